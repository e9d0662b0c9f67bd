"""What transformers knows of the names in a family's files, where the architecture table has no row to say it.

transformers keeps, for families whose modules have other names than their files, a list of renamings and of weights that are
joined. Renamings of plain text, and the names of experts' matrices, are all that is taken from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

_PLAIN = re.compile(r"[\w.]+")
_OF_EXPERTS = re.compile(r".*\.experts\.\*(\.\w+\.)weight")
_JOINED = {"gate_up_proj": (".gate_proj.", ".up_proj."), "down_proj": (".down_proj.",)}
_FROM_THE_START = ("model.", "transformer.")  # what begins so begins nowhere else


def names_in_files(model_type: str) -> tuple[tuple[str, str], ...]:
    """Pairs for ``ModelArchitecture.stored_names``, as far as such pairs can say it."""
    renamed = (_renamed(change) for change in get_checkpoint_conversion_mapping(model_type) or ())
    return tuple(dict.fromkeys(chain(*renamed)))


def has_files_by_expert(model_type: str) -> bool:
    """Whether transformers reads files of the family that have a tensor for each matrix of each expert."""
    changes = get_checkpoint_conversion_mapping(model_type) or ()
    return any(_OF_EXPERTS.fullmatch(source) for change in changes for source in change.source_patterns)


def _renamed(change: object) -> Iterator[tuple[str, str]]:
    sources, targets = change.source_patterns, change.target_patterns  # type: ignore[attr-defined]
    if len(targets) != 1:
        return
    experts = [_OF_EXPERTS.fullmatch(source) for source in sources]
    ours = _JOINED.get(targets[0].rpartition(".")[2], ())
    if all(experts) and len(experts) == len(ours):
        yield from ((match[1], name) for match, name in zip(experts, ours, strict=True) if match[1] != name)
    elif len(sources) == 1 and not any(experts):
        theirs, target = (pattern.replace("\\.", ".") for pattern in (sources[0], targets[0]))
        anchored = theirs.startswith("^") and theirs[1:].startswith(_FROM_THE_START)
        theirs = theirs[1:] if anchored else theirs
        if _PLAIN.fullmatch(theirs) and _PLAIN.fullmatch(target):
            yield theirs, target
