import json
import math

import pytest
import torch

from algorithms.blockwise.config import BlockwiseParameters
from algorithms.blockwise.pipeline import Pipeline, check_groups, followed_sequences, linear_shapes
from algorithms.blockwise.stages import _spread, load_checkpoint
from algorithms.blockwise.uniform_exports import Setting
from algorithms.blockwise.uniform_method import uniform_pipeline
from algorithms.modeling.source import ModelSource
from algorithms.numerics.uniform import UniformCodes
from tests.support.models import save_family, token_sequences
from tests.unit.algorithms.quantization.plugin_runs import blocks, calibrate, run


def _halves(wanted, statistics, spread):
    """Codes that say nothing but the sign, and that depend on the inputs' size where there are any."""
    size = 1.0 if statistics is None else statistics.hessian().diagonal().mean().sqrt().item()
    weights = {}
    for name, matrix in wanted.items():
        rows = matrix.shape[0]
        weights[name] = UniformCodes(
            codes=torch.where(matrix > 0, 3, 1).to(torch.uint8),
            scales=torch.full((rows, 2), 0.01 * size).half().float(),
            zeros=torch.full((rows, 2), 2.0),
            bits=2,
        )
    return weights


def _pipeline(*, needs_text=True, exports=("dense",), **keys) -> Pipeline:
    config = BlockwiseParameters.model_validate({"nsamples": 8, "model_seqlen": 16, "val_size": 2, **keys})
    setting = Setting(bits=2, symmetric=True, group_size=16)
    return uniform_pipeline(name="halves", config=config, fit=_halves, setting=setting, exports=exports, needs_text=needs_text)


class _Plugin:
    """As much of a plugin as its runs ask for."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.stages, self.exports = pipeline.specs, pipeline.exports


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ModelSource(save_family(tmp_path_factory.mktemp("models") / "base", "llama"))


@pytest.mark.parametrize(
    ("keys", "followed"),
    [
        ({}, math.ceil(24 * 64 / 16)),  # the widest linear has 64 inputs
        ({"model_seqlen": 500}, 4),
        ({"model_seqlen": 512}, 3),
        ({"model_seqlen": 2048}, 1),
        ({"reference_samples": 5}, 5),
        ({"block_tuning": {}}, None),
        ({"block_tuning": {}, "reference_samples": 5}, None),
    ],
)
def test_so_many_sequences_are_followed(source, keys, followed):
    config = _pipeline(**keys).config
    assert followed_sequences(config, source, tunes=config.block_tuning is not None) == followed


def test_followed_sequences_lie_at_even_distances():
    sequences = token_sequences(10, 4)
    followed, others = _spread(sequences, 4)
    places = [next(i for i, other in enumerate(sequences) if other is one) for one in followed]
    assert places == [0, 2, 5, 7]
    assert {id(one) for one in (*followed, *others)} == {id(one) for one in sequences}
    for count in (None, 10, 11):
        followed, others = _spread(sequences, count)
        assert len(followed) == 10
        assert others == []


def test_linears_and_their_shapes(source):
    assert linear_shapes(source) == {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }


def test_groups_must_divide_every_linear(source):
    with pytest.raises(ValueError, match=r"^key: groups of 64 columns do not divide ") as caught:
        check_groups(source, 64, "key")
    named = str(caught.value)
    assert "self_attn.q_proj [32, 32]" in named
    assert "mlp.down_proj" not in named
    assert named.endswith("-1 takes whole rows.")
    for size in (-1, 1, 8, 32):
        check_groups(source, size, "key")


def test_the_text_that_is_asked_for(source):
    calibration, conversion = _pipeline().specs()
    request = calibration.tokens
    assert (request.num_samples, request.sequence_length, request.validation_samples, request.seed) == (8, 16, 2, 0)
    assert conversion.tokens is None
    assert _pipeline(needs_text=False).specs()[0].tokens is None
    assert calibration.reuse_on_new_data
    assert (calibration.name, conversion.name) == ("calibration", "conversion")


@pytest.mark.parametrize("needs_text", [True, False])
def test_bits_are_a_hand_count_in_every_report(source, tmp_path, needs_text):
    pipeline = _pipeline(needs_text=needs_text)
    calibrated, converted = run(_Plugin(pipeline), source, tmp_path)
    shapes = linear_shapes(source)
    weights, rows = (2 * sum(sizes) for sizes in ([r * c for r, c in shapes.values()], [r for r, _ in shapes.values()]))
    expected = {"codes": 2 * weights, "scales": 2 * 16 * rows, "parameters": weights}
    assert pipeline.bits(calibrated) == expected == pipeline.bits(converted)
    assert json.loads((converted.directory / "bits_report.json").read_text()) == expected
    for report in blocks(calibrated, "linears"):
        assert set(report) == set(shapes)
        for name, (height, width) in shapes.items():
            assert report[name]["bits_per_weight"] == (2 * height * width + 32 * height) / (height * width)


def test_errors_are_those_of_the_outputs(source, tmp_path):
    pipeline = _pipeline(needs_text=False)
    calibrated = calibrate(_Plugin(pipeline), source, tmp_path / "out")
    original, model = source.load_block(0), pipeline.load(calibrated)
    report = blocks(calibrated, "linears")[0]
    for name in linear_shapes(source):
        wanted = original.get_submodule(name).weight.double()
        found = model.get_submodule(f"model.layers.0.{name}").weight.double()
        expected = ((wanted - found).square().sum() / wanted.square().sum()).item()
        assert report[name]["relative_error"] == pytest.approx(expected, rel=1e-5)


def test_an_export_loads_as_the_calibration_does(source, tmp_path):
    pipeline = _pipeline(exports=("compressed-tensors", "dense"))
    calibrated, converted = run(_Plugin(pipeline), source, tmp_path)
    expected = pipeline.load(calibrated).state_dict()
    found = pipeline.load(converted).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    dense = load_checkpoint(converted.directory / "exports" / "dense", dict).state_dict()
    assert all(torch.equal(dense[name], tensor.half().float()) for name, tensor in expected.items())


def test_statistics_follow_the_compressed_prefix(source, tmp_path):
    """The scales of these codes are the size of their inputs: computed here with the finished model."""
    pipeline = _pipeline(targets="compressed_prefix", true_sequential=True)
    calibrated = calibrate(_Plugin(pipeline), source, tmp_path / "out")
    model, sizes = pipeline.load(calibrated), {}

    def note(name):
        def hook(module, inputs):
            sizes[name] = inputs[0].double().square().mean().sqrt().item()

        return hook

    names = [f"model.layers.{index}.{name}" for index in range(2) for name in linear_shapes(source)]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(note(name))
    with torch.no_grad():
        model(input_ids=torch.cat(token_sequences(8, 16)[2:]), use_cache=False)
    for name in names:
        weight = model.get_submodule(name).weight
        assert weight.abs().max().item() == pytest.approx(0.01 * sizes[name], rel=2**-9), name
