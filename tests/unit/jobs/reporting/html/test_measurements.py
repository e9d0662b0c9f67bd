import json

import pytest

from jobs.reporting.html.layers import _by_name, errors_section, experts_section
from jobs.reporting.html.measurements import read_measurements
from tests.unit.jobs.reporting.html.accounts import LINES


def written(tmp_path, lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_blocks_linears_and_curves(tmp_path):
    found = read_measurements(written(tmp_path, LINES), ["calibration"])
    assert [block.index for block in found.blocks] == [0, 1, 2]
    linear = found.blocks[1].linears[0]
    assert (linear.name, linear.relative_error, linear.distance) == ("self_attn.q_proj", pytest.approx(0.01), 0.5)
    (curve,) = found.curves
    assert (curve.steps, curve.losses[1]) == ([1, 2, 3, 4, 5], 0.5)
    assert curve.evaluations[0]["perplexity"] == {"ptb": 20.0}


def test_a_replayed_line_counts_once_and_the_last_time(tmp_path):
    again = {**LINES[0], "output_error": 0.5}
    found = read_measurements(written(tmp_path, [LINES[0], *LINES[3:5], again, LINES[3]]), ["calibration"])
    assert [block.output_error for block in found.blocks] == [0.5]
    assert found.curves[0].steps == [1, 2]


def test_other_stages_damaged_lines_and_missing_figures(tmp_path):
    lines = [
        '{"stage": "calibration", "event": "blo',
        "[1]",
        {**LINES[0], "stage": "recovery"},
        {"stage": "calibration", "event": "block", "index": 4, "linears": {"a": {"relative_error": "nan"}}},
        {"stage": "calibration", "event": "step", "step": 1, "loss": "inf"},
    ]
    found = read_measurements(written(tmp_path, lines), ["calibration"])
    (block,) = found.blocks
    assert block.index == 4
    assert block.linears[0].relative_error is block.linears[0].distance is None
    assert found.curves[0].losses == []
    assert not read_measurements(tmp_path / "nothing", ["calibration"]).blocks


def test_experts_are_told_apart_in_the_table_and_share_a_line_in_figures(tmp_path):
    errors = {0: 0.1, 1: 0.3, 12: 0.2}
    linears = {f"mlp.experts.{number}.up_proj": {"relative_error": error} for number, error in errors.items()}
    linears["mlp.shared_expert.up_proj"] = {"relative_error": 0.7}
    experts = {"tokens": [5, 0, 90], "floor": 6, "calibrated_on_all_tokens": [0, 1]}
    line = {"stage": "calibration", "event": "block", "index": 3, "linears": linears, "experts": experts}
    (block,) = read_measurements(written(tmp_path, [line]), ["calibration"]).blocks
    assert [(one.number, one.tokens, one.saw_all) for one in block.experts] == [(0, 5, True), (1, 0, True), (2, 90, False)]
    errors_shown, shown = errors_section([block]), experts_section([block])
    assert [row.cells[1] for row in errors_shown.tables[0].rows] == list(linears)
    assert "mlp.experts.*.up_proj" in errors_shown.figures[0].svg
    assert "mlp.experts.12" not in errors_shown.figures[0].svg
    mean, shared = _by_name(block.linears, "relative_error")
    assert (mean.label, list(mean.y)) == ("mlp.experts.*.up_proj", [pytest.approx(0.2)])
    assert (shared.label, list(shared.y)) == ("mlp.shared_expert.up_proj", [0.7])
    assert [row.cells for row in shown.tables[0].rows][1] == ("3", "1", "0", "all tokens")
    assert shown.tables[0].folded == "every expert (2 on all tokens)"
