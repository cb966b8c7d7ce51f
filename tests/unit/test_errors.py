"""What a machine refused, told from errors of other people's code."""

from __future__ import annotations

import errno

import pytest

from bmkit.errors import machine_refusal


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "write"), "No space left on device"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            "there is no folder that temporary files can be written to",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (MemoryError(), "out of memory"),
        (
            RuntimeError("[enforce fail] not enough memory: you tried to allocate 9"),
            "out of memory",
        ),
        (
            RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"),
            "the GPU can't be used any more: CUDA error: unspecified launch failure",
        ),
        (RuntimeError("CUDA error: device-side assert triggered"), None),
        (ValueError("not enough memory"), None),
    ],
)
def test_only_the_machines_refusals_are_told(error: BaseException, said: str | None) -> None:
    assert machine_refusal(error) == said
    try:
        raise KeyError from error
    except KeyError as exc:
        assert machine_refusal(exc) == said
