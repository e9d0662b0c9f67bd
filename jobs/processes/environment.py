"""How many processes a job has, as its recipe and the environment say. Torch is imported only where devices are counted."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

from configs.recipe import Recipe

LAUNCHER = "BITPRESS_LAUNCHER"  # in the environment of ranks that a job started by itself: the process that did
_LAUNCHERS_WORDS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", LAUNCHER),
)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def is_follower(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether another process of the same job leads: this one is not rank 0 of several."""
    return environment.get("WORLD_SIZE", "1") != "1" and environment.get("RANK", "0") != "0"


def is_on_another_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether rank 0 runs on another node than this process, under a launcher of its own."""
    return environment.get("GROUP_RANK", "0") != "0"


def is_one_of_many(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process, alone or with others."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def is_own_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the job started this rank by itself, so that its parent tells the user how the job ended."""
    return LAUNCHER in environment


def ranks_to_start(recipe: Recipe, environment: MutableMapping[str, str] = os.environ) -> int:
    """How many ranks this command starts for a job; with 1, this process does the job alone.

    NUM_PROCESSES says how many, or else CUDA_ID by the devices that it names and that can be used. Under a launcher, which has
    started the ranks already, it is 1.
    """
    if is_one_of_many(environment):
        return 1
    if recipe.num_processes is not None:
        return recipe.num_processes
    if len(recipe.cuda_id) < 2:
        return 1
    return max(1, min(len(recipe.cuda_id), _usable_devices(recipe.cuda_id, environment)))


def note_on_processes(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> str | None:
    """A note for the log where a launcher has started another number of ranks than NUM_PROCESSES says, else None."""
    started = environment.get("WORLD_SIZE", "1")
    if not is_one_of_many(environment) or recipe.num_processes is None or str(recipe.num_processes) == started:
        return None
    return f"NUM_PROCESSES: {recipe.num_processes} is ignored: the launcher has set WORLD_SIZE={started}."


def _usable_devices(cuda_id: Sequence[int], environment: MutableMapping[str, str]) -> int:
    """How many of these devices there are; none where CUDA_ID has no effect. The environment is left as it was."""
    wanted, given = visible_devices(cuda_id), environment.get("CUDA_VISIBLE_DEVICES")
    if given not in (None, wanted):
        return 0
    import torch

    environment["CUDA_VISIBLE_DEVICES"] = wanted
    try:
        return torch.cuda.device_count()
    finally:
        if given is None:
            del environment["CUDA_VISIBLE_DEVICES"]


def visible_devices(cuda_id: Sequence[int]) -> str:
    """The devices of CUDA_ID as CUDA_VISIBLE_DEVICES spells them."""
    return ",".join(map(str, cuda_id))


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Have the kernel stop this rank when its launcher is killed, so that no job goes on unseen. Linux alone can do that."""
    if not is_own_rank(environment) or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    if os.getppid() != int(environment[LAUNCHER]):  # killed before the kernel knew
        signal.raise_signal(signal.SIGTERM)


def without_ranks(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a program that runs on its own, and must not take itself for one of several ranks."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHERS_WORDS and not name.startswith("TORCHELASTIC_")
    }


def threads_for(ranks: int) -> int:
    """An equal share of the cores that this process may use, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


@contextmanager
def set_for_ranks(ranks: int, environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """The environment that ranks are started in; undone on leaving. What the user has set is kept."""
    before = dict(environment)
    environment[LAUNCHER] = str(os.getpid())
    environment.setdefault("OMP_NUM_THREADS", str(threads_for(ranks)))
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is said once, in our words
    try:
        yield
    finally:
        for name in set(environment) - set(before):
            del environment[name]
        environment.update(before)
