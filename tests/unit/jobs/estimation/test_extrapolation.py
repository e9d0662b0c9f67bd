"""Costs of a deeper model from those of one and two blocks, against closed forms."""

import dataclasses

import pytest

from algorithms.workload import ModelShapes
from jobs.estimation.extrapolation import Kind, Measured, at_depth, linear
from jobs.estimation.prediction import CERTIFICATE, Basis, Prediction, total


def shapes(blocks: int) -> ModelShapes:
    """Blocks of 10 parameters: four float32 copies are 160 bytes."""
    return ModelShapes(blocks=blocks, block_parameters=10, outside_parameters=5, hidden=2, vocabulary=3)


def measured(blocks: int) -> Measured:
    """A stage that costs 3 s and 0.5 s a block, 700 bytes and 20 a block, 10 bytes of disk and 4 a block."""
    return Measured(
        user_cpu_s=3 + 0.5 * blocks,
        wall_s=2 * (3 + 0.5 * blocks),
        peak_memory_bytes=700 + 20 * blocks,
        disk_bytes=10 + 4 * blocks,
        resident_bytes=500,
    )


@pytest.mark.parametrize("depths", [(1, 2), (4, 5), (2, 7)])
@pytest.mark.parametrize("blocks", [8, 32])
def test_a_linear_cost_is_found_again(depths, blocks):
    found = at_depth({depth: {"calibration": measured(depth)} for depth in depths}, shapes(blocks), ["calibration"])
    expected = measured(blocks)
    assert found["calibration"] == Prediction(
        user_cpu_s=expected.user_cpu_s,
        wall_s=expected.wall_s,
        peak_memory_bytes=expected.peak_memory_bytes,
        disk_bytes=expected.disk_bytes,
        basis=Basis.PROBE,
    )


def test_what_does_not_grow_stays_at_the_largest_that_was_seen():
    assert linear({1: 9.0, 2: 8.0}, 30) == 9.0
    assert linear({3: 8.0}, 30) == 8.0


@pytest.mark.parametrize(
    ("kind", "blocks", "expected"),
    [
        (Kind.WALK, 5, 1100 + 3 * 400),
        (Kind.WALK, 40, 1100 + 4 * 400),
        (Kind.OTHER, 40, 600 + 500 + 38 * 160),
        (Kind.TUNING, 40, 600 + 500 + 38 * 300),
        (Kind.TUNING, 2, 1100),
    ],
)
def test_memory_grows_as_the_work_does(kind, blocks, expected):
    cost = Measured(user_cpu_s=1, wall_s=1, peak_memory_bytes=700, resident_bytes=500, kind=kind)  # 200 on top, then 500
    costs = {1: {"x": cost}, 2: {"x": dataclasses.replace(cost, peak_memory_bytes=1100, resident_bytes=600)}}
    assert at_depth(costs, shapes(blocks), ["x"])["x"].peak_memory_bytes == expected


def test_a_small_difference_of_a_certificate_is_doubted():
    assert linear({1: 10.0, 2: 13.0}, 12, doubtful=0.3) == 13 + 10 * 3
    assert linear({1: 10.0, 2: 11.5}, 12, doubtful=0.3) == 11.5 + 10 * 1.5 / 2
    assert linear({1: 10.0, 2: 11.5}, 2, doubtful=0.3) == 11.5
    assert linear({1: 10.0, 2: 11.5}, 12) == 11.5 + 10 * 1.5
    costs = {depth: {"x": measured(depth), CERTIFICATE: measured(depth)} for depth in (1, 2)}
    found = at_depth(costs, shapes(12), ["x"])
    assert found["x"].user_cpu_s == measured(12).user_cpu_s
    assert found[CERTIFICATE].user_cpu_s < found["x"].user_cpu_s


def test_the_memory_that_earlier_stages_leave_counts_where_they_run():
    first = measured(1)
    second = Measured(user_cpu_s=1, wall_s=1, peak_memory_bytes=900, resident_bytes=650)
    costs = {1: {"calibration": first, "conversion": second, CERTIFICATE: second}}
    both = at_depth(costs, shapes(1), ["calibration", "conversion"])
    assert both["conversion"].peak_memory_bytes == both[CERTIFICATE].peak_memory_bytes == 900
    alone = at_depth(costs, shapes(1), ["conversion"])
    assert "calibration" not in alone
    assert alone["conversion"].peak_memory_bytes == 900 - (650 - 500)


def test_memory_of_a_device_is_a_line_of_its_own():
    costs = {}
    for depth in (1, 2):
        costs[depth] = {"x": Measured(user_cpu_s=1, wall_s=1, peak_memory_bytes=5, peak_cuda_memory_bytes=100 * depth)}
    assert at_depth(costs, shapes(10), ["x"])["x"].peak_cuda_memory_bytes == 1000


def test_a_total_adds_time_and_disk_and_takes_the_largest_memory():
    probed = Prediction(user_cpu_s=1, wall_s=2, peak_memory_bytes=30, disk_bytes=4, basis=Basis.PROBE)
    guessed = Prediction(user_cpu_s=10, wall_s=20, peak_memory_bytes=20, disk_bytes=40, basis=Basis.SHAPES)
    found = total([probed, guessed])
    assert (found.user_cpu_s, found.wall_s, found.peak_memory_bytes, found.disk_bytes) == (11, 22, 30, 44)
    assert found.basis is Basis.SHAPES
    assert total([probed]).basis is Basis.PROBE
