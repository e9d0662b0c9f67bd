"""What of a model stays as it is, by the names under which clients look for it."""

from __future__ import annotations

from torch import nn

from algorithms.modeling.source import ModelSource


def kept_linears(source: ModelSource) -> tuple[str, ...]:
    """Full names of all modules that multiply by a matrix which is not compressed, the head first.

    Beside the head these are projections around the blocks and, in mixtures, routers and gates. Clients would look for codes in
    whatever is not listed. Where files of the family name a module in another way than the model, both names are listed.
    """
    row, model = source.architecture, source.skeleton()
    blocks = f"{row.blocks}."
    compressed = {f"{blocks}{index}.{name}" for index in range(source.num_blocks) for name in row.linears}
    found = [row.head]
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding) and name not in compressed:
            found.append(name)
    spelled = [spelling for name in found for spelling in (name, source.stored_as(f"{name}.weight").removesuffix(".weight"))]
    return tuple(dict.fromkeys(spelled))
