"""A Hugging Face causal LM on disk, seen as blocks and read one block at a time."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.families.inspection import Inspection, InspectionError, inspect_family
from algorithms.modeling.families.stored_names import StoredTensor, stored_name, stored_tensors
from algorithms.modeling.families.table import architecture_for, is_known
from algorithms.modeling.families.weight_files import ModelError, open_weights, read_tensor, weight_map
from algorithms.modeling.families.without_storage import WithoutStorage, move_own
from algorithms.modeling.files import file_digest, fingerprint
from algorithms.modeling.mixtures.deferred import Reader, defer_experts
from algorithms.modeling.mixtures.experts import READER, separate_experts

logger = logging.getLogger(__name__)

# What transformers stumbles over where a configuration has values that it did not reckon with.
_OF_VALUES = (ValueError, TypeError, AttributeError, KeyError, ImportError, ZeroDivisionError, OverflowError, RuntimeError)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
NOTHING_FINITE = (
    "MODEL: no finite activations reached block {index}: the model overflows on the calibration text in float32. "
    "Look at its weights."
)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class ModelSource:
    """The folder of a causal LM: config.json, safetensors weights and, where there is one, a tokenizer.

    Nothing is read until it is asked for, and weights only block by block: the memory a pass over the model needs does not
    grow with its number of blocks.
    """

    def __init__(
        self, directory: Path, *, name: str = "", trust_remote_code: bool = False, attn_implementation: str | None = None
    ) -> None:
        self.directory = Path(directory)
        self.name = name or self.directory.name
        self._is_users = bool(name)  # what a user has named, and not a folder on the way from it to a result
        self.trust_remote_code = trust_remote_code
        self.attn_implementation = attn_implementation

    def with_attention(self, attn_implementation: str | None) -> ModelSource:
        """The same model, computed with another attention implementation; None leaves the choice as it is."""
        if attn_implementation in (None, self.attn_implementation):
            return self
        return ModelSource(
            self.directory,
            name=self.name,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=attn_implementation,
        )

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            ModelError: it is no JSON, or has values that no model of its type can have.
        """
        try:
            return AutoConfig.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
        except StrictDataclassError as error:
            reason = str(error.__cause__ or error).strip()
            raise ModelError(f"{self.directory / 'config.json'}: {reason}") from error
        except (OSError, *_OF_VALUES) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, and not transformers' word for a file that is no JSON
            raise ModelError(f"MODEL: {self.directory / 'config.json'} cannot be used: {_reason(error)}") from error

    @cached_property
    def architecture(self) -> ModelArchitecture:
        """The row of the architecture table that describes this model; for a family without one, what inspection finds.

        Raises:
            ModelError: a family that the table does not know and whose blocks cannot be walked.
        """
        row = self._row
        return row if row.experts is None else row.resolved(self._template.get_submodule(row.blocks).children())

    @cached_property
    def _row(self) -> ModelArchitecture:
        if is_known(self.config.model_type):
            return architecture_for(self.config.model_type, self.config)
        found = self.inspection
        if self._is_users:
            logger.warning("%s: %s", self.name, found.warning())
        return found.architecture

    @cached_property
    def inspection(self) -> Inspection:
        """What a look at the model finds, whether the table knows its family or not.

        Raises:
            ModelError: its blocks cannot be walked.
        """
        try:
            return inspect_family(
                self.config, trust_remote_code=self.trust_remote_code, attn_implementation=self.attn_implementation
            )
        except InspectionError as error:
            raise ModelError(str(error)) from error

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks."""
        return self.config.num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding: token ids lie below it."""
        return self.config.vocab_size

    @cached_property
    def weight_files(self) -> Mapping[str, str]:
        """Name of a parameter -> name of the safetensors file that holds it.

        Raises:
            ModelError: as for :attr:`stored_files`.
        """
        return {name: tensor.file for name, tensor in self.places.items()}

    @cached_property
    def places(self) -> Mapping[str, StoredTensor]:
        """Name of a parameter -> the tensor, or the part of one, that holds it.

        Raises:
            ModelError: as for :attr:`stored_files`.
        """
        return stored_tensors(self.stored_files, self._row, self._stored_shape)

    def _stored_shape(self, stored: str) -> Sequence[int]:
        with open_weights(self.directory / self.stored_files[stored]) as handle:
            return handle.get_slice(stored).get_shape()

    def stored_as(self, parameter: str) -> str:
        """The name that files of this model's family have for a parameter, or for a part of a compressed one."""
        return stored_name(parameter, self.architecture)

    @cached_property
    def stored_files(self) -> Mapping[str, str]:
        """Name of a tensor, as it is stored -> name of the safetensors file that holds it.

        Raises:
            ModelError: no safetensors weights, an index that names a missing shard, or an unreadable file.
        """
        index = self.directory / _INDEX
        if index.is_file():
            files = weight_map(index)
            missing = sorted({name for name in files.values() if not (self.directory / name).is_file()})
            if missing:
                raise ModelError(
                    f"MODEL: {index} names shards that are not there: {', '.join(missing[:5])}. Fetch the model again."
                )
            return files
        if not (self.directory / _SINGLE).is_file():
            raise ModelError(f"MODEL: {self.directory} holds neither {_SINGLE} nor {_INDEX}.")
        with open_weights(self.directory / _SINGLE) as handle:
            return dict.fromkeys(handle.keys(), _SINGLE)

    @cached_property
    def digest(self) -> str:
        """Names the model's content: its config and the fingerprint of every weight file."""
        digest = hashlib.sha256(file_digest(self.directory / "config.json").encode())
        for name in sorted(set(self.weight_files.values())):
            digest.update(name.encode() + fingerprint(self.directory / name).encode())
        return digest.hexdigest()

    @cached_property
    def num_parameters(self) -> int:
        """Number of stored parameters; tied tensors count once.

        Raises:
            ModelError: a weight file is truncated or no safetensors.
        """
        total = 0
        for file in sorted(set(self.weight_files.values())):
            with open_weights(self.directory / file) as handle:
                for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                    shape = handle.get_slice(name).get_shape()
                    total += int(torch.Size(shape).numel())
        return total

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer.

        Raises:
            OSError: the folder holds none.
        """
        return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embeddings."""
        return getattr(self.config, "tie_word_embeddings", True)

    def tensors(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read tensors by name, each detached from the file's memory map; floating ones in ``dtype`` if that is given.

        Raises:
            ModelError: a name that no weight file holds.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.places:
                raise ModelError(
                    f"MODEL: {self.directory} has no tensor {name!r}; its weight files do not match its config.json."
                )
            by_file.setdefault(self.places[name].file, []).append(name)
        loaded = {}
        for file, wanted in by_file.items():
            with safe_open(self.directory / file, framework="pt") as handle:
                for name in wanted:
                    tensor = read_tensor(handle, self.places[name])
                    loaded[name] = tensor.to(dtype or tensor.dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
        return loaded

    def skeleton(self) -> PreTrainedModel:
        """A fresh model of this configuration, in evaluation mode: parameters on the meta device, buffers (rotary) real.

        Raises:
            ModelError: the configuration has values of which no model can be made.
        """
        options = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        config = copy.deepcopy(self.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        try:
            with init_empty_weights(include_buffers=False), WithoutStorage():
                model = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=self.trust_remote_code, **options
                )
        except _OF_VALUES as error:
            place = self.directory / "config.json"
            raise ModelError(f"MODEL: no model can be made of {place}: {_reason(error)}") from error
        model.tie_weights()
        separate_experts(model)
        return model.eval().requires_grad_(False)

    @cached_property
    def _template(self) -> PreTrainedModel:
        return self.skeleton()

    def block_skeleton(self) -> nn.Module:
        """The first block as it is in :meth:`skeleton`, to be looked at and left as it is."""
        return self._template.get_submodule(f"{self.architecture.blocks}.0")

    def linear_like(self, name: str) -> nn.Linear:
        """A linear of the architecture in the first block that has it, to be looked at and left as it is.

        Raises:
            ModelError: no block has it.
        """
        for block in self._template.get_submodule(self.architecture.blocks).children():
            try:
                return block.get_submodule(name)
            except AttributeError:
                continue
        raise ModelError(f"MODEL: no block of {self.directory} has {name}, which the table has for {self.config.model_type}.")

    def block_prefix(self, index: int) -> str:
        """Name prefix of a block's parameters, with the closing dot."""
        return f"{self.architecture.blocks}.{index}."

    def load_block(
        self,
        index: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        late_experts: bool = False,
    ) -> nn.Module:
        """One block with its weights, in evaluation mode, without gradients.

        With ``late_experts``, weights of experts are read when they compute
        (:mod:`algorithms.modeling.mixtures.deferred`): the block needs the memory of one of them.

        Raises:
            ModelError: a weight of the block is missing or holds NaN or infinity.
        """
        block = copy.deepcopy(self._template.get_submodule(f"{self.architecture.blocks}.{index}"))
        prefix = self.block_prefix(index)
        if late_experts:
            defer_experts(block, lambda name: self._reader(f"{prefix}{name}.weight", dtype, device))
        self._fill(block, prefix, dtype)
        for module in block.modules():
            if READER not in vars(module):
                move_own(module, device)
        return block.eval().requires_grad_(False)

    def _reader(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Reader:
        return lambda: self._checked(name, self.tensors([name], dtype)[name]).to(device)

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if not torch.isfinite(tensor).all():
            raise ModelError(f"MODEL: {name} in {self.directory} holds NaN or infinity; the checkpoint is damaged.")
        return tensor

    def outside_names(self) -> tuple[str, ...]:
        """Names of the model's stored tensors that belong to no block: embeddings, final norm, an untied head.

        Stored tensors that the model has no place for are left out with a warning.
        """
        outside = sorted(name for name in self.weight_files if not name.startswith(f"{self.architecture.blocks}."))
        known = self._template.state_dict().keys()
        unknown = [name for name in outside if name not in known]
        if unknown:
            logger.warning("%s: left out, since the model has no such tensor: %s", self.directory, ", ".join(unknown[:5]))
        return tuple(name for name in outside if name in known)

    def raw_config(self) -> dict[str, object]:
        """config.json as it stands on disk."""
        return json.loads((self.directory / "config.json").read_text(encoding="utf-8"))

    def model_from(self, state: Mapping[str, Tensor]) -> nn.Module:
        """A float32 model of this configuration with the given weights.

        Args:
            state: every parameter by name; a tied head may be left out.

        Raises:
            ModelError: missing or unknown names.
        """
        model = self.skeleton()
        missing, unknown = model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        absent = sorted({name for name, parameter in model.named_parameters() if parameter.is_meta} & set(missing))
        if absent or unknown:
            raise ModelError(f"{self.directory}: weights do not fit the model (missing {absent[:3]}, unknown {unknown[:3]})")
        return model.eval().requires_grad_(False)

    def load_outside(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        """The model around its blocks: real embeddings, norm and head; the blocks' parameters stay on the meta device."""
        model = copy.deepcopy(self._template)
        blocks = model.get_submodule(self.architecture.blocks)
        for name, module in model.named_modules():
            inside = name == self.architecture.blocks or name.startswith(f"{self.architecture.blocks}.")
            if not inside and any(True for _ in module.parameters(recurse=False)):
                self._fill(module, f"{name}.", dtype, tied_to=self._tied_name(model, name))
        model.tie_weights()
        for name, module in model.named_children():
            if name != self.architecture.blocks.split(".")[0]:
                module.to(device)
        for part in model.get_submodule(self.architecture.blocks.rsplit(".", 1)[0]).children():
            if part is not blocks:
                part.to(device)
        return model

    def _tied_name(self, model: PreTrainedModel, name: str) -> str | None:
        """The stored twin of a tied head; None for any other module, and for a head that should be there and is not."""
        if name != self.architecture.head or f"{name}.weight" in self.weight_files or not self.is_tied:
            return None
        embeddings = model.get_input_embeddings()
        return next(f"{path}." for path, module in model.named_modules() if module is embeddings)

    def _fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, tied_to: str | None = None) -> None:
        stored = tied_to or prefix
        late = {f"{name}.weight" for name, part in module.named_modules() if READER in vars(part)}
        names = [f"{stored}{name}" for name, _ in module.named_parameters(recurse=True) if name not in late]
        buffers = [f"{stored}{name}" for name in module.state_dict() if name not in late and f"{stored}{name}" not in names]
        names += [name for name in buffers if name in self.places]  # what a family keeps in checkpoints is no parameter alone
        state = {name.removeprefix(stored): tensor for name, tensor in self.tensors(names, dtype).items()}
        for name, tensor in state.items():
            self._checked(f"{prefix}{name}", tensor)
        module.load_state_dict(state, strict=False, assign=True)
