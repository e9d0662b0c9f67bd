"""main.py with the fake algorithm in its table and no real model or text: what a job on several processes is tested with.

The folder of the job is FAKE_FOLDER of the environment. :func:`write_recipe` makes the recipe.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from algorithms import registry  # noqa: E402

PROGRAM = Path(__file__).resolve()


def write_recipe(folder: Path, envelope: dict | None = None, *, name: str = "recipe.yaml", **parameters: object) -> Path:
    """A recipe of the fake algorithm, its job, model and journal below ``folder``."""
    keys = {"ALGORITHM": "FAKE", "JOB_ID": "one", "USER_FOLDER": str(folder / "user_data"), "DATASET_NAME": "A"}
    block = {"journal": str(folder / "journal.txt"), "tunes": True, "shared": True, **parameters}
    path = folder / name
    path.write_text(yaml.safe_dump(keys | {"MODEL": "org/fake", "llm": {"FAKE": block}} | (envelope or {})))
    return path


def _with_the_fake_algorithm() -> None:
    registry.REGISTRY = (
        *registry.REGISTRY,
        registry.Row(
            name="FAKE",
            config_path="tests.support.fake_algorithm:FakeConfig",
            class_path="tests.support.fake_algorithm:FakeAlgorithm",
            summary="compresses nothing",
        ),
    )


def _without_models() -> None:
    import jobs.processes.following
    import jobs.runner
    from jobs.logs import Terminal
    from tests.support.fake_job import parts

    fakes = parts(Path(os.environ["FAKE_FOLDER"]), terminal=Terminal())
    jobs.runner.Collaborators = jobs.processes.following.Collaborators = lambda: fakes


if __name__ == "__main__":
    import main

    _with_the_fake_algorithm()
    if "RANK" in os.environ:  # the process that only starts ranks runs no stage
        _without_models()
    sys.exit(main.main(program=PROGRAM))
