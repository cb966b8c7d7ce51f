"""What a module is for, whatever a model calls it: `attn.q`, `mlp.down`, `norm`, …

Told by the last word of its name, by the words before it where that word is used for several
things (`dense`, `c_proj`, `out_proj`), and by what kind of module it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from bmkit.deltas.modules import TOKENS, Module, layer_of, plain, stack_of

ROLES = (
    *("attn", "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o"),
    *("cross", "cross.q", "cross.k", "cross.v", "cross.o"),
    *("mlp", "mlp.gate", "mlp.up", "mlp.gate_up", "mlp.down"),
    *("router", "experts", "norm", "embed", "head"),
)
"""Every role that there is; a model has some of them."""

SELF = (
    *("self_attn", "self_attention", "SelfAttention", "attn", "attention"),
    *("rel_attn", "LocalSelfAttention", "TransientGlobalSelfAttention"),
)
CROSS = ("encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention")
FEED_FORWARD = (
    *("mlp", "ffn", "ff", "feed_forward", "feedforward", "DenseReluDense"),
    *("block_sparse_moe", "moe"),
)
EXPERTS = ("experts", "expert", "shared_expert", "shared_experts", "shared_mlp")
_CONTEXT = {
    **dict.fromkeys(SELF, "attn"),
    **dict.fromkeys(CROSS, "cross"),
    **dict.fromkeys((*FEED_FORWARD, *EXPERTS), "mlp"),
}
_OWN_PROJECTIONS = {  # these words are used in attention only
    **dict.fromkeys(("q_proj", "query_proj", "q_lin", "q_a_proj", "q_b_proj", "wq"), ("q",)),
    **dict.fromkeys(("k_proj", "key_proj", "k_lin", "wk"), ("k",)),
    **dict.fromkeys(("v_proj", "value_proj", "v_lin", "wv"), ("v",)),
    **dict.fromkeys(("kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"), ("k", "v")),
    **dict.fromkeys(("qkv_proj", "query_key_value", "Wqkv", "W_pack", "qkv"), ("qkv",)),
}
_PROJECTIONS = {
    **_OWN_PROJECTIONS,
    **dict.fromkeys(("query", "q", "q_attn"), ("q",)),
    **dict.fromkeys(("key", "k"), ("k",)),
    **dict.fromkeys(("value", "v"), ("v",)),
    **dict.fromkeys(("kv",), ("k", "v")),
    **dict.fromkeys(("c_attn", "in_proj"), ("qkv",)),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "dense", "c_proj", "wo", "Wo", "o"), ("o",)),
    **dict.fromkeys(("proj", "to_out", "output", "wo_proj"), ("o",)),
}
_NEURONS = {
    **dict.fromkeys(("gate_proj", "wi_0"), "mlp.gate"),
    **dict.fromkeys(("up_proj", "wi", "wi_1", "fc1", "c_fc", "fc_in", "dense_h_to_4h"), "mlp.up"),
    **dict.fromkeys(("lin1", "linear1", "layer_1", "w3", "key"), "mlp.up"),
    **dict.fromkeys(("gate_up_proj", "gate_and_up_proj", "Wi"), "mlp.gate_up"),
    **dict.fromkeys(("down_proj", "wo", "Wo", "fc2", "c_proj", "fc_out"), "mlp.down"),
    **dict.fromkeys(("dense_4h_to_h", "lin2", "linear2", "layer_2", "w2", "value"), "mlp.down"),
}
_IN_BLOCK = {  # directly in a block, as there is no module for the whole feed-forward
    **dict.fromkeys(("fc1", "linear1", "lin1", "ffn", "intermediate.dense"), "mlp.up"),
    **dict.fromkeys(("fc2", "linear2", "lin2", "ffn_output", "output.dense"), "mlp.down"),
}
_HEADS = (
    *("lm_head", "embed_out", "proj_out", "generator_lm_head", "vocab_projector", "lm_loss"),
    *("decoder", "score", "classifier", "qa_outputs"),
)
_HEAD_BLOCKS = ("classifier", "classification_head")
_ASIDE = ("bottleneck", "pooler")
"""Parts of a block or model whose linear layers have no role, though their names seem to say so."""


def roles_of(modules: Mapping[str, Module]) -> dict[str, tuple[str, ...]]:
    """Return the roles of the modules that have any, by name, in the order of `modules`.

    Most have one; a matrix that makes keys and values has `attn.k` and `attn.v`, and one that
    makes queries as well has `attn.qkv`. In cross-attention a matrix of keys and values counts as
    both. PEFT's wrappers, and any module around the model, make no difference.
    """
    bare = {plain(name): module for name, module in modules.items()}
    unnamed = _unnamed_attention(bare)
    stacks = {stack for name in bare if (stack := stack_of(name)) is not None}
    found = {}
    for name, module in modules.items():
        around = any(f"{stack}.".startswith(f"{plain(name)}.") for stack in stacks)
        roles = () if around else _roles(plain(name), module, bare, unnamed)
        if roles:
            found[name] = roles
    return found


def roles_there(modules: Mapping[str, Module]) -> list[str]:
    """Return the roles that some module has, in the order of ROLES."""
    there = {role for roles in roles_of(modules).values() for role in roles}
    return [role for role in ROLES if role in there]


def _roles(
    name: str, module: Module, bare: Mapping[str, Module], unnamed: Collection[str]
) -> tuple[str, ...]:
    outer, _, leaf = name.rpartition(".")
    if module.kind == "norm":
        return ("norm",)
    if module.kind == "router":
        return ("router",)
    if module.kind == "embedding":
        looked_up = leaf in TOKENS and not (leaf == "shared" and _tables(outer, bare))
        return ("embed",) if looked_up else ()
    if module.kind == "block":
        return _of_block(name, unnamed)
    if module.kind != "linear":
        return ()
    if _is_head(name, module):
        return ("head",)
    return _of_linear(name, bare, unnamed)


def _of_block(name: str, unnamed: Collection[str]) -> tuple[str, ...]:
    outer, _, leaf = name.rpartition(".")
    if leaf == "experts" or (leaf.isdigit() and outer.endswith(".experts")):
        return ("experts",)
    if set(name.split(".")) & set(_ASIDE) or _context(outer, unnamed):
        return ()
    if leaf in CROSS:
        return ("cross",)
    if leaf in SELF or name in unnamed:
        return ("attn",)
    return ("mlp",) if leaf in FEED_FORWARD else ()


def _of_linear(name: str, bare: Mapping[str, Module], unnamed: Collection[str]) -> tuple[str, ...]:
    outer, _, leaf = name.rpartition(".")
    if set(name.split(".")) & set(_ASIDE):
        return ()
    if outer.endswith(".router") or (leaf in ("gate", "router") and f"{outer}.experts" in bare):
        return ("router",)
    side = _context(outer, unnamed)
    if side == "mlp":
        if leaf == "w1":
            return ("mlp.gate",) if f"{outer}.w3" in bare else ("mlp.up",)
        return _one(_NEURONS.get(leaf) or _directly(name))
    if side is None:
        return _one(_directly(name))
    parts = _PROJECTIONS.get(leaf, ())
    if side == "cross" and parts == ("qkv",):
        parts = ("k", "v")  # queries are of the other text
    return tuple(f"{side}.{part}" for part in parts)


def _directly(name: str) -> str | None:
    """Return the role of a linear layer that is in a numbered block with nothing between."""
    parts = name.split(".")
    for count in (1, 2):
        if len(parts) > count and parts[-count - 1].isdigit():
            return _IN_BLOCK.get(".".join(parts[-count:]))
    return None


def _one(role: str | None) -> tuple[str, ...]:
    return () if role is None else (role,)


def _context(outer: str, unnamed: Collection[str]) -> str | None:
    """Return what the innermost named block around a module is: `attn`, `cross`, `mlp` or None.

    What is around its stack of layers doesn't count.
    """
    stack = stack_of(outer)
    while outer and outer != stack:
        leaf = outer.rpartition(".")[2]
        if leaf in _CONTEXT:
            return _CONTEXT[leaf]
        if outer in unnamed:
            return "attn"
        outer = outer.rpartition(".")[0]
    return None


def _unnamed_attention(bare: Mapping[str, Module]) -> set[str]:
    """Return blocks that hold projections to queries under another name than attention has."""
    return {
        outer
        for outer, _, leaf in (n.rpartition(".") for n, m in bare.items() if m.kind == "linear")
        if _OWN_PROJECTIONS.get(leaf) in (("q",), ("qkv",))
        and outer
        and layer_of(outer) is not None
        and not outer.rpartition(".")[2].isdigit()
        and _context(outer, ()) is None
    }


def _is_head(name: str, module: Module) -> bool:
    parts = name.split(".")
    if module.head or parts[-1] in _HEADS:
        return "router" not in parts
    return layer_of(name) is None and any(part in _HEAD_BLOCKS for part in parts[:-1])


def _tables(outer: str, bare: Mapping[str, Module]) -> bool:
    """Tell whether the halves of an encoder-decoder have tables of their own."""
    start = f"{outer}." if outer else ""
    return any(f"{start}{half}.embed_tokens" in bare for half in ("encoder", "decoder"))
