"""The compiled kernels against numpy, for every way of storing and every number of tokens."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding as llvm

from bmkit.nn.rounding import Grid, dequantize, quantize, round_matrix
from bmkit.runtime.cpu import block, dots, pack
from bmkit.runtime.cpu.pack import Packed

STORES = ["float32", "bfloat16", "float16", "int8", "int8-32", "int4", "int4-32", "int4-64"]
STORES += ["zero8", "zero8-32", "zero4", "zero4-32", "zero3-64", "zero2-32", "int2-32", "int3-64"]


def packed(
    weight: torch.Tensor, store: str, bias: torch.Tensor | None
) -> tuple[Packed, np.ndarray]:
    """Return `weight` as stored, and the float32 weights that this stands for."""
    kind, _, group = store.partition("-")
    if kind.startswith("int"):
        values, scale = quantize(weight, int(kind[3:]), int(group) if group else None)
        found = pack.pack_integers(values, scale, int(kind[3:]), bias)
        assert found is not None
        return found, dequantize(values, scale).numpy()
    if kind.startswith("zero"):
        bits = int(kind[4:])
        grid = Grid(bits, int(group) if group else None, False, scale_dtype=torch.bfloat16)
        rounded = round_matrix(weight, grid)
        found = pack.pack_integers(rounded.values, rounded.scale, bits, bias, zero=rounded.zero)
        assert found is not None
        return found, rounded.dense().numpy()
    stored = weight.to(getattr(torch, kind))
    return pack.pack_floats(stored, bias), stored.float().numpy()


@pytest.mark.parametrize("store", STORES)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 6),
    tokens=st.integers(1, 19),
    threads=st.integers(1, 3),
    with_bias=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_products_equal_numpys(
    store: str, rows: int, blocks: int, tokens: int, threads: int, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows + 100 * tokens)
    inputs = 64 * blocks if "-64" in store else 32 * blocks
    if "-" not in store:
        inputs -= 5  # not a multiple of what the kernels take
    weight = torch.randn(rows, inputs, generator=generator)
    weight[0] = 0  # a row that pruning has emptied
    bias = torch.randn(rows, generator=generator) if with_bias else None
    matrix, wanted = packed(weight, store, bias)
    plan = pack.lay_out([None, matrix.shape])
    slab = pack.empty_slab(plan.bytes)
    plan.write(slab, 1, matrix)
    assert slab.ctypes.data % 64 == 0
    x = np.zeros((tokens, matrix.shape.width), np.float32)
    x[:, :inputs] = torch.randn(tokens, inputs, generator=generator).numpy()
    y = np.full((tokens, rows + 3), np.nan, np.float32)
    block.product(block.ADDRESS, slab, plan.table[1], x, y, 2, threads)
    assert np.isnan(y[:, [0, 1, -1]]).all(), "only the columns of this matrix are written"
    y = y[:, 2:-1]
    right = x[:, :inputs].astype(np.float64) @ wanted.T.astype(np.float64)
    if bias is not None:
        right += bias.numpy()
    np.testing.assert_allclose(y, right, atol=2e-5 * math.sqrt(inputs))
    dense = np.empty((rows, inputs), np.float32)
    block.unpack_rows(slab, plan.table[1], 0, dense, threads)
    np.testing.assert_array_equal(dense, wanted)


def test_groups_that_no_kernel_reads_are_refused() -> None:
    values, scale = quantize(torch.randn(4, 48), 8, 16)
    assert pack.pack_integers(values, scale, 8) is None


def test_the_exponential_is_close_and_never_overflows() -> None:
    for x in np.concatenate([np.linspace(-90, 88, 5001), [-1e30, -np.inf]]).astype(np.float32):
        found = float(block.exp(np.float32(x)))
        wanted = math.exp(max(float(x), -87.0))
        assert abs(found - wanted) <= 3e-7 * wanted
    assert np.isfinite(block.exp(np.float32(1e30)))


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (block.SILU, torch.nn.functional.silu),
        (block.GELU, torch.nn.functional.gelu),
        (block.GELU_TANH, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        (block.RELU, torch.nn.functional.relu),
    ],
)
def test_activations_are_torchs(kind: int, own: object) -> None:
    for x in np.linspace(-20, 20, 401).astype(np.float32):
        wanted = float(own(torch.tensor(x)))  # type: ignore[operator]
        assert abs(float(block.activate(x, kind)) - wanted) < 2e-6


FIRST_CALL = """
import torch
from bmkit.runtime.cpu import block
torch.set_num_threads(1)
torch.get_num_threads()  # from now on this thread's number is what it was set to
block.use_threads(1)
print(torch.get_num_threads())
"""


def test_kernels_leave_torch_the_threads_that_it_was_given() -> None:
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-c", FIRST_CALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


BEFORE_AND_AFTER = """
from bmkit.runtime import cpu
from bmkit.runtime.cpu import load
print(cpu.compiled(fused=False), cpu.compiled())
from bmkit.runtime.placed import load
load.warm()
print(cpu.compiled(fused=False), cpu.compiled())
"""


def test_kernels_that_were_not_compiled_yet_are_known(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    environment["BMKIT_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", BEFORE_AND_AFTER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False False", "True False"]


@pytest.mark.skipif(dots.LANES == 8, reason="the processor has no other kernels")
def test_kernels_for_avx2_multiply_as_well() -> None:
    features = llvm.get_host_cpu_features()
    lacks = [name for name in features if name.startswith(("avx512", "amx", "avx10"))]
    told = ",".join(
        f"{'+' if on and name not in lacks else '-'}{name}" for name, on in features.items()
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": told}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["--deselect", f"{__file__}::test_kernels_for_avx2_multiply_as_well"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
