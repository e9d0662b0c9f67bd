"""README's table of model families, from the cells that tests check: ``python -m tests.integration.families.table``."""

from __future__ import annotations

import sys

from tests.integration.families.matrix import MATRIX, METHODS, Cell
from tests.support.source_tree import ROOT

BEGIN, END = "<!-- families -->", "<!-- /families -->"
_MEANING = {
    "compressed-tensors": "read back by transformers with compressed-tensors",
    "aqlm": "by transformers with aqlm",
    "padded": "by transformers, as a smaller model of its family",
    "dense": "by transformers, decoded",
}


def rendered() -> str:
    """The table, and below it why some cells have no format of codes or none at all."""
    lines = ["| family | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    notes: list[str] = []
    for family, row in MATRIX.items():
        lines.append(f"| {family} | " + " | ".join(_shown(row[method], method, notes) for method in METHODS) + " |")
    meaning = "; ".join(f"`{name}`: {text}" for name, text in _MEANING.items())
    said = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", f"{meaning[0].upper()}{meaning[1:]}.", "", *said])


def _shown(cell: Cell, method: str, notes: list[str]) -> str:
    marks = []
    for name, words in cell.refused.items():
        note = f"{name} is refused: {words}." if name != method else f"Refused: {words}."
        if note not in notes:
            notes.append(note)
        marks.append(str(notes.index(note) + 1))
    shown = "no" if cell.certified is None else f"`{cell.certified}`"
    return " ".join([shown, *(f"({mark})" for mark in marks)])


def replaced(text: str) -> str:
    """README with the table between its two marks as it is rendered now."""
    before, rest = text.split(f"{BEGIN}\n")
    _, after = rest.split(f"\n{END}")
    return f"{before}{BEGIN}\n{rendered()}\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{rendered()}\n")
