"""From a calibration folder to a Hugging Face folder, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from algorithms.formats.storage import to_storage
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.companions import copy_companions
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.shards import ShardWriter
from algorithms.modeling.source import ModelSource

OUTSIDE = "not_quantized_weights.safetensors"

DenseState = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class Calibrated:
    """A finished calibration: blocks in a plugin's packed form, and the rest of the model in float16."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = ModelSource(directory)
        self._store = BlockStore(directory)

    def outside(self) -> dict[str, Tensor]:
        """Embeddings, final norm and head."""
        return load_file(self.directory / OUTSIDE)

    def blocks(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Number and stored tensors of every block, in order, named relative to the block.

        Raises:
            ValueError: a block is missing or damaged.
        """
        for index in range(self.source.num_blocks):
            yield index, self.block(index)

    def block(self, index: int) -> dict[str, Tensor]:
        """Stored tensors of one block, named relative to it.

        Raises:
            ValueError: the block is missing or damaged.
        """
        loaded = self._store.load(index)
        if loaded is None:
            raise self._damaged(index)
        return loaded[0]

    def shapes(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Shapes of every block's tensors, in order, without reading these.

        Raises:
            ValueError: a block is missing.
        """
        for index in range(self.source.num_blocks):
            found = self._store.shapes(index)
            if found is None:
                raise self._damaged(index)
            yield found

    def _damaged(self, index: int) -> ValueError:
        return ValueError(f"block {index} of {self.directory} is missing or damaged; run the job again with overwrite: true")


def write_checkpoint(
    calibrated: Calibrated,
    directory: Path,
    transform: DenseState,
    quantization_config: Mapping[str, object] | None = None,
    *,
    config: Mapping[str, object] | None = None,
) -> None:
    """A Hugging Face folder whose blocks hold what ``transform`` makes of the stored tensors; config.json comes last.

    Args:
        calibrated: what to write.
        directory: an existing folder.
        transform: from a block's stored tensors to those of the folder.
        quantization_config: of config.json, where there is one.
        config: stands in the place of the original's config.json.
    """
    source = calibrated.source
    writer = ShardWriter(directory)
    writer.add({source.stored_as(name): tensor for name, tensor in calibrated.outside().items()})
    for index, tensors in calibrated.blocks():
        prefix = source.block_prefix(index)
        for part in _by_expert(tensors, source.architecture):
            writer.add({source.stored_as(prefix + name): tensor for name, tensor in transform(part).items()})
    writer.close()
    copy_companions(calibrated.directory, directory)
    settings = {**(source.raw_config() if config is None else config), "dtype": "float16", "torch_dtype": "float16"}
    if quantization_config is not None:
        settings["quantization_config"] = dict(quantization_config)
    atomic_write_json(directory / "config.json", settings)


def _by_expert(tensors: Mapping[str, Tensor], architecture: ModelArchitecture) -> Iterator[Mapping[str, Tensor]]:
    """A block's tensors without those of experts, then those of each: decoded together they may not fit the memory."""
    parts: dict[str, dict[str, Tensor]] = {"": {}}
    for name, tensor in tensors.items():
        number = name.removeprefix(f"{architecture.experts}.").partition(".")[0] if architecture.is_expert(name) else ""
        parts.setdefault(number, {})[name] = tensor
    yield from parts.values()


def write_dense(calibrated: Calibrated, directory: Path, dense_state: DenseState) -> None:
    """Decoded weights in float16, which load anywhere."""

    def _rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: to_storage(tensor, name) for name, tensor in dense_state(tensors).items()}

    write_checkpoint(calibrated, directory, _rounded)
