"""The parts of a report that go layer by layer: errors of blocks and linears, and the curves of their tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jobs.reporting.html.drawing import Axis, Series, finite, lines
from jobs.reporting.html.measurements import BlockRecord, Curve, LinearRecord, Measurements
from jobs.reporting.html.page import Drawing, Section, Table


def errors_section(blocks: Sequence[BlockRecord]) -> Section:
    """The error of every block and linear, and its distance to the Gaussian rate-distortion function."""
    linears = [linear for block in blocks for linear in block.linears]
    figures = []
    outputs = [block for block in blocks if block.output_error is not None]
    if outputs:
        series = Series(label="block", x=[b.index for b in outputs], y=[b.output_error or math.nan for b in outputs])
        figures.append(
            Drawing(
                svg=lines("Error of each block's output", [series], Axis(x="block", y="relative squared error", whole=True)),
                caption="Squared error of each block's output over its square, everything before it compressed as well.",
            )
        )
    if linears:
        axis = Axis(x="block", y="relative squared error", is_log=True, whole=True)
        figures.append(
            Drawing(
                svg=lines("Error of each linear", _by_name(linears, "relative_error"), axis),
                caption="Squared error of each linear's outputs over their square, before block tuning; of experts their mean.",
            )
        )
    if any(linear.distance is not None for linear in linears):
        axis = Axis(x="block", y="bits a weight", whole=True, marks={"Gaussian rate-distortion function": 0.0})
        figures.append(
            Drawing(
                svg=lines("Distance to the Gaussian rate-distortion function", _by_name(linears, "distance"), axis),
                caption="Bits a weight beyond what a Gaussian matrix would take for the same error under the same Hessian "
                "(reverse water-filling over its eigenvalues). A line to measure by, not a bound: trained weights are not "
                "Gaussian and may lie below it.",
            )
        )
    rows = [
        (
            str(one.block),
            one.name,
            _text(one.relative_error, ".4g"),
            _text(one.bits_per_weight, ".3f"),
            _text(one.distance, ".3f"),
        )
        for one in linears
    ]
    columns = ("block", "linear", "relative squared error", "bits a weight", "bits beyond Gaussian rate-distortion")
    return Section(
        id="errors", title="Errors, layer by layer", tables=[Table.of(columns, rows, folded="every linear")], figures=figures
    )


def _by_name(linears: Sequence[LinearRecord], value: str) -> list[Series]:
    """A line for each linear of a block; for all experts of a block one of their means."""
    found: dict[str, dict[int, list[float | None]]] = {}
    for one in linears:
        found.setdefault(one.place, {}).setdefault(one.block, []).append(getattr(one, value))
    return [
        Series(label=place, x=list(blocks), y=finite([_mean(values) for values in blocks.values()]))
        for place, blocks in found.items()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def experts_section(blocks: Sequence[BlockRecord]) -> Section:
    """How many tokens the experts of a mixture were given."""
    experts = [expert for block in blocks for expert in block.experts]
    if not experts:
        return Section(id="experts", title="Experts")
    mixed = [block for block in blocks if block.experts]
    counts = [sorted(expert.tokens for expert in block.experts) for block in mixed]
    shown = {
        "most": [row[-1] for row in counts],
        "median": [row[len(row) // 2] for row in counts],
        "least": [row[0] for row in counts],
    }
    series = [Series(label=label, x=[block.index for block in mixed], y=values) for label, values in shown.items()]
    drawing = Drawing(
        svg=lines("Tokens of each expert", series, Axis(x="block", y="tokens", whole=True)),
        caption="Calibration tokens that the routers gave the experts of each block. Statistics of an expert that was given "
        "too few were taken from all tokens.",
    )
    rows = [(str(one.block), str(one.number), str(one.tokens), "all tokens" if one.saw_all else "its own") for one in experts]
    starved = sum(one.saw_all for one in experts)
    table = Table.of(("block", "expert", "tokens", "calibrated on"), rows, folded=f"every expert ({starved} on all tokens)")
    return Section(id="experts", title="Experts", tables=[table], figures=[drawing])


def tuning_section(found: Measurements) -> Section:
    """The curves of block tuning and of whole models."""
    figures = []
    curves = {block.index: block.validation_losses or block.training_losses for block in found.blocks}
    tuned = {index: curve for index, curve in curves.items() if curve and curve[0] > 0}
    if tuned:
        series = [
            Series(label=f"block {index}", x=range(len(curve)), y=[loss / curve[0] for loss in curve])
            for index, curve in tuned.items()
        ]
        figures.append(
            Drawing(
                svg=lines("Block tuning", series, Axis(x="epoch", y="loss, as a share of the first", whole=True)),
                caption="Block tuning: mean squared error of each block's output, on held-out text where there is any.",
            )
        )
    for curve in found.curves:
        figures += _curves(curve)
    return Section(id="tuning", title="Tuning", figures=figures)


def _curves(curve: Curve) -> list[Drawing]:
    series = [Series(label="loss of each step", x=curve.steps, y=curve.losses)] if curve.steps else []
    held_out = [(line.get("step", 0), line["divergence"]) for line in curve.evaluations if line.get("divergence") is not None]
    if held_out:
        series.append(Series(label="held-out text", x=[step for step, _ in held_out], y=[value for _, value in held_out]))
    found = []
    if series:
        svg = lines(f"Loss of {curve.stage}", series, Axis(x="step", y="KL divergence (nats)", whole=True))
        found.append(Drawing(svg=svg, caption=f"{curve.stage}: divergence from the model that is imitated."))
    texts = dict.fromkeys(name for line in curve.evaluations for name in (line.get("perplexity") or {}))
    if texts:
        by_text = [
            Series(
                label=name,
                x=[line.get("step", 0) for line in curve.evaluations if name in (line.get("perplexity") or {})],
                y=[line["perplexity"][name] for line in curve.evaluations if name in (line.get("perplexity") or {})],
            )
            for name in texts
        ]
        svg = lines(f"Perplexity during {curve.stage}", by_text, Axis(x="step", y="perplexity", whole=True))
        found.append(Drawing(svg=svg, caption=f"{curve.stage}: perplexity of texts that decide nothing."))
    return found


def _text(value: float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"
