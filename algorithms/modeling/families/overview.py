"""What would become of every part of a model, from its configuration alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.families.table import is_known
from algorithms.modeling.source import ModelError, ModelSource


@dataclass(frozen=True, kw_only=True)
class Part:
    """Modules with the same path in every block, ``*`` standing for any expert; or one module around the blocks.

    Attributes:
        shapes: of its weight, all that there are.
        count: how many there are in the whole model.
        parameters: of all of them together.
        remark: what it is, or why it is kept.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    count: int
    parameters: int
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """``groups`` are linears that share an input; ``folds`` says where their scales can go, by the first of a group.

    ``basis`` is how the row was found, None for one of the table.
    """

    architecture: ModelArchitecture
    basis: str | None
    num_blocks: int
    num_experts: int
    groups: tuple[tuple[Part, ...], ...]
    folds: Mapping[str, str]
    kept: tuple[Part, ...]
    outside: tuple[Part, ...]

    @property
    def compressed(self) -> int:
        """Number of parameters of compressed linears, biases included."""
        return sum(part.parameters for group in self.groups for part in group)

    @property
    def total(self) -> int:
        """Number of the model's parameters; tied ones count once."""
        return self.compressed + sum(part.parameters for part in (*self.kept, *self.outside))


def overview(source: ModelSource) -> Overview:
    """The parts of a model, without its weights.

    Raises:
        ModelError: no row describes it, or the row does not fit it.
    """
    row, model = source.architecture, source.skeleton()
    model_type = source.config.model_type
    reasons = source.inspection.left_out if row.is_inspected else {}
    basis = source.inspection.basis if row.is_inspected else None
    assert is_known(model_type) or row.is_inspected
    blocks = dict(model.named_modules()).get(row.blocks)
    if blocks is None:
        raise ModelError(f"MODEL: {source.name} has no {row.blocks}, which the table has for {model_type}.")
    owners, seen = _owners(blocks, row), {id(parameter) for parameter in blocks.parameters()}
    patterns = (tuple(_pattern(name, row) for name in group) for group in row.input_groups)
    present = (tuple(name for name in group if name in owners) for group in dict.fromkeys(patterns))
    groups = [group for group in present if group]
    compressed = {name for group in groups for name in group}
    folds = {
        _pattern(leader, row): _pattern(place, row)
        for places in (row.input_norms, row.feeders)
        for leader, place in places.items()
    }
    return Overview(
        architecture=row,
        basis=basis,
        num_blocks=len(list(blocks.children())),
        num_experts=max((_num_experts(block, row) for block in blocks.children()), default=0),
        groups=tuple(tuple(_part(name, owners[name], "") for name in group) for group in groups),
        folds=folds,
        kept=tuple(_part(name, parts, reasons.get(name)) for name, parts in owners.items() if name not in compressed),
        outside=tuple(_outside(model, row, seen)),
    )


def _owners(blocks: nn.Module, row: ModelArchitecture) -> dict[str, list[nn.Module]]:
    """The modules of all blocks that have parameters of their own, by path."""
    found: dict[str, list[nn.Module]] = {}
    for block in blocks.children():
        for name, module in block.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                found.setdefault(_pattern(name, row), []).append(module)
    return found


def _outside(model: nn.Module, row: ModelArchitecture, seen: set[int]) -> Iterator[Part]:
    known = {row.embeddings: "embeddings", row.head: "head", row.final_norm: "final norm"}
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        is_inside = name == row.blocks or name.startswith(f"{row.blocks}.")
        if is_inside or not any(True for _ in module.parameters(recurse=False)):
            continue
        seen |= {id(parameter) for parameter in own}
        remark = known.get(name, type(module).__name__) + ("" if own else ", tied")
        yield Part(name=name, shapes=_shapes([module]), count=1, parameters=sum(p.numel() for p in own), remark=remark)


def _part(name: str, modules: list[nn.Module], remark: str | None) -> Part:
    return Part(
        name=name,
        shapes=_shapes(modules),
        count=len(modules),
        parameters=sum(parameter.numel() for module in modules for parameter in module.parameters(recurse=False)),
        remark=type(modules[0]).__name__ if remark is None else remark,
    )


def _shapes(modules: list[nn.Module]) -> tuple[tuple[int, ...], ...]:
    largest = (max(module.parameters(recurse=False), key=lambda parameter: parameter.ndim) for module in modules)
    return tuple(dict.fromkeys(tuple(parameter.shape) for parameter in largest))


def _pattern(name: str, row: ModelArchitecture) -> str:
    return name if row.experts is None else re.sub(rf"^{re.escape(row.experts)}\.\d+\.", f"{row.experts}.*.", name)


def _num_experts(block: nn.Module, row: ModelArchitecture) -> int:
    mixture = None if row.experts is None else dict(block.named_modules()).get(row.experts)
    return 0 if mixture is None else len(list(mixture.children()))
