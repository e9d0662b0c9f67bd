"""Predictions that a probe has made, kept for the run that follows: one small file a key below the cache folder.

    <cache>/plans/<key>.json        the key of a stage, or of a closing line

A stage's key is the digest of all that shapes its result, so what was predicted under it holds for every recipe that has it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from algorithms.modeling.files import atomic_write_json
from configs.recipe import Recipe
from jobs.estimation.prediction import CERTIFICATE, EVALUATION, Prediction
from jobs.planning import Plan
from jobs.results.artifacts import canonical_digest

logger = logging.getLogger(__name__)

_FOLDER = "plans"


def keys_of(plan: Plan, recipe: Recipe) -> dict[str, str]:
    """Name of a stage that runs, or of a closing line -> the key of its prediction."""
    keys = {stage.spec.name: stage.key for stage in plan.runs}
    asked = None if recipe.evaluation is None else recipe.evaluation.model_dump(mode="json")
    keys[CERTIFICATE] = canonical_digest([CERTIFICATE, plan.goal.key])
    keys[EVALUATION] = canonical_digest([EVALUATION, plan.goal.key, asked])
    return keys


def keep(cache: Path, keys: Mapping[str, str], predictions: Mapping[str, Prediction], device: str) -> None:
    """Write what was predicted for a kind of device; a later probe of the same key takes its place."""
    for name, prediction in predictions.items():
        place = cache / _FOLDER / f"{keys[name]}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(place, {"device": device, "prediction": asdict(prediction)})


def recall(cache: Path, keys: Mapping[str, str], device: str) -> dict[str, Prediction]:
    """What is known of these keys on this kind of device. A file that cannot be read is as good as none."""
    found = {}
    for name, key in keys.items():
        place = cache / _FOLDER / f"{key}.json"
        try:
            entry = json.loads(place.read_text(encoding="utf-8"))
            if entry["device"] == device:
                found[name] = Prediction.from_record(entry["prediction"])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.info("%s cannot be read (%s); it is left out", place, error)
    return found
