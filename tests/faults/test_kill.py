"""Some rounds of each harness that is meant to be used by hand."""

import os
import re
import subprocess
import sys

import pytest

from tests.faults.warm_process import ROOT


@pytest.mark.parametrize(("rounds", "signals"), [(15, ["KILL"]), (5, ["TERM", "INT"])])
def test_a_job_that_is_stopped_anywhere_ends_as_if_it_never_had_been(rounds, signals):
    command = [sys.executable, "-m", "tests.faults.kill", "--rounds", str(rounds), "--stops", "5", "--signal", *signals]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--seed", "7"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    held = re.search(rf"^{rounds} rounds held \((.+)\)$", done.stdout, re.MULTILINE)
    assert held, done.stdout
    assert {"calibration", "finetune"} <= set(re.findall(r"calibration|finetune|conversion|certificate", held[1]))
    assert "it had ended" not in done.stdout, "a round stopped nothing"
