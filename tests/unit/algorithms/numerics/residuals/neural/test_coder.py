import math

import pytest
import torch

from algorithms.numerics.residuals.neural.budget import DecoderSizes
from algorithms.numerics.residuals.neural.coder import NeuralCoder
from algorithms.numerics.residuals.neural.codes import NeuralCodes
from algorithms.numerics.residuals.neural.training import TrainingSettings
from algorithms.numerics.residuals.vq import VectorCoder, VectorSettings
from tests.support.matrices import problem

SHAPE = (37, 83)
QUICK = TrainingSettings(epochs=2)
SIZES = {
    "longer values": {"bits": 3.3},
    "longer weights": {"bits": 5.2, "embedding_dim": 4, "embedding_bits": 3},
    "nine bits": {"bits": 13.0, "embedding_bits": 8, "embedding_dim": 4, "weight_bits": 8, "decoder_share": 0.3},
    "deep": {"bits": 6.0, "strides": (2, 2, 2), "embedding_dim": 5, "embedding_bits": 7, "weight_bits": 5, "block_size": 20},
}


def _coded(sizes, hessian=True, seed=0, settings=QUICK, **more):
    matrix, found = problem(*SHAPE)
    coder = NeuralCoder(DecoderSizes(**sizes), settings, **more)
    return matrix, found, coder.encode(matrix, found if hessian else None, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", SIZES)
def test_what_is_stored_comes_back_to_the_last_bit(kind):
    _, _, coded = _coded(SIZES[kind])
    stored = {name: tensor.clone() for name, tensor in coded.tensors().items()}
    back = NeuralCodes.restore(stored, SHAPE)
    assert coded.dequantize().shape == SHAPE
    assert torch.equal(back.dequantize(), coded.dequantize())
    again = back.tensors()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) and again[name].dtype == stored[name].dtype for name in stored)
    assert "high_codes" in stored


@pytest.mark.parametrize("kind", SIZES)
def test_bits_are_those_of_the_stored_tensors_and_of_the_plan(kind):
    _, _, coded = _coded(SIZES[kind])
    stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in coded.tensors().values())
    bits = dict(coded.bits())
    assert sum(bits.values()) == stored
    assert SIZES[kind]["bits"] - 0.05 < stored / (37 * 83) <= SIZES[kind]["bits"]  # of so small a matrix, words are 0.01 bits
    layout = coded.layout
    values = coded.embedding.numel() * layout.embedding_bits + layout.longer_values
    assert bits["codes"] == pytest.approx(values, abs=32)
    assert bits["scales"] == 8 * 37 * -(-83 // SIZES[kind].get("block_size", 128)) + 32
    tops = torch.cat([codes.abs().flatten() for codes in coded.weights]).max().item()
    assert tops.bit_length() == layout.weight_bits - (0 if coded.layout.longer_weights else 1)


def test_the_matrix_is_the_decoders_output_at_its_scales():
    _, _, coded = _coded(SIZES["deep"])
    halves = {name: tensor.clone() for name, tensor in coded.tensors().items()}
    halves["run_scales"] /= 2
    halves["run_zeros"].zero_()
    doubled = {**halves, "run_scales": 2 * halves["run_scales"]}
    one, two = (NeuralCodes.restore(tensors, SHAPE).dequantize() for tensors in (halves, doubled))
    torch.testing.assert_close(two, 2 * one)
    moved = coded.moved({"scales": 1.5 * coded.movable()["scales"]})
    torch.testing.assert_close(moved.dequantize(), 1.5 * coded.dequantize(), atol=0.03, rtol=0.03)
    values = coded.movable()["scales"].clone().requires_grad_(True)
    coded.decode({"scales": values}).sum().backward()
    # Linear in scales: a run's slope times its scale is its sum.
    runs = [run.sum(1) for run in coded.dequantize().split(17, dim=1)]  # 83 columns in five runs
    torch.testing.assert_close(values.grad * values.detach(), torch.stack(runs, 1), atol=1e-4, rtol=1e-4)


def _error(difference, hessian):
    return torch.sum((difference.double() @ hessian.double()) * difference.double()).item()


def test_an_error_counts_by_the_input_it_meets():
    matrix, hessian = problem(96, 64)
    coder = NeuralCoder(DecoderSizes(bits=4.0, patch_size=16), TrainingSettings(epochs=40))
    under, plain = (coder.encode(matrix, metric, torch.Generator().manual_seed(0)) for metric in (hessian, None))
    seen, unseen = (_error(matrix - coded.dequantize(), hessian) for coded in (under, plain))
    assert seen < 0.7 * unseen
    squares = [(matrix - coded.dequantize()).square().sum() for coded in (under, plain)]
    assert squares[1] < squares[0]
    # Trained weights hold hardly more than noise does; of noise, four bits a weight leave this at best.
    assert 2.0**-8 < squares[1] / matrix.square().sum() < 0.2


def test_a_matrix_with_a_pattern_costs_far_fewer_bits_than_its_weights_one_by_one():
    rows, columns = torch.linspace(0, 12, 128), torch.linspace(0, 15, 128)
    matrix = torch.outer(rows.sin(), columns.sin())
    sizes = DecoderSizes(bits=0.53, strides=(2, 2), embedding_dim=1, embedding_bits=4, weight_bits=5, patch_size=32)
    coder = NeuralCoder(sizes, TrainingSettings(epochs=50, batch_size=2))
    ours = coder.encode(matrix, None, torch.Generator().manual_seed(0))
    theirs = VectorCoder(VectorSettings(code_bits=2, bucket=4)).encode(matrix, None, torch.Generator().manual_seed(0))
    assert sum(ours.bits().values()) <= 0.53 * matrix.numel() < sum(theirs.bits().values())
    errors = [(matrix - coded.dequantize()).norm().item() for coded in (ours, theirs)]
    assert errors[0] < 0.45 * errors[1]
    assert errors[0] < 0.12 * matrix.norm().item()


def test_a_seed_gives_one_result():
    first, second, other = (_coded({"bits": 3.0}, seed=seed)[2].dequantize() for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_an_earlier_coding_is_gone_on_from_where_it_is_ones_own():
    matrix, hessian = problem(*SHAPE)
    coder, settings = {}, TrainingSettings(epochs=24)
    for name in ("ours", "theirs"):
        coder[name] = NeuralCoder(DecoderSizes(bits=4.0), settings)
    first = coder["ours"].encode(matrix, hessian, torch.Generator().manual_seed(0))
    again = coder["theirs"].encode(matrix, hessian, torch.Generator().manual_seed(1), first)
    fresh = NeuralCoder(DecoderSizes(bits=4.0), settings).encode(matrix, hessian, torch.Generator().manual_seed(1))
    assert torch.equal(again.dequantize(), fresh.dequantize())
    more = coder["ours"].encode(matrix, hessian, torch.Generator().manual_seed(1), first)
    errors = [_error(matrix - coded.dequantize(), hessian) for coded in (first, more)]
    assert errors[1] < errors[0]


def test_dead_inputs_and_rows_of_zeros_do_no_harm():
    matrix, hessian = problem(*SHAPE)
    matrix[5:8] = 0
    hessian[11], hessian[:, 11] = 0, 0
    coder = NeuralCoder(DecoderSizes(bits=4.0), QUICK)
    coded = coder.encode(matrix, hessian, torch.Generator().manual_seed(0))
    assert torch.isfinite(coded.dequantize()).all()
    assert coded.dequantize()[5:8].abs().max() < 0.02
    zeros = coder.encode(torch.zeros(SHAPE), hessian, torch.Generator().manual_seed(0))
    assert zeros.dequantize().abs().max() < 1e-4
    assert math.isfinite(zeros.dequantize().sum().item())
