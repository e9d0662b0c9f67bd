"""A row for a family that the table does not have, found by looking at a model without weights.

Nothing is known of where factors could be moved or of what writes to the residual stream, so that the row says nothing of it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.families.conversions import has_files_by_expert, names_in_files
from algorithms.modeling.families.merging import Block, merged_groups
from algorithms.modeling.families.tracing import Call, UnsuitableBlocksError, trace
from algorithms.modeling.mixtures.experts import FirstExpert, keep_first_experts

_ADVICE = "Add a row to algorithms/modeling/families/table.py if one can describe it."


class InspectionError(ValueError):
    """A model that no row can be found for; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found.

    Attributes:
        architecture: the row.
        left_out: linears of blocks that are not compressed, and other modules with matrices -> why.
        basis: what the groups and their order were found by.
    """

    architecture: ModelArchitecture
    left_out: Mapping[str, str]
    basis: str

    def warning(self) -> str:
        """What a user should know before such a row is relied on."""
        row = self.architecture
        groups = "; ".join(" + ".join(group) for group in row.input_groups)
        left = "".join(f" {name} ({reason})," for name, reason in self.left_out.items())
        return (
            f"model_type {row.model_type!r} is not in the architecture table; its row was found by inspection ({self.basis}). "
            f"Compressed in each block of {row.blocks}, those that share an input joined by +: {groups}. "
            f"Kept:{left} embeddings ({row.embeddings}), head ({row.head}), norms and all else. Nothing is folded into norms. "
            f"`python main.py inspect` shows it with sizes; a row in algorithms/modeling/families/table.py pins it down."
        )


def inspect_family(
    config: PretrainedConfig, *, trust_remote_code: bool = False, attn_implementation: str | None = None
) -> Inspection:
    """The row of a family that the table does not have.

    Raises:
        InspectionError: there is no list of blocks, no linear in them, or they cannot be walked one by one.
    """

    def _make(without_values: bool) -> PreTrainedModel:
        return _first_expert_model(config, without_values, trust_remote_code, attn_implementation)

    kind = f"MODEL: model_type {config.model_type!r} is not in the architecture table, and "
    model = _make(True)
    try:
        path = _block_list(model, config)
        _check_shares_nothing(model.get_submodule(path))
        calls, basis = trace(_make, path)
        blocks = list(model.get_submodule(path).children())
        left_out = _left_out(blocks, calls)
        mixtures = sorted({name for block in blocks for name, part in block.named_modules() if isinstance(part, FirstExpert)})
        if len(mixtures) > 1:
            raise UnsuitableBlocksError(f"its blocks have experts in several places ({', '.join(mixtures)})")
        if mixtures and not has_files_by_expert(config.model_type):
            raise UnsuitableBlocksError(
                f"its files hold all experts ({mixtures[0]}) of a block in one tensor; what is written here, one for each "
                "matrix, transformers would not read"
            )
        groups = merged_groups(_ordered(block, calls.get(index), left_out) for index, block in enumerate(blocks))
        if not groups:
            raise UnsuitableBlocksError(f"no linear of its blocks ({path}) can be compressed: {_listed(left_out)}")
        ends = _ends(model, path)
    except UnsuitableBlocksError as error:
        raise InspectionError(
            f"{kind}{error}. Add a row to algorithms/modeling/families/table.py if one can describe it."
        ) from error
    experts = mixtures[0] if mixtures else None

    def _pattern(name: str) -> str:
        return name if experts is None else name.replace(f"{experts}.0.", f"{experts}.*.")

    row = ModelArchitecture(
        model_type=config.model_type,
        blocks=path,
        head=ends["head"],
        embeddings=ends["embeddings"],
        final_norm=ends["final_norm"],
        input_groups=tuple(tuple(_pattern(name) for name in group) for group in groups),
        residual_writers=(),
        input_norms={},
        feeders={},
        gates={},
        attention="",
        qkv=None,
        experts=experts,
        stored_names=names_in_files(config.model_type),
        is_inspected=True,
    )
    return Inspection(architecture=row, left_out={_pattern(name): why for name, why in left_out.items()}, basis=basis)


def _first_expert_model(
    config: PretrainedConfig, without_values: bool, trust_remote_code: bool, attn_implementation: str | None
) -> PreTrainedModel:
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=without_values):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code, **options)
    model.tie_weights()
    keep_first_experts(model)
    return model.eval().requires_grad_(False)


def _block_list(model: nn.Module, config: PretrainedConfig) -> str:
    """The outermost list of as many modules as the configuration has blocks, those with most parameters first."""
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    fitting = {name: part for name, part in lists.items() if len(part) == count}
    outer = {name: part for name, part in fitting.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise UnsuitableBlocksError(f"it has no list of {count} blocks (num_hidden_layers in config.json)")
    path = max(outer, key=lambda name: sum(parameter.numel() for parameter in outer[name].parameters()))
    if not any(isinstance(part, nn.Linear) for part in outer[path].modules()):
        kinds = Counter(
            type(part).__name__ for part in outer[path].modules() if any(True for _ in part.parameters(recurse=False))
        )
        raise UnsuitableBlocksError(f"its blocks ({path}) hold no linear layer, but {', '.join(sorted(kinds))}")
    return path


def _check_shares_nothing(blocks: nn.Module) -> None:
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks.children()):
        for name, parameter in block.named_parameters(remove_duplicate=False):
            if owners.setdefault(id(parameter), index) != index:
                raise UnsuitableBlocksError(f"blocks {owners[id(parameter)]} and {index} share their {name}")


def _left_out(blocks: Sequence[nn.Module], calls: Mapping[int, Sequence[Call]]) -> dict[str, str]:
    """Linears that are not compressed in any block, and why."""
    found: dict[str, str] = {}
    for index, block in enumerate(blocks):
        reasons = dict(_reasons(block, calls.get(index)))
        found = {**_strangers(block), **_beside(block, reasons), **reasons, **found}
    return found


def _strangers(block: nn.Module) -> dict[str, str]:
    """Modules with matrices of their own that are no linears."""
    return {
        name: f"no linear, but {type(part).__name__}"
        for name, part in block.named_modules()
        if not isinstance(part, nn.Linear) and any(tensor.ndim > 1 for tensor in part.parameters(recurse=False))
    }


def _beside(block: nn.Module, reasons: Mapping[str, str]) -> dict[str, str]:
    """Modules of one list do the same work in turn: where one is kept, the others are."""
    found = {}
    for name, part in block.named_modules():
        inside = [f"{name}.{inner}" for inner, linear in part.named_modules() if isinstance(linear, nn.Linear)]
        if isinstance(part, nn.ModuleList) and not isinstance(part, FirstExpert) and any(path in reasons for path in inside):
            found |= dict.fromkeys(inside, f"others of {name} are kept")
    return found


def _reasons(block: nn.Module, calls: Sequence[Call] | None) -> Iterator[tuple[str, str]]:
    lists = {name: part for name, part in block.named_modules() if isinstance(part, nn.ModuleList)}
    times = Counter(call.name for call in calls or ())
    partly = {call.name for call in calls or () if not call.is_whole}
    for name, linear in block.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if _routes(name, linear, lists):
            yield name, "a router"
        elif linear.out_features == 1:
            yield name, "a single output"
        elif calls is not None and times[name] != 1:
            yield name, f"called {times[name]} times in a forward"
        elif name in partly:
            yield name, "not given every token"


def _routes(name: str, linear: nn.Linear, lists: Mapping[str, nn.ModuleList]) -> bool:
    """Whether a linear chooses between the modules of a list that stands beside it, or beside a module that it belongs to."""
    parts = name.split(".")
    if any("router" in part for part in parts) or parts[-1] == "shared_expert_gate":
        return True
    for path, members in lists.items():
        around = path.split(".")[:-1]
        if parts[: len(around)] != around or name.startswith(f"{path}."):
            continue
        inside = parts[len(around) :]
        count = members.count if isinstance(members, FirstExpert) else len(members)
        if "gate" in inside or (len(inside) == 1 and linear.out_features == count):
            return True
    return False


def _ordered(block: nn.Module, calls: Sequence[Call] | None, left_out: Mapping[str, str]) -> Block:
    """The compressed linears of a block -> the first one with the same input; an expert's inputs are its own."""
    if calls is None:
        return {name: name for name, part in block.named_modules() if isinstance(part, nn.Linear) and name not in left_out}
    experts = [f"{name}." for name, part in block.named_modules() if isinstance(part, FirstExpert)]
    firsts: dict[object, str] = {}
    found = {}
    for call in calls:
        if call.name not in left_out:
            place = next((prefix for prefix in experts if call.name.startswith(prefix)), "")
            found[call.name] = firsts.setdefault((place, call.data), call.name)
    return found


def _ends(model: PreTrainedModel, path: str) -> dict[str, str]:
    """Embeddings, head and, as far as names tell, the norm behind the blocks."""
    names = {id(part): name for name, part in model.named_modules()}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or id(head) not in names or id(embeddings) not in names:
        raise UnsuitableBlocksError("it has no output projection over its vocabulary")
    around = model.get_submodule(path.rpartition(".")[0])
    norms = [part for part in around.children() if "norm" in type(part).__name__.lower()]
    return {
        "head": names[id(head)],
        "embeddings": names[id(embeddings)],
        "final_norm": names[id(norms[-1])] if norms else "",
    }


def _listed(left_out: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in left_out.items())
