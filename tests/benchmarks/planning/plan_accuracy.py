"""How close a plan comes to what its job then costs.

    python -m tests.benchmarks.planning.plan_accuracy [--model DIR --tokens FILE.pt] [--case AQLM --case GPTQ ...] [--guess] \
        [KEY=VALUE ...]

Every case is one recipe: `main.py plan --probe` in an empty user folder, then `main.py` in it, both on one thread. Printed are,
of each line, what was predicted, what it did cost, and the larger of the two over the smaller. Some lines are over in
milliseconds; times are compared from a tenth of a second on. `--guess` leaves the probe out, KEY=VALUE overrides the recipes.
Wall time says something on an otherwise idle machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.aqlm_perplexity import ROOT

QUICKSTART, PV_TUNING = "examples/quickstart/recipe.yaml", "examples/pv_tuning/recipe.yaml"
TEXT = ("nsamples=128", "model_seqlen=256")
SHORT_CODES = ("nbits_per_codebook=8", "in_group_size=8", "finetune_max_epochs=4")
RECOVERY = ("to_finetune=true", "recovery.model_seqlen=256", "recovery.max_epochs=2")
CASES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "AQLM": (QUICKSTART, ()),
    "AQLM-2x8": (QUICKSTART, tuple(f"llm.AQLM.calibration_config.{key}" for key in SHORT_CODES)),
    "PV-Tuning": (PV_TUNING, ()),
    **{name: (QUICKSTART, tuple(f"llm.{name}.{key}" for key in TEXT)) for name in ("GPTQ", "AutoAWQ", "FlapPruner", "RTN")},
    "recovery": (QUICKSTART, tuple(f"llm.FlapPruner.{key}" for key in (*TEXT, *RECOVERY))),
}
ALGORITHMS = {"AQLM-2x8": "AQLM", "PV-Tuning": "AQLM", "recovery": "FlapPruner"}
COSTS = (("user_cpu_s", "CPU s", 1.0, 0.1), ("wall_s", "wall s", 1.0, 0.1), ("peak_memory_bytes", "MB", 1e6, 1.0))
LONGEST = 3600.0  # seconds that one command may take


def main() -> None:
    """Run the cases that the command line names and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--guess", action="store_true")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    for case in arguments.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            _say(*_case(case, arguments, Path(folder)))


def _case(case: str, arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    recipe, overrides = CASES[case]
    command = ["--yaml_path", recipe, *overrides, f"USER_FOLDER={folder}", "JOB_ID=benchmark", *arguments.overrides]
    name = ALGORITHMS.get(case, case)
    if name != "AQLM":
        command += [f"ALGORITHM={name}", "EXPORT=[]", "llm.AQLM=null"]
    for key, path in (("MODEL", arguments.model), ("DATA_PATH", arguments.tokens)):
        command += [] if path is None else [f"{key}={path.resolve()}"]
    seconds = 0.0 if arguments.guess else _timed("plan", "--probe", *command)
    _timed(*command)
    manifest = json.loads((folder / "jobs" / "Kompress" / "benchmark" / "manifest.json").read_text(encoding="utf-8"))
    yield f"{case}: the probe took {seconds:.0f} s" if seconds else f"{case}: without a probe"
    lines = list(_lines(manifest))
    for name, predicted, actual in [*lines, _total(lines)]:
        cells = (
            f"{label} {predicted[key] / unit:7.1f} -> {actual[key] / unit:7.1f}{ratio(predicted[key], actual[key], least):6.2f}"
            for key, label, unit, least in COSTS
        )
        yield f"  {name:12} {'   '.join(cells)}"


def ratio(predicted: float, actual: float, least: float) -> float:
    """The larger over the smaller, both at ``least`` so much."""
    predicted, actual = max(predicted, least), max(actual, least)
    return max(predicted, actual) / min(predicted, actual)


def _lines(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float], Mapping[str, float]]]:
    """Name, prediction and cost of each stage, the certificate and the evaluation."""
    for name, record in manifest["stages"].items():
        yield name, record["predicted"], record
    for name in ("certificate", "evaluation"):
        if manifest[name] is not None:
            yield name, manifest[name]["predicted"], manifest[name]["cost"]


def _total(
    lines: Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]],
) -> tuple[str, Mapping[str, float], Mapping[str, float]]:
    """Times added up, and the largest memory."""
    both = []
    for costs in ([predicted for _, predicted, _ in lines], [actual for _, _, actual in lines]):
        times = {key: sum(cost[key] for cost in costs) for key in ("user_cpu_s", "wall_s")}
        both.append({**times, "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs)})
    return "total", both[0], both[1]


def _timed(*arguments: str) -> float:
    """Run main.py on one thread; the wall seconds it took."""
    environment, started = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, time.monotonic()
    command = [sys.executable, "main.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.monotonic() - started


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
