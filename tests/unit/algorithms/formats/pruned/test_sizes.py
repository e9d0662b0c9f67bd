import pytest
from safetensors.torch import load_file

from algorithms.formats.pruned.padded import write_padded
from algorithms.formats.pruned.ragged import write_ragged
from algorithms.formats.pruned.sizes import sizes
from algorithms.modeling.source import ModelSource
from tests.unit.algorithms.formats.pruned.pruned_models import COMPENSATION, RAGGED, UNIFORM, pruned_model


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
