"""Functions run on several ranks at once: processes of one group on this machine, one thread each, a CUDA device each or none.

Processes are forked from a server that has imported torch once, so that a test with two ranks costs a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist

from algorithms.parallel.ranks import Ranks
from jobs.processes.group import backend

_IMPORTED_BY_ALL = ["tests.support.rank_processes", "algorithms.blockwise.pipeline", "transformers.models.llama.modeling_llama"]
_LOCALHOST = "127.0.0.1"


def run_on_ranks(function: Callable, size: int, *arguments: object, limit: float = 60.0, on: str = "cpu") -> list:
    """What ``function(ranks, *arguments)`` returns on each of ``size`` ranks.

    The function stands at the top level of its module, and all that goes in and out can be pickled. Fails with the first
    traceback where a rank fails, or where one is not done after ``limit`` seconds. ``on="cuda"`` gives each rank a device.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_BY_ALL)
    server = dist.TCPStore(_LOCALHOST, 0, is_master=True, wait_for_workers=False)
    processes, ends = [], {}
    for rank in range(size):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(sending, server.port, rank, size, on, function, arguments), daemon=True)
        process.start()
        sending.close()
        processes.append(process)
        ends[receiving] = rank
    try:
        return _collect(ends, size, limit)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(ends: dict[Connection, int], size: int, limit: float) -> list:
    results: list = [None] * size
    deadline = time.monotonic() + limit
    while ends:
        ready = wait(list(ends), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(ends.values())} were not done after {limit:g} s"
        for end in ready:
            rank = ends.pop(end)
            try:
                failure, result = pickle.loads(end.recv_bytes())
            except EOFError:
                failure, result = "the process ended without a word", None
            assert failure is None, f"rank {rank} of {size}: {failure}"
            results[rank] = result
    return results


def _run(sending: Connection, port: int, rank: int, size: int, on: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore(_LOCALHOST, port, is_master=False)
    device = torch.device(on, rank) if on == "cuda" else torch.device(on)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend(device, {"LOCAL_WORLD_SIZE": str(size)}), store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        answer = None, function(Ranks(dist.group.WORLD, store, device), *arguments)
    except Exception:  # noqa: BLE001 - whatever it is, the test that started this shows it
        answer = traceback.format_exc(), None
    sending.send_bytes(pickle.dumps(answer))
    sending.close()
    dist.destroy_process_group()
