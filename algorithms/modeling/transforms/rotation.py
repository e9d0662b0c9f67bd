"""A model whose residual stream is rotated by a Hadamard matrix: the same function, without channels that stand out.

Legend: R [n, n] orthogonal, n the hidden size; g the gains of an RMSNorm. With h' = h R in the place of every h [n]:

    embeddings E -> E R      linears that read a norm W -> W diag(g) R, g -> 1
    head W -> W diag(g) R    linears that write to the stream W -> R^T W, bias b -> b R

since x / rms(x) commutes with R once the gains are out of the way (QuaRot, SpinQuant, QServe section 4.3.1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.source import ModelError, ModelSource
from algorithms.numerics.activations.hadamard import random_signs, times_hadamard
from algorithms.numerics.randomness import keyed_generator


class RotatedSource(ModelSource):
    """A model source whose tensors are those of the rotated model, computed in float64 as they are read.

    Embeddings and head differ in the rotated model, so a tied model is untied: the head has a name, a place in the weight files
    and parameters of its own, and the configuration says so. The digest stays the original's.

    Args:
        source: the original.
        random: R is a Hadamard matrix behind random signs, rather than the matrix itself.
        seed: of the signs.

    Raises:
        ModelError: the model does not follow the plan above; all reasons are listed.
        ValueError: no Hadamard matrix of the hidden size is known.
    """

    def __init__(self, source: ModelSource, *, random: bool = False, seed: int = 0) -> None:
        super().__init__(
            source.directory,
            name=source.name,
            trust_remote_code=source.trust_remote_code,
            attn_implementation=source.attn_implementation,
        )
        self._original, self._random, self._seed = source, random, seed
        row = self.architecture
        reasons = list(_refusals(self._template, row))
        if reasons:
            raise ModelError(f"rotation: {self.name} cannot be rotated: {'; '.join(reasons)}.")
        hidden = self._template.get_submodule(row.embeddings).weight.shape[1]
        times_hadamard(torch.zeros(1, hidden))
        plain = torch.ones(hidden, dtype=torch.float64)
        self._signs = random_signs(hidden, keyed_generator(seed, "rotation")) if random else plain
        self._norm_of = {**_norms_of_readers(row), row.head: row.final_norm}

    def with_attention(self, attn_implementation: str | None) -> ModelSource:
        """See :meth:`ModelSource.with_attention`; the rotation is kept."""
        if attn_implementation in (None, self.attn_implementation):
            return self
        return RotatedSource(self._original.with_attention(attn_implementation), random=self._random, seed=self._seed)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The original's configuration, untied."""
        config = copy.deepcopy(self._original.config)
        config.tie_word_embeddings = False
        return config

    def raw_config(self) -> dict[str, object]:
        """The original's config.json, untied."""
        return {**self._original.raw_config(), "tie_word_embeddings": False}

    @cached_property
    def weight_files(self) -> Mapping[str, str]:
        """Tensor name -> file it is computed from; an untied head comes from the embeddings' file."""
        files, stored = self._original.weight_files, self._stored(self._head)
        return {**files, self._head: files[stored]} if stored in files else files

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters; a head that is untied counts for itself."""
        added = self._template.get_submodule(self.architecture.head).weight.numel()
        return self._original.num_parameters + (added if self._head not in self._original.weight_files else 0)

    def tensors(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors of the rotated model; what is rotated is float32 by default, since the stored dtype may round it.

        Raises:
            ModelError: a name that no weight file holds.
        """
        return {name: self._rotated(name, dtype) for name in names}

    @property
    def _head(self) -> str:
        return f"{self.architecture.head}.weight"

    def _stored(self, name: str) -> str:
        """The stored tensor that a tensor of this model is made of."""
        is_tied = self._original.config.tie_word_embeddings and name == self._head
        return f"{self.architecture.embeddings}.weight" if is_tied else name

    def _rotated(self, name: str, dtype: torch.dtype | None) -> Tensor:
        row, stored = self.architecture, self._stored(name)
        tensor = self._original.tensors([stored])[stored]
        module, _, kind = name.rpartition(".")
        prefix, place = self._block_and_place(module)
        rotated = dtype or torch.float32
        if place in self._norm_of.values():
            return torch.full_like(tensor, 1 - row.norm_offset, dtype=dtype)
        if place in self._norm_of and kind == "weight":
            norm = f"{prefix}{self._norm_of[place]}.weight"
            gains = self._original.tensors([norm], torch.float64)[norm] + row.norm_offset
            return times_hadamard(tensor, scales=gains * self._signs, dtype=rotated)
        if place in row.residual_writers and kind == "weight":
            return times_hadamard(tensor.T, scales=self._signs, dtype=rotated).T.contiguous()
        if place in (*row.residual_writers, row.embeddings):
            return times_hadamard(tensor, scales=self._signs, dtype=rotated)
        return tensor.to(dtype) if tensor.is_floating_point() and dtype is not None else tensor

    def _block_and_place(self, module: str) -> tuple[str, str]:
        """A block's name prefix and a path in it; no prefix and the whole path for what is outside the blocks."""
        blocks = f"{self.architecture.blocks}."
        if not module.startswith(blocks):
            return "", module
        index, _, place = module.removeprefix(blocks).partition(".")
        return f"{blocks}{index}.", place


def _norms_of_readers(row: ModelArchitecture) -> dict[str, str]:
    """The norm in front of every linear of a block that has one."""
    return {name: row.input_norms[group[0]] for group in row.input_groups for name in group if group[0] in row.input_norms}


def _refusals(model: nn.Module, row: ModelArchitecture) -> Iterator[str]:
    """Why a model cannot be rotated."""
    readers, writers = _norms_of_readers(row), row.residual_writers
    block = model.get_submodule(f"{row.blocks}.0")
    for group in row.input_groups:
        if group[0] not in {**row.input_norms, **row.feeders}:
            yield f"{group[0]} is missing from the norms of the architecture table"
    for name in row.linears:
        if name in readers and name in writers:
            yield f"{name} both reads a norm and writes to the residual stream"
        elif name not in readers and name not in (*writers, *row.feeders.values()):
            yield f"what {name} computes is not added to the residual stream as it is"
    inside = {*row.linears, *readers.values(), *(row.qk_norms or ())}
    outside = {row.embeddings, row.final_norm, row.head}
    yield from _strangers(block, inside)
    yield from _strangers(model, outside, left_out=f"{row.blocks}.")
    for norm in sorted(set(readers.values())):
        yield from _norm_refusals(block, norm, row.norm_offset)
    yield from _norm_refusals(model, row.final_norm, row.norm_offset)
    hidden = model.get_submodule(row.embeddings).weight.shape[1]
    widths = {name: block.get_submodule(name).weight.shape[1] for name in readers}
    widths |= {name: block.get_submodule(name).weight.shape[0] for name in writers}
    yield from (f"{name} is {width} wide and the embeddings {hidden}" for name, width in widths.items() if width != hidden)


def _strangers(root: nn.Module, known: set[str], left_out: str = "\0") -> Iterator[str]:
    """Modules with parameters that the architecture table does not list."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name, _ in root.named_parameters() if not name.startswith(left_out))
    yield from (
        f"{name or 'the block'} has parameters and is not in the architecture table" for name in owners if name not in known
    )


def _norm_refusals(root: nn.Module, path: str, offset: float) -> Iterator[str]:
    """Why a norm does not commute with rotations, once its gains are one."""
    norm = copy.deepcopy(root.get_submodule(path)).to_empty(device="cpu")
    parameters = dict(norm.named_parameters())
    if set(parameters) != {"weight"}:
        yield f"{path} has {', '.join(sorted(parameters)) or 'no weight'} where an RMSNorm has a weight alone"
        return
    parameters["weight"].data.fill_(1 - offset)
    values = torch.linspace(-1, 3, parameters["weight"].numel())
    if not torch.allclose(norm(values[None])[0], values / values.square().mean().sqrt(), rtol=1e-3):
        yield f"{path} computes something else than x / rms(x)"
