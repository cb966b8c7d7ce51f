"""A model as a folded tree: its figures against PEFT's own, its folding against the model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from torch import nn

from bmkit.deltas.view import Branch, to_json, view
from bmkit_cli.tree import render, summary

LORA = {"target_modules": ["q_proj", "v_proj"]}
DELTAS: dict[str, tuple[str, Any]] = {
    "lora": ("llama", lambda: peft.LoraConfig(**LORA)),
    "lora in one layer": ("llama", lambda: peft.LoraConfig(**LORA, layers_to_transform=[1])),
    "lora and a saved head": (
        "llama",
        lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    ),
    "lora and rows of a table": (
        "llama",
        lambda: peft.LoraConfig(**LORA, trainable_token_indices=[1, 2]),
    ),
    "lora on a table": ("gpt2", lambda: peft.LoraConfig(target_modules=["c_attn", "wte"])),
    "lora and biases": ("opt", lambda: peft.LoraConfig(**LORA, bias="all")),
    "ia3": ("t5", lambda: peft.IA3Config(task_type="SEQ_2_SEQ_LM")),
    "norms": (
        "bert_classifier",
        lambda: peft.LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["classifier"]),
    ),
    "prompt": (
        "llama",
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ),
    "experts": ("mixtral", lambda: peft.LoraConfig(target_modules=["o_proj"])),
}


def branches(root: Branch) -> Iterator[Branch]:
    for child in root.children:
        yield child
        yield from branches(child)


def named(root: Branch, name: str) -> Branch:
    return next(b for b in branches(root) if b.name == name)


@pytest.mark.parametrize("what", DELTAS)
def test_figures_are_those_that_peft_counts(what: str, architecture: Callable[..., Any]) -> None:
    family, config = DELTAS[what]
    model = architecture(family, real="prompt" in what)
    model = peft.get_peft_model(model, config())
    tree = view(model)
    trained, every = model.get_nb_trainable_parameters()
    assert (tree.trained, tree.parameters) == (trained, every)
    assert tree.delta_bytes == 4 * trained
    assert tree.root.type == type(model.get_base_model()).__name__
    assert tree.share == trained / every


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "deepseek_v3", "vit", "clip"])
def test_the_parts_of_every_branch_add_up_to_it(
    family: str, architecture: Callable[..., Any]
) -> None:
    model = architecture(family)
    root = view(model).root
    assert root.parameters == sum(p.numel() for p in model.parameters())
    for branch in (root, *branches(root)):
        if branch.children:
            for key in ("parameters", "trainable", "delta", "bytes"):
                inside = sum(c.count * getattr(c, key) for c in branch.children)
                assert inside == getattr(branch, key), (branch.name, key)


def test_layers_that_are_alike_are_one_line(architecture: Callable[..., Any]) -> None:
    model = architecture("qwen3", num_hidden_layers=30)
    plain = named(view(model).root, "layers.0-29")
    assert plain.count == 30
    assert plain.parameters == sum(p.numel() for p in model.model.layers[0].parameters())
    config = peft.LoraConfig(**LORA, layers_to_transform=[*range(20, 30)])
    tree = view(peft.get_peft_model(model, config))
    layers = [b for b in branches(tree.root) if b.name.startswith("layers.")]
    assert [(b.name, b.count, b.state) for b in layers] == [
        ("layers.0-19", 20, "frozen"),
        ("layers.20-29", 10, "delta"),
    ]
    assert layers[1].delta == 8 * (16 + 16) + 8 * (16 + 8)  # r (in + out) of q and of v
    assert [b.name for b in named(layers[1], "q_proj").children] == [
        "lora_A.default",
        "lora_B.default",
    ]


def test_layers_fold_where_others_lie_between(architecture: Callable[..., Any]) -> None:
    model = architecture("llama", num_hidden_layers=6)
    config = peft.LoraConfig(**LORA, layers_to_transform=[1, 4])
    tree = view(peft.get_peft_model(model, config))
    layers = [b.name for b in branches(tree.root) if b.name.startswith("layers.")]
    assert layers == ["layers.0,2-3,5", "layers.1,4"]
    dense_first = view(architecture("deepseek_v3")).root
    assert [b.name for b in branches(dense_first) if b.name.startswith("layers.")] == [
        *("layers.0", "layers.1"),
    ]


def test_what_of_the_base_is_unfrozen_is_told_from_a_delta(
    architecture: Callable[..., Any],
) -> None:
    model = architecture("llama").requires_grad_(False)
    base = {name for name, _ in model.named_parameters()}
    model.model.norm.weight.requires_grad_(True)
    for layer in model.model.layers:
        bias = torch.zeros(16, device="meta")
        layer.self_attn.o_proj.register_parameter("bias", nn.Parameter(bias))
    tree = view(model, base)
    norm, projection = named(tree.root, "norm"), named(tree.root, "o_proj")
    assert (norm.state, norm.trainable) == ("trainable", 16)
    assert [(b.name, b.state) for b in projection.children] == [
        *(("weight", "frozen"), ("bias", "delta")),
    ]
    assert (tree.root.trainable, tree.root.delta, tree.trained) == (16, 32, 48)
    assert tree.delta_bytes == 4 * 48
    assert view(model).root.trainable == 48  # without `base` they can't be told apart


def test_sizes_follow_the_dtype_and_shared_tables_count_once(
    architecture: Callable[..., Any],
) -> None:
    model = architecture("llama")
    full, half = view(model), view(model.to(torch.bfloat16))
    assert full.bytes == 2 * half.bytes == 4 * sum(p.numel() for p in model.parameters())
    head = named(full.root, "lm_head")
    assert (head.shared, head.parameters, head.shape) == (True, 0, (40, 16))


def test_branches_have_their_roles_under_peft(architecture: Callable[..., Any]) -> None:
    model = architecture("bert_classifier")
    before = {(b.name, b.type, b.roles) for b in branches(view(model).root) if b.roles}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "dense"]))
    after = {(b.name, b.type, b.roles) for b in branches(view(wrapped).root) if b.roles}
    assert before == after
    assert ("query", "Linear", ("attn.q",)) in after


def test_json_is_plain_and_says_what_the_tree_does(architecture: Callable[..., Any]) -> None:
    tree = view(peft.get_peft_model(architecture("llama"), peft.LoraConfig(**LORA)))
    values = json.loads(json.dumps(to_json(tree)))
    assert values == to_json(tree)
    assert (values["trained"], values["share"]) == (tree.trained, tree.share)
    model = values["root"]["children"][0]
    layers = next(c for c in model["children"] if c["name"] == "layers.0-1")
    assert (layers["count"], layers["state"], layers["type"]) == (2, "delta", "LlamaDecoderLayer")


def test_the_tree_reads_without_colours(architecture: Callable[..., Any]) -> None:
    model = architecture("llama", tie_word_embeddings=False)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA, layers_to_transform=[1]))
    model.get_base_model().model.norm.requires_grad_(True)
    tree = view(model)
    console = Console(no_color=True, width=120, record=True, file=io.StringIO())
    console.print(render(tree))
    lines = [line.strip(" │├└─") for line in console.export_text().splitlines()]
    assert lines[1] == summary(tree)
    assert f"{tree.trained:,} of {tree.parameters:,} parameters are trained" in lines[1]
    assert lines[2].startswith("+ delta")
    assert "· layers.0  LlamaDecoderLayer  1,952  7.6 KiB" in lines
    assert "+ layers.1  LlamaDecoderLayer  2,400, delta 448  9.4 KiB" in lines
    assert "+ q_proj  attn.q  Linear [16, 16]  512, delta 256  2.0 KiB" in lines
    assert "* norm  norm  LlamaRMSNorm [16]  16  64 B" in lines
