"""The limits of a process, from the kernel and from files that stand in for it."""

import resource
import shutil

import pytest
import torch

from jobs.estimation import room
from jobs.estimation.room import Room, free_disk

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 1000 kB memory, 600 of them available, with 200 kB swap; this process holds 50 kB."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  1000 kB\nMemFree: 10 kB\nMemAvailable:  600 kB\nSwapTotal:  200 kB\n")
    monkeypatch.setattr(room, "_MEMINFO", meminfo)
    monkeypatch.setattr(room, "_OWN_CGROUP", tmp_path / "none")
    monkeypatch.setattr(room, "resident_bytes", lambda: 50 * 1024)
    return tmp_path


def test_a_free_machine_gives_what_it_has(machine):
    found = Room.here(machine / "not" / "there", CPU)
    assert (found.memory, found.memory_limit) == (650 * 1024, 1200 * 1024)
    assert found.disk == shutil.disk_usage(machine).free == free_disk(machine)
    assert found.device is None


def test_the_tightest_control_group_counts(machine, monkeypatch):
    inner = machine / "cgroup" / "slice" / "job"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("1\n")
    (inner.parent / "memory.max").write_text("500000\n")
    (inner.parent / "memory.current").write_text("450000\n")
    (inner.parent / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    own = machine / "own"
    own.write_text("0::/slice/job\n")
    monkeypatch.setattr(room, "_CGROUPS", machine / "cgroup")
    monkeypatch.setattr(room, "_OWN_CGROUP", own)
    found = Room.here(machine, CPU)
    assert found.memory_limit == 500_000
    assert found.memory == 500_000 - 350_000 + 50 * 1024


def test_a_limit_on_the_address_space_counts(machine):
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = 1 << 45
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        wide = Room.here(machine, CPU)
        assert wide.memory == 650 * 1024, "it is far above what the machine has"
        room_without = room._MEMINFO.read_text()
        room._MEMINFO.unlink()
        alone = Room.here(machine, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "MemTotal" in room_without
    assert alone.memory_limit == limit
    assert limit - (1 << 42) < alone.memory < limit, "less what is mapped and not in memory"
