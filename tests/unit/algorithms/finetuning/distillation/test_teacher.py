"""The original model's logits kept on disk: the same from any number of ranks, and a bound that closes."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from algorithms.finetuning.distillation.batches import stack
from algorithms.finetuning.distillation.loss import kl_divergence
from algorithms.finetuning.distillation.teacher import CachedTeacher, LiveTeacher, cached_tokens, counted, fill_cache
from algorithms.parallel.ranks import ALONE
from tests.support.rank_processes import run_on_ranks

VOCABULARY = 20
LENGTHS = (6, 3, 6, 1, 5)


class _Table(nn.Module):
    """A model whose logits are a row of each token and of the one before, so that a pad in front would show."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.own, self.last = (3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator) for _ in range(2))
        self.passes = 0

    def forward(self, input_ids, use_cache):
        self.passes += 1
        before = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
        return SimpleNamespace(logits=self.own[input_ids] + self.last[before])


def _sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (1, length), generator=generator) for length in LENGTHS]


def _fill(folder, *, kept=4, size=2, ranks=ALONE, model=None, passes=None):
    """Fill the cache, or stop after so many micro-batches; the model that was asked."""
    model = model or _Table()
    filling = fill_cache(
        folder, LiveTeacher(model, contextlib.nullcontext), _sequences(), kept=kept, micro_batch_size=size, ranks=ranks
    )
    for number, _ in enumerate(filling, start=1):
        if number == passes:
            break
    return model


def _files(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        for kind, tensor in tensors.items():
            assert torch.equal(found[name][kind], tensor), (name, kind)


def test_the_cache_holds_the_most_likely_tokens_and_the_mass_of_all_others(tmp_path):
    model = _fill(tmp_path)
    assert cached_tokens(tmp_path) == 4
    assert set(_files(tmp_path)) == {f"{number}.safetensors" for number in range(len(LENGTHS))}
    for number, sequence in enumerate(_sequences()):
        found = load_file(tmp_path / f"{number}.safetensors")
        chances, order = model(sequence, use_cache=False).logits[0].double().softmax(-1).sort(-1, descending=True)
        assert torch.equal(found["tokens"].long(), order[:, :4])
        torch.testing.assert_close(found["log_probabilities"].double(), chances[:, :4].log(), atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(found["tail"].double(), chances[:, 4:].sum(-1), atol=1e-6, rtol=1e-4)
        assert [found[kind].dtype for kind in ("log_probabilities", "tokens", "tail")] == [
            torch.float16, torch.int32, torch.float32,
        ]  # fmt: skip


def _filled_by_ranks(ranks, folder, size):
    _fill(Path(folder), size=size, ranks=ranks)


@pytest.mark.parametrize(("count", "size"), [(2, 1), (2, 2), (3, 4)])
def test_ranks_together_write_what_one_process_writes(tmp_path, count, size):
    _fill(tmp_path / "alone", size=size)
    run_on_ranks(_filled_by_ranks, count, str(tmp_path / "shared"), size)
    _assert_same(_files(tmp_path / "shared"), _files(tmp_path / "alone"))
    assert json.loads((tmp_path / "shared" / "cache.json").read_text()) == {"kept": 4, "sequences": len(LENGTHS)}


def test_an_interrupted_cache_is_made_again_and_a_finished_one_is_not(tmp_path):
    _fill(tmp_path, model=_Table(seed=7), passes=2)
    assert cached_tokens(tmp_path) is None
    assert _files(tmp_path), "the interrupted one has left files"
    assert _fill(tmp_path).passes == 3
    _fill(tmp_path / "whole")
    _assert_same(_files(tmp_path), _files(tmp_path / "whole"))
    assert _fill(tmp_path, model=_Table(seed=7)).passes == 0
    _assert_same(_files(tmp_path), _files(tmp_path / "whole"))


def test_a_cache_of_another_size_is_not_taken_for_this_one(tmp_path):
    _fill(tmp_path, kept=2)
    assert _fill(tmp_path, kept=4).passes == 3
    assert cached_tokens(tmp_path) == 4
    (tmp_path / "cache.json").write_text("{")
    assert cached_tokens(tmp_path) is None


def _divergences(student, teacher, numbers):
    batch = stack(_sequences(), numbers)
    logits = student(batch.tokens, use_cache=False).logits
    return kl_divergence(counted(logits, batch.mask), teacher.targets(batch)).item()


@pytest.mark.parametrize("numbers", [(0,), (3, 0), (1, 2, 4, 3, 0)])
def test_padded_sequences_have_the_targets_of_their_own_passes(tmp_path, numbers):
    _fill(tmp_path, kept=VOCABULARY, size=3)
    live, cached, student = LiveTeacher(_Table(), contextlib.nullcontext), CachedTeacher(tmp_path), _Table(seed=3)
    together = _divergences(student, cached, numbers)
    assert together == pytest.approx(sum(_divergences(student, cached, (number,)) for number in numbers), rel=1e-5)
    assert together == pytest.approx(_divergences(student, live, numbers), rel=2e-3)


def test_a_batch_that_does_not_count_has_no_targets(tmp_path):
    _fill(tmp_path)
    batch = stack(_sequences(), (0,))
    batch.mask.fill_(False)
    targets = CachedTeacher(tmp_path).targets(batch)
    student = torch.randn(0, VOCABULARY, requires_grad=True)
    divergence = kl_divergence(student, targets)
    divergence.backward()
    assert divergence.item() == 0
    assert student.grad.shape == (0, VOCABULARY)


def test_the_more_is_kept_the_nearer_the_divergence_comes_to_the_whole_one_from_below(tmp_path):
    everything, student = tuple(range(len(LENGTHS))), _Table(seed=3)
    whole = _divergences(student, LiveTeacher(_Table(), contextlib.nullcontext), everything)
    found = []
    for kept in (1, 2, 4, 8, 16, VOCABULARY):
        _fill(tmp_path / str(kept), kept=kept)
        found.append(_divergences(student, CachedTeacher(tmp_path / str(kept)), everything))
    assert found == sorted(found)
    assert found[0] < 0.9 * whole
    assert all(divergence <= whole * (1 + 1e-3) for divergence in found), "but for the rounding of what is kept"
    assert found[-1] == pytest.approx(whole, rel=1e-3)
