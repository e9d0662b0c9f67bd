import pytest
from safetensors.torch import load_file

from algorithms.formats.client import load as client_load
from algorithms.formats.pruned.padded import write_padded
from algorithms.formats.pruned.ragged import write_ragged
from algorithms.formats.pruned.sizes import sizes
from algorithms.modeling.source import ModelSource
from tests.unit.algorithms.formats.pruned.pruned_models import COMPENSATION, RAGGED, TOKENS, UNIFORM, pruned_model, settings_of


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kept", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_written_folders(tmp_path, family, kept, tied):
    biased = COMPENSATION[:1] if family == "qwen3" else COMPENSATION
    model = pruned_model(tmp_path, family, kept=kept, biased=biased, tied=tied)
    found = sizes(model.calibrated)
    assert found["original"].parameters == ModelSource(model.origin).num_parameters
    for name, write in (("padded", write_padded), ("ragged", write_ragged)):
        (tmp_path / name).mkdir()
        write(model.calibrated, tmp_path / name)
        stored = load_file(tmp_path / name / "model.safetensors")
        assert found[name].parameters == sum(tensor.numel() for tensor in stored.values())
        assert found[name].bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert found["original"].parameters > found["padded"].parameters >= found["ragged"].parameters


def test_bytes_of_the_cache(tmp_path):
    found = sizes(pruned_model(tmp_path, "llama").calibrated)
    # Keys and values, four channels a head, two bytes a value: 16 bytes a group, which are 4, then 3 in the widest block.
    assert {name: stored.cache_bytes for name, stored in found.items()} == {
        "original": 3 * 4 * 16,
        "padded": 3 * 3 * 16,
        "ragged": (2 + 3 + 1) * 16,
    }


# The widest block of RAGGED has 53 neurons, every one of UNIFORM 40, the original 64.
@pytest.mark.parametrize(
    ("kept", "multiple", "neurons"),
    [(RAGGED, 1, 53), (RAGGED, 8, 56), (RAGGED, 32, 64), (RAGGED, 48, 64), (UNIFORM, 8, 40), (UNIFORM, 16, 48)],
)
def test_neurons_are_padded_to_a_multiple_with_zeros_and_no_further_than_the_original(tmp_path, kept, multiple, neurons):
    model = pruned_model(tmp_path, "llama", kept=kept, biased=COMPENSATION)
    (tmp_path / "padded").mkdir()
    write_padded(model.calibrated, tmp_path / "padded", multiple=multiple)
    stored = load_file(tmp_path / "padded" / "model.safetensors")
    assert settings_of(tmp_path / "padded")["intermediate_size"] == neurons
    for index, keeps in enumerate(kept):
        for name, side in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = stored[f"model.layers.{index}.mlp.{name}.weight"]
            assert weight.shape[side] == neurons
            assert not weight.narrow(side, len(keeps.neurons), neurons - len(keeps.neurons)).any()
    found = sizes(model.calibrated, multiple=multiple)["padded"]
    assert found.parameters == sum(tensor.numel() for tensor in stored.values())
    expected = model.logits()
    assert ((client_load("padded", tmp_path / "padded")(TOKENS).logits - expected).abs().max() / expected.std()) < 1e-4
