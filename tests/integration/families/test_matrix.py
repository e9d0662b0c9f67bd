"""Every cell of the table of model families, by a whole job: load, calibrate, convert, and the certificate of the client."""

import json
import subprocess

import pytest

from algorithms.formats.client import main as run_client
from algorithms.modeling.families.table import known_families
from configs.errors import ExitCode
from jobs.execution import conclusion
from jobs.reporting import certificate
from main import main
from tests.integration.families.matrix import MATRIX, METHODS
from tests.integration.families.table import BEGIN, END, replaced
from tests.support.families.cases import CASES, MIXTURES, save_case
from tests.support.models import FAMILIES, save_family
from tests.support.source_tree import ROOT

CELLS = [(family, method) for family, row in MATRIX.items() for method in row]
VARIANTS = [case for case in CASES if case not in MATRIX]
TEXT = "\n".join(f"The {n} quick brown foxes jump over {7 * n} lazy dogs, and {n % 11} cats look on." for n in range(80))


class InProcess:
    """Stands for ``subprocess`` where a certificate starts its clients: an interpreter for each would cost most of the time."""

    STDOUT = subprocess.STDOUT

    def run(self, command, **options):
        words = list(command)
        return subprocess.CompletedProcess(words, run_client(words[words.index("algorithms.formats.client") + 1 :]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a text, and a model for each family that is asked for."""
    found = tmp_path_factory.mktemp("families")
    (found / "text.txt").write_text(TEXT, encoding="utf-8")
    return found


@pytest.fixture
def run(folder, monkeypatch):
    """Runs a method on a case: the exit code, and the folder of the job."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(certificate, "subprocess", InProcess())
    monkeypatch.setattr(conclusion, "_write_report", lambda outcome, summary: None)  # drawings, which have tests of their own

    def _run(case, method, export):
        model = folder / case
        if not model.is_dir():
            save_case(model, case) if case in (*CASES, *MIXTURES) else save_family(model, case)
        name = f"{case}-{method}-{export}"
        keys = {"ALGORITHM": method, "JOB_SERVICE": "Kompress", "JOB_ID": name, "MODEL": str(model), "EXPORT": [export]}
        keys |= {"DATA_PATH": str(folder / "text.txt"), "USER_FOLDER": str(folder / "user"), "EVALUATION": None}
        recipe = folder / f"{name}.json"
        recipe.write_text(json.dumps({**keys, "llm": {method: METHODS[method]}}), encoding="utf-8")
        return main(["--json_path", str(recipe)]), folder / "user" / "jobs" / "Kompress" / name

    return _run


def _assert_certified(run, case, method, export):
    code, job = run(case, method, export)
    assert code is ExitCode.DONE
    (verdict,) = json.loads((job / "certificate.json").read_text())["formats"]
    assert (verdict["format"], verdict["verdict"]) == (export, "passed")
    assert verdict["max_logit_difference"] < 1e-3
    assert verdict["greedy_tokens"] == 64


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_cell_holds(run, capfd, family, method):
    cell = MATRIX[family][method]
    for name, words in cell.refused.items():
        code, job = run(family, method, "padded" if name == method else name)
        assert code is ExitCode.RECIPE
        assert words in " ".join(capfd.readouterr().err.split())
        assert not list(job.rglob("*.safetensors"))
    if cell.certified is not None:
        _assert_certified(run, family, method, cell.certified)


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_of_a_family_are_certified_too(run, case):
    _assert_certified(run, case, "AutoAWQ", MATRIX[CASES[case][0]]["AutoAWQ"].certified)


def test_the_readme_has_the_table_that_is_rendered():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert replaced(text) == text
    assert text.count(BEGIN) == text.count(END) == 1


def test_every_family_of_the_architecture_table_is_in_the_matrix():
    assert set(MATRIX) == set(known_families())
    assert {family for family in MATRIX if family not in (*CASES, *MIXTURES)} <= set(FAMILIES)
    assert all(set(row) == set(METHODS) for row in MATRIX.values())
