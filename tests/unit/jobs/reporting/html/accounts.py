"""A report's account that needs no job."""

import dataclasses
import json
from pathlib import Path

from jobs.manifest import Manifest, RunRecord, Status
from jobs.reporting.html.report import Account
from tests.support.fake_job import recipe
from tests.unit.jobs.reporting.test_summary import FIGURES, STAGE, TASK, summary

LINES = [
    {
        "stage": "calibration",
        "event": "block",
        "index": index,
        "output_error": 0.01 * (index + 1),
        "linears": {
            name: {"relative_error": 0.02 / (index + 1), "bits_per_weight": 3.0, "gaussian_bits": 2.5}
            for name in ("self_attn.q_proj", "mlp.up_proj")
        },
        "tuning": {"training_losses": [4.0, 3.0, 2.5], "validation_losses": [4.0, 3.5, 3.0]},
    }
    for index in range(3)
]
LINES += [{"stage": "calibration", "event": "step", "step": step, "loss": 1 / step} for step in range(1, 6)]
LINES += [{"stage": "calibration", "event": "evaluation", "step": 5, "divergence": 0.3, "perplexity": {"ptb": 20.0}}]


def account(folder: Path, **changes: object) -> Account:
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    figures = dataclasses.replace(
        FIGURES, base_perplexity_interval=(20.0, 24.0), perplexity_interval=(21.0, 26.0), ratio_interval=(1.06, 1.075)
    )
    shown = dataclasses.replace(summary(), figures=dataclasses.replace(summary().figures, corpora=(figures,), tasks=(TASK,)))
    manifest = Manifest(
        job="Kompress/one",
        algorithm="AQLM",
        versions={"torch": "2.13"},
        run=RunRecord(id="r", status=Status.FINISHED, started="now"),
        warnings=("Mind <b>this</b>.",),
        stages={"calibration": STAGE},
    )
    values = {"summary": shown, "manifest": manifest, "metrics": metrics, "loaded": recipe(folder, scale=0.25)}
    return Account(**{**values, **changes})
