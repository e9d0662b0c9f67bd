import os

import pytest
import torch

from jobs.processes.environment import (
    LAUNCHER,
    is_follower,
    is_one_of_many,
    note_on_processes,
    ranks_to_start,
    set_for_ranks,
    threads_for,
    without_ranks,
)
from tests.support.envelopes import envelope

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2"}


@pytest.fixture
def devices(monkeypatch):
    """Pretends a number of CUDA devices, of which CUDA_VISIBLE_DEVICES shows some."""

    def pretend(count, environment):
        def seen():
            return len([number for number in environment["CUDA_VISIBLE_DEVICES"].split(",") if int(number) < count])

        monkeypatch.setattr(torch.cuda, "device_count", seen)
        return environment

    return pretend


@pytest.mark.parametrize(
    ("keys", "count", "environment", "ranks"),
    [
        ({}, 4, {}, 1),
        ({"CUDA_ID": "0"}, 4, {}, 1),
        ({"CUDA_ID": "0,2"}, 4, {}, 2),
        ({"CUDA_ID": "0,1,7"}, 2, {}, 2),
        ({"CUDA_ID": "0,1"}, 0, {}, 1),
        ({"CUDA_ID": "0,1"}, 4, {"CUDA_VISIBLE_DEVICES": "3"}, 1),
        ({"CUDA_ID": "0,1"}, 4, {"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"NUM_PROCESSES": 3}, 0, {}, 3),
        ({"NUM_PROCESSES": 1, "CUDA_ID": "0,1"}, 4, {}, 1),
        ({"NUM_PROCESSES": 4, "CUDA_ID": "0,1"}, 4, {}, 4),
        ({"NUM_PROCESSES": 3}, 0, TORCHRUN, 1),
        ({"CUDA_ID": "0,1"}, 4, TORCHRUN, 1),
    ],
)
def test_who_says_how_many_ranks_are_started(tmp_path, devices, keys, count, environment, ranks):
    environment = devices(count, dict(environment))
    before = dict(environment)
    assert ranks_to_start(envelope(tmp_path, **keys), environment) == ranks
    assert environment == before


def test_a_launcher_that_started_another_number_is_followed_with_a_note(tmp_path):
    recipe = envelope(tmp_path, NUM_PROCESSES=3)
    assert note_on_processes(recipe, TORCHRUN) == "NUM_PROCESSES: 3 is ignored: the launcher has set WORLD_SIZE=2."
    assert note_on_processes(recipe, {}) is None
    assert note_on_processes(recipe, {"RANK": "0", "WORLD_SIZE": "3"}) is None
    assert note_on_processes(envelope(tmp_path), TORCHRUN) is None


def test_rank_0_of_several_leads():
    found = [is_follower({}), is_follower(TORCHRUN), is_follower(TORCHRUN | {"RANK": "1"}), is_follower({"WORLD_SIZE": "1"})]
    assert found == [False, False, True, False]
    assert [is_one_of_many({}), is_one_of_many({"RANK": "0"}), is_one_of_many(TORCHRUN)] == [False, False, True]


def test_ranks_share_the_cores_unless_the_user_has_said_otherwise():
    environment = {"A": "1"}
    with set_for_ranks(2, environment):
        assert environment["OMP_NUM_THREADS"] == str(threads_for(2))
        assert environment[LAUNCHER] == str(os.getpid())
    assert environment == {"A": "1"}
    chosen = {"OMP_NUM_THREADS": "7"}
    with set_for_ranks(2, chosen):
        assert chosen["OMP_NUM_THREADS"] == "7"
    cores = len(os.sched_getaffinity(0))
    assert [threads_for(1), threads_for(cores), threads_for(100 * cores)] == [cores, 1, 1]


def test_a_program_that_runs_on_its_own_is_told_of_no_ranks():
    given = TORCHRUN | {"MASTER_ADDR": "here", "TORCHELASTIC_RUN_ID": "1", LAUNCHER: "1", "HOME": "/root", "HF_HOME": "/hub"}
    assert without_ranks(given) == {"HOME": "/root", "HF_HOME": "/hub"}
