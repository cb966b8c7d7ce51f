"""What every module of every family is for, against tables that were written by reading models."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from bmkit.deltas.modules import Module, modules_of_model
from bmkit.deltas.roles import ROLES, roles_of, roles_there

Expected = dict[str, str]


def at(place: str, text: str) -> Expected:
    """Read `name=role` words of modules inside of `place`; `=role` is of `place` itself."""
    pairs = (word.split("=") for word in text.split())
    return {".".join(filter(None, (place, name))): role for name, role in pairs}


def layers(stack: str, *parts: Expected) -> Expected:
    return {f"{stack}.*.{name}": role for part in parts for name, role in part.items()}


QKV = "=attn q_proj=attn.q k_proj=attn.k v_proj=attn.v"
GLU = "=mlp gate_proj=mlp.gate up_proj=mlp.up down_proj=mlp.down"
LLAMA_ATTENTION = at("self_attn", f"{QKV} o_proj=attn.o")
LLAMA_OUTSIDE = at("", "model.embed_tokens=embed lm_head=head")
LLAMA = layers("model.layers", LLAMA_ATTENTION, at("mlp", GLU)) | LLAMA_OUTSIDE
NEOX_ATTENTION = "=attn query_key_value=attn.qkv dense=attn.o"
NEOX_MLP = at("mlp", "=mlp dense_h_to_4h=mlp.up dense_4h_to_h=mlp.down")
BLOOM = layers("transformer.h", at("self_attention", NEOX_ATTENTION), NEOX_MLP)
BLOOM |= at("", "transformer.word_embeddings=embed lm_head=head")
MOE = at("mlp", "=mlp gate=router experts=experts")
SHARED = "gate_proj=mlp.gate up_proj=mlp.up down_proj=mlp.down"
DEEPSEEK = LLAMA_OUTSIDE | layers(
    "model.layers",
    at("self_attn", "=attn q_a_proj=attn.q q_b_proj=attn.q o_proj=attn.o"),
    at("self_attn", "kv_a_proj_with_mqa=attn.k,attn.v kv_b_proj=attn.k,attn.v"),
    MOE,
    at("mlp", SHARED),  # the first layer is dense
    at("mlp.shared_experts", SHARED),
)
GPT2_OUTSIDE = at("", "transformer.wte=embed lm_head=head")
GPT2_MLP = at("mlp", "=mlp c_fc=mlp.up c_proj=mlp.down")
BERT_MLP = at("", "intermediate.dense=mlp.up output.dense=mlp.down")
BERT_BLOCK = BERT_MLP | at(
    "attention",
    "=attn self.query=attn.q self.key=attn.k self.value=attn.v output.dense=attn.o",
)
BART_MLP = at("", "fc1=mlp.up fc2=mlp.down")
BART_SELF = at("self_attn", f"{QKV} out_proj=attn.o")
BART_CROSS = at(
    "encoder_attn", "=cross q_proj=cross.q k_proj=cross.k v_proj=cross.v out_proj=cross.o"
)
BART_BODY = layers("model.encoder.layers", BART_SELF, BART_MLP) | layers(
    "model.decoder.layers", BART_SELF, BART_CROSS, BART_MLP
)
BART = BART_BODY | at(
    "", "model.encoder.embed_tokens=embed model.decoder.embed_tokens=embed lm_head=head"
)
T5_SELF = at("layer.0.SelfAttention", "=attn q=attn.q k=attn.k v=attn.v o=attn.o")
T5_CROSS = at("layer.1.EncDecAttention", "=cross q=cross.q k=cross.k v=cross.v o=cross.o")
T5_TABLES = at("", "encoder.embed_tokens=embed decoder.embed_tokens=embed lm_head=head")


def t5(mlp: str) -> Expected:
    return (
        T5_TABLES
        | layers("encoder.block", T5_SELF, at("layer.1.DenseReluDense", mlp))
        | layers("decoder.block", T5_SELF, T5_CROSS, at("layer.2.DenseReluDense", mlp))
    )


CLIP_BLOCK = (BART_SELF, at("mlp", "=mlp fc1=mlp.up fc2=mlp.down"))
WORDS = "embeddings.word_embeddings=embed"
EXPECTED: dict[str, Expected] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"), LLAMA),
    "phi": LLAMA_OUTSIDE
    | layers(
        "model.layers",
        at("self_attn", f"{QKV} dense=attn.o"),
        at("mlp", "=mlp fc1=mlp.up fc2=mlp.down"),
    ),
    "phi3": LLAMA_OUTSIDE
    | layers(
        "model.layers",
        at("self_attn", "=attn qkv_proj=attn.qkv o_proj=attn.o"),
        at("mlp", "=mlp gate_up_proj=mlp.gate_up down_proj=mlp.down"),
    ),
    "gpt2": GPT2_OUTSIDE
    | layers("transformer.h", at("attn", "=attn c_attn=attn.qkv c_proj=attn.o"), GPT2_MLP),
    "gpt_neo": GPT2_OUTSIDE
    | layers(
        "transformer.h",
        at("attn", "=attn"),
        at("attn.attention", f"{QKV} out_proj=attn.o".removeprefix("=attn ")),
        GPT2_MLP,
    ),
    "gpt_neox": at("", "gpt_neox.embed_in=embed lm_head=head")
    | layers("gpt_neox.layers", at("attention", NEOX_ATTENTION), NEOX_MLP),
    "gptj": GPT2_OUTSIDE
    | layers(
        "transformer.h",
        at("attn", f"{QKV} out_proj=attn.o"),
        at("mlp", "=mlp fc_in=mlp.up fc_out=mlp.down"),
    ),
    **dict.fromkeys(("bloom", "falcon"), BLOOM),
    "opt": layers("model.decoder.layers", BART_SELF, BART_MLP)
    | at("", "model.decoder.embed_tokens=embed lm_head=head"),
    "mpt": GPT2_OUTSIDE
    | layers(
        "transformer.blocks",
        at("attn", "=attn Wqkv=attn.qkv out_proj=attn.o"),
        at("ffn", "=mlp up_proj=mlp.up down_proj=mlp.down"),
    ),
    "mixtral": LLAMA_OUTSIDE | layers("model.layers", LLAMA_ATTENTION, MOE),
    "gpt_oss": LLAMA_OUTSIDE
    | layers("model.layers", LLAMA_ATTENTION, at("mlp", "=mlp router=router experts=experts")),
    "qwen2_moe": LLAMA_OUTSIDE
    | layers(
        "model.layers",
        LLAMA_ATTENTION,
        MOE,
        at("mlp.shared_expert", SHARED),
        at("mlp", "shared_expert_gate=-"),
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), DEEPSEEK),
    "bert": layers("bert.encoder.layer", BERT_BLOCK)
    | at("bert", WORDS)
    | at("cls.predictions", "transform.dense=- decoder=head"),
    "bert_classifier": layers("bert.encoder.layer", BERT_BLOCK)
    | at("bert", f"{WORDS} pooler.dense=-")
    | at("", "classifier=head"),
    "roberta": layers("roberta.encoder.layer", BERT_BLOCK)
    | at("roberta", WORDS)
    | at("lm_head", "dense=- decoder=head"),
    "roberta_classifier": layers("roberta.encoder.layer", BERT_BLOCK)
    | at("roberta", WORDS)
    | at("classifier", "dense=head out_proj=head"),
    "electra": layers("electra.encoder.layer", BERT_BLOCK)
    | at("electra", f"{WORDS} embeddings_project=-")
    | at("", "generator_predictions.dense=- generator_lm_head=head"),
    "albert": layers(
        "albert.encoder.albert_layer_groups",
        at(
            "albert_layers.0.attention",
            "=attn query=attn.q key=attn.k value=attn.v dense=attn.o",
        ),
        at("albert_layers.0", "ffn=mlp.up ffn_output=mlp.down"),
    )
    | at("albert", f"{WORDS} encoder.embedding_hidden_mapping_in=-")
    | at("predictions", "dense=- decoder=head"),
    "distilbert": layers(
        "distilbert.transformer.layer",
        at("attention", "=attn q_lin=attn.q k_lin=attn.k v_lin=attn.v out_lin=attn.o"),
        at("ffn", "=mlp lin1=mlp.up lin2=mlp.down"),
    )
    | at("distilbert", WORDS)
    | at("", "vocab_transform=- vocab_projector=head"),
    "deberta_v2": layers(
        "deberta.encoder.layer",
        at("attention", "=attn self.query_proj=attn.q self.key_proj=attn.k"),
        at("attention", "self.value_proj=attn.v output.dense=attn.o"),
        at("attention.self", "pos_query_proj=- pos_key_proj=-"),
        BERT_MLP,
    )
    | at("deberta", WORDS)
    | at("cls.predictions", "transform.dense=- decoder=head"),
    "modernbert": layers(
        "model.layers",
        at("attn", "=attn Wqkv=attn.qkv Wo=attn.o"),
        at("mlp", "=mlp Wi=mlp.gate_up Wo=mlp.down"),
    )
    | at("", "model.embeddings.tok_embeddings=embed head.dense=- decoder=head"),
    "mpnet": layers(
        "mpnet.encoder.layer",
        at("attention", "=attn attn.q=attn.q attn.k=attn.k attn.v=attn.v attn.o=attn.o"),
        BERT_MLP,
    )
    | at("mpnet", WORDS)
    | at("lm_head", "dense=- decoder=head"),
    "nomic_bert": layers("layers", LLAMA_ATTENTION, at("mlp", GLU)) | at("", WORDS),
    "t5": t5("=mlp wi=mlp.up wo=mlp.down"),
    "t5_gated": t5("=mlp wi_0=mlp.gate wi_1=mlp.up wo=mlp.down"),
    **dict.fromkeys(("bart", "m2m_100", "marian"), BART),
    "whisper": BART_BODY | at("", "model.decoder.embed_tokens=embed proj_out=head"),
    "vit": layers(
        "vit.layers",
        at("attention", f"{QKV} o_proj=attn.o"),
        at("mlp", "=mlp fc1=mlp.up fc2=mlp.down"),
    )
    | at("", "classifier=head"),
    "clip": layers("text_model.encoder.layers", *CLIP_BLOCK)
    | layers("vision_model.encoder.layers", *CLIP_BLOCK)
    | at("", "text_model.embeddings.token_embedding=embed")
    | at("", "visual_projection=- text_projection=-"),
}


def said(model: nn.Module) -> Expected:
    """Return the roles of every module but the norms, and `-` for a linear layer that has none."""
    modules = modules_of_model(model)
    roles = roles_of(modules)
    found = {}
    for name, module in modules.items():
        if module.kind != "norm" and (name in roles or module.kind == "linear"):
            place = re.sub(r"(?<![\w])\d+(?!\w)", "*", name, count=1)
            found[place] = ",".join(roles.get(name, ("-",)))
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_every_linear_layer_block_and_table_has_the_role_that_it_plays(
    name: str, architecture: Callable[..., Any]
) -> None:
    assert said(architecture(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_norms_are_the_modules_that_transformers_calls_so(
    name: str, architecture: Callable[..., Any]
) -> None:
    model = architecture(name)
    roles = roles_of(modules_of_model(model))
    norms = {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    assert {n for n, r in roles.items() if r == ("norm",)} == norms
    assert norms


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral", "opt"])
def test_peft_and_outer_modules_change_no_role(name: str, architecture: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = architecture(name)
    before = roles_of(modules_of_model(model))
    linears = [n for n, r in before.items() if {"attn.q", "attn.qkv", "mlp.down"} & set(r)]

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.moe = inner  # a name that means something inside of a layer

    outer = roles_of(modules_of_model(Outer(model)))
    assert {n.removeprefix("moe."): r for n, r in outer.items()} == before
    wrapped = get_peft_model(model, LoraConfig(target_modules=linears or ["q_proj"]))
    inside = roles_of(modules_of_model(wrapped))
    assert {n.removeprefix("base_model.model."): r for n, r in inside.items()} == before


def test_linear_layers_of_experts_that_are_modules_count_as_feed_forward() -> None:
    names = [f"model.layers.0.mlp.experts.{i}.w{j}" for i in range(2) for j in (1, 2, 3)]
    modules = {n: Module("linear", (4, 4)) for n in names}
    modules |= {f"model.layers.0.mlp.experts.{i}": Module("block") for i in range(2)}
    found = roles_of(modules)
    assert [found[n] for n in names[:3]] == [("mlp.gate",), ("mlp.down",), ("mlp.up",)]
    assert found["model.layers.0.mlp.experts.1"] == ("experts",)


def test_attention_under_a_name_that_is_not_known_is_found_by_its_projections() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.out_proj = (nn.Linear(4, 4) for _ in range(3))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = Mixing()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

    roles = roles_of(modules_of_model(Model()))
    assert roles["layers.1.mixing"] == ("attn",)
    assert roles["layers.1.mixing.q_proj"] == ("attn.q",)
    assert roles["layers.1.mixing.out_proj"] == ("attn.o",)


def test_words_of_attention_mean_nothing_outside_of_it() -> None:
    names = ["bridge.query", "layers.0.side.dense", "layers.0.side.c_proj", "fc1", "pooler.dense"]
    assert roles_of({n: Module("linear", (4, 4)) for n in names}) == {}


def test_roles_there_are_in_the_order_of_the_table(architecture: Callable[..., Any]) -> None:
    there = roles_there(modules_of_model(architecture("t5_gated")))
    assert there == [r for r in ROLES if r not in ("attn.qkv", "mlp.gate_up", "router", "experts")]
