"""Checkpoints of a tuning: what comes back, which one counts, and that ranks may change in between."""

from pathlib import Path

import pytest
import torch

from algorithms.finetuning.distillation import checkpoints
from algorithms.finetuning.distillation.checkpoints import Checkpoints
from algorithms.finetuning.distillation.sharding import Sharding, part_of, whole
from algorithms.parallel.ranks import ALONE
from tests.support.rank_processes import run_on_ranks

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.int8)


def _tensors(seed=0, rows=7):
    """One of each dtype, with values that no other dtype of the list can hold them all; and one of a single row."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for dtype in DTYPES:
        drawn = 100 * torch.randn(rows, 3, generator=generator)
        found[f"model.{str(dtype).removeprefix('torch.')}"] = drawn.to(dtype)
    found["model.int16"] *= 200
    return found | {"moment.first.a": torch.randn(1, 5, generator=generator), "bias": torch.randn(rows, generator=generator)}


def _checkpoints(folder):
    return Checkpoints(folder, ".checkpoint", ALONE)


def _loaded(folder, step, like):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    _checkpoints(folder).load(step, tensors)
    return tensors


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_tensors_of_every_dtype_come_back_with_their_bits(tmp_path):
    tensors, progress = _tensors(), {"history": {"losses": [0.1, 1e-300]}}
    _checkpoints(tmp_path).save(3, tensors, progress)
    found = _checkpoints(tmp_path).newest()
    assert found["step"] == 3
    assert found["history"] == progress["history"]
    _assert_same(_loaded(tmp_path, 3, tensors), tensors)
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoint-3"]


def test_nothing_is_found_where_nothing_was_saved(tmp_path):
    _checkpoints(tmp_path / "absent").keep_only(None)
    assert _checkpoints(tmp_path / "absent").newest() is None


def _flip(place):
    (file,) = place.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _take_a_file(place):
    next(place.glob("*.safetensors")).unlink()


def _cut_the_progress(place):
    text = (place / "progress.json").read_text()
    (place / "progress.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize("damage", [_flip, _take_a_file, _cut_the_progress])
def test_the_newest_intact_one_is_taken(tmp_path, caplog, damage):
    for step in (9, 10, 2):  # 10 comes after 9, whatever their letters say
        _checkpoints(tmp_path).save(step, _tensors(step), {})
    assert _checkpoints(tmp_path).newest()["step"] == 10
    damage(tmp_path / ".checkpoint-10")
    assert _checkpoints(tmp_path).newest()["step"] == 9
    assert ".checkpoint-10 is damaged" in caplog.text
    _assert_same(_loaded(tmp_path, 9, _tensors(9)), _tensors(9))


class _KilledError(Exception):
    pass


def test_what_a_kill_left_half_written_does_not_count(tmp_path, monkeypatch):
    _checkpoints(tmp_path).save(1, _tensors(1), {})

    def killed(path, value):
        raise _KilledError

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "atomic_write_json", killed)
        with pytest.raises(_KilledError):
            _checkpoints(tmp_path).save(2, _tensors(2), {})
    assert any(path.name.endswith(".partial") for path in tmp_path.iterdir()), "the kill left something"
    assert _checkpoints(tmp_path).newest()["step"] == 1
    _checkpoints(tmp_path).save(2, _tensors(3), {})
    assert _checkpoints(tmp_path).newest()["step"] == 2
    _assert_same(_loaded(tmp_path, 2, _tensors(3)), _tensors(3))
    assert not any(path.name.endswith(".partial") for path in tmp_path.iterdir())


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path):
    for seed in (1, 2):
        _checkpoints(tmp_path).save(4, _tensors(seed), {"seed": seed})
    assert _checkpoints(tmp_path).newest()["seed"] == 2
    _assert_same(_loaded(tmp_path, 4, _tensors(2)), _tensors(2))


def test_all_but_one_are_removed_and_none_of_another_name(tmp_path):
    for step in (1, 2, 3):
        _checkpoints(tmp_path).save(step, _tensors(), {})
    Checkpoints(tmp_path, ".best", ALONE).save(1, _tensors(), {})
    _checkpoints(tmp_path).keep_only(2)
    assert {path.name for path in tmp_path.iterdir()} == {".checkpoint-2", ".best-1"}
    _checkpoints(tmp_path).keep_only(None)
    assert {path.name for path in tmp_path.iterdir()} == {".best-1"}


def _sharded(ranks, tensors):
    """Each tensor split over the ranks as parameters are, rows first; some ranks may have none."""
    sharding = Sharding(ranks)
    shaped = {name: sharding.rows(tensor[:0], tensor.shape[0]) for name, tensor in tensors.items()}
    return {name: sharding.rows(part_of(tensor, shaped[name]), tensor.shape[0]) for name, tensor in tensors.items()}


def _saved_by_ranks(ranks, folder, seed):
    found = Checkpoints(Path(folder), ".checkpoint", ranks)
    found.save(5, _sharded(ranks, _tensors(seed)), {"ranks": ranks.size})
    return found.newest()["ranks"]


def _loaded_by_ranks(ranks, folder, seed):
    tensors = _sharded(ranks, {name: torch.zeros_like(tensor) for name, tensor in _tensors(seed).items()})
    Checkpoints(Path(folder), ".checkpoint", ranks).load(5, tensors)
    return {name: whole(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_any_number_of_ranks_goes_on_from_any_other(tmp_path, before, after):
    assert run_on_ranks(_saved_by_ranks, before, str(tmp_path), before) == [before] * before
    for found in run_on_ranks(_loaded_by_ranks, after, str(tmp_path), before):
        _assert_same(found, _tensors(before))


@pytest.mark.parametrize("cause", [KeyboardInterrupt("stopped"), OSError("no space left")])
def test_what_ends_a_save_comes_out_as_it_is(tmp_path, monkeypatch, cause):
    """torch wraps it in a class that is no Exception, which nothing above would know for a request to stop."""

    def _stopped(*arguments):
        raise cause

    monkeypatch.setattr(checkpoints.HuggingFaceStorageWriter, "write_data", _stopped)
    with pytest.raises(type(cause), match=str(cause)):
        _checkpoints(tmp_path).save(1, _tensors(), {})
    assert _checkpoints(tmp_path).newest() is None
