"""Text to tokens with the model's own tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from algorithms.modeling.files import file_digest
from algorithms.modeling.source import ModelSource
from configs.errors import DataError

LONGEST_CALL = 1 << 24  # characters given to the tokenizer at once; a longer text is cut at line ends, to bound the memory
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class _naming_tokenizer:  # noqa: N801 - stands behind "with"
    """What a damaged tokenizer raises, as an error that names it. The Rust library has no class of its own for its errors."""

    _KINDS = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError)

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is Exception or isinstance(error, self._KINDS):
            reason, source = (str(error).splitlines() or [kind.__name__])[0], self._source
            raise DataError(f"MODEL {source.name}: the tokenizer in {source.directory} cannot be loaded ({reason}).") from error


class Encoder:
    """Tokenises with the special tokens that the tokenizer adds by itself; where these are, ``record`` says.

    Args:
        source: The model.

    Raises:
        DataError: The model's folder holds no tokenizer, or one that cannot be read.
    """

    def __init__(self, source: ModelSource) -> None:
        self.digest = tokenizer_digest(source)
        with _naming_tokenizer(source):
            self._tokenizer: PreTrainedTokenizerBase = source.tokenizer()

    @property
    def separator(self) -> int | None:
        """The id that is put between two documents: the end of sequence, where the tokenizer has one."""
        return self._tokenizer.eos_token_id

    @property
    def record(self) -> Mapping[str, object]:
        """What the tokenizer is and does, for the record of the tokens."""
        ids = self._tokenizer("a", add_special_tokens=True)["input_ids"]
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        added = {"bos_added": bos is not None and ids[0] == bos, "eos_added": eos is not None and ids[-1] == eos}
        return {"digest": self.digest, "bos": bos, "eos": eos, **added}

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """One [n] int64 tensor for each text."""
        if any(len(text) > LONGEST_CALL for text in texts):
            return [
                torch.cat([self._encode([part], index == 0)[0] for index, part in enumerate(_parts(text))]) for text in texts
            ]
        return self._encode(texts, True)

    def _encode(self, texts: Sequence[str], special: bool) -> list[Tensor]:
        rows = self._tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
        return [torch.tensor(row, dtype=torch.int64) for row in rows]


def tokenizer_digest(source: ModelSource) -> str:
    """A hash of the files that make the tokenizer; loads nothing.

    Raises:
        DataError: The model's folder holds no tokenizer.
    """
    files = [source.directory / name for name in TOKENIZER_FILES if (source.directory / name).is_file()]
    if not files:
        raise DataError(
            f"MODEL {source.name}: {source.directory} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json). "
            "Put the model's tokenizer there, or give token tensors (a .pt file) as DATA_PATH."
        )
    return hashlib.sha256("".join(f"{path.name} {file_digest(path)}\n" for path in files).encode()).hexdigest()


def _parts(text: str) -> Iterator[str]:
    """A text in stretches of at most LONGEST_CALL characters, cut after a line end where there is one."""
    start = 0
    while start < len(text):
        end = min(start + LONGEST_CALL, len(text))
        cut = text.rfind("\n", start, end) + 1 if end < len(text) else end
        yield text[start : (end := cut if cut > start else end)]
        start = end
