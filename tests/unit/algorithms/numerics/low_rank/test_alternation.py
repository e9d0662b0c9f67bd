from itertools import pairwise

import pytest
import torch

from algorithms.numerics.low_rank.alternation import alternate
from algorithms.numerics.low_rank.factors import Geometry
from tests.support.matrices import CODERS, problem

SETTINGS = {"rank": 4, "factor_bits": 16, "iterations": 10}


def _run(kind, hessian, start=None, seed=0, **changes):
    matrix = problem(37, 83)[0]
    generator = torch.Generator().manual_seed(seed)
    return matrix, alternate(matrix, hessian, CODERS[kind](), generator, **{**SETTINGS, **changes}, start=start)


@pytest.mark.parametrize("kind", CODERS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_never_rises_and_is_that_of_what_is_returned(kind, weighted):
    hessian = problem(37, 83)[1] if weighted else None
    matrix, found = _run(kind, hessian)
    assert all(later < earlier for earlier, later in pairwise(found.errors))
    geometry = Geometry(hessian)
    assert geometry.error(matrix - found.dequantize()) == pytest.approx(found.errors[-1], rel=1e-6)
    _, once = _run(kind, hessian, iterations=1)
    assert once.errors == found.errors[:1]


def test_a_low_rank_part_makes_the_residual_smaller():
    hessian = problem(37, 83)[1]
    errors = [_run("vq", hessian, rank=rank)[1].errors[-1] for rank in (0, 2, 8, 24)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize("kind", ["vq", "nf2", "aqlm"])
def test_full_rank_leaves_nothing_to_code(kind):
    matrix, found = _run(kind, problem(37, 83)[1], rank=100)
    assert found.low_rank.rank == 37
    torch.testing.assert_close(found.dequantize(), matrix, atol=2e-3, rtol=2e-3)


def test_later_turns_go_on_from_what_is_known():
    hessian = problem(37, 83)[1]
    _, more = _run("nf2", hessian, start=_run("nf2", hessian, iterations=1)[1])
    _, whole = _run("nf2", hessian)
    assert len(whole.errors) > 2
    assert more.errors == pytest.approx(whole.errors, rel=1e-6)
    # Nothing is better than rank 37 at 16 bits: what is known already stays.
    best = _run("vq", hessian, rank=37)[1]
    again = _run("vq", hessian, start=best, rank=1)[1]
    assert again is best


def test_the_residual_makes_up_for_the_rounding_of_the_low_rank_part():
    matrix, hessian = problem(37, 83)
    coarse = _run("vq of ten bits", hessian, factor_bits=4)[1]
    fine = _run("vq of ten bits", hessian, factor_bits=16)[1]
    exact = Geometry(hessian).best(matrix - fine.residual.dequantize(), 4, torch.Generator().manual_seed(0))
    rounded = coarse.low_rank.stored(*exact, 4)
    unaware = Geometry(hessian).error(matrix - fine.residual.dequantize() - rounded.dequantize())
    assert unaware > coarse.errors[-1]


def test_a_turn_that_comes_to_nothing_is_not_taken():
    matrix, hessian = problem(37, 83)

    class _Fails:
        """Codes as it should once, and then as something broken would."""

        def __init__(self):
            self.coder, self.turns = CODERS["nf2"](), 0

        def encode(self, residual, *rest):
            self.turns += 1
            return self.coder.encode(residual * (torch.nan if self.turns > 1 else 1.0), *rest)

    coder = _Fails()
    found = alternate(matrix, hessian, coder, torch.Generator().manual_seed(0), **SETTINGS)
    assert coder.turns == 2
    assert len(found.errors) == 1
    assert torch.isfinite(found.dequantize()).all()
