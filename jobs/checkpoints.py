"""Weights that are not safetensors yet: state dicts in ``.bin``, ``.pt`` and ``.pth`` files, converted once, safely."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises for a file that holds more than tensors; nothing is unpickled here

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from algorithms.modeling.files import atomic_folder, atomic_save_tensors, atomic_write_json, fingerprint
from configs.errors import DataError

logger = logging.getLogger(__name__)

STATE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")  # what trainers leave beside the weights
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # keys under which trainers nest a state dict
PREFIXES = ("module.", "_orig_mod.")
SIDE_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".py")  # config, tokenizer, templates
SHARD_INDEX = "model.safetensors.index.json"
LONGEST_NAME = 255  # bytes of a file's name


def state_files(path: Path, key: str) -> list[Path]:
    """The weight files that ``path`` names: itself, or those of a folder, of the first suffix that there are any of.

    Raises:
        DataError: There are none.
    """
    if path.is_file():
        if path.suffix not in STATE_SUFFIXES:
            raise DataError(f"{key} {path}: not a state dict ({', '.join(STATE_SUFFIXES)}). Change {key}.")
        return [path]
    for suffix in STATE_SUFFIXES:
        files = (file for file in path.glob(f"*{suffix}") if file.is_file())
        found = sorted(file for file in files if not file.name.startswith((*NO_WEIGHTS, ".")))
        if found:
            return found
    raise DataError(f"{key} {path}: the folder holds neither config.json nor a state dict ({', '.join(STATE_SUFFIXES)}).")


def files_digest(files: Iterable[Path]) -> str:
    """A hash of the contents of files, in their order."""
    return hashlib.sha256("".join(fingerprint(file) for file in files).encode()).hexdigest()


def convert(files: list[Path], base: Path, target: Path, key: str, *, trust_remote_code: bool = False) -> None:
    """Writes ``target``: the weights of ``files`` as safetensors, one shard a file, with ``base``'s config and tokenizer.

    The folder is whole or absent.

    Args:
        files: State dicts of one model, disjoint.
        base: The folder of config.json and the tokenizer.
        target: The folder to make.
        key: The recipe's key, named in errors.
        trust_remote_code: Whether the model's own code may be run to learn its parameters' names.

    Raises:
        DataError: A file is no state dict of tensors, or does not fit the architecture.
    """
    logger.info("Converting %d file(s) of %s to safetensors in %s.", len(files), key, target)
    with atomic_folder(target) as partial:
        wanted = _parameters(base, trust_remote_code=trust_remote_code)
        shapes = _write_shards(files, partial, wanted, key)
        _check(shapes, wanted, base, files, key)
        link_files((file for file in base.iterdir() if file.is_file() and is_side_file(file)), partial)


def is_side_file(file: Path) -> bool:
    """Whether a file belongs to a model beside its weights: config, tokenizer, chat template, code."""
    return file.suffix in SIDE_SUFFIXES and not file.name.endswith(".index.json") and not file.name.startswith(".")


def link_files(files: Iterable[Path], folder: Path) -> None:
    """Puts a link to each file into ``folder``; a copy where the file system has no links."""
    for file in files:
        try:
            (folder / file.name).symlink_to(file.resolve())
        except FileExistsError:
            continue
        except OSError:
            shutil.copy2(file, folder / file.name)


def _parameters(base: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """The architecture that ``base``'s config.json names, on the meta device."""
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"MODEL {base}: config.json names no causal language model that transformers knows ({reason})."
        ) from error


def _write_shards(files: list[Path], folder: Path, model: PreTrainedModel, key: str) -> dict[str, torch.Size]:
    """Writes one shard a file and the index; returns the shape of every tensor."""
    shapes: dict[str, torch.Size] = {}
    index: dict[str, str] = {}
    tied = _tied_names(model)
    single = len(files) == 1
    for number, file in enumerate(files, 1):
        tensors = {name: tensor for name, tensor in read_state(file, key).items() if name not in tied}
        repeated = next((name for name in tensors if name in shapes), None)
        if repeated is not None:
            raise DataError(
                f"{key} {file}: {repeated} is also in {index[repeated]}; name one state dict, or one model's parts."
            )
        shard = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        atomic_save_tensors(folder / shard, dict(_separate(tensors)))
        shapes |= {name: tensor.shape for name, tensor in tensors.items()}
        index |= dict.fromkeys(tensors, shard)
    if not single:
        atomic_write_json(folder / SHARD_INDEX, {"metadata": {}, "weight_map": dict(sorted(index.items()))})
    return shapes


def read_state(file: Path, key: str) -> dict[str, Tensor]:
    """The tensors of one state dict, without the nesting and prefixes that training wrappers add.

    Raises:
        DataError: The file holds more than tensors, or cannot be read.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                return _unwrapped({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118 - not iterable
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{key} {file}: not a plain state dict ({reason}). A pickled module is not loaded, for it could run any code: "
            "save model.state_dict() instead, or better safetensors."
        ) from error
    while isinstance(loaded, Mapping) and (
        inner := next((loaded[name] for name in WRAPPERS if _is_mapping(loaded, name)), None)
    ):
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"{key} {file}: holds a {type(loaded).__name__}, not a state dict of tensors. Save model.state_dict().")
    return _unwrapped(dict(loaded))


def _is_mapping(loaded: Mapping[str, object], name: str) -> bool:
    return isinstance(loaded.get(name), Mapping)


def _is_zip(file: Path) -> bool:
    """Whether torch can map the file into memory: only its newer format, a zip, allows that."""
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _separate(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, each with memory of its own: safetensors refuses shared memory."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        start = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if start in seen else tensor
        seen.add(start)


def _tied_names(model: PreTrainedModel) -> frozenset[str]:
    """Names that a tied model's state dict repeats: the head, which is the embedding."""
    if not model.config.tie_word_embeddings or model.get_output_embeddings() is None:
        return frozenset()
    head = model.get_output_embeddings()
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _check(shapes: Mapping[str, torch.Size], model: PreTrainedModel, base: Path, files: list[Path], key: str) -> None:
    """Refuses a state dict that lacks parameters of the architecture or has them in another shape."""
    tied = _tied_names(model)
    # Fused experts have other names in files than in a model, so only their neighbours tell whether the file fits.
    wanted = {name: tensor.shape for name, tensor in model.named_parameters() if name not in tied and ".experts." not in name}
    missing = [name for name in wanted if name not in shapes]
    other = [name for name in wanted if name in shapes and shapes[name] != wanted[name]]
    place = f"{key} {files[0] if len(files) == 1 else files[0].parent}"
    if missing:
        raise DataError(
            f"{place}: {len(missing)} of {len(wanted)} parameters of {base.name} are missing, the first {missing[0]}; the "
            f"file has {len(shapes)} tensors, such as {next(iter(shapes), 'none')}. MODEL must name its architecture."
        )
    if other:
        name = other[0]
        raise DataError(
            f"{place}: {name} has the shape {list(shapes[name])}, but {list(wanted[name])} in {base.name}. MODEL must name the "
            "architecture of this state dict."
        )


def shard_index(folder: Path) -> Mapping[str, str] | None:
    """Tensor name -> shard of a sharded model; None where there is no index.

    Raises:
        DataError: The index cannot be read.
    """
    path = folder / SHARD_INDEX
    if not path.is_file():
        return None
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files.values()):
            raise ValueError("it names files outside its folder")
        if any(len(name.encode()) > LONGEST_NAME for name in files.values()):
            raise ValueError("it names files that no disk can hold")
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"MODEL {folder}: {SHARD_INDEX} is damaged ({error}). Fetch the model again.") from error
