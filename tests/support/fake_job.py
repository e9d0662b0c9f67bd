"""A job of the fake algorithm in a folder: recipe, collaborators, and a process that can be killed.

``python -m tests.support.fake_job FOLDER JSON`` runs one, with the keyword arguments of :func:`recipe` as JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console

from algorithms.base import TokenRequest
from configs.loader import LoadedRecipe
from configs.recipe import Recipe
from jobs.execution.collaborators import Collaborators
from jobs.logs import Terminal
from jobs.runner import JobResult, run_job
from jobs.workspace import Workspace
from tests.support.fake_algorithm import (
    VOCABULARY,
    FakeAlgorithm,
    FakeConfig,
    FakeSource,
    TableModel,
    base_table,
)


def recipe(folder: Path, *, data: str = "A", envelope: dict | None = None, **parameters: object) -> LoadedRecipe:
    """A recipe whose job, model and journal are below ``folder``. ``envelope`` are further upper-case keys."""
    keys = {"ALGORITHM": "FAKE", "JOB_ID": "one", "USER_FOLDER": str(folder / "user_data"), "DATASET_NAME": data}
    keys |= {"MODEL": "org/fake", **(envelope or {})}
    config = FakeConfig(journal=folder / "journal.txt", **parameters)
    shown = config.model_dump(mode="json", exclude={"wait_at", "fail_at", "trouble"})
    return LoadedRecipe(
        recipe=Recipe.model_validate(keys),
        parameters=config,
        resolved={**keys, "llm": {"FAKE": shown}},
        file=Path("recipe.yaml"),
        warnings=("JOB_PATH has no effect",),
    )


def parts(folder: Path, behaviour: str = "pass", **changes: object) -> Collaborators:
    """Collaborators that need no model, no data set and no network. ``behaviour`` is the stub client's."""

    def load_tokens(given: Recipe, request: TokenRequest, source: FakeSource, workspace: Workspace) -> SimpleNamespace:
        seed = int(hashlib.sha256(given.dataset_name.encode()).hexdigest()[:8], 16) + request.seed
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(VOCABULARY, (request.num_samples, 1, request.sequence_length), generator=generator)
        sequences, cut = tuple(drawn), request.num_samples - request.validation_samples
        record = {"data": given.dataset_name, "samples": list(range(request.num_samples))}
        return SimpleNamespace(train=sequences[:cut], validation=sequences[cut:], key="", record=record)

    def corpus_tokens(
        name: str, given: Recipe, source: FakeSource, workspace: Workspace, *, split: str = "test"
    ) -> torch.Tensor:
        return torch.randint(VOCABULARY, (101,), generator=torch.Generator().manual_seed(len(name)))

    values = {
        "algorithm_class": lambda name: FakeAlgorithm,
        "resolve_model": lambda given, workspace: FakeSource.create(folder / "model"),
        "open_model": lambda directory, name, trust: FakeSource(directory=directory, name=name),
        "tokens_key": lambda given, request, source: f"{given.dataset_name} {request}",
        "load_tokens": load_tokens,
        "corpus_tokens": corpus_tokens,
        "check_weights": lambda source, workspace, progress: None,
        "open_source": lambda source: TableModel(base_table()),
        "client_command": lambda *arguments: [
            sys.executable,
            "-m",
            "tests.support.stub_client",
            behaviour,
            *(str(argument) for argument in arguments),
        ],
        "terminal": quiet_terminal(),
    }
    return Collaborators(**{**values, **changes})


def quiet_terminal() -> Terminal:
    """A terminal that nobody watches; its text is in ``results.file`` and ``messages.file``."""
    return Terminal(messages=Console(file=io.StringIO()), results=Console(file=io.StringIO()))


def run(folder: Path, *, behaviour: str = "pass", changes: dict | None = None, **options: object) -> JobResult:
    """Run the fake job in ``folder``."""
    return run_job(recipe(folder, **options), parts=parts(folder, behaviour, **(changes or {})))


def job_dir(folder: Path) -> Path:
    return folder / "user_data" / "jobs" / "Kompress" / "one"


def journal(folder: Path) -> list[str]:
    """What was computed, over all runs; emptied by reading."""
    path = folder / "journal.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def manifest(folder: Path) -> dict:
    return json.loads((job_dir(folder) / "manifest.json").read_text())


if __name__ == "__main__":
    run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
