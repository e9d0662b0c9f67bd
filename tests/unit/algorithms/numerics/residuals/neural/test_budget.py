import pytest
import torch

from algorithms.numerics.residuals.neural.budget import DecoderSizes, fitted, plan
from algorithms.numerics.residuals.neural.layout import DecoderLayout

LAYOUT = DecoderLayout(
    patch=8, embedding_dim=3, embedding_bits=2, weight_bits=4, strides=(2, 2), widths=(5, 4, 3), longer_values=40,
    longer_weights=7,
)  # fmt: skip


def test_layers_are_those_of_hnerv():
    assert [tuple(layer) for layer in LAYOUT.layers] == [(5, 3, 1), (16, 5, 1), (12, 4, 3), (1, 3, 3)]
    kernels = [layer.kernel for layer in DecoderLayout(**{**vars(LAYOUT), "strides": (2,) * 5, "widths": (9,) * 6}).layers]
    assert kernels == [1, 1, 3, 5, 5, 5, 3]


def test_bits_are_those_counted_by_hand():
    # Two frames of 8 x 8 at a stride of 4: 2 * 3 * 2 * 2 values of 2 bits, 48 bits or two words, of which 24 can be longer.
    layout = DecoderLayout(**{**vars(LAYOUT), "longer_values": 10})
    weights = 5 * 3 + 16 * 5 + 12 * 4 * 9 + 1 * 3 * 9
    assert weights == 554  # of 4 bits: 2216, or 70 words
    rows = 5 + 16 + 12 + 1  # a scale and a bias of 16 bits each
    high = 1  # word: 10 bits of values, and of weights the two rows of three that 7 gives
    header = 6 + 2 + 3
    assert layout.stored_size(2) == 32 * (2 + 70 + high + rows + header)


def test_longer_codes_are_first_values_and_first_rows():
    tops = DecoderLayout(**{**vars(LAYOUT), "longer_values": 9}).value_tops(2)
    assert tops.shape == (2, 3, 2, 2)
    # The first channel of both frames, and one place of the second channel of the first frame.
    assert (tops[:, 0] == 7).all()
    assert tops[:, 1].flatten().tolist() == [7, 3, 3, 3, 3, 3, 3, 3]
    assert (tops[:, 2] == 3).all()
    assert [bits.tolist() for bits in LAYOUT.row_bits()][:2] == [[5, 5, 4, 4, 4], [4] * 16]
    assert LAYOUT.row_tops()[0].tolist() == [15, 15, 7, 7, 7]
    assert LAYOUT.weights_with_more() == 6


def test_a_header_holds_all_sizes():
    assert DecoderLayout.read(LAYOUT.header()) == LAYOUT
    assert LAYOUT.header().dtype == torch.int32


def test_the_widest_decoder_that_fits_is_found():
    bare = DecoderLayout(**{**vars(LAYOUT), "widths": (), "longer_values": 0, "longer_weights": 0})
    for budget in (9000, 30000, 100000):
        found = fitted(bare, 2, budget)
        # A longer code is a whole row's; of embeddings, all are longer already.
        assert budget - 32 - max(layer.row for layer in found.layers) < found.stored_size(2) <= budget
        widths = [found.widths[0] + 1]
        for _ in range(2):
            widths.append(max(min(12, *found.widths[1:]), round(widths[-1] / 1.2)))
        wider = DecoderLayout(**{**vars(bare), "widths": tuple(widths)})
        assert wider.stored_size(2) > budget
    assert fitted(bare, 2, 100000).widths == (30, 25, 21)  # the last is 25 over 1.2
    with pytest.raises(ValueError, match="the narrowest decoder take 960"):
        fitted(bare, 2, 900)


@pytest.mark.parametrize("shape", [(384, 128), (64, 128), (100, 75), (1024, 384)])
@pytest.mark.parametrize(
    "sizes",
    [
        {"bits": 2.0},
        {"bits": 3.3},
        {"bits": 4.0, "embedding_bits": 3},
        {"bits": 3.0, "embedding_dim": 7, "weight_bits": 8},
        {"bits": 5.0, "strides": (2, 2), "embedding_dim": 3, "embedding_bits": 6},
        {"bits": 2.5, "block_size": 20, "decoder_share": 0.5},
    ],
)
def test_a_budget_is_met_to_a_hundredth_of_a_bit_and_never_exceeded(shape, sizes):
    patches, layout = plan(shape, DecoderSizes(**sizes))
    weights = shape[0] * shape[1]
    scales = shape[0] * -(-shape[1] // sizes.get("block_size", 128))
    runs = -(-scales // 256)
    bits = (layout.stored_size(patches.count) + 8 * scales + 32 * runs) / weights
    assert sizes["bits"] - 0.01 < bits <= sizes["bits"]


def test_embeddings_have_as_many_values_as_weights_where_bits_allow():
    for bits, channels, width in ((2.0, 6, 1), (3.0, 5, 2), (4.0, 5, 3)):
        _, layout = plan((384, 128), DecoderSizes(bits=bits))
        assert (layout.embedding_bits, layout.embedding_dim >= 4) == (width, True)
        assert abs(layout.embedding_dim - channels) <= 1


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"a matrix of 16 x 16 at 0.5 bits a weight: scales leave .* Give it more bits"):
        plan((16, 16), DecoderSizes(bits=0.5))
    with pytest.raises(ValueError, match="patches of 10 are no multiple of 4"):
        plan((64, 64), DecoderSizes(bits=3.0, strides=(2, 2), patch_size=10))
