"""Going through a model block by block: what comes in and out is what the whole model has there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    M2M100Config,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
    XLNetConfig,
)

from bmkit.compress import layerwise, perplexity
from bmkit.compress.calibrate import Blocks, held_out, pack_rows
from bmkit.compress.options.rounding import Gptq
from bmkit.compress.options.sparse import SparseGpt
from bmkit.errors import InputError
from bmkit.nn.rounding import Grid
from bmkit.report import Silent
from bmkit.runtime import experts
from bmkit.runtime.voice import Voice

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "vocab_size": 300,
    "num_attention_heads": 2,
}
PLAIN = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
DECODERS: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2-windows": Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=8),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "falcon": FalconConfig(**SMALL),
    "opt": OPTConfig(**PLAIN, ffn_dim=48, word_embed_proj_dim=32),
    "deepseek-v3": DeepseekV3Config(
        **SMALL,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "qwen2-moe": Qwen2MoeConfig(
        **GROUPED,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    ),
}
ENCODERS: dict[str, Any] = {
    "bert": BertConfig(**SMALL),
    "roberta": RobertaConfig(**SMALL, pad_token_id=1),
}
T5_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
HALVES: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
}
SEQ2SEQ: dict[str, Any] = {
    "t5": T5Config(**T5_SIZES),
    "t5-gated-untied": T5Config(
        **T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=2
    ),
    "t5-of-one-block": T5Config(**{**T5_SIZES, "num_layers": 1, "num_decoder_layers": 2}),
    "bart": BartConfig(**HALVES),
    "m2m100": M2M100Config(**HALVES),
}


def saved(config: Any, path: Path) -> Any:
    """Write a random model to `path`, and return it."""
    torch.manual_seed(0)
    kind: Any = AutoModelForMaskedLM if config.model_type in ENCODERS else AutoModelForCausalLM
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else kind
    model = kind.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
        for name, buffer in model.named_buffers():  # stored ones, as biases of routers
            if name in model.state_dict():
                buffer.normal_()
    model.save_pretrained(path)
    return model


def rows_of(count: int = 9, length: int = 20) -> Tensor:
    return torch.randint(3, 290, (count, length), generator=torch.Generator().manual_seed(1))


def given(config: Any, row: Tensor) -> dict[str, Tensor]:
    """Return what a model is called with for a row: halves of it for an encoder-decoder."""
    if not config.is_encoder_decoder:
        return {"input_ids": row[None]}
    half = len(row) // 2
    begin = torch.tensor([config.decoder_start_token_id])
    return {
        "input_ids": row[None, :half],
        "decoder_input_ids": torch.cat((begin, row[half:-1]))[None],
    }


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *SEQ2SEQ])
@torch.no_grad()
def test_blocks_give_what_the_model_gives_and_see_what_it_sees(name: str, tmp_path: Path) -> None:
    model = saved((DECODERS | ENCODERS | SEQ2SEQ)[name], tmp_path)
    rows = rows_of()
    blocks = Blocks(tmp_path, rows, device=CPU, both=True)
    inputs: dict[str, list[Tensor]] = {}
    last: list[Tensor] = []

    def note(name: str) -> Any:
        return lambda _, args: inputs.setdefault(name, []).append(
            args[0].reshape(-1, args[0].shape[-1])
        )

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        last.append(out[0] if isinstance(out, tuple) else out)

    for whole, its in model.named_modules():
        module = whole.removeprefix(f"{model.base_model_prefix}." if name in ENCODERS else "")
        if isinstance(its, nn.Linear):
            its.register_forward_pre_hook(note(module))
        elif module == blocks.places[-1]:
            its.register_forward_hook(keep)
    for row in rows:
        model(**given(model.config, row))
    checked = 0
    for block in blocks.visit():
        for linear, seen in blocks.observe(block, list(block.linears)).items():
            x = inputs[linear]
            fitted = torch.cat([p for i, p in enumerate(x) if i not in held_out(9)])
            apart = torch.cat([p for i, p in enumerate(x) if i in held_out(9)])
            for found, wanted in ((seen.hessian, fitted), (seen.held_out, apart)):
                gram = wanted.T @ wanted / len(wanted)
                assert torch.allclose(found, gram, rtol=1e-3, atol=1e-4 * float(gram.abs().max()))
            assert seen.tokens == len(fitted)
            energy = blocks.observe(block, [linear], whole=False)[linear]
            diagonal = seen.hessian.diagonal()
            assert torch.allclose(energy.hessian, diagonal, rtol=1e-3, atol=1e-4)
            assert torch.allclose(energy.held_out, seen.held_out, rtol=1e-3, atol=1e-3)
            checked += 1
    assert checked == sum(n.startswith(tuple(f"{p}." for p in blocks.places)) for n in inputs)
    assert torch.allclose(blocks.hidden, torch.cat(last), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*SEQ2SEQ, "gemma3"])
@torch.no_grad()
def test_blocks_see_what_compressed_ones_make_of_it(name: str, tmp_path: Path) -> None:
    model = saved((DECODERS | SEQ2SEQ)[name], tmp_path)
    rows = rows_of()
    blocks = Blocks(tmp_path, rows, device=CPU, both=True)
    for block in blocks.visit():
        for linear, module in block.linears.items():
            module.weight.data *= 0.8
            model.get_submodule(linear).weight.data *= 0.8
    last: list[Tensor] = []
    model.get_submodule(blocks.places[-1]).register_forward_hook(
        lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    for row in rows:
        model(**given(model.config, row))
    assert torch.allclose(blocks.hidden, torch.cat(last), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_blocks_that_are_skipped_hand_on_what_they_were_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**{**T5_SIZES, "num_layers": 5})).eval()
    model.save_pretrained(tmp_path)
    rows = rows_of()
    blocks = Blocks(tmp_path, rows, device=CPU)
    for block in blocks.visit(skip={2, 3}):
        blocks.observe(block, list(block.linears))
    for i in (3, 2):
        del model.encoder.block[i]
    last: list[Tensor] = []
    model.encoder.block[-1].register_forward_hook(lambda _, __, out: last.append(out[0]))
    model(input_ids=rows)
    assert torch.allclose(blocks.hidden, last[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_blocks_compute_by_the_experts_that_are_stored(tmp_path: Path) -> None:
    model = saved(DECODERS["llama"], tmp_path)
    generator = torch.Generator().manual_seed(0)
    routers = [
        experts.Router(torch.randn(5, 32, generator=generator), torch.zeros(5)) for _ in range(3)
    ]
    divided = experts.Experts(8, 1, (2, 2, 2), tuple(routers))
    experts.write(tmp_path, divided)
    rows = rows_of()
    blocks = Blocks(tmp_path, rows, device=CPU)
    for block in blocks.visit():
        assert block.linears
    last: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _, __, out: last.append(out))
    model(input_ids=rows)
    assert not torch.allclose(blocks.hidden, last[0], atol=1e-2)
    experts.attach(model, divided)
    model(input_ids=rows)
    assert torch.allclose(blocks.hidden, last[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "apart"), [(1, set()), (2, {1}), (7, {6}), (8, {7}), (9, {7})])
def test_of_few_rows_the_last_is_held_out(rows: int, apart: set[int]) -> None:
    assert held_out(rows) == apart


def test_a_model_that_goes_through_time_first_is_refused(tmp_path: Path) -> None:
    saved(XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=2, d_inner=48), tmp_path)
    with pytest.raises(InputError, match="block by block"):
        Blocks(tmp_path, rows_of(), device=CPU)


def test_rows_that_went_through_a_block_for_good_are_not_run_again(tmp_path: Path) -> None:
    saved(DECODERS["llama"], tmp_path)
    found = []
    for go_on in (False, True):
        blocks = Blocks(tmp_path, rows_of(), device=CPU)
        runs = 0

        def count(*_: Any) -> None:
            nonlocal runs
            runs += 1

        for block in blocks.visit():
            block.module.register_forward_hook(count)
            made = torch.stack([out for _, out in blocks.outputs(block, go_on=go_on)])
        assert torch.equal(made, blocks.hidden)
        found.append((blocks.hidden, runs))
    assert torch.equal(found[0][0], found[1][0])
    assert [runs for _, runs in found] == [3 * 2 * 9, 3 * 9]  # blocks, times, rows


def test_models_with_two_stacks_are_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    saved(config, tmp_path)
    with pytest.raises(InputError, match="which layers"):
        Blocks(tmp_path, rows_of(), device=CPU)


@pytest.mark.parametrize(
    "step",
    [
        Gptq(method="gptq", bits=4, group_size="channel"),
        SparseGpt(method="sparsegpt", pattern="2:4"),
    ],
    ids=lambda s: str(s.method),
)
def test_a_stopped_run_goes_on_behind_its_last_block(step: Any, tmp_path: Path) -> None:
    saved(DECODERS["llama"], tmp_path / "m")

    def run(folder: str) -> Any:
        return layerwise.walk_blocks(
            *(tmp_path / "m", step, rows_of(), [], Grid(4, None, False), tmp_path / folder),
            device=CPU,
            reporter=Silent(),
        )

    where, figures = run("a")
    assert figures.layers == len(where) == 21
    before = {n: layerwise.read(f, n) for n, f in where.items()}
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    kept = files[0].stat().st_mtime_ns
    for file in files[1:]:
        file.unlink()
    again, same = run("a")
    assert files[0].stat().st_mtime_ns == kept
    assert same == figures
    for name, parts in before.items():
        found = layerwise.read(again[name], name)
        assert parts.keys() == found.keys()
        assert all(torch.equal(parts[k], found[k]) for k in parts)


def test_later_blocks_are_fitted_to_what_earlier_ones_say_by_then(tmp_path: Path) -> None:
    """Of the same matrix, another result comes out if what is before it was compressed."""
    saved(DECODERS["llama"], tmp_path / "m")
    step = SparseGpt(method="sparsegpt", pattern="2:4")
    found = []
    for left in ([], [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]):
        where, _ = layerwise.walk_blocks(
            *(tmp_path / "m", step, rows_of(), left, None, tmp_path / f"w{len(left)}"),
            device=CPU,
            reporter=Silent(),
        )
        name = "model.layers.2.mlp.down_proj.weight"
        found.append(layerwise.read(where[name], name)["weight"])
    assert not torch.equal(*found)


def test_perplexity_is_that_of_transformers_loss(tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    rows = rows_of(3, 40) % 250
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in rows]
    wanted = float(torch.stack(losses).mean().exp())
    voice = Voice(tiny_checkpoint, device=CPU, dtype="auto", rows=1, reporter=Silent())
    assert perplexity.of(voice, rows.tolist()) == pytest.approx(wanted, rel=1e-3)


def test_rows_are_texts_one_after_the_other() -> None:
    assert pack_rows([[1, 2, 3], [4, 5], [6, 7, 8]], 3, 100).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert pack_rows([[1, 2, 3], [4, 5], [6, 7, 8]], 2, 5).tolist() == [[1, 2], [3, 4]]
    assert pack_rows([[1, 2, 3]], 8, 100).tolist() == [[1, 2, 3]]
    with pytest.raises(InputError, match="no text"):
        pack_rows([[1]], 8, 100)
