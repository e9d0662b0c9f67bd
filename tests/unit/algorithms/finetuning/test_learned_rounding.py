from dataclasses import replace

import pytest
import torch
from torch import nn

from algorithms.blockwise import uniform_method
from algorithms.finetuning.config import BlockTuningConfig
from algorithms.finetuning.learned_rounding import RoundingLinear, _Round, learning_rates, tune_rounding
from algorithms.modeling.activations import Activations
from algorithms.modeling.block_loop import BlockData
from algorithms.numerics.column_sweep import inverse_factor, sweep
from algorithms.numerics.sparse_columns import SparseColumns, SparseSettings, saliency_scale
from algorithms.numerics.uniform import Grid, RangeSearch, UniformColumns
from algorithms.quantization.spqr import weight as spqr_weight
from tests.support.matrices import problem

BITS, GROUP = 2, 16
SHAPES = {"up": (48, 32), "down": (32, 48)}


def _wanted(name, seed=0):
    matrix, hessian = problem(*SHAPES[name], seed=seed)
    return 0.1 * matrix, hessian


def _uniform(name, *, scattered=False):
    matrix, hessian = _wanted(name)
    order = torch.argsort(hessian.diagonal(), descending=True) if scattered else None
    columns = (matrix if order is None else matrix[:, order]).T.contiguous()
    grid = Grid(bits=BITS, symmetric=False, search=RangeSearch())
    quantizer = UniformColumns(columns.shape[0], group_size=GROUP, grid=grid, order=order)
    sweep(columns, inverse_factor(hessian, 0.01, order), quantizer)
    return matrix, quantizer.result()


def _sparse(name, *, ordered=True, **changes):
    matrix, hessian = _wanted(name)
    order = torch.argsort(hessian.diagonal(), descending=True) if ordered else None
    factor = inverse_factor(hessian, 0.01, order)
    columns = (matrix if order is None else matrix[:, order]).T.contiguous()
    settings = SparseSettings(bits=BITS, group_size=GROUP, **changes)
    threshold = 0.3 * saliency_scale(columns, factor.pivots)
    quantizer = SparseColumns(columns.shape[0], settings, threshold.expand(matrix.shape[0]).clone(), order)
    sweep(columns, factor, quantizer)
    return matrix, quantizer.result()


TWO_LEVELS = {"scale_bits": 3, "zero_bits": 3}
WEIGHTS = {
    "uniform": (lambda name: _uniform(name), uniform_method),
    "uniform, scattered groups": (lambda name: _uniform(name, scattered=True), uniform_method),
    "sparse": (lambda name: _sparse(name, **TWO_LEVELS), spqr_weight),
    "sparse, plain statistics": (lambda name: _sparse(name), spqr_weight),
    "sparse, model order": (lambda name: _sparse(name, ordered=False), spqr_weight),
    "sparse, one grid for all rows": (lambda name: _sparse(name, per_channel=False, leave_one_out=False), spqr_weight),
}


@pytest.fixture(params=WEIGHTS)
def kind(request):
    return WEIGHTS[request.param]


class _Block(nn.Module):
    """Two linears and a gain around a nonlinearity."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down
        self.gain = nn.Parameter(torch.linspace(0.8, 1.2, 48), requires_grad=False)

    def forward(self, hidden):
        return hidden + self.down(torch.nn.functional.silu(self.up(hidden)) * self.gain)


class _Arguments:
    def run(self, block, index, hidden):
        return block(hidden)


def _original():
    up, down = (nn.Linear(SHAPES[name][1], SHAPES[name][0]) for name in ("up", "down"))
    up.weight.data, down.weight.data = _wanted("up")[0], _wanted("down")[0]
    up.bias.data = torch.linspace(-0.1, 0.1, 48)
    down.bias.data.zero_()
    return _Block(up, down)


def _tunable(kind):
    make, module = kind
    original, parts, stored = _original(), {}, {}
    for name in ("up", "down"):
        matrix, stored[name] = make(name)
        parts[name] = module.tunable(stored[name], matrix, getattr(original, name).bias)
    return _Block(**parts), stored


def _data(original, *, held_out=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sets = [[torch.randn(count, 10, 32, generator=generator)] for count in (24, held_out) if count]
    sets += [[]] * (2 - len(sets))
    cpu = torch.device("cpu")

    def _streams(batches):
        inputs = Activations(batches=batches, arguments=_Arguments(), device=cpu, storage=cpu)
        return inputs, inputs.through(original, 0)

    (inputs, targets), (validation_inputs, validation_targets) = map(_streams, sets)
    return BlockData(inputs=inputs, targets=targets, validation_inputs=validation_inputs, validation_targets=validation_targets)


@torch.no_grad()
def _loss(block, inputs, targets):
    errors = [(block(batch) - target).double().square() for batch, target in zip(inputs, targets, strict=True)]
    return torch.cat(errors).mean().item()


def _tune(block, data, **changes):
    config = BlockTuningConfig(**({"max_epochs": 5, "batch_size": 4} | changes))
    return tune_rounding(0, block, data, config, torch.Generator().manual_seed(0))


def test_at_the_start_it_computes_what_is_stored(kind):
    block, stored = _tunable(kind)
    for name in SHAPES:
        torch.testing.assert_close(getattr(block, name).decode().detach(), stored[name].dequantize(), atol=1e-7, rtol=1e-6)
        linear = getattr(block, name)
        assert torch.equal(kind[1].tuned(linear, stored[name]).dequantize(), stored[name].dequantize())


def test_positions_hold_the_fraction_that_the_wanted_weight_has_beyond_its_code():
    matrix, stored = _uniform("up")
    linear = uniform_method.tunable(stored, matrix, None)
    scales, zeros = (part.repeat_interleave(GROUP, 1) for part in (stored.scales, stored.zeros))
    exact = matrix / scales + zeros
    near = (exact - stored.codes).abs() < 0.45
    assert 0.3 < near.float().mean() < 0.99
    torch.testing.assert_close(linear.positions.detach()[near], exact[near], atol=1e-4, rtol=0)
    beyond = stored.codes + 0.45 * (exact - stored.codes).sign()
    torch.testing.assert_close(linear.positions.detach()[~near], beyond[~near])


def test_gradients_are_those_of_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(6, 12, generator=generator) * 6 - 1.5  # codes 0 to 3
    scales, zeros = torch.rand(6, 3, generator=generator) + 0.5, torch.rand(6, 3, generator=generator) * 3
    positions.requires_grad_(True)
    scales.requires_grad_(True)
    weight = _Round.apply(positions, scales, zeros, 3)
    upstream = torch.randn(6, 12, generator=generator)
    weight.backward(upstream)
    codes = positions.detach().round().clamp(0, 3)
    outside = (positions.detach() < -0.5) | (positions.detach() > 3.5)
    assert 5 < outside.sum() < 40
    for row in range(6):
        for column in range(12):
            group = column // 4
            assert weight[row, column].item() == pytest.approx(
                (scales[row, group] * (codes[row, column] - zeros[row, group])).item(), abs=1e-6
            )
            expected = 0.0 if outside[row, column] else (upstream[row, column] * scales[row, group]).item()
            assert positions.grad[row, column].item() == pytest.approx(expected, abs=1e-6)
        for group in range(3):
            inside = slice(4 * group, 4 * group + 4)
            expected = (upstream[row, inside] * (codes[row, inside] - zeros[row, group])).sum().item()
            assert scales.grad[row, group].item() == pytest.approx(expected, abs=1e-5)


def test_the_gradient_of_scales_is_the_finite_difference():
    matrix, stored = _uniform("up", scattered=True)
    linear = uniform_method.tunable(stored, matrix, None)
    linear.scales.requires_grad_(True)
    inputs = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    target = inputs @ matrix.T

    def loss():
        return (linear(inputs) - target).double().square().mean()

    loss().backward()
    for place in ((0, 0), (5, 1), (47, 1)):
        expected = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                linear.scales[place] += step
                expected.append(loss().item())
                linear.scales[place] -= step
        assert linear.scales.grad[place].item() == pytest.approx((expected[0] - expected[1]) / 2e-3, rel=1e-2)


def test_a_gradient_reaches_the_position_of_its_column_in_the_order_of_groups():
    matrix, stored = _uniform("up", scattered=True)
    linear = uniform_method.tunable(stored, matrix, None)
    upstream = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    linear.decode().backward(upstream)
    order = torch.argsort(stored.groups, stable=True)
    assert not torch.equal(order, torch.arange(32))
    expected = upstream[:, order] * stored.scales.repeat_interleave(GROUP, 1)
    torch.testing.assert_close(linear.positions.grad, expected)


def test_outliers_are_trained_and_the_codes_below_them_are_not():
    matrix, stored = _sparse("up", **TWO_LEVELS)
    linear = spqr_weight.tunable(stored, matrix, None)
    upstream = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    linear.decode().backward(upstream)
    rows, places = stored.outliers.rows, stored.outliers.columns.long()
    assert rows.numel() > 20
    assert torch.equal(linear.outliers.grad, upstream[rows, stored.order.long()[places]])
    assert linear.positions.grad[rows, places].abs().max() == 0
    with torch.no_grad():
        linear.positions += 1.0
        linear.outliers += 0.125
    after = spqr_weight.tuned(linear, stored)
    assert torch.equal(after.codes[rows, places], stored.codes[rows, places])
    mask = torch.ones_like(stored.codes, dtype=torch.bool)
    mask[rows, places] = False
    moved = stored.codes[mask] < 3
    assert torch.equal(after.codes[mask][moved], stored.codes[mask][moved] + 1)
    torch.testing.assert_close(after.outliers.values, (stored.outliers.values + 0.125).half().float())


def test_every_parameter_has_the_step_that_the_recipe_gives_it():
    block, _ = _tunable(WEIGHTS["sparse, plain statistics"])
    config = BlockTuningConfig(rounding_step=0.02, scale_step=0.004, other_step=0.005)
    rates = {id(parameter): rate for parameter, rate in learning_rates(block, config)}
    names = {name: rates.pop(id(parameter)) for name, parameter in block.named_parameters()}
    assert rates == {}
    size = {name: parameter.detach().double().square().mean().sqrt().item() for name, parameter in block.named_parameters()}
    for name, rate in names.items():
        step = {"positions": 0.02, "scales": 0.004 * size[name]}.get(name.split(".")[-1], 0.005 * (size[name] or 1.0))
        assert rate == pytest.approx(step, rel=1e-5), name
    assert names["down.bias"] == 0.005  # it starts at zero
    assert {"gain", "up.outliers", "up.bias"} <= names.keys()


@pytest.mark.parametrize(
    ("nulls", "still"),
    [
        ({"rounding_step": None}, {"positions"}),
        ({"scale_step": None}, {"scales"}),
        ({"other_step": None}, {"gain", "bias", "outliers"}),
    ],
)
def test_a_step_of_null_leaves_its_tensors_alone(nulls, still):
    block, _ = _tunable(WEIGHTS["sparse, plain statistics"])
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    _tune(block, _data(_original()), max_epochs=1, keep_best=False, **nulls)
    changed = {name.split(".")[-1] for name, parameter in block.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"positions", "scales", "gain", "bias", "outliers"} - still


def test_two_level_scales_stay_as_they_are():
    block, stored = _tunable(WEIGHTS["sparse"])
    names = {id(parameter) for parameter, _ in learning_rates(block, BlockTuningConfig())}
    assert id(block.up.scales) not in names
    assert id(block.up.positions) in names
    _tune(block, _data(_original()), max_epochs=1)
    assert spqr_weight.tuned(block.up, stored["up"]).scales is stored["up"].scales


def test_tuning_lowers_the_error_of_the_block(kind):
    block, stored = _tunable(kind)
    data = _data(_original())
    before = _loss(block, data.validation_inputs, data.validation_targets)
    report = _tune(block, data)
    assert report.validation_losses[0] == pytest.approx(before, rel=1e-4)
    after = _loss(block, data.validation_inputs, data.validation_targets)
    assert after == pytest.approx(min(report.validation_losses), rel=1e-4)
    assert after < 0.8 * before
    changed = [(kind[1].tuned(getattr(block, name), stored[name]).codes != stored[name].codes).any() for name in SHAPES]
    assert all(changed)


@pytest.mark.parametrize("step", [0.3, 1.0])
def test_it_never_ends_worse_than_it_began(kind, step):
    block, _ = _tunable(kind)
    data = _data(_original())
    before = _loss(block, data.validation_inputs, data.validation_targets)
    _tune(block, data, max_epochs=2, rounding_step=step, scale_step=step, other_step=step)
    assert _loss(block, data.validation_inputs, data.validation_targets) <= before * (1 + 1e-6)


def test_without_keep_best_the_last_epoch_stays():
    block, _ = _tunable(WEIGHTS["uniform"])
    data = _data(_original())
    report = _tune(block, data, max_epochs=2, rounding_step=1.0, scale_step=1.0, other_step=1.0, keep_best=False)
    after = _loss(block, data.validation_inputs, data.validation_targets)
    assert after == pytest.approx(report.validation_losses[-1], rel=1e-4)
    assert after > report.validation_losses[0]


def test_what_is_stored_is_the_tuned_weight_in_float16(kind):
    block, stored = _tunable(kind)
    _tune(block, _data(_original()), keep_best=False, max_epochs=2)
    for name in SHAPES:
        linear = getattr(block, name)
        weight, after = linear.decode().detach(), kind[1].tuned(linear, stored[name])
        assert torch.equal(after.zeros.decode() if hasattr(after.zeros, "decode") else after.zeros, _plain(stored[name].zeros))
        torch.testing.assert_close(after.dequantize(), weight, rtol=2**-10, atol=1e-7)
        scales = _plain(after.scales)
        if not linear.scales_are_fixed:
            assert not torch.equal(scales, _plain(stored[name].scales))
            assert torch.equal(scales, scales.half().float())


def _plain(statistics):
    return statistics if isinstance(statistics, torch.Tensor) else statistics.decode()


def test_micro_batches_follow_the_length_of_the_text_and_change_nothing():
    data = _data(_original())
    results = []
    for micro in (None, 1, 3):
        block, _ = _tunable(WEIGHTS["uniform"])
        _tune(block, data, max_epochs=1, micro_batch_size=micro)
        results.append(block.up.decode().detach())
    assert (results[0] - results[1]).abs().max() < 1e-4
    assert (results[0] - results[2]).abs().max() < 1e-4


def test_a_scale_of_nothing_gives_no_position_that_is_not_a_number():
    matrix, stored = _uniform("up")
    linear = RoundingLinear(
        torch.zeros_like(matrix), stored.codes, torch.zeros_like(stored.scales), stored.zeros, bits=BITS, bias=None
    )
    assert torch.isfinite(linear.positions).all()
    assert torch.equal(linear.current_codes(), stored.codes)
    assert replace(stored, codes=linear.current_codes()).codes.dtype == torch.uint8
