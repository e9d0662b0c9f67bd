"""Finds the text that a recipe names, without reading it: a file, a folder, a saved data set, a named corpus, a hub id."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from algorithms.modeling.files import fingerprint
from configs.errors import DataError
from configs.recipe import Recipe
from jobs.texts.corpora import CorpusCard, find_card
from jobs.workspace import Workspace, check_name

Kind = Literal["tokens", "json", "csv", "parquet", "text", "saved", "hub"]

TOKEN_SUFFIXES = (".pt", ".pth")
READERS: Mapping[str, Kind] = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SAVED_MARKS = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in the folder of a DatasetDict and of a Dataset
SPLIT_WORDS = {
    "train": "train",
    "test": "test",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
}


@dataclass(frozen=True, kw_only=True)
class TextLocation:
    """Where a text lies and how it is read.

    ``files`` are local files by split (``""`` holds files that belong to every split); ``folder`` is a saved data set. ``card``
    says how a corpus known by name is joined and sampled; ``from_corpora`` marks files that CORPORA names. ``origin`` names
    the text in errors.
    """

    kind: Kind
    origin: str
    name: str
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    folder: Path | None = None
    subname: str | None = None
    card: CorpusCard | None = None
    from_corpora: bool = False

    def identity(self) -> dict[str, object]:
        """What names the content of this text: digests of local files, ids of the hub; not the names and dates of files."""
        if self.folder is not None:
            arrow = sorted(self.folder.rglob("*.arrow"))
            return {
                "kind": self.kind,
                "files": [[path.parent.relative_to(self.folder).as_posix(), fingerprint(path)] for path in arrow],
            }
        digests = {split: [fingerprint(path) for path in paths] for split, paths in sorted(self.files.items())}
        hub = {} if self.files else {"name": self.name, "subname": self.subname}
        card = {} if self.card is None else {"corpus": self.card.name, "revision": self.card.revision}
        return {"kind": self.kind, "files": digests, **hub, **card}

    def describe(self) -> dict[str, object]:
        """The same for a person: where the text was found."""
        files = [str(path) for paths in self.files.values() for path in paths]
        place = {"folder": str(self.folder)} if self.folder else {"files": files} if files else {"subname": self.subname}
        return {"kind": self.kind, "name": self.name, **place}


def locate(recipe: Recipe, workspace: Workspace) -> TextLocation:
    """The text to calibrate on: DATA_PATH if it is set, else DATASET_NAME.

    Raises:
        DataError: Neither is set, or nothing readable is there.
    """
    if recipe.data_path is not None:
        return locate_path(recipe.data_path, "DATA_PATH")
    name = recipe.dataset_name
    if name is None:
        raise DataError(
            "The recipe names no text: set DATA_PATH to a local file or folder, or DATASET_NAME to a hub id or a corpus."
        )
    if name.endswith(TOKEN_SUFFIXES):
        beside = [path for path in (Path(name).expanduser(), workspace.datasets_dir / name) if path.is_file()]
        return locate_path(beside[0] if beside else Path(name), "DATASET_NAME")
    check_name(name, "DATASET_NAME")
    card = find_card(name, recipe.dataset_subname)
    if _override(recipe, name, card) is not None:
        return locate_corpus(recipe, name)
    saved = workspace.datasets_dir / name
    if saved.exists():
        return locate_path(saved, "DATASET_NAME")
    if Path(name).suffix in READERS and Path(name).is_file():
        return locate_path(Path(name), "DATASET_NAME")
    if card is not None:
        return locate_corpus(recipe, card.name)
    return TextLocation(kind="hub", origin=f"DATASET_NAME {name}", name=name, subname=recipe.dataset_subname)


def locate_corpus(recipe: Recipe, name: str) -> TextLocation:
    """A text by its short name: the files that CORPORA gives for it, else the hub.

    Raises:
        DataError: The name is neither a key of CORPORA nor a corpus that is known here; or its files are missing.
    """
    card = find_card(name, recipe.dataset_subname)
    given = _override(recipe, name, card)
    if given is None:
        if card is None:
            raise DataError(f"{name} is no known corpus and CORPORA has no file for it. Add CORPORA: {{{name}: FILE}}.")
        return TextLocation(kind="hub", origin=f"corpus {card.name}", name=card.hub, subname=card.subname, card=card)
    by_split = dict(given) if isinstance(given, Mapping) else {"": given}
    found = {split: locate_path(path, f"CORPORA.{name}") for split, path in by_split.items()}
    kinds = {location.kind for location in found.values()}
    if len(kinds) > 1:
        raise DataError(f"CORPORA.{name}: the splits are files of different kinds ({', '.join(sorted(kinds))}). Use one kind.")
    files = {split: tuple(path for paths in location.files.values() for path in paths) for split, location in found.items()}
    if not all(files.values()):
        raise DataError(f"CORPORA.{name}: give a file, not a folder that save_to_disk wrote; use DATA_PATH for such a folder.")
    label = f"{name} (CORPORA: {', '.join(str(path) for path in by_split.values())})"
    return TextLocation(
        kind=kinds.pop(), origin=label, name=card.name if card else name, files=files, card=card, from_corpora=True
    )


def locate_path(path: Path, key: str) -> TextLocation:
    """A local file, a folder of files of one kind, or a folder that ``save_to_disk`` wrote; ``key`` is named in errors.

    Raises:
        DataError: Nothing is there, or nothing that can be read.
    """
    path = path.expanduser().absolute()
    origin = f"{key} {path}"
    if path.is_file():
        kind = "tokens" if path.suffix in TOKEN_SUFFIXES else _reader(path)
        if kind is None:
            raise DataError(f"{origin}: files ending in {path.suffix or 'nothing'} cannot be read; {_readable()}.")
        return TextLocation(kind=kind, origin=origin, name=path.name, files={"": (path,)})
    if not path.is_dir():
        raise DataError(f"{origin}: there is no such file or folder.{nearest_sibling(path)} Change {key}.")
    if any((path / mark).is_file() for mark in SAVED_MARKS):
        return TextLocation(kind="saved", origin=origin, name=path.name, folder=path)
    readers = {file: _reader(file) for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file, path)}
    found = [file for file, kind in readers.items() if kind is not None]
    kinds = sorted({kind for kind in readers.values() if kind is not None})
    if len(kinds) != 1:
        what = (
            f"holds files of several kinds ({', '.join(kinds)}): name one of them" if kinds else f"holds no text: {_readable()}"
        )
        raise DataError(f"{origin}: the folder {what}. Change {key}.")
    return TextLocation(kind=kinds[0], origin=origin, name=path.name, files=_by_split(found, path))


def nearest_sibling(path: Path) -> str:
    """A sentence that names the existing files or folders whose names come closest to a missing one, or nothing."""
    parent = path.parent
    if not parent.is_dir():
        return f" Nor is there a folder {parent}."
    siblings = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5)
    return f" {parent} holds {', '.join(close)}." if close else ""


def location_digest(location: TextLocation) -> str:
    """One hash of :meth:`TextLocation.identity`."""
    return hashlib.sha256(json.dumps(location.identity(), sort_keys=True).encode()).hexdigest()


def _override(recipe: Recipe, name: str, card: CorpusCard | None) -> Path | Mapping[str, Path] | None:
    wanted = {name.casefold()} | ({card.name} if card else set())
    return next((files for key, files in recipe.corpora.items() if key.casefold() in wanted), None)


def _reader(path: Path) -> Kind | None:
    """How a file is read; ``.json.gz`` and the like as without ``.gz``."""
    bare = path.with_suffix("") if path.suffix == ".gz" else path
    kind = READERS.get(bare.suffix)
    return None if kind == "text" and bare != path else kind


def _readable() -> str:
    return (
        f"readable are {', '.join(READERS)}, lists of token tensors ({', '.join(TOKEN_SUFFIXES)}) and folders of save_to_disk"
    )


def _hidden(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    return any(part.startswith(".") for part in parts) or file.stem.casefold() in (
        "readme",
        "license",
        "licence",
        "requirements",
    )


def _by_split(files: Sequence[Path], folder: Path) -> dict[str, tuple[Path, ...]]:
    """Files by the split that their names say (train.jsonl, test-00000-of-00002.parquet, validation/a.txt).

    A split has to be the whole name, but for a shard's number: ``gsm8k_train.jsonl`` and ``wikitext2_valid.jsonl`` side by side
    are two texts, not two splits of one. Files that say no split belong to all of them, or to train beside files that do.
    """
    found: dict[str, list[Path]] = {}
    for file in files:
        parts = [part.casefold() for part in file.relative_to(folder).with_suffix("").parts]
        names = [re.sub(r"[-_.]\d+([-_.]of[-_.]\d+)?$", "", part) for part in parts]
        found.setdefault(next((SPLIT_WORDS[name] for name in names if name in SPLIT_WORDS), ""), []).append(file)
    if set(found) != {""} and "" in found:
        found.setdefault("train", []).extend(found.pop(""))
    return {split: tuple(paths) for split, paths in found.items()}
