"""The file that divides feed-forwards into experts: round trip, damage, and who is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bmkit import artifact, model
from bmkit.errors import InputError
from bmkit.runtime import experts
from bmkit.runtime.experts import DENSE, FILE, Experts, Router, chosen_mask


def linear(routed: int = 6, hidden: int = 8, seed: int = 0) -> Router:
    generator = torch.Generator().manual_seed(seed)
    return Router(
        torch.randn(routed, hidden, generator=generator), torch.randn(routed, generator=generator)
    )


def two_layers(routed: int = 6, hidden: int = 8, inner: int = 5) -> Router:
    last, first = linear(routed, inner, 1), linear(inner, hidden, 2)
    return Router(last.weight, last.bias, first.weight, first.bias)


def some() -> Experts:
    """Three blocks: a linear router, a dense block, a router of two layers."""
    return Experts(4, 2, (3, DENSE, 0), (linear(), None, two_layers()))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert experts.read(tmp_path) is None
    wanted = some()
    experts.write(tmp_path, wanted)
    found = experts.read(tmp_path)
    assert found is not None
    assert (found.size, found.shared, found.chosen) == (4, 2, (3, DENSE, 0))
    assert found.routers[1] is None
    for a, b in zip(found.routers, wanted.routers, strict=True):
        if a is not None and b is not None:
            assert same(a.weight, b.weight)
            assert same(a.bias, b.bias)
            assert same(a.inner_weight, b.inner_weight)
            assert same(a.inner_bias, b.inner_bias)
    assert [found.width(i) for i in range(3)] == [32, None, 32]
    assert [found.active(i) for i in range(3)] == [20, None, 8]


def test_equal_experts_give_equal_bytes_with_an_ordered_header(tmp_path: Path) -> None:
    written = []
    for _ in range(8):  # the library orders a header by chance
        experts.write(tmp_path, some())
        written.append((tmp_path / FILE).read_bytes())
    assert len(set(written)) == 1
    size = int.from_bytes(written[0][:8], "little")
    header = json.loads(written[0][8 : 8 + size])
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == ["chosen", "shared", "size"]


def test_the_file_goes_with_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    before = artifact.open_artifact(tiny).digest
    experts.write(tiny, some())
    (tmp_path / "copy").mkdir()
    model.copy_side_files(tiny, tmp_path / "copy")
    assert (tmp_path / "copy" / FILE).read_bytes() == (tiny / FILE).read_bytes()
    assert artifact.open_artifact(tiny).digest != before


def brute_force(router: Router, x: Tensor, chosen: int, shared: int, size: int) -> Tensor:
    mask = torch.zeros(len(x), (shared + router.experts) * size, dtype=torch.bool)
    for t, row in enumerate(x):
        if router.inner_weight is not None:
            row = torch.tanh(torch.mv(router.inner_weight, row) + router.inner_bias)
        scores = [float(w @ row + b) for w, b in zip(router.weight, router.bias, strict=True)]
        best = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:chosen]
        for expert in [*range(shared), *(shared + e for e in best)]:
            mask[t, expert * size : (expert + 1) * size] = True
    return mask


@pytest.mark.parametrize("router", [linear(), two_layers()], ids=["linear", "two-layers"])
@pytest.mark.parametrize("chosen", [0, 1, 4, 6])
@pytest.mark.parametrize("shared", [0, 2])
def test_the_best_experts_and_the_shared_ones_are_computed(
    router: Router, chosen: int, shared: int
) -> None:
    x = torch.randn(17, 8, generator=torch.Generator().manual_seed(5))
    found = chosen_mask(router, x, chosen=chosen, shared=shared, size=3)
    assert torch.equal(found, brute_force(router, x, chosen, shared, 3))
    assert (found.sum(1) == (chosen + shared) * 3).all()


def test_of_equal_scores_the_lower_number_is_taken() -> None:
    router = Router(torch.zeros(40, 4), torch.tensor([1.0] * 10 + [2.0] * 2 + [1.0] * 28))
    mask = chosen_mask(router, torch.randn(2, 4), chosen=4, shared=0, size=1)
    assert mask[0].nonzero()[:, 0].tolist() == [0, 1, 10, 11]
    assert torch.equal(mask[0], mask[1])


def metadata(**changed: str) -> dict[str, str]:
    return {"size": "4", "shared": "2", "chosen": "[3, -1, 0]", **changed}


@pytest.mark.parametrize(
    ("said", "changed"),
    [
        (metadata(size="0"), {}),
        (metadata(size="four"), {}),
        (metadata(shared="-1"), {}),
        (metadata(chosen="[7, -1, 0]"), {}),
        (metadata(chosen="[3, -2, 0]"), {}),
        (metadata(chosen="[3, -1]"), {}),
        (metadata(chosen="[3, 1, 0]"), {}),
        (metadata(chosen="[3, -1, 0.5]"), {}),
        (metadata(chosen="[true, -1, 0]"), {}),
        (metadata(chosen="{}"), {}),
        (metadata(chosen="[3,"), {}),
        (metadata(shared="0"), {}),  # nothing at all would be computed in the last block
        ({"size": "4", "shared": "2"}, {}),
        (metadata(), {"0.router.bias": None}),
        (metadata(), {"0.router.bias": torch.zeros(5)}),
        (metadata(), {"0.router.weight": torch.zeros(6)}),
        (metadata(), {"0.router.weight": torch.zeros(6, 8, dtype=torch.float16)}),
        (metadata(), {"0.router.weight": torch.full((6, 8), torch.nan)}),
        (metadata(), {"2.router.in.weight": torch.zeros(4, 8)}),
        (metadata(), {"2.router.out.weight": None}),
        (metadata(), {"1.router.weight": torch.zeros(6, 8)}),
        (metadata(), {"3.router.weight": torch.zeros(6, 8)}),
        (metadata(), {"0.gate.weight": torch.zeros(6, 8)}),
    ],
)
def test_a_damaged_file_is_refused(
    said: dict[str, str], changed: dict[str, Any], tmp_path: Path
) -> None:
    experts.write(tmp_path, some())
    tensors = load_file(tmp_path / FILE) | changed
    save_file({k: t for k, t in tensors.items() if t is not None}, tmp_path / FILE, said)
    with pytest.raises(InputError, match=f"{FILE} is damaged"):
        experts.read(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    experts.write(tmp_path, some())
    whole = (tmp_path / FILE).read_bytes()
    for size in (0, 5, 40, len(whole) - 1):
        (tmp_path / FILE).write_bytes(whole[:size])
        with pytest.raises(InputError, match="is damaged"):
            experts.read(tmp_path)
