"""Packed weights on the CPU: kernels compiled on the user's machine, and blocks fused of them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import tempfile
from pathlib import Path

from bmkit import env


def _prepare() -> bool:
    """Tell numba where compiled kernels are kept and how threads are made, before it is imported.

    The folder's name holds a hash of the kernels' source, since numba looks only at the file in
    which a function stands. Returns whether the folder can be written.
    """
    os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")
    here = Path(__file__).parent
    source = b"".join((here / name).read_bytes() for name in ("dots.py", "block.py", "experts.py"))
    version = importlib.metadata.version("numba")
    name = hashlib.sha256(source + version.encode()).hexdigest()[:12]
    given = os.environ.get("NUMBA_CACHE_DIR")
    folder = (Path(given) if given else env.home() / "kernels") / name
    if given and Path(given).name == name:  # set by this function, in the process that started us
        folder = Path(given)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # numba fails where it can't write
            file.write(bytes(2**20))
            file.flush()
    except OSError:
        return False
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    return True


KEPT = _prepare()
"""Whether compiled kernels can be kept for the next process."""


def compiled(*, divided: bool = False, fused: bool = True) -> bool:
    """Tell whether the kernels were compiled before, for whatever processor.

    Those of feed-forwards that are `divided` into experts are compiled apart. Without `fused`,
    products alone are asked for. A few others are compiled by the import.
    """
    kernel = "block.block-*.nbc" if fused else "block.product-*.nbc"
    kernel = "experts.feed_forward*.nbc" if divided else kernel
    return KEPT and any(Path(os.environ["NUMBA_CACHE_DIR"]).rglob(kernel))
