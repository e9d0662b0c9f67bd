"""Hidden states on their way through a model, and the arguments that its blocks are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.modeling.mixtures.deferred import is_deferred
from algorithms.modeling.mixtures.experts import in_step
from algorithms.modeling.mixtures.pacing import run_paced
from algorithms.modeling.source import ModelSource


class _LastBlockReached(Exception):  # noqa: N818 - control flow inside this file, not an error
    pass


class _Recorder(nn.Module):
    """Stands in for a block: notes its arguments, passes the hidden states on, and looks like the block to whoever asks."""

    def __init__(self, block: nn.Module, calls: list[BlockCall], stop: bool) -> None:
        super().__init__()
        self.block = block
        self._calls = calls
        self._stop = stop

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of any block
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Hidden states [1, length, hidden], returned as they are."""
        self._calls.append(BlockCall(hidden_states=hidden_states, args=args, kwargs=kwargs))
        if self._stop:
            raise _LastBlockReached
        return hidden_states.as_subclass(_Passed)


class _Passed(Tensor):
    """What a block gives, to a model that takes it for the hidden states as to one that takes the first of a tuple."""

    def __getitem__(self, place: Any) -> Tensor:  # noqa: ANN401 - any index of a tensor
        return self if isinstance(place, int) and place == 0 else super().__getitem__(place)


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """One recorded call of a block: its hidden states [1, length, hidden] and everything else it was given."""

    hidden_states: Tensor
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


class BlockArguments:
    """The arguments besides the hidden states (rotary tables, masks, positions) of every block, by sequence length.

    They do not depend on the hidden states, so they are recorded once a length, on a batch of one, and broadcast.
    """

    def __init__(self, calls: Mapping[int, Sequence[BlockCall]]) -> None:
        self._calls = calls

    def run(self, block: nn.Module, index: int, hidden_states: Tensor) -> Tensor:
        """Output [b, length, hidden] of block ``index`` for hidden_states [b, length, hidden]."""
        call = self._calls[hidden_states.shape[1]][index]
        output = block(hidden_states, *call.args, **call.kwargs)
        # Blocks of transformers 4 return a tuple, those of transformers 5 a tensor, a few (Falcon's) still a tuple.
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Hidden states of many sequences, in batches of equal length: kept on ``storage``, computed on ``device`` in float32."""

    batches: list[Tensor]
    arguments: BlockArguments
    device: torch.device
    storage: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            yield self.compute(batch)

    def compute(self, batch: Tensor) -> Tensor:
        """Kept hidden states as they enter a block: on the device, in float32."""
        return batch.to(self.device, torch.float32, non_blocking=True)

    @property
    def num_sequences(self) -> int:
        """Number of sequences over all batches."""
        return sum(batch.shape[0] for batch in self.batches)

    @torch.no_grad()
    def through(self, block: nn.Module, index: int) -> Activations:
        """What block ``index`` makes of these hidden states."""
        outputs = [self._keep(output, place) for place, output in enumerate(self._outputs(block, index))]
        return replace(self, batches=outputs)

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the hidden states by what block ``index`` makes of them, batch by batch: no second copy is held."""
        with torch.no_grad():
            for place, output in enumerate(self._outputs(block, index)):
                self.take(place, output)

    def take(self, place: int, outputs: Tensor) -> None:
        """Replace one batch by what a block has made of it."""
        self.batches[place] = self._keep(outputs, place)

    def copy(self) -> Activations:
        """A second list over the same tensors, which ``advance`` on either leaves to the other."""
        return replace(self, batches=list(self.batches))

    def _outputs(self, block: nn.Module, index: int) -> Iterator[Tensor]:
        """A block's outputs; where its experts are read when they are needed, each is read once for all batches."""
        runs = [partial(self._run, block, index, batch) for batch in self.batches]
        if not is_deferred(block):
            yield from (run() for run in runs)
            return
        with in_step(block):
            yield from run_paced(runs)

    def _run(self, block: nn.Module, index: int, batch: Tensor) -> Tensor:
        return self.arguments.run(block, index, self.compute(batch))

    def _keep(self, outputs: Tensor, place: int) -> Tensor:
        dtype = self.batches[place].dtype
        if dtype == torch.float16:
            # Some models carry a few hidden states beyond 65504; saturated they cost little, as infinities everything.
            limit = torch.finfo(dtype).max
            outputs = outputs.clamp(-limit, limit)
        return outputs.to(self.storage, dtype)


def batches_of_equal_length(sequences: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Join token sequences [1, length] into batches [b <= batch_size, length]; neighbours of one length stay in order."""
    batches: list[list[Tensor]] = []
    for sequence in sequences:
        fits = batches and len(batches[-1]) < batch_size and batches[-1][0].shape == sequence.shape
        if fits:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return [torch.cat(batch) for batch in batches]


@torch.no_grad()
def embed(
    source: ModelSource,
    sequence_sets: Sequence[Sequence[Tensor]],
    *,
    batch_size: int,
    device: torch.device,
    offload: bool,
    dtype: torch.dtype = torch.float32,
) -> list[Activations]:
    """The inputs of block 0 for several sets of token sequences [1, length], with the arguments of all blocks recorded.

    Hidden states are kept in ``dtype``, on the CPU with ``offload``. The model around the blocks is loaded for this and then
    released again; the blocks' weights are not touched.
    """
    model = source.load_outside(device=device)
    storage = torch.device("cpu") if offload else device
    calls: dict[int, Sequence[BlockCall]] = {}
    results = []
    for sequences in sequence_sets:
        batches = []
        for tokens in batches_of_equal_length(sequences, batch_size):
            length = tokens.shape[1]
            if length not in calls:
                calls[length] = _record_calls(model, source, tokens[:1].to(device))
            batches.append(_first_input(model, source, tokens.to(device)).to(storage, dtype))
        results.append(Activations(batches=batches, arguments=BlockArguments(calls), device=device, storage=storage))
    return results


def _record_calls(model: nn.Module, source: ModelSource, tokens: Tensor) -> list[BlockCall]:
    calls: list[BlockCall] = []
    last = source.num_blocks - 1
    _run_with_blocks(model, source, tokens, lambda index, block: _Recorder(block, calls, stop=index == last))
    # Only the arguments are kept: the hidden states of every block would be a copy of the embeddings.
    return [BlockCall(hidden_states=tokens.new_empty(0), args=call.args, kwargs=call.kwargs) for call in calls]


def _first_input(model: nn.Module, source: ModelSource, tokens: Tensor) -> Tensor:
    calls: list[BlockCall] = []
    _run_with_blocks(model, source, tokens, lambda index, block: _Recorder(block, calls, stop=index == 0))
    return calls[0].hidden_states


def _run_with_blocks(
    model: nn.Module, source: ModelSource, tokens: Tensor, replacement: Callable[[int, nn.Module], nn.Module]
) -> None:
    path = source.architecture.blocks
    parent = model.get_submodule(path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    blocks = getattr(parent, name)
    setattr(parent, name, nn.ModuleList([replacement(index, block) for index, block in enumerate(blocks)]))
    try:
        model(input_ids=tokens, use_cache=False)
    except _LastBlockReached:
        pass
    finally:
        setattr(parent, name, blocks)
