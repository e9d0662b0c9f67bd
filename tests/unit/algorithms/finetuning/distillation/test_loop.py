"""The learning rates of a run."""

import pytest

from algorithms.finetuning.distillation.loop import LoopSettings


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.853553, 0.5, 0.146447])],
)
def test_rates_fall_to_zero_at_the_last_step(schedule, expected):
    settings = LoopSettings(max_epochs=1, batch_size=1, schedule=schedule)
    assert [settings.factor(step, 4) for step in range(4)] == pytest.approx(expected, abs=1e-6)


def test_rates_rise_before_they_fall():
    settings = LoopSettings(max_epochs=1, batch_size=1, schedule="linear", warmup_steps=2)
    assert [settings.factor(step, 4) for step in range(3)] == pytest.approx([1 / 3, 2 / 3 * 0.75, 0.5])
