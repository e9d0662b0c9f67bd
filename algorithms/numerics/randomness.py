"""Random numbers that belong to a place, not to a moment.

Every random choice derives its own generator from the job's seed and the names of the place where it is made, so that a
resumed job draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(seed: int, *place: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one place, for instance ``keyed_generator(0, "aqlm", block, "mlp.up_proj")``."""
    digest = hashlib.sha256("\0".join(str(part) for part in (seed, *place)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
