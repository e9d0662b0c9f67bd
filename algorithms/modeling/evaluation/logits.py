"""Logits of many windows: batch by batch, or where a model reads its blocks on demand, block by block for all batches at once.

A forward of a model on demand reads every block. So the forwards of all batches start together, each in a coroutine that halts
before every block; the block is read once, takes all of them one block further, and is forgotten. Between blocks, what is alive
of a forward is its hidden states. Behind the last block the forwards end one after the other, so that the logits of one batch
alone are in memory. Nothing of the model's own forward is written again for this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from algorithms.modeling.lockstep import free_bytes
from algorithms.modeling.on_demand import Shelf, shelf_of

TOKENS_PER_BATCH = 2048
# Share of the free memory that hidden states of forwards on their way may take, and their float32 copies alive at a time.
_HELD_SHARE = 0.25
_COPIES = 3


def batches_of(windows: Tensor) -> tuple[Tensor, ...]:
    """Windows [n, length] in batches of about ``TOKENS_PER_BATCH`` tokens."""
    return windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))


def logits_of(model: nn.Module, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The logits [b, length, vocabulary], float32, of every batch [b, length] of token ids, in order.

    Args:
        model: a causal LM; one that :func:`algorithms.modeling.on_demand.on_demand` made is read once for as many batches as
            their hidden states fit the memory.
        batches: int64 token ids on any device.
    """
    shelf = shelf_of(model)
    if shelf is None:
        for batch in batches:
            with torch.no_grad():
                logits = _forward(model, batch)
            yield logits
        return
    hidden = model.get_input_embeddings().weight.shape[1]
    for group in _groups(batches, hidden, shelf.device):
        yield from _together(model, shelf, group)


def _forward(model: nn.Module, batch: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=batch.to(device), use_cache=False).logits.float()


def _groups(batches: Sequence[Tensor], hidden: int, device: torch.device) -> Iterator[Sequence[Tensor]]:
    """Runs of batches whose forwards can be on their way together; at least one each."""
    most = max(1, int(_HELD_SHARE * free_bytes(device)) // (4 * _COPIES * hidden))
    start, held = 0, 0
    for number, batch in enumerate(batches):
        if held + batch.numel() > most and number > start:
            yield batches[start:number]
            start, held = number, 0
        held += batch.numel()
    yield batches[start:]


def _together(model: nn.Module, shelf: Shelf, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    walks = [greenlet(partial(_forward, model, batch)) for batch in batches]
    with _halting(shelf, walks):
        with torch.no_grad():
            for walk in walks:  # to the first block
                walk.switch()
            for index in range(len(shelf.blocks)):
                taken = shelf.take(index)
                for walk in walks:  # through this block, to the next or behind the last
                    walk.switch()
                if taken:
                    shelf.put_back(index)
        while walks:
            with torch.no_grad():
                logits = walks.pop(0).switch()
            yield logits


@contextmanager
def _halting(shelf: Shelf, walks: Sequence[greenlet]) -> Iterator[None]:
    """Within, the forwards of ``walks`` hand over before every block and behind the last one; others pass."""
    ours = frozenset(walks)

    def _halt(*_: object) -> None:
        here = getcurrent()
        if here in ours:
            here.parent.switch(None)

    hooks = [block.register_forward_pre_hook(_halt, prepend=True) for block in shelf.blocks]
    hooks.append(shelf.blocks[-1].register_forward_hook(_halt))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
