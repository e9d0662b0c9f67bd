"""A pruned model with the widths of each block as they are, and the small modelling file that loads it.

``modeling_ragged.py`` in this folder is copied into the output and says in its head what config.json holds. Code in a model
folder is run by whoever trusts it: here that is only done when it is this repository's own, byte for byte, and from a folder in
which nothing else stands but the weights and the configuration.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from algorithms.formats.checkpoint import Calibrated, write_checkpoint
from algorithms.formats.pruned.structure import structure_of, with_biases
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.on_demand import folder_on_demand
from algorithms.modeling.source import ModelError, ModelSource
from algorithms.modeling.transforms.narrowing import fill_narrowed

MODELING = "modeling_ragged.py"
_RESOURCE = Path(__file__).with_name(MODELING)
_BASE = "base_model_type"
_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}


def family_refusal(config: PretrainedConfig) -> str | None:
    """Why the modelling file cannot load models of this kind, in a sentence; None where it can."""
    if config.model_type in _NAMES:
        return None
    return f"{MODELING} has no classes for {config.model_type}, only for {', '.join(_NAMES)}."


def write_ragged(calibrated: Calibrated, directory: Path) -> None:
    """A Hugging Face folder that loads with ``trust_remote_code=True``; biases that only some blocks have are zeros elsewhere.

    Raises:
        ModelError: a family that the modelling file does not know.
    """
    source, structure = calibrated.source, structure_of(calibrated)
    original = structure.original
    settings = {
        **source.raw_config(),
        **_code_settings(source.config.model_type),
        "head_dim": original.head_dim,
        "num_attention_heads_per_layer": [block.groups * block.heads_a_group for block in structure.blocks],
        "num_key_value_heads_per_layer": [block.groups for block in structure.blocks],
        "intermediate_size_per_layer": [block.neurons for block in structure.blocks],
        "biases": sorted(structure.biases),
    }

    def _filled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return with_biases(tensors, structure.biases)

    shutil.copyfile(_RESOURCE, directory / MODELING)
    write_checkpoint(calibrated, directory, _filled, config=settings)


def read_ragged(directory: Path) -> nn.Module:
    """The model of such a folder in float32, without its modelling file, read block by block when it computes.

    Raises:
        ModelError: another kind of folder, or missing tensors.
    """
    source = _BaseSource(directory)
    return folder_on_demand(source, fill=partial(fill_narrowed, architecture=source.architecture))


def load_shipped(directory: Path) -> nn.Module:
    """The model of such a folder in float32 as transformers loads it through the modelling file.

    Raises:
        ModelError: the code that the folder would run is not this repository's.
    """
    source = _BaseSource(directory)
    expected = _code_settings(source.config.model_type)
    raw, shipped = source.raw_config(), directory / MODELING
    if not shipped.is_file() or shipped.read_bytes() != _RESOURCE.read_bytes():
        raise ModelError(f"{shipped} is not the modelling file of this release; its code is not run. Export the model again.")
    strange = sorted(key for key, value in expected.items() if raw.get(key) != value)
    if strange:
        raise ModelError(f"{directory}/config.json names code other than {MODELING} ({', '.join(strange)}); it is not run.")
    with tempfile.TemporaryDirectory() as scratch:
        # transformers also runs custom_generate/generate.py and whatever else it may learn to: none of it comes along.
        alone = Path(scratch) / "ragged"
        alone.mkdir()
        shutil.copyfile(_RESOURCE, alone / MODELING)
        atomic_write_json(alone / "config.json", raw)
        for path in (*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")):
            (alone / path.name).symlink_to(path.resolve())
        return AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, trust_remote_code=True).eval()


class _BaseSource(ModelSource):
    """A folder of this format, seen as a model of its family with the original's widths."""

    @cached_property
    def config(self) -> PretrainedConfig:
        """The original model's configuration.

        Raises:
            ModelError: another kind of folder.
        """
        raw = self.raw_config()
        if raw.get(_BASE) not in _NAMES:
            raise ModelError(f"{self.directory}/config.json has no {_BASE} that is one of {', '.join(_NAMES)}.")
        return AutoConfig.for_model(raw[_BASE], **{key: raw[key] for key in raw if key not in ("model_type", "auto_map")})


def _code_settings(base_model_type: str) -> dict[str, object]:
    """Which classes of the modelling file load a model, as config.json says it.

    Raises:
        ModelError: a family that has none.
    """
    if base_model_type not in _NAMES:
        raise ModelError(f"{MODELING} has no classes for {base_model_type}, only for {', '.join(_NAMES)}.")
    name = f"Ragged{_NAMES[base_model_type]}"
    module = MODELING.removesuffix(".py")
    return {
        "model_type": f"ragged_{base_model_type}",
        _BASE: base_model_type,
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {"AutoConfig": f"{module}.{name}Config", "AutoModelForCausalLM": f"{module}.{name}ForCausalLM"},
    }
