import resource
import time

import pytest

from jobs.execution import resources
from jobs.execution.resources import Meter, resident_bytes

MEGABYTE = 1 << 20


def burn(seconds):
    """Pure computing, so that asking for the time (a system call) costs next to nothing of it."""
    start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    while resource.getrusage(resource.RUSAGE_SELF).ru_utime - start < seconds:
        sum(number * number for number in range(20_000))


def test_cpu_time_is_that_of_the_piece_alone():
    burn(0.3)
    with Meter() as meter:
        burn(0.2)
        time.sleep(0.2)
    assert meter.usage().user_cpu_s == pytest.approx(0.2, abs=0.1)
    assert meter.usage().wall_s >= 0.4
    burn(0.2)
    assert meter.usage().user_cpu_s < 0.35, "nothing is added after the end"


@pytest.mark.parametrize("permitted", [True, False])
def test_peak_memory_is_that_of_the_piece_alone(permitted, monkeypatch):
    if not permitted:
        monkeypatch.setattr(resources, "_reset_peak", lambda: False)
    bytearray(300 * MEGABYTE)  # before: must not count
    before = resident_bytes()
    with Meter() as meter:
        block = bytearray(100 * MEGABYTE)
        time.sleep(0.2)
        del block
    rise = meter.usage().peak_memory_bytes - before
    assert 80 * MEGABYTE < rise < 200 * MEGABYTE
    bytearray(300 * MEGABYTE)
    assert meter.usage().peak_memory_bytes - before == rise


def test_usage_may_be_asked_inside():
    with Meter() as meter:
        first = meter.usage()
        burn(0.05)
        second = meter.usage()
    assert first.user_cpu_s < second.user_cpu_s <= meter.usage().user_cpu_s
    assert first.peak_memory_bytes <= second.peak_memory_bytes
