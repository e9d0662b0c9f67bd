"""Recipe envelopes for unit tests: the upper-case keys as keyword arguments, the user folder somewhere temporary."""

from __future__ import annotations

from pathlib import Path

from configs.recipe import Recipe


def envelope(user_folder: Path, **keys: object) -> Recipe:
    """A recipe with the given keys over the shortest one that is valid."""
    return Recipe.model_validate({"ALGORITHM": "AQLM", "JOB_ID": "job", "USER_FOLDER": str(user_folder)} | keys)
