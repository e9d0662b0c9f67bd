import sys

import pytest
import torch

from configs.errors import DataError
from jobs.reporting.certificate import TIE_MARGIN, Verdict, certificate_windows, certify, compare_outputs
from tests.support.fake_algorithm import VOCABULARY, FakeSource, TableModel, base_table

WINDOWS = torch.arange(12).view(2, 6)


def certificate(tmp_path, behaviour, table=None, formats=("dense",)):
    folder = FakeSource.create(tmp_path / "converted").directory
    asked = []

    def reference(name):
        asked.append(1)
        return TableModel(base_table() if table is None else table)

    def command(*arguments):
        return [sys.executable, "-m", "tests.support.stub_client", behaviour, *map(str, arguments)]

    scratch = tmp_path / "scratch"
    verdicts = certify(dict.fromkeys(formats, folder), WINDOWS, reference, scratch_dir=scratch, command=command)
    assert not scratch.exists()
    return verdicts, len(asked)


def test_a_client_that_reads_the_same_passes(tmp_path):
    (verdict,), asked = certificate(tmp_path, "pass")
    assert verdict.verdict is Verdict.PASSED
    assert verdict.max_logit_difference == 0
    figures = "the client's logits differ by at most 0.0e+00 of their deviation (1e-03 allowed), 8 of 8 greedy tokens equal"
    assert verdict.reason == figures
    assert (verdict.windows, verdict.window_length, verdict.greedy_tokens, verdict.greedy_ties) == (2, 6, 8, 0)
    assert asked == 1


def test_a_client_that_reads_something_else_fails_with_the_figures(tmp_path):
    (verdict,), _ = certificate(tmp_path, "wrong")
    assert verdict.verdict is Verdict.FAILED
    deviation = base_table()[WINDOWS].std().item()
    assert verdict.max_logit_difference == pytest.approx(0.1 / deviation, rel=1e-4)


def test_other_greedy_tokens_fail_even_where_the_windows_agree(tmp_path):
    table = base_table()
    unseen = next(t for t in table[11].topk(3).indices.tolist() if t > 11)  # a token that no window holds
    table[11, unseen], table[11, table[11].argmax()] = table[11].max().clone(), table[11, unseen].clone()
    (verdict,), _ = certificate(tmp_path, "pass", table=table)
    assert verdict.verdict is Verdict.FAILED


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("crash", "ended with 1: the client cannot read this"),
        ("silent", "cannot be read"),
        ("nan", "NaN"),
    ],
)
def test_a_client_that_breaks_down_fails_with_its_own_words(tmp_path, behaviour, said):
    (verdict,), asked = certificate(tmp_path, behaviour)
    assert verdict.verdict is Verdict.FAILED
    assert said in verdict.reason
    assert asked == 0, "our own reading is not needed"


def test_no_client_is_no_failure(tmp_path):
    verdicts, asked = certificate(tmp_path, "absent:b", formats=("a", "b"))
    assert [v.verdict for v in verdicts] == [Verdict.PASSED, Verdict.NO_CLIENT]
    assert verdicts[1].reason == "pip install the-client"
    assert asked == 1


def test_ties_within_the_margin_are_counted_and_wider_gaps_are_wrong():
    logits = torch.zeros(1, 4, 8)
    logits[..., 0] = 1.0
    deviation = logits[:, :2].std().item()
    logits[:, 1, 1] = 1.0 - 0.5 * TIE_MARGIN * deviation
    logits[:, 2, 1] = 1.0 - 2.0 * TIE_MARGIN * deviation
    difference, ties, wrong = compare_outputs(logits, logits[:, :2], torch.tensor([[1, 1]]))
    assert difference == 0
    assert (ties, wrong) == (1, 1)
    assert compare_outputs(logits, logits[:, :2], torch.tensor([[0, 0]]))[1:] == (0, 0)


def test_windows_are_the_heads_of_the_first_sequences():
    sequences = [torch.arange(100)[None] + n for n in range(6)]
    windows = certificate_windows(sequences, 1000)
    assert windows.shape == (4, 64)
    assert windows[3, 0] == 3
    assert certificate_windows([torch.arange(5)[None], torch.arange(9)[None]], 10).tolist() == [[0, 1, 2, 3, 4]] * 2
    drawn = certificate_windows([], VOCABULARY)
    assert drawn.shape == (4, 64)
    assert 0 <= drawn.min() <= drawn.max() < VOCABULARY
    assert torch.equal(drawn, certificate_windows([], VOCABULARY))


def test_a_model_that_says_the_same_of_every_token_can_be_certified():
    logits = torch.zeros(1, 4, 5)
    assert compare_outputs(logits, logits[:, :2], torch.tensor([[0, 0]])) == (0, 0, 0)
    assert compare_outputs(logits, logits[:, :2] + 0.1, torch.tensor([[0, 0]]))[0] > 1e9


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit('Error while serializing: I/O error: No space left on device (os error 28)')", "No space left"),
        ("raise MemoryError", "ran out of memory"),
        ("raise RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: you tried')", "ran out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "ran out of memory: it ended with -9"),
    ],
)
def test_a_client_without_room_is_no_verdict(tmp_path, program, said):
    scratch, command = tmp_path / "scratch", [sys.executable, "-c", program]
    with pytest.raises(DataError, match=said):
        certify({"dense": tmp_path}, WINDOWS, pytest.fail, scratch_dir=scratch, command=lambda *arguments: command)
    assert not scratch.exists()
