"""The model that a recipe names, as a folder with config.json, safetensors and tokenizer, from wherever it says."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError

from algorithms.modeling.files import atomic_folder
from algorithms.modeling.source import ModelSource
from configs.errors import DataError
from configs.recipe import Recipe
from jobs.checkpoints import convert, files_digest, is_side_file, link_files, shard_index, state_files
from jobs.earlier_jobs import earlier_output
from jobs.model_layout import check_layout
from jobs.texts.location import nearest_sibling
from jobs.workspace import Workspace, check_name, inside

logger = logging.getLogger(__name__)

CONFIG = "config.json"
SIDE_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "README.md")  # whose licence the result carries on
NOT_WANTED = ("*/*", "consolidated*", "*.gguf")  # folders of other formats and a vendor's own copy of the weights
DIGEST_LENGTH = 12


def resolve_model(recipe: Recipe, workspace: Workspace) -> ModelSource:
    """The model to compress, brought into the form that the rest reads; weights are not loaded.

    CUSTOM_MODEL_PATH comes first, then MODEL as another job's output, a local folder, ``models/<MODEL>`` in the user folder,
    the hub.

    Raises:
        DataError: Nothing is there, it is incomplete, or it cannot be fetched; says what was tried.
    """
    custom = recipe.custom_model_path
    if custom is None:
        return _source(_named_model(recipe, workspace), recipe.model, recipe)
    custom = custom.expanduser().absolute()
    if not custom.exists():
        raise DataError(f"CUSTOM_MODEL_PATH {custom}: there is no such file or folder.{nearest_sibling(custom)}")
    if (custom / CONFIG).is_file():
        return _source(_with_safetensors(custom, "CUSTOM_MODEL_PATH", recipe, workspace), str(custom), recipe)
    return _source(_custom_state(custom, recipe, workspace), recipe.model, recipe)


def _source(directory: Path, name: str, recipe: Recipe) -> ModelSource:
    shards = sorted(set((shard_index(directory) or {}).values()))
    missing = [name for name in shards if not (directory / name).is_file()]
    if missing:
        raise DataError(
            f"MODEL {directory}: {len(missing)} of {len(shards)} shards are missing ({missing[0]}...). Fetch it again."
        )
    source = ModelSource(directory, name=name, trust_remote_code=recipe.trust_remote_code)
    check_layout(source)
    return source


def _named_model(recipe: Recipe, workspace: Workspace, *, weights: bool = True) -> Path:
    """The folder of MODEL; with ``weights`` false its config and tokenizer are enough."""
    if recipe.model_job is not None:
        return earlier_output(recipe.model_job, workspace)
    local = Path(recipe.model).expanduser()
    if local.is_dir():
        return _local_model(local.absolute(), "MODEL", recipe, workspace, weights=weights)
    if local.is_absolute() or recipe.model.startswith((".", "~")) or recipe.model.count("/") > 1:
        raise DataError(f"MODEL {recipe.model}: there is no such folder.{nearest_sibling(local.absolute())}")
    check_name(recipe.model, "MODEL")
    kept = workspace.models_dir / recipe.model
    if _broken_links(kept):
        logger.warning("%s links to files that are gone from the cache; fetching %s again.", kept, recipe.model)
        shutil.rmtree(inside(workspace.models_dir, recipe.model, "MODEL"))
    if kept.is_dir() and any(kept.iterdir()):
        return _local_model(kept, "MODEL", recipe, workspace, weights=weights)
    return _from_hub(recipe, workspace, weights=weights)


def _local_model(folder: Path, key: str, recipe: Recipe, workspace: Workspace, *, weights: bool = True) -> Path:
    if not (folder / CONFIG).is_file():
        raise DataError(
            f"{key} {folder}: the folder has no {CONFIG}, so it is no model. Complete or remove it, or change {key}."
        )
    return _with_safetensors(folder, key, recipe, workspace) if weights else folder


def _with_safetensors(folder: Path, key: str, recipe: Recipe, workspace: Workspace) -> Path:
    """The folder itself, or, where its weights have another form or name, a folder under ``models/`` that has what it lacks."""
    if shard_index(folder) is not None or (folder / "model.safetensors").is_file():
        return folder
    files = state_files(folder, key)
    target = workspace.models_dir / f"{folder.name}--safetensors-{files_digest(files)[:DIGEST_LENGTH]}"
    if not (target / CONFIG).is_file():
        convert(files, folder, target, key, trust_remote_code=recipe.trust_remote_code)
    return target


def _custom_state(custom: Path, recipe: Recipe, workspace: Workspace) -> Path:
    """A state dict for MODEL's architecture, written once as safetensors with MODEL's config and tokenizer."""
    files = state_files(custom, "CUSTOM_MODEL_PATH")
    base = _named_model(recipe, workspace, weights=False)
    is_folder = recipe.model_job is not None or Path(recipe.model).expanduser().is_dir()
    name = base.name if is_folder else recipe.model
    sides = sorted(file for file in base.iterdir() if file.is_file() and is_side_file(file))
    digest = files_digest([*files, *sides])[:DIGEST_LENGTH]
    target = inside(workspace.models_dir, f"{name}--custom-{digest}", "MODEL")
    if not (target / CONFIG).is_file():
        convert(files, base, target, "CUSTOM_MODEL_PATH", trust_remote_code=recipe.trust_remote_code)
    return target


def _broken_links(folder: Path) -> bool:
    """Whether a folder is one of our own, made of links, and one of them leads nowhere any more."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    entries = list(folder.iterdir())
    return bool(entries) and all(entry.is_symlink() for entry in entries) and not all(entry.exists() for entry in entries)


def _from_hub(recipe: Recipe, workspace: Workspace, *, weights: bool) -> Path:
    """Fetches MODEL into the cache and makes ``models/<MODEL>`` of links into it; without weights, the cache folder itself."""
    code = ("*.py",) if recipe.trust_remote_code else ()
    snapshot = _download(recipe.model, workspace, (*SIDE_PATTERNS, *code, *(("*.safetensors",) if weights else ())))
    if not (snapshot / CONFIG).is_file():
        raise DataError(f"MODEL {recipe.model}: the hub has no {CONFIG} for it, so it is no model for transformers.")
    if not weights:
        return snapshot
    target = inside(workspace.models_dir, recipe.model, "MODEL")
    if not any(snapshot.glob("*.safetensors")):
        snapshot = _download(recipe.model, workspace, (*SIDE_PATTERNS, *code, "pytorch_model*.bin"))
        convert(state_files(snapshot, "MODEL"), snapshot, target, "MODEL", trust_remote_code=recipe.trust_remote_code)
        return target
    with atomic_folder(target) as partial:
        link_files((file for file in snapshot.iterdir() if file.is_file()), partial)
    return target


def _download(name: str, workspace: Workspace, patterns: tuple[str, ...]) -> Path:
    tried = f"no local folder {name}, no {workspace.models_dir / name}"
    try:
        found = snapshot_download(
            name, cache_dir=workspace.cache_dir, allow_patterns=list(patterns), ignore_patterns=list(NOT_WANTED)
        )
    except GatedRepoError as error:
        raise DataError(
            f"MODEL {name}: the hub gives it only to those who accepted its terms. Accept them at "
            f"https://huggingface.co/{name}, then set HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(f"MODEL {name}: {tried}, and the hub has no such model (a private one needs HF_TOKEN).") from error
    except (OSError, HTTPError, RuntimeError) as error:
        raise DataError(
            f"MODEL {name}: {tried}, and the hub cannot be reached (offline? {type(error).__name__}). Give the path of a "
            f"local folder as MODEL, or put the model into {workspace.models_dir / name}."
        ) from error
    return Path(found)
