"""What the linears of a model's blocks are given, noted in one forward that needs no weights.

The forward runs on tensors that have shapes and no values. Where a family's code asks for values, blocks are run one by one
with random weights instead, if they are small enough.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS = 16
LARGEST_RANDOM = 2 * 2**30  # bytes of a block in float32, with embeddings and all else around the blocks
DEFINITION = "the order in which they are defined"
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)  # of other people's code
_OF_SHAPE_ALONE = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}


class UnsuitableBlocksError(ValueError):
    """Blocks that cannot be walked one after another; the message says why, as the end of a sentence about the model."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A linear, by its path in the block, was given ``data``: equal for inputs with the same values in the same rows.

    ``is_whole`` is false where it was given something else than all tokens.
    """

    name: str
    data: Hashable
    is_whole: bool


@dataclass(kw_only=True)
class _Notes:
    """``kept`` holds everything noted alive: a storage that is freed may come back as another's."""

    calls: dict[int, list[Call]] = field(default_factory=dict)
    inputs: dict[int, list[tuple[Tensor, Mapping[str, object]]]] = field(default_factory=dict)
    outputs: dict[int, list[Tensor]] = field(default_factory=dict)
    kept: list[object] = field(default_factory=list)


class _Stop(Exception):  # noqa: N818 - control flow inside this file, not an error
    pass


def trace(make: Callable[[bool], nn.Module], path: str) -> tuple[dict[int, tuple[Call, ...]], str]:
    """The calls of every block's linears in their order, and how they were found; nothing where no forward was possible.

    Args:
        make: a fresh model in evaluation mode, parameters on the meta device; buffers too, or real ones where it is told False.
        path: of its blocks.

    Raises:
        UnsuitableBlocksError: blocks that are not called once each, one on the output of the other, or given other values
            that depend on the text.
    """
    for dtype in (torch.float32, torch.bfloat16):  # kernels that some experts run on know the latter alone
        try:
            with _unheard():
                return _trace_without_values(make(True), path, dtype), "one forward without weights"
        except UnsuitableBlocksError:
            raise
        except FAILURES:
            continue
    try:
        found = _trace_random(make(False), path)
    except UnsuitableBlocksError:
        raise
    except FAILURES:
        found = None
    return ({}, DEFINITION) if found is None else (found, "one forward of single blocks with random weights")


@contextmanager
def _unheard() -> Iterator[None]:
    """Torch writes the traceback of every operation that fails without values, which others of this file make up for."""
    log = logging.getLogger(FakeTensorMode.__module__)
    log.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _trace_without_values(model: nn.Module, path: str, dtype: torch.dtype) -> dict[int, tuple[Call, ...]]:
    model.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _Descent() as descent:
        model.to_empty(device="cpu")
        blocks, tokens = model.get_submodule(path), torch.ones(1, TOKENS, dtype=torch.long)
        descent.mark(tokens)
        notes = _watch(blocks)
        model(input_ids=tokens, use_cache=False)
        _check_chain(notes, len(blocks), descent)
        calls = {index: tuple(notes.calls[index]) for index in range(len(blocks))}
        _check_batches(blocks[0], *notes.inputs[0][0])
    return calls


def _check_batches(block: nn.Module, hidden: Tensor, arguments: Mapping[str, object]) -> None:
    """Blocks are given many sequences with the arguments of one."""
    others = arguments["args"]
    assert isinstance(others, tuple)
    keywords = {name: value for name, value in arguments.items() if name != "args"}
    try:
        block(torch.cat([hidden, hidden]), *others, **keywords)
    except FAILURES as error:
        raise UnsuitableBlocksError("its blocks are called with values that fit one sequence alone") from error


def _check_chain(notes: _Notes, count: int, descent: _Descent) -> None:
    for index in range(count):
        if len(notes.inputs.get(index, ())) != 1:
            raise UnsuitableBlocksError(f"block {index} is called {len(notes.inputs.get(index, ()))} times in one forward")
        (hidden, others), (output,) = notes.inputs[index][0], notes.outputs[index]
        if output.shape != hidden.shape:
            raise UnsuitableBlocksError(f"block {index} makes {tuple(output.shape)} of {tuple(hidden.shape)}")
        if index and _data(hidden) != _data(notes.outputs[index - 1][0]):
            raise UnsuitableBlocksError(f"block {index} is given something else than what block {index - 1} returns")
        if any(tensor in descent for tensor in _tensors(others)):
            raise UnsuitableBlocksError("its blocks are given more that depends on the text than their hidden states")


class _Descent(TorchDispatchMode):
    """Follows what is computed from marked tensors; shapes taken from them do not count."""

    def __init__(self) -> None:
        super().__init__()
        self._marked: set[int] = set()
        self._kept: list[object] = []

    def mark(self, tensor: Tensor) -> None:
        """Whatever is computed from it from now on descends from it."""
        self._marked.add(tensor.untyped_storage()._cdata)
        self._kept.append(tensor.untyped_storage())

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._marked

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an overload of any operation
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Compute, and mark the results of marked tensors."""
        results = func(*args, **(kwargs or {}))
        by_shape = func.overloadpacket.__name__ in _OF_SHAPE_ALONE
        if not by_shape and any(tensor in self for tensor in _tensors([args, kwargs])):
            for tensor in _tensors(results):
                self.mark(tensor)
        return results


def _trace_random(model: nn.Module, path: str) -> dict[int, tuple[Call, ...]] | None:
    """One block of each kind, with random weights in float32; None where one is too large."""
    blocks, head = model.get_submodule(path), model.get_output_embeddings()
    outside = [
        module
        for name, module in model.named_modules()
        if name != path and not name.startswith(f"{path}.") and module is not head
    ]
    size = sum(parameter.numel() for module in outside for parameter in module.parameters(recurse=False))
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    if (size + largest) * 4 > LARGEST_RANDOM:
        return None
    for module in outside:
        _fill(module)
    found: dict[int, tuple[Call, ...]] = {}
    kinds: dict[Hashable, int] = {}
    for index, block in enumerate(blocks):
        kind = tuple((name, type(module), module.extra_repr()) for name, module in block.named_modules())
        if kind not in kinds:
            kinds[kind] = index
            found[index] = _trace_one(model, block)
        found[index] = found[kinds[kind]]
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return found


def _trace_one(model: nn.Module, block: nn.Module) -> tuple[Call, ...]:
    for module in block.modules():
        _fill(module)
    notes = _watch([block])

    def _halt(module: nn.Module, args: object, output: object) -> None:
        raise _Stop

    halt = block.register_forward_hook(_halt)
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(TOKENS)[None], use_cache=False)
    except _Stop:
        pass
    finally:
        halt.remove()  # later blocks are reached through this one
    block.to("meta")
    return tuple(notes.calls[0])


def _fill(module: nn.Module) -> None:
    """Random values for the module's own parameters."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters(recurse=False):
        values = torch.randn(parameter.shape, generator=generator) * 0.02
        module._parameters[name] = nn.Parameter(values, requires_grad=False)


def _watch(blocks: Sequence[nn.Module] | nn.Module) -> _Notes:
    notes = _Notes()
    for index, block in enumerate(blocks):
        notes.calls[index] = []
        block.register_forward_pre_hook(partial(_enter, notes, index), with_kwargs=True)
        block.register_forward_hook(partial(_leave, notes, index))
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(partial(_note, notes, index, name))
    return notes


def _enter(notes: _Notes, index: int, block: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise UnsuitableBlocksError(f"block {index} is not given hidden states for each token")
    others = {"args": args[1:], **{name: value for name, value in kwargs.items() if name != "hidden_states"}}
    notes.inputs.setdefault(index, []).append((hidden, others))


def _leave(notes: _Notes, index: int, block: nn.Module, args: object, output: object) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise UnsuitableBlocksError(f"block {index} returns no hidden states")
    notes.outputs.setdefault(index, []).append(first)


def _note(notes: _Notes, index: int, name: str, linear: nn.Linear, args: tuple[object, ...]) -> None:
    inputs = args[0] if args else None
    if not isinstance(inputs, Tensor):
        notes.calls[index].append(Call(name=name, data=(index, name), is_whole=False))
        return
    notes.kept.append(inputs.untyped_storage())
    is_whole = inputs.numel() == TOKENS * linear.in_features
    notes.calls[index].append(Call(name=name, data=_data(inputs), is_whole=is_whole))


def _data(tensor: Tensor) -> Hashable:
    """Equal for tensors over the same numbers in rows of the same length, as they are at this moment."""
    if tensor.is_contiguous():
        layout: Hashable = (tensor.numel(), tensor.shape[-1])
    else:
        layout = (tuple(tensor.shape), tensor.stride())
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor._version, layout


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for inner in value.values() for tensor in _tensors(inner))
    elif isinstance(value, (tuple, list)):
        yield from (tensor for inner in value for tensor in _tensors(inner))
