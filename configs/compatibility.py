"""Keys of older recipes at the top level: accepted without effect, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

from configs.document import Document
from configs.recipe import DEFAULT_MODEL, Recipe

JOB_PATH = "JOB_PATH"
IGNORED = {
    JOB_PATH: "JOB_SERVICE and JOB_ID name the job folder, MODEL_PATH replaces it",
    "OUTPUT_PATH": "JOB_SERVICE and JOB_ID name the job folder, MODEL_PATH replaces it",
    "ALGO_TYPE": "ALGORITHM says it all",
    "PLATFORM": "CUDA_ID names the devices",
    "DATA_URL": "DATASET_NAME or DATA_PATH names the data",
}
REFUSED = {
    "VLM_DATASET": "no such key: this version compresses language models on text, not on images",
    "IMAGE_COLUMN": "no such key: this version compresses language models on text, not on images",
}
UNSET = (None, "", False)
SPELLINGS = {"push_to_hub": "PUSH_TO_HUB"}  # another spelling of a key -> the key


def take_legacy_keys(document: Document, values: dict[str, object]) -> dict[str, object]:
    """``values`` without the keys of older recipes, other spellings as the key; what cannot be honoured becomes a problem."""
    for key, reason in REFUSED.items():
        if values.get(key) not in UNSET:
            document.problem((key,), values[key], reason)
    for spelling, key in SPELLINGS.items():
        if spelling in values and key in values:
            document.problem((spelling,), values[spelling], f"{key} alone: it is the same key")
        elif spelling in values:
            document.rename(spelling, key)
    known = {key: value for key, value in values.items() if key not in IGNORED and key not in REFUSED}
    return {SPELLINGS.get(key, key): value for key, value in known.items()}


def legacy_warnings(values: dict[str, object], recipe: Recipe) -> tuple[str, ...]:
    """One line for each key of ``values`` that changes nothing, and for a model that nobody chose."""
    lines = []
    for key, reason in IGNORED.items():
        if values.get(key) in UNSET:
            continue
        lines.append(_job_path_warning(values[key], recipe) if key == JOB_PATH else f"{key} has no effect: {reason}")
    if "MODEL" not in values:
        lines.append(f"MODEL is not set: {DEFAULT_MODEL} is taken, as it always was")
    return tuple(lines)


def _job_path_warning(value: object, recipe: Recipe) -> str:
    place = recipe.job_folder
    if isinstance(value, str) and Path(value).expanduser() == place:
        return f"{JOB_PATH} has no effect: {IGNORED[JOB_PATH]} (it is the same folder, {place})"
    return f"{JOB_PATH} ({value}) has no effect: the job folder is {place}; MODEL_PATH would replace it"
