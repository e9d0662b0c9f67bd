"""How a matrix's bits are shared out between its embeddings and its decoder.

Legend: O out_features, I in_features, N frames, S the product of the strides; a place of an embedding is all that it has for
S x S weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from algorithms.numerics.bit_packing import WORD
from algorithms.numerics.residuals.neural.layout import DecoderLayout
from algorithms.numerics.residuals.neural.patches import Patches, num_tiles, patch_size
from algorithms.numerics.residuals.vector_codes import scales_size

_REDUCTION = 1.2  # of channels from stage to stage
_MOST_WIDTH = 8192
# Channels that a stage has at least, and fewer where a budget has no room for them.
_LEAST_WIDTHS = (12, 8, 6, 4, 3, 2, 1)
_MOST_BITS = 8
# A decoder of about 16 channels: narrower ones hardly learn. Small matrices give it no more than the share.
_DECODER_BITS, _MOST_SHARE = 8192, 0.2


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """What is asked for.

    ``bits`` a weight hold everything that is stored. ``patch_size`` None: see :func:`patches.patch_size`. With both
    ``embedding_dim`` and ``embedding_bits`` given, the decoder takes what embeddings leave. Otherwise ``decoder_share`` of
    all bits is its, embeddings take the rest, and one follows from the other; with neither, there are about as many values as
    weights.
    """

    bits: float
    strides: tuple[int, ...] = (2,)
    patch_size: int | None = None
    block_size: int = 128
    embedding_dim: int | None = None
    embedding_bits: int | None = None
    weight_bits: int = 4
    decoder_share: float = 0.02


def plan(shape: tuple[int, int], sizes: DecoderSizes) -> tuple[Patches, DecoderLayout]:
    """Patches and layout for a matrix of ``shape`` (O, I); all that is stored stays within the budget.

    Raises:
        ValueError: the budget is too small for any decoder, or patches are not a whole number of embeddings.
    """
    layout = DecoderLayout(
        patch=0,
        embedding_dim=sizes.embedding_dim or 1,
        embedding_bits=sizes.embedding_bits or 1,
        weight_bits=sizes.weight_bits,
        strides=sizes.strides,
    )
    size = sizes.patch_size or patch_size(shape, layout.stride)
    if size % layout.stride:
        raise ValueError(f"patches of {size} are no multiple of {layout.stride}, the product of the strides")
    patches, layout = Patches(shape=shape, size=size), replace(layout, patch=size)
    budget = int(sizes.bits * shape[0] * shape[1])
    left = budget - scales_size(shape[0] * num_tiles(shape[1], sizes.block_size))
    if sizes.embedding_dim is None or sizes.embedding_bits is None:
        decoder = min(max(sizes.decoder_share * budget, _DECODER_BITS), _MOST_SHARE * budget)
        layout = _with_embeddings(layout, sizes, patches.count, int(left - decoder))
    try:
        return patches, fitted(layout, patches.count, left)
    except ValueError as error:
        raise ValueError(
            f"a matrix of {shape[0]} x {shape[1]} at {sizes.bits:g} bits a weight: {error}. Give it more bits, a smaller "
            "embedding_dim or fewer strides."
        ) from None


def fitted(layout: DecoderLayout, frames: int, budget: int) -> DecoderLayout:
    """The widest decoder whose bits, with those of embeddings and header, stay within ``budget``.

    The first width decides all others. What it leaves over gives rows of weights a bit more, and then values of embeddings.

    Raises:
        ValueError: the narrowest decoder needs more.
    """
    for least in _LEAST_WIDTHS:
        if _wide(layout, 1, least).stored_size(frames) <= budget:
            break
    else:
        least_size = _wide(layout, 1, 1).stored_size(frames)
        raise ValueError(f"scales leave {budget} bits, and embeddings with the narrowest decoder take {least_size}")
    low, high = 1, _MOST_WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _wide(layout, middle, least).stored_size(frames) <= budget else (low, middle - 1)
    chosen = _wide(layout, low, least)
    weights = sum(layer.outputs * layer.row for layer in chosen.layers)
    # Their stream is whole words, the last of which longer values may have begun.
    left = (budget - chosen.stored_size(frames)) // WORD * WORD + -layout.longer_values % WORD
    chosen = replace(chosen, longer_weights=min(left, weights))
    values = layout.longer_values + left - chosen.weights_with_more()
    return replace(chosen, longer_values=min(values, layout.values(frames)))


def _wide(layout: DecoderLayout, first: int, least: int) -> DecoderLayout:
    widths = [first]
    for _ in layout.strides:
        widths.append(max(least, round(widths[-1] / _REDUCTION)))
    return replace(layout, widths=tuple(widths))


def _with_embeddings(layout: DecoderLayout, sizes: DecoderSizes, frames: int, budget: int) -> DecoderLayout:
    """The embeddings that take up ``budget``: channels, their bits, and how many values have a bit more."""
    a_place = max(1, budget // replace(layout, embedding_dim=1).values(frames))
    # Fewer values than weights lose some of what any decoder could tell apart; more bits for each are worth less.
    bits = sizes.embedding_bits or max(1, a_place // (sizes.embedding_dim or layout.stride**2))
    channels = sizes.embedding_dim or max(1, a_place // bits)
    bits = min(_MOST_BITS, bits, max(1, a_place // channels))
    layout = replace(layout, embedding_dim=channels, embedding_bits=bits)
    values = layout.values(frames)
    return replace(layout, longer_values=max(0, min(budget // WORD * WORD - values * bits, values)))
