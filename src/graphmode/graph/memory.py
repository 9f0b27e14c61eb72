"""How much memory a device has left, and whether an error says that it had none."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on ``device``; on the host, within the limits of its control groups."""
    if device.type != "cpu":
        free: int = torch.accelerator.get_memory_info(device)[0]
        return free
    return min([int(psutil.virtual_memory().available), *control_group_memory()])


def control_group_memory(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the bytes that each control group of this process leaves it; none where no group has a limit.

    A group is bound by its parents too, and a container may see its own group as the root. Files that are cached and
    not in use count as free, as the kernel drops them first.

    Args:
        own: says which groups the process is in.
        mounted: where groups are files.
    """
    left = []
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = mounted, ("memory.max", "memory.current", "inactive_file")
        if controllers:  # the first version of control groups
            root, names = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / names[0]).is_file() and (limit := (folder / names[0]).read_text().strip()) != "max":
                used = int((folder / names[1]).read_text())
                fields = dict(field.split() for field in (folder / "memory.stat").read_text().splitlines())
                left.append(max(0, int(limit) - used + int(fields.get(names[2], 0))))
            if folder == root:
                break
    return left


def in_words(nbytes: float) -> str:
    """Return a number of bytes as a person reads it: ``"1.5 GiB"``."""
    size, unit = float(nbytes), 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} bytes" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that there was no memory left, on the host or on a device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    # From torch's allocators on the host, and from drivers that allocate memory themselves.
    told = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(words in text for words in told)
