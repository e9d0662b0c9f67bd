"""A probe: the job itself on the first one and the first two blocks of its model, each in a process of its own.

Everything in a job costs a part that does not depend on the number of blocks, and a part for each block; two depths tell them
apart. What is measured is the real work, with the recipe's own text and the plugin's own stages, on the device of the job.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from algorithms.modeling.source import ModelSource
from algorithms.workload import ModelShapes
from configs.errors import ExitCode
from configs.loader import LoadedRecipe
from jobs.estimation.extrapolation import Measured, at_depth
from jobs.estimation.prediction import Prediction
from jobs.estimation.truncation import write_truncated
from jobs.processes.environment import without_ranks
from jobs.results.artifacts import remove_folder
from jobs.workspace import Workspace

logger = logging.getLogger(__name__)

_PROJECT_ROOT = Path(__file__).resolve().parents[2]
_SHOWN_LINES = 3
# What a probe does otherwise than the job: it works in folders of its own, on one process, and tells nobody.
_OWN = {
    "MODEL_PATH": None,
    "LOGGING_PATH": None,
    "CUSTOM_MODEL_PATH": None,
    "STAGES": None,
    "NUM_PROCESSES": None,
    "TRACKING": {"wandb": False},
    "PUSH_TO_HUB": None,
}
_LEFT_OUT = ("push_to_hub",)  # the other spelling

Start = Callable[[Path, Path, Path], tuple[int, str]]


class ProbeError(RuntimeError):
    """A probe that gave no figures; the message says why. Nothing else is affected."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Costs at one or two depths: number of blocks -> name of a stage or closing line -> cost; and the time it took."""

    costs: Mapping[int, Mapping[str, Measured]]
    wall_s: float

    def predictions(self, shapes: ModelShapes, stages: Sequence[str]) -> dict[str, Prediction]:
        """On the whole model, for the ``stages`` that run, in order, and for what follows them."""
        return at_depth(self.costs, shapes, stages)


@dataclass(frozen=True, kw_only=True)
class _Scratch:
    """The probe's own user folder, and what it does there."""

    folder: Path
    loaded: LoadedRecipe
    source: ModelSource
    workspace: Workspace
    start: Start
    failures: list[str] = field(default_factory=list)

    def measure(self, blocks: int) -> Mapping[str, Measured] | None:
        """The costs on so many blocks; None, and a line in ``failures``, where the recipe refuses so few."""
        model = write_truncated(self.source, blocks, self.folder / f"blocks_{blocks}" / "model")
        recipe, out = model.with_name("recipe.yaml"), model.with_name("costs.json")
        user_folder = self.folder / "user"
        cache = self.workspace.cache_dir
        own = {"JOB_ID": "probe", "MODEL": str(model), "USER_FOLDER": str(user_folder), "CACHE_PATH": str(cache)}
        given = {key: value for key, value in self.loaded.resolved.items() if key not in _LEFT_OUT}
        values = {**given, **_OWN, **own, "CUDA_ID": list(self.loaded.recipe.cuda_id[:1])}
        if isinstance(given.get("EVALUATION"), Mapping):
            values["EVALUATION"] = {
                **given["EVALUATION"],
                "tasks": [],
            }  # hours of answers, which a block or two cannot foretell
        recipe.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        user_folder.mkdir(exist_ok=True)
        for name in ("datasets", "models"):
            real, link = self.workspace.user_folder / name, user_folder / name
            if real.is_dir() and not link.exists():
                link.symlink_to(real, target_is_directory=True)
        code, said = self.start(recipe, out, model.with_name("log"))
        if code == ExitCode.RECIPE:
            self.failures.append(said)
            return None
        if code:
            raise ProbeError(f"The probe on {blocks} blocks ended with {code}: {said}")
        found = json.loads(out.read_text(encoding="utf-8"))
        return {name: Measured(**cost) for name, cost in (found["stages"] | found["closing"]).items()}


def probe(loaded: LoadedRecipe, source: ModelSource, workspace: Workspace, *, start: Start | None = None) -> Probed:
    """Measure what the job of a recipe costs on the first blocks of its model.

    The folder it works in is below the cache folder and is removed. A recipe that so few blocks cannot satisfy is tried on
    more, up to half of them.

    Args:
        loaded: the recipe.
        source: its model.
        workspace: its folders; nothing is written into the job's.
        start: runs a recipe (file, place for the costs, log) in a fresh process; by default the real one.

    Raises:
        ProbeError: no figures; says why.
    """
    started, blocks = time.monotonic(), source.num_blocks
    with _scratch_folder(workspace.cache_dir) as folder:
        scratch = _Scratch(folder=folder, loaded=loaded, source=source, workspace=workspace, start=start or _start)
        for depth in _depths(blocks):
            shallow = scratch.measure(depth)
            if shallow is not None:
                break
        else:
            raise ProbeError(f"The recipe cannot be probed on part of the model: {scratch.failures[-1]}")
        costs = {depth: shallow}
        deep = scratch.measure(depth + 1) if depth < blocks else None
        if deep is not None:
            costs[depth + 1] = deep
    return Probed(costs=costs, wall_s=time.monotonic() - started)


def _depths(blocks: int) -> Iterator[int]:
    depth = 1
    while depth == 1 or depth <= blocks // 2:
        yield depth
        depth *= 2


@contextmanager
def _scratch_folder(cache: Path) -> Iterator[Path]:
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="probe-", dir=cache))
    try:
        yield folder
    finally:
        remove_folder(folder)


def _start(recipe: Path, out: Path, log: Path) -> tuple[int, str]:
    """Run the probe of a recipe; returns its exit code and its last words. It ends with this process, however that ends."""
    search = os.pathsep.join(filter(None, [str(_PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        **without_ranks(os.environ),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": search,
    }
    command = [sys.executable, "-m", "jobs.estimation.probe_process", str(recipe), str(out), str(os.getpid())]
    with (
        log.open("w", encoding="utf-8") as stream,
        subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT) as process,
    ):
        try:
            code = process.wait()
        finally:
            process.terminate()  # nothing where it has ended; otherwise this process is being stopped
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return code, " ".join(said[-_SHOWN_LINES:])
