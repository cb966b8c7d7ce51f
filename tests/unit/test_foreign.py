"""Formats of other libraries: GPTQ's words against a packing bit by bit, quanto's by quanto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bmkit import model as models
from bmkit.deltas.stored import modules_of_headers
from bmkit.errors import InputError, ResourceError
from bmkit.foreign import extra, gptq, quanto
from bmkit.plan import read_headers

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=48,
)


def words(columns: list[list[int]], bits: int) -> Tensor:
    """Write numbers one behind the other, from the lowest bit on, a stream a column."""
    packed = []
    for column in columns:
        stream = sum(value << (i * bits) for i, value in enumerate(column))
        raw = stream.to_bytes(len(column) * bits // 8, "little")
        packed.append(torch.frombuffer(bytearray(raw), dtype=torch.int32))
    return torch.stack(packed, 1)


def layer(
    weight: Tensor, bits: int, *, v2: bool, group: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Round a weight [out, in] by groups; return GPTQ's parts, and what they stand for."""
    groups, largest = int(group.max()) + 1, 2**bits - 1
    scales, zeros = torch.empty(groups, len(weight)), torch.empty(groups, len(weight))
    dense, values = torch.empty_like(weight), torch.empty_like(weight)
    for g in range(groups):
        part = weight[:, group == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[g] = ((high - low) / largest).half().float()
        zeros[g] = (-low / scales[g]).round().clamp(1, largest)  # v1 has no 0 below 2^bits
        ints = (part / scales[g][:, None] + zeros[g][:, None]).round().clamp(0, largest)
        values[:, group == g] = ints
        dense[:, group == g] = (ints - zeros[g][:, None]) * scales[g][:, None]
    stored = zeros - (0 if v2 else 1)
    return {
        "qweight": words(values.long().tolist(), bits),
        "qzeros": words(stored.long().tolist(), bits).T.contiguous(),
        "scales": scales.half(),
        "g_idx": group.to(torch.int32),
    }, dense


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_words_are_read_as_they_were_written(bits: int, v2: bool, ordered: bool) -> None:
    torch.manual_seed(bits)
    group = torch.arange(96) // 32
    if not ordered:
        group = group[torch.randperm(96)]
    parts, dense = layer(torch.randn(64, 96), bits, v2=v2, group=group)
    found = gptq.unpack(parts, bits, v2=v2)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), dense, rtol=1e-3, atol=1e-6)
    if ordered:
        del parts["g_idx"]
        assert torch.equal(gptq.unpack(parts, bits, v2=v2), found)


def test_parts_that_do_not_fit_are_refused() -> None:
    parts, _ = layer(torch.randn(32, 64), 4, v2=False, group=torch.arange(64) // 32)
    for name, wrong in (
        ("qzeros", parts["qzeros"][:, :1]),
        ("scales", parts["scales"][:1]),
        ("qweight", parts["qweight"][:, :8]),
        ("g_idx", torch.arange(99)),
    ):
        with pytest.raises((ValueError, IndexError)):
            gptq.unpack({**parts, name: wrong}, 4)
    with pytest.raises(ValueError):
        gptq.bits_of({"bits": 5})


def saved(path: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    model.save_pretrained(path)
    return model


def as_gptq(path: Path, bits: int) -> dict[str, Tensor]:
    """Turn the checkpoint at `path` into one of GPTQ; return what its weights stand for."""
    file = path / "model.safetensors"
    tensors, found = load_file(file), {}
    for name in [n for n in tensors if "_proj." in n]:
        weight = tensors.pop(name)
        group = torch.arange(weight.shape[1]) // 32
        parts, found[name] = layer(weight, bits, v2=False, group=group)
        tensors |= {f"{name.removesuffix('weight')}{k}": v for k, v in parts.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    (path / "config.json").write_text(json.dumps(config))
    return found


@pytest.mark.parametrize("bits", [2, 4])
def test_a_checkpoint_of_gptq_is_the_model_that_it_stands_for(tmp_path: Path, bits: int) -> None:
    model = saved(tmp_path)
    before = read_headers(tmp_path)
    dense = as_gptq(tmp_path, bits)
    model.load_state_dict(dense, strict=False)
    headers, ids = read_headers(tmp_path), torch.arange(20)[None]
    assert headers.dense_numel == before.dense_numel
    assert modules_of_headers(headers) == modules_of_headers(before)
    found = models.load_model(tmp_path, device=CPU, dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_of_gptq_that_lacks_a_part_names_the_layer(tmp_path: Path) -> None:
    saved(tmp_path)
    as_gptq(tmp_path, 4)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.qzeros"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj.*lacks 'qzeros'"):
        models.load_model(tmp_path, device=CPU)


def quantised(path: Path, weights: str, activations: str | None = None) -> Any:
    """Write a checkpoint by the library alone, as its docs say; return its model."""
    library = pytest.importorskip("optimum.quanto")
    model = saved(path)
    ids = torch.arange(20)[None]
    library.quantize(model, weights=weights, activations=activations, exclude="lm_head")
    if activations:
        with library.Calibration(), torch.no_grad():
            model(ids)
    library.freeze(model)
    (path / "model.safetensors").unlink()
    library.QuantizedModelForCausalLM(model).save_pretrained(path)
    return library.QuantizedModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("weights", ["qint2", "qint4", "qint8", "qfloat8"])
def test_a_checkpoint_that_quanto_has_written_is_read(tmp_path: Path, weights: str) -> None:
    theirs, ids = quantised(tmp_path, weights), torch.arange(20)[None]
    ours = models.load_model(tmp_path, device=CPU, dtype="float32")
    for name, module in ours.named_modules():
        if name.endswith("_proj"):
            wanted = theirs.get_submodule(name).weight.dequantize()
            torch.testing.assert_close(module.weight, wanted, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    if weights != "qint2":  # nothing but the bits in a file of ours tells these from four
        assert read_headers(tmp_path).dense_numel == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("activations", ["qint8", "qfloat8"])
def test_what_goes_through_quantos_layers_is_rounded_as_quanto_does(
    tmp_path: Path, activations: str
) -> None:
    theirs, ids = quantised(tmp_path, "qint8", activations), torch.arange(20)[None]
    ours = models.load_model(tmp_path, device=CPU, dtype="float32")
    assert quanto.rounding_outputs(ours) != []
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    quanto.fill(
        tmp_path,
        bare := LlamaForCausalLM(CONFIG).eval(),
        load_file(tmp_path / "model.safetensors"),
        quanto.read_map(tmp_path),
        [],
    )
    assert quanto.rounding_outputs(bare) == []
    with torch.no_grad():
        assert not torch.equal(bare(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("activations", [None, "qint8"])
def test_a_checkpoint_of_quanto_that_lacks_a_part_names_it(
    tmp_path: Path, activations: str | None
) -> None:
    quantised(tmp_path, "qint8", activations)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight._scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj"):
        models.load_model(tmp_path, device=CPU)


def test_a_library_that_is_not_there_is_told_with_its_extra() -> None:
    for module in ("no_such_library", "no_such_library.inner"):
        with pytest.raises(ResourceError, match="no_such_library") as found:
            extra.load(module, "more", "`step`")
        assert found.value.hint == "pip install 'bmkit[more]'"
