"""Hadamard matrices by construction, scaled to be orthogonal, and products with them in n log n.

A matrix of order n = 2^k K is the Kronecker product of Sylvester's of order 2^k and one of order K, which Paley's
constructions give from the squares of a finite field GF(q), q a power of a prime:

    I    K = q + 1,     q = 3 mod 4
    II   K = 2 (q + 1), q = 1 mod 4
"""

from __future__ import annotations

from functools import cache
from itertools import product
from math import prod

import torch
from torch import Tensor

_SYLVESTER = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
_DIAGONAL = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)  # takes the place of the zeros in Paley II
# Products with small dense factors use the processor better than steps of two, at little more arithmetic.
_RADIX = 64
_CHUNK = 1 << 22  # numbers held in float64 at a time


def hadamard(order: int) -> Tensor:
    """An orthogonal matrix [n, n] of entries +-1 / sqrt(n), float64.

    Raises:
        ValueError: no construction gives this order; the message names the nearest ones.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in _factors(order):
        matrix = torch.kron(matrix, _signs(factor))
    return matrix / order**0.5


def times_hadamard(matrix: Tensor, *, scales: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``matrix`` [..., n] times diag(``scales``) times ``hadamard(n)``, computed in float64.

    Args:
        matrix: of any floating dtype.
        scales: [n]; none scale nothing.
        dtype: of the result; the matrix's by default.

    Raises:
        ValueError: as :func:`hadamard`.
    """
    order = matrix.shape[-1]
    factors = _factors(order)
    rows = matrix.reshape(-1, order)
    turned = torch.empty_like(rows, dtype=dtype or matrix.dtype)
    step = max(1, _CHUNK // order)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step].double()
        if scales is not None:
            part = part * scales.to(part.device)
        for place, factor in enumerate(factors):
            # A row is a tensor of shape ``factors``; each factor's matrix turns one of its axes.
            axis = part.reshape(-1, factor, prod(factors[place + 1 :]))
            part = torch.einsum("aib,ij->ajb", axis, _signs(factor).to(part.device))
        turned[start : start + step] = part.reshape(-1, order) / order**0.5
    return turned.view(matrix.shape)


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """Independent fair signs [count], float64."""
    return torch.randint(0, 2, (count,), generator=generator, dtype=torch.float64) * 2 - 1


@cache
def _factors(order: int) -> tuple[int, ...]:
    """Orders whose Kronecker product has this order: powers of two up to the radix, then Paley's."""
    base = _base_order(order)
    if base is None:
        below = next(size for size in range(order - 1, 0, -1) if _base_order(size) is not None) if order > 1 else 1
        above = next(size for size in range(max(order, 0) + 1, 2 * max(order, 1) + 1) if _base_order(size) is not None)
        raise ValueError(
            f"rotation needs a Hadamard matrix of order {order}, and none can be constructed; the nearest orders that can "
            f"are {below} and {above}."
        )
    factors, rest = [base] if base > 1 else [], order // base
    while rest > 1:
        factors.insert(0, min(rest, _RADIX))
        rest //= factors[0]
    return tuple(factors)


def _base_order(order: int) -> int | None:
    """The smallest K, order = 2^k K, with K = 1 or one of Paley's."""
    base = order
    while base > 1 and base % 2 == 0:
        base //= 2
    while 0 < base <= order:
        if base == 1 or _paley_field(base) is not None:
            return base
        base *= 2
    return None


def _paley_field(order: int) -> int | None:
    """The q of the construction that gives a matrix of this order."""
    if order % 4:
        return None
    if _prime_power(order - 1) is not None:
        return order - 1
    q = order // 2 - 1
    return q if q % 4 == 1 and _prime_power(q) is not None else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, p prime."""
    if q < 2:
        return None
    p = next((divisor for divisor in range(2, int(q**0.5) + 1) if q % divisor == 0), q)
    exponent = 0
    rest = q
    while rest % p == 0:
        rest, exponent = rest // p, exponent + 1
    return (p, exponent) if rest == 1 else None


@cache
def _signs(order: int) -> Tensor:
    """A Hadamard matrix [K, K] of entries +-1: Sylvester's, or Paley's. Shared: not to be changed."""
    if order & (order - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < order:
            matrix = torch.kron(matrix, _SYLVESTER)
        return matrix
    q = _paley_field(order)
    assert q is not None, f"{order} is no order of Paley's"
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = 1
    conference[1:, 0] = 1 if q % 4 == 1 else -1
    conference[1:, 1:] = _jacobsthal(q)
    identity = torch.eye(q + 1, dtype=torch.float64)
    return torch.kron(conference, _SYLVESTER) + torch.kron(identity, _DIAGONAL) if q % 4 == 1 else conference + identity


def _jacobsthal(q: int) -> Tensor:
    """Q [q, q]: 1 where a - b is the square of an element of GF(q) other than zero, 0 where a = b, else -1."""
    power = _prime_power(q)
    assert power is not None
    p, exponent = power
    weights = torch.tensor([p**place for place in range(exponent)])
    elements = torch.tensor(list(product(range(p), repeat=exponent)))
    differences = ((elements[:, None] - elements) % p) @ weights
    character = torch.full((q,), -1.0, dtype=torch.float64)
    modulus = _irreducible(p, exponent)
    character[[sum(c * p**i for i, c in enumerate(_product(a, a, modulus, p))) for a in elements.tolist()]] = 1
    character[0] = 0
    return character[differences]


def _irreducible(p: int, degree: int) -> list[int]:
    """The lower coefficients of a monic polynomial of this degree over GF(p) that makes multiplication modulo it a field's."""
    for lower in product(range(p), repeat=degree):
        nonzero = [list(element) for element in product(range(p), repeat=degree) if any(element)]
        # In a field of odd order every square but zero has two roots; other rings have more of them, or squares that vanish.
        squares = [tuple(_product(element, element, list(lower), p)) for element in nonzero]
        if tuple([0] * degree) not in squares and 2 * len(set(squares)) == len(squares):
            return list(lower)
    raise AssertionError(f"GF({p}^{degree}) exists")


def _product(a: list[int], b: list[int], modulus: list[int], p: int) -> list[int]:
    """A b modulo x^e + ``modulus``, over GF(p); coefficients from the lowest."""
    degree = len(modulus)
    coefficients = [0] * (2 * degree - 1)
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            coefficients[i + j] += left * right
    for place in range(2 * degree - 2, degree - 1, -1):
        for i, lower in enumerate(modulus):
            coefficients[place - degree + i] -= coefficients[place] * lower
    return [coefficient % p for coefficient in coefficients[:degree]]
