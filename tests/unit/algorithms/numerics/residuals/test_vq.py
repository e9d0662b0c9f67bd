from itertools import pairwise, product

import pytest
import torch

from algorithms.numerics.column_sweep import inverse_factor
from algorithms.numerics.residuals.permutation import similar_columns
from algorithms.numerics.residuals.vector_codes import packed_codes, unpacked_codes
from algorithms.numerics.residuals.vector_columns import Problem, VectorColumns
from algorithms.numerics.residuals.vq import VectorCoder, VectorSettings
from tests.support.matrices import problem


def _problem(rows=8, columns=12, words=5, seed=0):
    matrix, hessian = problem(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    columns_ = matrix.T.contiguous()
    quantizer = VectorColumns(
        torch.randn(words, 2, generator=generator), torch.rand(columns, rows // 2, generator=generator) + 0.5
    )
    return Problem(columns=columns_, factor=inverse_factor(hessian, 0.01)), quantizer


def test_without_errors_to_make_up_for_each_vector_gets_its_nearest_codeword():
    found, quantizer = _problem()
    for place, column in enumerate(found.columns):
        values = quantizer.requantize(place, column)
        for vector, (wanted, got) in enumerate(zip(column.view(-1, 2), values.view(-1, 2), strict=True)):
            distances = [(wanted - quantizer.scales[place, vector] * word).norm().item() for word in quantizer.book]
            assert (wanted - got).norm().item() == pytest.approx(min(distances), abs=1e-6)
            assert distances[quantizer.codes[place, vector]] == pytest.approx(min(distances), abs=1e-6)


def test_codes_of_a_small_matrix_come_near_to_the_best_of_all():
    found, quantizer = _problem(rows=2, columns=5, words=3, seed=3)
    best = float("inf")
    for codes in product(range(3), repeat=5):
        quantizer.codes = torch.tensor(codes)[:, None]
        best = min(best, found.loss(quantizer))
    found.sweep(quantizer)
    swept = found.loss(quantizer)
    losses = [swept]
    for _ in range(4):
        found.refine(quantizer)
        losses.append(found.loss(quantizer))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(losses))
    assert best <= losses[-1] * (1 + 1e-6)
    assert losses[-1] < 1.3 * best


def test_the_codebook_becomes_the_best_one_for_its_codes():
    found, quantizer = _problem(rows=16, columns=20)
    found.sweep(quantizer)
    before = found.loss(quantizer)
    for _ in range(6):
        found.solve_book(quantizer)
    # Least squares over the codewords, in float64: W_hat is linear in the book.
    hessian = found.factor.hessian.double()
    basis = []
    for word, part in product(range(5), range(2)):
        book = torch.zeros(5, 2)
        book[word, part] = 1
        probe = VectorColumns(book, quantizer.scales)
        probe.codes = quantizer.codes
        basis.append(probe.values().double().flatten())
    matrix = torch.stack(basis, 1)
    weighted = torch.stack([(hessian @ column.view(20, 16)).flatten() for column in basis], 1)
    exact = torch.linalg.solve(matrix.T @ weighted, weighted.T @ found.columns.double().flatten())
    torch.testing.assert_close(quantizer.book.double().flatten(), exact, atol=2e-3, rtol=2e-3)
    assert found.loss(quantizer) < before


def test_scales_become_the_best_common_factor_of_their_row():
    found, quantizer = _problem()
    found.sweep(quantizer)
    found.solve_book(quantizer)
    before = quantizer.scales.clone()
    found.solve_scales(quantizer)
    factors = quantizer.scales / before
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    at_best = found.loss(quantizer)
    for change in (0.99, 1.01):
        quantizer.scales = before * factors * change
        assert found.loss(quantizer) > at_best


def test_more_bits_and_more_turns_lower_the_error():
    matrix, hessian = problem(48, 64)

    def error(**settings):
        coded = VectorCoder(VectorSettings(bucket=2, **settings)).encode(matrix, hessian, torch.Generator().manual_seed(0))
        difference = matrix - coded.dequantize()
        return torch.sum((difference @ hessian) * difference).item()

    errors = [error(code_bits=bits) for bits in (2, 3, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]
    assert error(code_bits=4, rounds=3) < error(code_bits=4, rounds=0)


def test_an_earlier_coding_is_gone_on_from():
    matrix, hessian = problem(48, 64)
    coder = VectorCoder(VectorSettings(code_bits=4, bucket=2))
    first = coder.encode(matrix, hessian, torch.Generator().manual_seed(0))
    second, other = (coder.encode(matrix, hessian, torch.Generator().manual_seed(1), start) for start in (first, None))
    assert (second.book - first.book).norm() < 0.5 * (other.book - first.book).norm()


def test_a_permuted_block_has_like_columns_together():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, 8, generator=generator) * 5
    labels = torch.tensor([0, 1, 2] * 10)
    matrix = (kinds[labels] + 0.1 * torch.randn(30, 8, generator=generator)).T
    order = similar_columns(matrix, 4)
    assert order.shape == (2, 30)
    for block in order:
        assert sorted(block.tolist()) == list(range(30))
        changes = (labels[block][1:] != labels[block][:-1]).sum()
        assert changes <= 6
    assert sorted(similar_columns(torch.ones(4, 6), 4)[0].tolist()) == list(range(6))


@pytest.mark.parametrize("bits", [1, 4, 8, 9, 12, 16])
def test_wide_codes_are_two_streams(bits):
    codes = torch.randint(1 << bits, (7, 13), generator=torch.Generator().manual_seed(bits))
    stored = packed_codes(codes, bits)
    assert len(stored) == (1 if bits <= 8 else 2)
    assert sum(32 * words.numel() for words in stored.values()) < 91 * bits + 64
    assert torch.equal(unpacked_codes(stored, bits, (7, 13)), codes)


@pytest.mark.parametrize("vectors", [64, 3000])
def test_few_and_many_vectors_get_their_nearest_codewords(vectors):
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(128, 2, generator=generator)
    quantizer = VectorColumns(book, torch.rand(2, vectors, generator=generator) + 0.5)
    column = torch.randn(2 * vectors, generator=generator)
    got = quantizer.requantize(1, column)
    words = quantizer.scales[1][:, None, None].double() * book.double()
    distances = (column.view(-1, 1, 2).double() - words).norm(dim=2)
    torch.testing.assert_close(distances.amin(1), (column - got).view(-1, 2).double().norm(dim=1), atol=1e-5, rtol=1e-5)
    quantizer.book = -book
    torch.testing.assert_close(quantizer.requantize(1, -column), -got)
    quantizer.scales = 2 * quantizer.scales
    torch.testing.assert_close(quantizer.requantize(1, -2 * column), -2 * got)
