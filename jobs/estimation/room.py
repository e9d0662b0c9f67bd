"""What this machine has to give: disk, memory, and the limits that are set on this process."""

from __future__ import annotations

import contextlib
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.execution.resources import resident_bytes

_MEMINFO, _CGROUPS, _OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes. ``memory`` is what this process can have now, ``memory_limit`` what it can never pass; None where nobody knows."""

    disk: int
    memory: int | None = None
    memory_limit: int | None = None
    device: int | None = None
    device_limit: int | None = None

    @classmethod
    def here(cls, folder: Path, device: torch.device) -> Room:
        """For a job in ``folder``, which need not exist, on ``device``."""
        limits, free = [], []
        known = _numbers(_MEMINFO, unit=1024)
        if "MemTotal" in known:
            limits.append(known["MemTotal"] + known.get("SwapTotal", 0))
            free.append(known["MemAvailable"] + resident_bytes())
        space = resource.getrlimit(resource.RLIMIT_AS)[0]
        if space != resource.RLIM_INFINITY:
            limits.append(space)
            free.append(space - max(0, _address_space() - resident_bytes()))
        for limit, used in _cgroup_limits(_CGROUPS, _OWN_CGROUP):
            limits.append(limit)
            free.append(limit - used + resident_bytes())
        on_device = torch.cuda.mem_get_info(device) if device.type == "cuda" else (None, None)
        return cls(
            disk=free_disk(folder),
            memory=min(free, default=None),
            memory_limit=min(limits, default=None),
            device=on_device[0],
            device_limit=on_device[1],
        )


def free_disk(folder: Path) -> int:
    """Bytes that a user may write below ``folder``, or where it will be."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _cgroup_limits(root: Path, own: Path) -> list[tuple[int, int]]:
    """Limit and use (without what the kernel gives up at once) of every control group that this process is in."""
    found = []
    with contextlib.suppress(OSError):
        lines = [line.split(":", 2)[2] for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("0::")]
        for line in lines:
            inner = root / line.strip().lstrip("/")
            for group in (inner, *inner.parents):
                if not group.is_relative_to(root):
                    break
                with contextlib.suppress(OSError, ValueError):  # the root group has no limit, and "max" is none
                    limit = int((group / "memory.max").read_text(encoding="ascii"))
                    used = int((group / "memory.current").read_text(encoding="ascii"))
                    cached = _numbers(group / "memory.stat").get("inactive_file", 0)
                    found.append((limit, max(0, used - cached)))
    return found


def _address_space() -> int:
    return _numbers(_STATUS, unit=1024).get("VmSize", 0)


def _numbers(path: Path, unit: int = 1) -> dict[str, int]:
    """Name -> number of a file with one of each on a line; nothing where there is no such file."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            words = line.replace(":", " ").split()
            if len(words) > 1 and words[1].isdigit():
                found[words[0]] = int(words[1]) * unit
    return found
