"""Both formats, read back by their clients and by our own readers, beside the original with zeros where it was pruned."""

import pytest
import torch
from safetensors.torch import load_file

from algorithms.formats.client import greedy_continuation, load, record
from algorithms.formats.pruned.padded import read_padded, write_padded
from algorithms.formats.pruned.ragged import read_ragged, write_ragged
from algorithms.formats.pruned.stock import expressible_biases
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.transforms.narrowing import Kept, narrowed_on_demand
from tests.support.models import FAMILIES
from tests.unit.algorithms.formats.pruned.pruned_models import (
    COMPENSATION,
    RAGGED,
    TOKENS,
    UNIFORM,
    pruned_model,
    settings_of,
)

TOLERANCE = 1e-4
WRITERS = {"padded": write_padded, "ragged": write_ragged}
READERS = {"padded": read_padded, "ragged": read_ragged}


def written(model, directory, name):
    directory.mkdir()
    WRITERS[name](model.calibrated, directory)
    return directory


def differs(logits, expected):
    return ((logits - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("kept", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_clients_and_readers_compute_what_is_left(tmp_path, family, kept, has_biases, tied):
    model = pruned_model(tmp_path, family, kept=kept, biased=COMPENSATION if has_biases else (), tied=tied)
    expected, source = model.logits(), model.calibrated.source
    blocks = [tensors for _, tensors in model.calibrated.blocks()]
    assert (
        differs(narrowed_on_demand(source, model.calibrated.outside(), blocks.__getitem__)(TOKENS).logits, expected) < TOLERANCE
    )
    assert expected.std() > 0.5
    for name in WRITERS:
        if name == "padded" and has_biases and not set(COMPENSATION) <= expressible_biases(source.config):
            continue
        folder = written(model, tmp_path / name, name)
        assert differs(record(name, folder, TOKENS)["logits"], expected) < TOLERANCE
        assert differs(READERS[name](folder)(TOKENS).logits, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_families_without_neuron_biases_hold_those_of_attention(tmp_path, family):
    model = pruned_model(tmp_path, family, biased=("self_attn.o_proj",))
    folder = written(model, tmp_path / "padded", "padded")
    assert differs(load("padded", folder)(TOKENS).logits, model.logits()) < TOLERANCE
    assert settings_of(folder)["attention_bias"] is True
    assert settings_of(folder)["model_type"] == family


@pytest.mark.parametrize(("name", "family"), [("padded", "qwen2"), *(("ragged", family) for family in FAMILIES)])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_generation_without(tmp_path, name, family, cache):
    biased = () if name == "padded" else COMPENSATION
    model = load(name, written(pruned_model(tmp_path, family, biased=biased), tmp_path / "out", name))
    model.generation_config.eos_token_id = None
    whole = model.generate(TOKENS, do_sample=False, max_new_tokens=8, cache_implementation=cache)
    assert torch.equal(whole[:, TOKENS.shape[1] :], greedy_continuation(model, TOKENS, new_tokens=8))


def test_the_cache_is_as_wide_as_each_block(tmp_path):
    model = load("ragged", written(pruned_model(tmp_path, "llama"), tmp_path / "out", "ragged"))
    given = model(TOKENS, use_cache=True)
    (cache,) = (value for value in given.values() if hasattr(value, "layers"))
    assert [layer.keys.shape[1] for layer in cache.layers] == [len(kept.groups) for kept in RAGGED]


@pytest.mark.parametrize("name", ["padded", "ragged"])
def test_a_window_that_slides_keeps_sliding(tmp_path, name):
    model = pruned_model(tmp_path, "mistral", sliding_window=4)
    expected = model.logits()
    folder = written(model, tmp_path / "out", name)
    assert differs(load(name, folder)(TOKENS).logits, expected) < TOLERANCE
    wide = pruned_model(tmp_path / "wide", "mistral")
    assert differs(wide.logits(), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("changes", [{"rope_theta": 77.0}, {"rms_norm_eps": 0.3}, {"hidden_act": "relu"}])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_what_shapes_the_computation_survives_another_family(tmp_path, family, changes):
    model = pruned_model(tmp_path, family, biased=COMPENSATION, **changes)
    folder = written(model, tmp_path / "padded", "padded")
    assert settings_of(folder)["model_type"] == "seed_oss"
    assert differs(load("padded", folder)(TOKENS).logits, model.logits()) < TOLERANCE


def test_scaled_positions_survive_another_family(tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = pruned_model(tmp_path, "qwen2", kept=UNIFORM, biased=COMPENSATION, rope_parameters=scaling)
    folder = written(model, tmp_path / "padded", "padded")
    assert settings_of(folder)["model_type"] == "llama"
    assert differs(load("padded", folder)(TOKENS).logits, model.logits()) < TOLERANCE


def test_a_uniform_structure_is_not_padded(tmp_path):
    model = pruned_model(tmp_path, "llama", kept=UNIFORM)
    stored = load_file(written(model, tmp_path / "padded", "padded") / "model.safetensors")
    for index, tensors in model.calibrated.blocks():
        for name, tensor in tensors.items():
            assert torch.equal(stored[f"model.layers.{index}.{name}"], tensor)


def test_padding_is_zero(tmp_path):
    model = pruned_model(tmp_path, "qwen2")
    stored = load_file(written(model, tmp_path / "padded", "padded") / "model.safetensors")
    _, tensors = list(model.calibrated.blocks())[2]
    for name, tensor in tensors.items():
        grown = stored[f"model.layers.2.{name}"]
        assert grown.dtype == torch.float16
        assert torch.equal(grown[tuple(slice(side) for side in tensor.shape)], tensor)
        assert grown.count_nonzero() == tensor.count_nonzero()
    assert stored["model.layers.2.self_attn.q_proj.bias"].shape == (24,)
    assert stored["model.layers.2.mlp.down_proj.weight"].shape == (32, 53)


def test_biases_of_some_blocks_are_zeros_in_the_others(tmp_path):
    model = pruned_model(tmp_path, "llama", kept=UNIFORM, biased=COMPENSATION)
    _, tensors = list(model.calibrated.blocks())[1]
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}
    BlockStore(model.calibrated.directory).save(1, without, {})
    expected, name = model.logits(), "model.layers.1.mlp.down_proj.bias"
    for client_format in WRITERS:
        folder = written(model, tmp_path / client_format, client_format)
        assert differs(load(client_format, folder)(TOKENS).logits, expected) < TOLERANCE
        assert not load_file(folder / "model.safetensors")[name].any()


def test_one_group_and_one_neuron_are_enough(tmp_path):
    model = pruned_model(tmp_path, "llama", kept=(Kept(groups=(3,), neurons=(9,)),) * 2, biased=COMPENSATION)
    for name in WRITERS:
        assert differs(load(name, written(model, tmp_path / name, name))(TOKENS).logits, model.logits()) < TOLERANCE
