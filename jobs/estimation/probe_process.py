"""One probe, in a process of its own: a job on a truncated model, its stages watched, and what everything in it cost.

    python -m jobs.estimation.probe_process RECIPE OUT PARENT

OUT receives JSON: ``stages`` and ``closing`` by name, each with the fields of :class:`jobs.estimation.probe.Measured`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from algorithms.modeling.files import atomic_write_json
from algorithms.registry import algorithm_class, config_class
from configs.errors import EXIT_CODES, CertificateError, exit_code
from configs.loader import LoadedRecipe, load_recipe
from jobs.estimation.prediction import CERTIFICATE, EVALUATION
from jobs.estimation.sampling import Account, sampled_algorithm
from jobs.execution.collaborators import Collaborators
from jobs.execution.interruption import interruptible
from jobs.logs import Terminal
from jobs.manifest import Manifest, StageRecord, read_manifest
from jobs.processes.environment import LAUNCHER, end_with_launcher
from jobs.runner import run_job
from jobs.workspace import open_workspace

_COST = ("user_cpu_s", "wall_s", "peak_memory_bytes", "peak_cuda_memory_bytes")


def measure(loaded: LoadedRecipe) -> dict[str, object]:
    """Run the job of a recipe, its long stages in part, and read what it cost out of its manifest."""
    accounts: dict[str, Account] = {}
    parts = Collaborators(
        algorithm_class=lambda name: sampled_algorithm(algorithm_class(name), accounts),
        terminal=Terminal(messages=Console(file=io.StringIO()), results=Console(file=io.StringIO())),
    )
    with suppress(CertificateError):  # a few blocks alone compute nonsense, on which a client may well differ
        run_job(loaded, parts=parts)
    return costs(read_manifest(open_workspace(loaded.recipe).manifest_path), accounts)


def costs(manifest: Manifest, accounts: Mapping[str, Account]) -> dict[str, object]:
    """What each stage, the certificate and the evaluation cost, as plain values."""
    stages = {name: _stage(record, accounts[name]) for name, record in manifest.stages.items()}
    closing = {CERTIFICATE: manifest.certificate, EVALUATION: manifest.evaluation}
    return {
        "stages": stages,
        "closing": {name: _cost(entry["cost"]) for name, entry in closing.items() if entry is not None},
    }


def _stage(record: StageRecord, account: Account) -> dict[str, object]:
    found = {**_cost(vars(record)), "disk_bytes": sum(file.size for file in record.files.values())}
    if account.sampled is not None:
        found |= {"user_cpu_s": account.sampled.user_cpu_s, "wall_s": account.sampled.wall_s}
    return {**found, "resident_bytes": account.resident_bytes, "kind": account.kind.value}


def _cost(usage: Mapping[str, Any]) -> dict[str, object]:
    return {name: usage[name] for name in _COST}


def main(arguments: list[str]) -> int:
    """Run the probe; returns the exit code of the error that ended it."""
    recipe, out, parent = Path(arguments[0]), Path(arguments[1]), arguments[2]
    try:
        with interruptible():
            end_with_launcher({LAUNCHER: parent})
            atomic_write_json(out, measure(load_recipe(recipe, plugin_config=config_class)))
    except tuple(EXIT_CODES) as error:
        sys.stderr.write(f"{error}\n")
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
