"""The boards of three ranks in one process, and an order that can be put on them."""

from __future__ import annotations

import torch.distributed as dist

from algorithms.base import Process
from jobs.processes.board import Board, Order

ORDER = Order(
    stage="finetune",
    model_directory="/models/a",
    model_name="a",
    trust_remote_code=False,
    given_kind="model",
    given_directory="/jobs/b",
    given_digest="d",
    output_dir="/o",
    scratch_dir="/s",
)


class Boards:
    """The boards of three ranks on one store; time passes only where somebody sleeps."""

    def __init__(self):
        self.now = 0.0
        store = dist.HashStore()
        self.leader, self.first, self.second = (self._board(store, rank) for rank in range(3))

    def _board(self, store, rank):
        return Board(store, Process(rank=rank, world_size=3), clock=lambda: self.now, sleep=self._pass)

    def _pass(self, seconds):
        self.now += seconds
