"""What a piece of work cost this process: user CPU seconds, wall time and peak memory, of that piece alone."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): writing 5 resets VmHWM to the current resident size
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Cost of a piece of work. User CPU covers this process and the children it waited for; memory is this process's own."""

    user_cpu_s: float
    wall_s: float
    peak_memory_bytes: int
    peak_cuda_memory_bytes: int | None

    def after(self, earlier: Mapping[str, Any] | None) -> Usage:
        """The cost of this and of an earlier attempt, which is given by the names of these fields."""
        if earlier is None:
            return self
        cuda = [peak for peak in (self.peak_cuda_memory_bytes, earlier["peak_cuda_memory_bytes"]) if peak is not None]
        return Usage(
            user_cpu_s=round(self.user_cpu_s + earlier["user_cpu_s"], 3),
            wall_s=round(self.wall_s + earlier["wall_s"], 3),
            peak_memory_bytes=max(self.peak_memory_bytes, earlier["peak_memory_bytes"]),
            peak_cuda_memory_bytes=max(cuda, default=None),
        )


class Meter:
    """Measures from entering it on; ``usage()`` may be asked at any time, inside and after.

    The peak is the kernel's own high-water mark, reset on entry. Where that is not permitted, a thread samples the resident
    size 20 times a second and may miss a shorter peak.
    """

    def __enter__(self) -> Meter:
        self._cpu, self._wall = _user_cpu(), time.monotonic()
        self._ended: Usage | None = None
        self._sampler = None if _reset_peak() else _Sampler()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended = self._measure()
        if self._sampler is not None:
            self._sampler.stop()

    def usage(self) -> Usage:
        """The cost so far, or of the whole piece once it has ended."""
        return self._ended or self._measure()

    def _measure(self) -> Usage:
        return Usage(
            user_cpu_s=round(_user_cpu() - self._cpu, 3),
            wall_s=round(time.monotonic() - self._wall, 3),
            peak_memory_bytes=_status_bytes("VmHWM") if self._sampler is None else self._sampler.peak(),
            peak_cuda_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None,
        )


class _Sampler:
    """The largest resident size seen by a thread that looks every ``_SAMPLE_SECONDS``."""

    def __init__(self) -> None:
        self._peak, self._done = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-sampler", daemon=True)
        self._thread.start()

    def peak(self) -> int:
        """Bytes."""
        self._peak = max(self._peak, resident_bytes())
        return self._peak

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.peak()


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not tell, its peak since the start."""
    if _STATUS.exists():
        return _status_bytes("VmRSS")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> bool:
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
        return True
    return False


def _status_bytes(name: str) -> int:
    line = next(
        line for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines() if line.startswith(f"{name}:")
    )
    return int(line.split()[1]) * 1024


def _user_cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + children.ru_utime
