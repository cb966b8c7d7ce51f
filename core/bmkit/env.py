"""What this machine is: where bmkit keeps things, how much memory and disk there is."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from bmkit.errors import UsageError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)},
    **{f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)},
}


def home() -> Path:
    """Return the directory for pulled models, artifacts and caches: `BMKIT_HOME`."""
    if named := os.environ.get("BMKIT_HOME"):
        return Path(named).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "bmkit"


def parse_bytes(text: str) -> int:
    """Read a size: `6GiB` (binary), `6GB` (decimal), `512 MiB`, or a bare number of bytes.

    Raises UsageError for anything else, and for a size that is not positive.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or not 1 <= float(match[1]) * unit < 2**63:
        raise UsageError(
            f"`{text}` is not a size", hint="write for example 6GiB, 6GB or 512MiB (more than 0)"
        )
    return int(float(match[1]) * unit)


def format_bytes(count: float) -> str:
    """Write a size for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def process() -> tuple[int, int]:
    """Return the number of this process among those that a launcher has started, and how many."""
    if not {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"} <= os.environ.keys():
        return 0, 1
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (world.isdigit() and rank.isdigit()) or int(world) < 2:
        return 0, 1
    return int(rank), int(world)


def shares_weights() -> bool:
    """Tell whether several processes were asked to share out the frozen weights.

    `accelerate launch --use_fsdp` does so by this variable, and so can other launchers.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1", "yes")
    return asked and process()[1] > 1


def started_alone() -> bool:
    """Tell whether accelerate was asked for several processes, and has started this one alone.

    It does so where it finds one GPU or none, and is not told `--multi_gpu`; where they would meet
    is said all the same.
    """
    meeting = {"ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return meeting and "LOCAL_RANK" not in os.environ


def available_ram_bytes() -> int:
    """Return the memory that a new process can take, the container's limit considered."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limited = container_free_bytes(Path("/sys/fs/cgroup"))
    return free if limited is None else min(free, limited)


def container_free_bytes(group: Path) -> int | None:
    """Return what a control group (version 2) still lets its processes take; None if unlimited.

    Page cache that the kernel can drop at once counts as free.
    """
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        droppable = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):
        return None
    return max(limit - used + (int(droppable[1]) if droppable else 0), 0)


def has_nvidia_gpu() -> bool:
    """Tell, without torch, whether an NVIDIA GPU's device file is there (also under WSL)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or (
        Path("/dev/dxg").exists() and Path("/usr/lib/wsl/lib/libcuda.so.1").exists()
    )


def resolve_device(device: str) -> str:
    """Return the device that a recipe's `device` means here: `auto` becomes `cuda` or `cpu`.

    It is `cuda` where there is an NVIDIA GPU, it is not hidden, and the installed torch is built
    for it. No torch is imported.
    """
    if device != "auto":
        return device
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in {"", "-1", "NoDevFiles"}
    return "cuda" if has_nvidia_gpu() and not hidden and not _torch_is_for_cpu() else "cpu"


@cache
def has_amx() -> bool:
    """Tell, without torch, whether bfloat16 matrices are multiplied by AMX.

    That is several times as quick as float32. Only Linux is asked.
    """
    try:
        return (
            re.search(r"^flags\s*:.* amx_bf16\b", Path("/proc/cpuinfo").read_text(), re.M)
            is not None
        )
    except OSError:
        return False


def _torch_is_for_cpu() -> bool:
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return True


def free_disk_bytes(path: Path) -> int:
    """Return the free space of the file system on which `path` lies or will lie."""
    here = path.absolute()
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def disk_of(path: Path) -> int:
    """Return the number of the file system on which `path` lies or will lie."""
    here = path.absolute()
    while not here.exists():
        here = here.parent
    return here.stat().st_dev


def peak_rss_bytes() -> int:
    """Return the largest resident memory that this process ever had.

    `VmHWM` where there is /proc: unlike `ru_maxrss` it does not inherit the parent's peak.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_rss() -> None:
    """Let the peak begin anew at what is resident now, where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def rss_bytes() -> int:
    """Return the resident memory that this process has now."""
    import psutil

    return int(psutil.Process().memory_info().rss)
