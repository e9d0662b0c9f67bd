"""What a page is made of, and the page: one HTML file with its style and figures inside it, everything else escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Badge:
    """A word that is seen first. ``kind`` gives its colour: passed, failed, unchecked or finished."""

    text: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Number:
    """A figure that is seen next, and what it is."""

    value: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """Cells of a table; ``kind`` "default" sets them back."""

    cells: Sequence[str]
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; with ``folded`` it is opened by a click on these words."""

    columns: Sequence[str]
    rows: Sequence[Row]
    folded: str = ""

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[Sequence[str]], folded: str = "") -> Table:
        """A table of plain rows."""
        return cls(columns=columns, rows=[Row(cells=cells) for cells in rows], folded=folded)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure and what it shows."""

    svg: Markup
    caption: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page; ``id`` is what a link to it ends with."""

    id: str
    title: str
    texts: Sequence[str] = ()
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Drawing] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing to show."""
        return not (self.notes or self.figures or any(table.rows for table in self.tables))


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page. Sections without content are left out."""

    title: str
    subtitle: str
    badges: Sequence[Badge] = ()
    numbers: Sequence[Number] = ()
    sections: Sequence[Section] = field(default_factory=list)

    def render(self) -> str:
        """The page as HTML."""
        environment = Environment(
            loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        shown = [section for section in self.sections if not section.is_empty]
        return environment.get_template("page.html.j2").render(
            title=self.title, subtitle=self.subtitle, badges=self.badges, numbers=self.numbers, sections=shown
        )
