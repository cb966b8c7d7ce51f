"""The modules of a model, told from the headers of its checkpoint alone.

A checkpoint may name things otherwise than the model does: without the name of its body, experts
one by one, a tied head not at all. The names given here are those of the model once transformers
has loaded it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from bmkit.deltas.modules import ROUTERS, TOKENS, Module, with_blocks
from bmkit.plan import Headers

BODIES: Mapping[str, str] = {
    **dict.fromkeys(("bloom", "falcon", "gpt2", "gptj", "gpt_bigcode", "gpt_neo"), "transformer"),
    **dict.fromkeys(("codegen", "ctrl", "mpt", "xlnet"), "transformer"),
    **dict.fromkeys(("camembert", "roberta", "xlm-roberta", "xmod"), "roberta"),
    **dict.fromkeys(("bert", "megatron-bert"), "bert"),
    **dict.fromkeys(("deberta", "deberta-v2"), "deberta"),
    **dict.fromkeys(("clip", "longt5", "mt5", "switch_transformers", "t5", "umt5"), ""),
    **{n: n for n in ("albert", "distilbert", "electra", "ernie", "esm", "gpt_neox", "mobilebert")},
    **{n: n for n in ("mpnet", "nomic_bert", "rembert", "roformer", "vit")},
}
"""What a model with a head calls its body, by model type; `model` if the type isn't here."""
_MIXTRAL = ((r"\.block_sparse_moe\.", ".mlp."),)
RENAMED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    "phimoe": (*_MIXTRAL, (r"\.mlp\.gate\.", ".mlp.router.")),
    "nomic_bert": (
        (r"\bencoder\.layers\.", "layers."),
        (r"\bemb_ln\.", "embeddings.LayerNorm."),
        (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
        (r"\.attn\.Wqkv\.", *(f".self_attn.{part}_proj." for part in "qkv")),
        (r"\.fc11\.", ".up_proj."),
        (r"\.fc12\.", ".gate_proj."),
        (r"\.fc2\.", ".down_proj."),
        (r"\.norm1\.", ".post_attention_layernorm."),
        (r"\.norm2\.", ".post_mlp_layernorm."),
    ),
    "vit": (
        (r"\bencoder\.layer\.", "layers."),
        (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    ),
}
"""What transformers renames while it loads, by model type: patterns, and what comes for them.

Where several names come for one, its matrix is split in equal parts."""
COMPUTED = ("m2m_100", "marian", "nllb-moe", "pegasus", "pegasus_x", "xglm")
"""Model types whose positions are computed, and not learned."""
_WEIGHT = re.compile(r"\.(?:weight|weight_packed|weight_kept|qweight|gamma)$")
_PART_OF_ONE = re.compile(
    r"\.(?:weight_(?:scale|shape|zero_point|places|g_idx)|qzeros|scales|g_idx)$"
)
_BUFFER = re.compile(r"(?:inv_freq|masked_bias|position_ids|token_type_ids|embed_scale)$")
_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\..*$")
_TABLE = re.compile(
    r"(?:wte|wpe|shared|embed_in|embed_tokens\w*|embed_positions|relative_attention_bias"
    r"|\w*embeddings?)$"
)
_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|proj_out|generator_lm_head|vocab_projector|lm_loss"
    r"|(?:predictions|lm_head)\.decoder)$|^decoder$"
)
_OUTSIDE = re.compile(
    r"(?:lm_head|embed_out|proj_out|generator_\w+|discriminator_\w+|vocab_\w+|lm_loss|cls"
    r"|predictions|sop_classifier|pre_classifier|classifier|classification_head|score|qa_outputs"
    r"|final_logits_bias|head)\.|decoder\.(?:weight|bias)$"
)
_BODY = re.compile(r"(?:layers|h|blocks|encoder|decoder|embed_tokens|embeddings|transformer)\.")
_SPEAKS = re.compile(
    r"For(?:CausalLM|ConditionalGeneration|MaskedLM|PreTraining)$|LMHeadModel$|MTModel$"
)
_POOLED = re.compile(r"For(?:MaskedLM|CausalLM|TokenClassification|QuestionAnswering)$")


def modules_of_headers(headers: Headers, architecture: str | None = None) -> dict[str, Module]:
    """Return the modules that the checkpoint's model has, by its names, as `modules_of_model` does.

    `architecture` is the class that it is loaded into; the first of `config.json` if not given.
    """
    shapes = shapes_of_headers(headers, architecture)
    kind, wanted = headers.config.get("model_type", ""), _architecture(headers, architecture)
    found = _leaves(shapes)
    for name, module in _shared(found).items():
        found.setdefault(name, module)
    if _SPEAKS.search(wanted) and not any(m.head for m in found.values()):
        found |= _tied_head(found, shapes, kind)
    return with_blocks(found)


def shapes_of_headers(
    headers: Headers, architecture: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the dense shapes of the tensors that are stored, by the model's names of them."""
    kind, first = headers.config.get("model_type", ""), _architecture(headers, None)
    wanted = _architecture(headers, architecture)
    return {
        name: shape
        for name, shape in _placed(_renamed(headers, kind), kind, wanted, first)
        if not (kind in COMPUTED and name.endswith("embed_positions.weight"))
    }


def _architecture(headers: Headers, given: str | None) -> str:
    return (headers.config.get("architectures") or [""])[0] if given is None else given


def _renamed(headers: Headers, kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the tensors that the model has, dense."""
    for tensor in headers.tensors:
        name, shape = tensor.name, tensor.shape
        if _PART_OF_ONE.search(name) or _BUFFER.search(name):
            continue
        if name.endswith(("_packed", "_kept")):
            shape = (shape[0], headers.numel(tensor) // shape[0])
        elif name.endswith(".qweight"):
            shape = (shape[1], headers.numel(tensor) // shape[1])
        names = [re.sub(r"\.beta$", ".bias", _WEIGHT.sub(".weight", name))]
        for pattern, *new in RENAMED.get(kind, ()):
            names = [
                re.sub(pattern, to, n)
                for n in names
                for to in (new if re.search(pattern, n) else new[:1])
            ]
        for name in names:
            yield name, (shape[0] // len(names), *shape[1:]) if len(names) > 1 else shape


def _placed(
    tensors: Iterator[tuple[str, tuple[int, ...]]], kind: str, wanted: str, stored: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield tensors with or without the name of the body before theirs, as class `wanted` has it.

    A head of another class is left out, and a pooler that `wanted` hasn't.
    """
    found = dict(tensors)
    body = BODIES.get(kind, "model")
    start = f"{body}." if body else ""
    bare = wanted.endswith("Model") and not _SPEAKS.search(wanted)
    has_body = any(name.startswith(start) for name in found)
    lacks = not bare and not has_body and any(_BODY.match(name) for name in found)
    for name, shape in found.items():
        outside = _OUTSIDE.match(name) is not None
        if outside and wanted != stored and (bare or wanted):
            continue
        inner = name.removeprefix(start) if bare else name
        if lacks and not outside:
            inner = start + inner
        if ".pooler." in f".{inner}" and _POOLED.search(wanted):
            continue
        yield inner, shape


def _leaves(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Module]:
    """Return the modules that own tensors; whatever has no weight of its own is a block."""
    found: dict[str, Module] = {}
    for name, shape in shapes.items():
        owner, _, attribute = name.rpartition(".")
        if expert := _EXPERT.match(name):
            found[expert[1]] = Module("block")
        elif owner and attribute == "weight":
            found[owner] = _module(owner, shape, shapes)
        elif owner and attribute != "bias":
            found.setdefault(owner, Module("block"))
    return found


def _module(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> Module:
    outer, _, leaf = name.rpartition(".")
    if len(shape) == 1:
        return Module("norm", shape)
    if len(shape) != 2:
        return Module("conv", shape)
    if leaf in ROUTERS and any(n.startswith(f"{outer}.experts.") for n in shapes):
        return Module("router", shape)
    if _TABLE.match(leaf):
        return Module("embedding", shape)
    return Module("linear", shape, head=_HEAD.search(name) is not None)


def _shared(found: Mapping[str, Module]) -> dict[str, Module]:
    """Return the tables of an encoder-decoder that are one: all of them are modules."""
    tables: dict[str, Module] = {}
    for name, module in found.items():
        match = re.match(r"^(.*\.)?(?:shared|encoder\.embed_tokens)$", name)
        if match and module.kind == "embedding":
            start = match[1] or ""
            halves = [h for h in ("encoder", "decoder") if _holds(found, f"{start}{h}.")]
            names = [f"{start}shared", *(f"{start}{h}.embed_tokens" for h in halves)]
            tables |= dict.fromkeys(names, module)
    return tables


def _holds(found: Mapping[str, Module], start: str) -> bool:
    return any(name.startswith(start) for name in found)


def _tied_head(
    found: Mapping[str, Module], shapes: Mapping[str, tuple[int, ...]], kind: str
) -> dict[str, Module]:
    """Return the head that makes logits with the table of tokens: at most its bias is stored."""
    tables = {n: m.shape for n, m in found.items() if m.kind == "embedding"}
    tokens = [s for n, s in tables.items() if n.rpartition(".")[2] in TOKENS]
    shape = next(iter(tokens or tables.values()), ())
    name = "proj_out" if kind == "whisper" else "lm_head"
    for tensor, size in shapes.items():
        owner, _, attribute = tensor.rpartition(".")
        if attribute == "bias" and owner not in found and size == shape[:1]:
            name = f"{owner}.decoder" if _holds(found, f"{owner}.") else owner
    return {name: Module("linear", shape, head=True)}
