"""The free resources of this machine: host memory, GPU memory, disk. Standard library only."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one GPU."""

    free: int
    total: int


def host_available() -> int:
    """Bytes that may still be allocated on the host: what the kernel calls available, and what the
    control group allows.
    """
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    limit = _cgroup_free()
    return available if limit is None else min(available, limit)


def _cgroup_free() -> int | None:
    """The bytes that the control group still allows (cgroup 2); None when it sets no limit."""
    folder = Path("/sys/fs/cgroup")
    if not (folder / "memory.max").exists():
        return None
    limit = (folder / "memory.max").read_text().strip()
    if limit == "max":
        return None
    counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    cache = int(counters.get("inactive_file", 0))  # the kernel gives cached file pages back when asked
    return int(limit) - int((folder / "memory.current").read_text()) + cache


def disk_free(path: Path) -> int:
    """Bytes free where `path` is, or will be."""
    path = path.expanduser().resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpu_memory(name: str) -> DeviceMemory | None:
    """Memory of the GPU that CUDA_VISIBLE_DEVICES calls `name` (a number or a UUID), from the
    driver's library; None: it does not say.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if library.nvmlInit_v2() != 0:
        return None
    try:
        handle, memory = ctypes.c_void_p(), _Memory()
        if name.isdigit():
            failed = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle))
        else:
            failed = library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        if failed or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
            return None
        return DeviceMemory(int(memory.free), int(memory.total))
    finally:
        library.nvmlShutdown()
