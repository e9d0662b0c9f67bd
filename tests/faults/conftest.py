"""One warm process, and one finished job to damage, for all tests of this folder."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.kill import result
from tests.faults.warm_process import ROOT, Outcome, WarmProcess

RECIPE = ROOT / "tests" / "faults" / "recipe.yaml"
Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def run_main() -> Iterator[Run]:
    """Runs main.py with any words."""
    with WarmProcess() as process:
        yield process.run


@pytest.fixture(scope="session")
def run(run_main: Run) -> Run:
    """Runs the fault recipe in a folder: ``run(folder, "KEY=VALUE", ..., limits={...})``."""

    def run_recipe(folder: Path, *overrides: str, **options: object) -> Outcome:
        """One run of main.py."""
        return run_main("--yaml_path", str(RECIPE), f"USER_FOLDER={folder}", *overrides, **options)

    return run_recipe


@pytest.fixture(scope="session")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user folder of a finished job; to be left as it is."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder)
    assert done.code == 0, done.said
    return folder


@pytest.fixture(scope="session")
def expected(whole: Path) -> dict[str, str]:
    """What a finished job's result is."""
    return result(whole)


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished job."""
    return Path(shutil.copytree(whole, tmp_path / "user", symlinks=True))
