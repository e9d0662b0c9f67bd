import time

import pytest
import torch.distributed as dist

from configs.errors import RankLostError
from jobs.processes import pulse as listening
from jobs.processes.pulse import BEAT_SECONDS, SILENCE_SECONDS, Pulse, beating, spans_nodes


class Listener:
    """A leader that listens to ranks 1 and 2 as time is moved on by hand."""

    def __init__(self):
        self.store, self.now = dist.HashStore(), 100.0
        self.pulse = Pulse(self.store, (1, 2), clock=lambda: self.now)

    def wait(self, seconds, beats=()):
        for _ in range(int(seconds / BEAT_SECONDS)):
            self.now += BEAT_SECONDS
            for rank in beats:
                self.store.add(f"pulse/{rank}", 1)
            self.pulse.check()


def test_a_rank_that_stops_beating_is_lost():
    leader = Listener()
    leader.wait(100, beats=(1, 2))
    leader.wait(SILENCE_SECONDS, beats=(2,))
    with pytest.raises(RankLostError, match="Rank 1 has given no sign of life for 42 seconds"):
        leader.wait(SILENCE_SECONDS, beats=(2,))


def test_a_leader_that_did_not_listen_begins_anew():
    leader = Listener()
    leader.wait(10, beats=(1, 2))
    leader.now += 10_000
    leader.pulse.check()
    leader.wait(SILENCE_SECONDS, beats=())
    with pytest.raises(RankLostError):
        leader.wait(2 * BEAT_SECONDS, beats=())


def test_a_follower_beats_while_it_works(monkeypatch):
    monkeypatch.setattr(listening, "BEAT_SECONDS", 0.01)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with beating(dist.PrefixStore("a", store), 3):
        deadline = time.monotonic() + 10
        while store.add("a/pulse/3", 0) < 3:
            assert time.monotonic() < deadline
    ended = store.add("a/pulse/3", 0)
    time.sleep(0.1)
    assert store.add("a/pulse/3", 0) == ended


def test_ranks_of_one_node_are_their_launchers_to_watch():
    assert not spans_nodes({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"})
    assert not spans_nodes({})
    assert spans_nodes({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
