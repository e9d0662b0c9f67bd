"""The program as its users start it: exit codes, messages, order, and the time that an answer takes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jobs.command_line.commands
import main as program
from configs.errors import CertificateError, DataError, ExitCode, MissingEnvironmentError, RankFailedError, RankLostError
from configs.loader import LoadedRecipe
from jobs.command_line.arguments import Arguments
from jobs.processes.environment import LAUNCHER
from tests.support.recipes import SEED_RECIPE, SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path) -> str:
    """A recipe that holds."""
    file = tmp_path / "recipe.yaml"
    file.write_text(SMALL)
    return str(file)


@pytest.fixture
def run_as(monkeypatch):
    """Replaces what ``run`` does with a recipe; the runner has tests of its own."""

    def replace(action) -> None:
        monkeypatch.setitem(jobs.command_line.commands._ACTIONS, "run", lambda loaded, arguments: action(loaded))

    return replace


def raising(error: BaseException):
    """An action that ends with ``error``."""

    def action(loaded: LoadedRecipe) -> None:
        raise error

    return action


def start(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """``python main.py ARGV`` in a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / "main.py"), *argv], cwd=cwd, capture_output=True, text=True, check=False)


def test_a_valid_recipe_and_a_typing_error_answer_in_a_second(tmp_path):
    for overrides, code in (((), 0), (("llm.AQLM.calibration_config.nsampels=3", "STAGE=[calibration]"), 2)):
        begin = time.perf_counter()
        finished = start("validate", "--yaml_path", str(SEED_RECIPE), *overrides, cwd=tmp_path)
        assert time.perf_counter() - begin < 1.0
        assert finished.returncode == code
        for override in overrides:
            assert override.partition("=")[0] in finished.stderr
    assert "nearest   nsamples" in finished.stderr
    assert not list(tmp_path.iterdir())


def test_checking_imports_no_torch():
    code = (
        "import sys, main; main.main(sys.argv[1:]); "
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", code, "validate", "--yaml_path", str(SEED_RECIPE)]
    for override in ([], ["SPLIT=null"], ["MODEL=${USER_FOLDER}/x"]):
        assert subprocess.run([*argv, *override], cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_a_run_with_a_typing_error_imports_no_torch_either():
    code = "import sys, main; print(int(main.main(sys.argv[1:])), 'torch' in sys.modules)"
    argv = [sys.executable, "-c", code, "--yaml_path", str(SEED_RECIPE), "nope=1"]
    assert subprocess.run(argv, cwd=ROOT, check=False, capture_output=True, text=True).stdout == "2 False\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("DATA_PATH: nothing there"), ExitCode.RECIPE),
        (MissingEnvironmentError("no such package"), ExitCode.ENVIRONMENT),
        (CertificateError("aqlm: logits differ"), ExitCode.CERTIFICATE),
        (MemoryError(), ExitCode.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), ExitCode.OUT_OF_MEMORY),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    ],
)
def test_errors_become_exit_codes_and_messages(recipe, run_as, capsys, error, code):
    run_as(raising(error))
    assert program.main(["--yaml_path", recipe]) == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert str(error) in message


def test_running_out_of_memory_names_the_override_that_helps(recipe, run_as, capsys):
    kind = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})
    run_as(raising(kind("CUDA out of memory.")))
    assert program.main(["--yaml_path", recipe, "llm.AQLM.calibration_config.local_batch_size=4"]) == ExitCode.OUT_OF_MEMORY
    assert "\n  llm.AQLM.calibration_config.local_batch_size=1\n" in capsys.readouterr().err


def test_an_interrupted_job_says_how_to_go_on(recipe, run_as, capsys):
    run_as(raising(KeyboardInterrupt()))
    assert program.main(["--yaml_path", recipe, "STAGES=[calibration]"]) == 75
    assert f"python main.py --yaml_path {recipe} 'STAGES=[calibration]'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RankLostError("Rank 1 is gone."), RankFailedError("Rank 1 failed. No data", 2)])
def test_the_end_of_another_process_is_said_once(recipe, run_as, capsys, monkeypatch, error):
    code = ExitCode.INTERRUPTED if isinstance(error, RankLostError) else ExitCode.RECIPE
    run_as(raising(error))
    assert program.main(["--yaml_path", recipe]) == code
    assert capsys.readouterr().err == f"{error}\n"
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))  # a rank that was started for the job: its parent says how it was stopped
    assert program.main(["--yaml_path", recipe]) == code
    assert capsys.readouterr().err == ("" if code is ExitCode.INTERRUPTED else f"{error}\n")


def test_an_error_that_was_said_already_is_not_said_again(recipe, run_as, capsys):
    run_as(raising(RankFailedError("", 77)))
    assert program.main(["--yaml_path", recipe]) == ExitCode.FAILED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["validate"], ["plan"], ["evaluate"], ["run", "nope=1"]])
def test_of_several_processes_only_rank_0_answers(recipe, monkeypatch, capsys, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("validate", "plan", "evaluate"):
        monkeypatch.delitem(jobs.command_line.commands._ACTIONS, name)
    assert program.main([words[0], "--yaml_path", recipe, *words[1:]]) == ExitCode.DONE
    monkeypatch.setenv("GROUP_RANK", "1")  # another node's launcher has to hear that the job has failed
    assert program.main([words[0], "--yaml_path", recipe, *words[1:]]) == (2 if "nope=1" in words else 0)
    assert capsys.readouterr() == ("", "")


def test_sigterm_is_an_interruption(recipe, run_as):
    run_as(lambda loaded: os.kill(os.getpid(), signal.SIGTERM))
    assert program.main(["--yaml_path", recipe]) == ExitCode.INTERRUPTED


def test_what_no_user_caused_keeps_its_traceback(recipe, run_as):
    run_as(raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        program.main(["--yaml_path", recipe])


def test_recipes_run_in_order_and_stop_at_the_first_failure(tmp_path, run_as):
    seen = []

    def action(loaded: LoadedRecipe) -> None:
        seen.append(loaded.recipe.job_id)
        if loaded.recipe.job_id == "second":
            raise DataError("no data")

    run_as(action)
    paths = []
    for name in ("first", "second", "third"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(SMALL.replace("trial", name))
        paths.append(str(file))
    assert program.main(["--yaml_path", *paths]) == ExitCode.RECIPE
    assert seen == ["first", "second"]


def test_nothing_runs_while_one_of_the_recipes_is_wrong(tmp_path, recipe, run_as, capsys):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("- no recipe\n")
    seen = []
    run_as(seen.append)
    assert program.main(["--yaml_path", recipe, str(wrong), str(tmp_path / "none.yaml")]) == ExitCode.RECIPE
    assert seen == []
    assert "2 problems" in capsys.readouterr().err


def test_json_recipes_need_no_suffix(tmp_path, run_as):
    file = tmp_path / "recipe"
    file.write_text('{"ALGORITHM": "AQLM", "JOB_ID": 3}')
    seen = []
    run_as(lambda loaded: seen.append(loaded.recipe.job_id))
    assert program.main(["--json_path", str(file)]) == ExitCode.DONE
    assert seen == ["3"]


def test_evaluate_hands_the_folder_on(recipe, monkeypatch):
    seen: list[Arguments] = []
    monkeypatch.setitem(jobs.command_line.commands._ACTIONS, "evaluate", lambda loaded, arguments: seen.append(arguments))
    assert program.main(["evaluate", "--yaml_path", recipe, "--directory", "some/folder"]) == ExitCode.DONE
    assert seen[0].directory == Path("some/folder")


def test_ls_lists_algorithms_and_jobs(tmp_path):
    job = tmp_path / "jobs/Kompress/trial"
    job.mkdir(parents=True)
    (job / "manifest.json").write_text(
        '{"algorithm": "AQLM", "run": {"status": "failed"}, "stages": {"calibration": {"status": "finished"}}}'
    )
    listing = start("ls", str(tmp_path)).stdout
    assert "AQLM " in listing
    assert "Kompress/trial  AQLM  failed" in listing
    assert "calibration finished" in listing


def test_quiet_reaches_the_job_and_the_ranks_that_share_it(recipe, monkeypatch):
    import jobs.processes.launcher
    import jobs.runner

    parts, commands = [], []
    monkeypatch.setattr(jobs.runner, "run_job", lambda loaded, *, parts, crew: given(parts))
    monkeypatch.setattr(jobs.processes.launcher, "start_ranks", lambda count, command: commands.append(command))
    given = parts.append
    for words in ([], ["--quiet"]):
        assert program.main([*words, "--yaml_path", recipe]) == ExitCode.DONE
    monkeypatch.setattr(jobs.command_line.commands, "ranks_to_start", lambda recipe: 2)
    for words in ([], ["--quiet"]):
        assert program.main([*words, "--yaml_path", recipe]) == ExitCode.DONE
    assert parts[0] is None
    assert parts[1].terminal.quiet
    assert ["--quiet" in command for command in commands] == [False, True]
