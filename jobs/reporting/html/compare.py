"""The comparison of several jobs as a page."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.reporting.comparison import UNCOMPRESSED, Entry, Plane, planes, safe_name, table_of
from jobs.reporting.html.drawing import Axis, Point, plane
from jobs.reporting.html.page import Drawing, Page, Section, Table

_MEGABYTE = 1e6


def comparison(entries: Sequence[Entry]) -> str:
    """The page as HTML: a table, and a plane of size and quality for every text."""
    columns, rows = table_of(entries)
    models = list(dict.fromkeys(entry.model for entry in entries))
    notes = [] if len(models) == 1 else ["These jobs start from different models; only sizes and tasks compare as they stand."]
    return Page(
        title=f"{sum(bool(entry.method) for entry in entries)} jobs compared",
        subtitle=", ".join(models),
        sections=[
            Section(
                id="table",
                title="Jobs",
                texts=["Behind a text's name stands the sequence length, behind a metric the number of samples."],
                notes=notes,
                tables=[Table.of(columns, rows)],
            ),
            *(_section(found) for found in planes(entries)),
        ],
    ).render()


def _section(found: Plane) -> Section:
    points = [
        Point(
            number=place.number,
            label=place.entry.name if place.entry.method else UNCOMPRESSED,
            x=place.bytes / _MEGABYTE,
            y=place.value,
            is_best=place.is_best,
            spread=place.interval,
        )
        for place in found.places
    ]
    svg = plane(f"{found.title} {found.text.digest}".rstrip(), points, Axis(x="weights on disk (MB)", y=found.figure))
    caption = "Smaller is to the left, better is below. Round points: no other is both smaller and better."
    return Section(
        id=safe_name(f"{found.title} {found.text.digest}"), title=found.title, figures=[Drawing(svg=svg, caption=caption)]
    )
