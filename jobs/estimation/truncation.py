"""The first blocks of a model as a model folder of its own, made of links: no weight is copied, and everything can read it."""

from __future__ import annotations

from pathlib import Path

from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelSource

_CONFIG, _INDEX, _DEPTH = "config.json", "model.safetensors.index.json", "num_hidden_layers"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def write_truncated(source: ModelSource, blocks: int, folder: Path) -> Path:
    """Make ``folder`` the model of the first ``blocks`` blocks, with the original's embeddings, norm and head.

    Weight files are links to the original's, and an index names of their tensors only those that are left. Lists of config.json
    that have an entry a block are cut to the blocks that stay.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    kept = {tensor.name: tensor.file for name, tensor in source.places.items() if _stays(source, name, blocks)}
    for file in source.directory.iterdir():
        if file.is_file() and file.name not in (_CONFIG, _INDEX) and file.suffix not in _WEIGHTS:
            (folder / file.name).symlink_to(file.resolve())
    for name in sorted(set(kept.values())):
        (folder / name).symlink_to((source.directory / name).resolve())
    config = source.raw_config()
    each = {key: value[:blocks] for key, value in config.items() if isinstance(value, list) and len(value) == config[_DEPTH]}
    atomic_write_json(folder / _INDEX, {"metadata": {}, "weight_map": kept})
    atomic_write_json(folder / _CONFIG, {**config, **each, _DEPTH: blocks})
    return folder


def _stays(source: ModelSource, name: str, blocks: int) -> bool:
    prefix = f"{source.architecture.blocks}."
    return not name.startswith(prefix) or int(name.removeprefix(prefix).partition(".")[0]) < blocks
