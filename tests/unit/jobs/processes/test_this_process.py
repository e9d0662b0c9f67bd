import pytest
import torch

from algorithms.base import Process
from configs.errors import DataError, MissingEnvironmentError
from jobs.processes import this_process
from jobs.processes.this_process import apply_visible_devices, choose_device, process_from_environment


def test_the_process_is_what_torchrun_says():
    assert process_from_environment({}) == Process(rank=0, world_size=1, local_rank=0)
    found = process_from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (found.rank, found.world_size, found.local_rank, found.is_main) == (5, 8, 1, False)


@pytest.mark.parametrize("environment", [{"RANK": "x"}, {"RANK": "1"}, {"RANK": "0", "LOCAL_RANK": "-1"}])
def test_contradictions_are_refused(environment):
    with pytest.raises(MissingEnvironmentError, match="RANK"):
        process_from_environment(environment)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretends a number of devices, seen through CUDA_VISIBLE_DEVICES."""

    def pretend(count, environment):
        for number in range(count):
            (tmp_path / str(number)).mkdir()
        monkeypatch.setattr(this_process, "_NVIDIA_DEVICES", tmp_path)
        monkeypatch.setattr(torch.version, "cuda", "13.0" if count else None)
        visible = environment.get("CUDA_VISIBLE_DEVICES")

        def available():
            asked = environment.get("CUDA_VISIBLE_DEVICES", visible)
            return bool(count) and (asked is None or int(asked.split(",")[0]) < count)

        monkeypatch.setattr(torch.cuda, "is_available", available)
        return environment

    return pretend


def test_cuda_id_selects_devices_in_its_order(machine):
    environment = machine(4, {})
    assert apply_visible_devices((2, 0), environment) is None
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,0"


def test_cuda_id_is_ignored_with_a_note_without_devices(machine):
    environment = machine(0, {})
    assert "no CUDA device" in apply_visible_devices((0, 1), environment)
    assert environment == {}
    assert apply_visible_devices((), environment) is None


def test_what_the_scheduler_gave_counts_more(machine):
    environment = machine(4, {"CUDA_VISIBLE_DEVICES": "3"})
    assert "was set from outside" in apply_visible_devices((0, 1), environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"


def test_devices_that_the_machine_does_not_have_are_an_error(machine):
    with pytest.raises(DataError, match="CUDA_ID: 7 names no device of this machine; it has 2"):
        apply_visible_devices((7,), machine(2, {}))


def test_without_cuda_the_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(Process()) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(Process(rank=3, world_size=4, local_rank=3)) == torch.device("cuda", 1)
