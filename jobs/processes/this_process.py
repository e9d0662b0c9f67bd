"""Which process this is, and on which device it computes."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

import torch

from algorithms.base import Process
from configs.errors import DataError, MissingEnvironmentError
from jobs.processes.environment import visible_devices

_NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")


def process_from_environment(environment: Mapping[str, str] = os.environ) -> Process:
    """Rank, world size and local rank as torchrun hands them over; rank 0 of 1 without it.

    Raises:
        MissingEnvironmentError: values that contradict each other.
    """
    try:
        rank, size, local = (int(environment.get(name, default)) for name, default in _VARIABLES)
    except ValueError as error:
        raise MissingEnvironmentError(f"RANK, WORLD_SIZE and LOCAL_RANK have to be whole numbers: {error}.") from error
    if not 0 <= rank < size or local < 0:
        raise MissingEnvironmentError(
            f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local} contradict each other; start with torchrun."
        )
    return Process(rank=rank, world_size=size, local_rank=local)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def apply_visible_devices(cuda_id: Sequence[int], environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Show this process only the devices of CUDA_ID, in that order; call it before anything initialises CUDA.

    Returns:
        A note for the log where the key has no effect, else None.

    Raises:
        DataError: the machine has devices, but none that CUDA_ID names.
    """
    if not cuda_id:
        return None
    wanted = visible_devices(cuda_id)
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None and given != wanted:
        return f"CUDA_ID: {wanted} is ignored: CUDA_VISIBLE_DEVICES={given} was set from outside."
    environment["CUDA_VISIBLE_DEVICES"] = wanted
    if torch.cuda.is_available():
        return None
    present = len(list(_NVIDIA_DEVICES.iterdir())) if _NVIDIA_DEVICES.is_dir() else 0
    if torch.version.cuda is not None and present and not any(number < present for number in cuda_id):
        raise DataError(f"CUDA_ID: {wanted} names no device of this machine; it has {present}, numbered from 0.")
    del environment["CUDA_VISIBLE_DEVICES"]
    return f"CUDA_ID: {wanted} is ignored: no CUDA device can be used here; computing on the CPU."


def choose_device(process: Process) -> torch.device:
    """The CUDA device of this process's local rank where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", process.local_rank % torch.cuda.device_count())
    return torch.device("cpu")
