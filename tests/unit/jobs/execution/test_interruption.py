import os
import signal
import threading
import time

import pytest

from jobs.execution.interruption import JobInterrupted, interruptible


def stop_self():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)


def test_a_stop_signal_becomes_an_exception_and_a_second_one_is_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    tidied = []

    @interruptible()
    def work():
        try:
            stop_self()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            tidied.append(True)

    with pytest.raises(JobInterrupted, match="SIGTERM"):
        work()
    assert tidied
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_until_the_outer_block_ends_a_second_stop_is_left_alone(number):
    before, tidied = signal.getsignal(number), []

    @interruptible()
    def work():
        try:
            with interruptible(), interruptible():
                os.kill(os.getpid(), number)
                time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            tidied.append(True)

    with pytest.raises(JobInterrupted):
        work()
    assert tidied
    assert signal.getsignal(number) is before


def test_what_a_shell_has_its_background_ignore_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_handler_of_ordinary_errors_swallows_it():
    assert not issubclass(JobInterrupted, Exception)
    with pytest.raises(KeyboardInterrupt), interruptible():
        stop_self()


def test_other_threads_leave_signals_alone():
    seen = []

    def work():
        with interruptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
