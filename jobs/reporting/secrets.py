"""What the environment keeps secret: kept out of what leaves this machine, for a recipe may refer to any variable."""

from __future__ import annotations

import re
from collections.abc import Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

SECRET = re.compile(r"TOKEN(_|$)|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)(API_?KEY|KEY|AUTH)(_|$)", re.IGNORECASE)
SHORTEST = 8  # characters; shorter values stand everywhere by chance
MASK = "(secret)"  # plain YAML, as the card has it in its recipe
WANDB_SERVER = "https://api.wandb.ai"
Value = TypeVar("Value")


def without_secrets(value: Value, environment: Mapping[str, str]) -> Value:
    """``value`` with ``MASK`` in place of the values of variables that are called like secrets, in all texts within it.

    Args:
        value: a text, or lists and mappings with texts in them, keys included.
        environment: variable -> value.
    """
    secrets = sorted({text for name, text in environment.items() if SECRET.search(name) and len(text) >= SHORTEST}, key=len)
    return _masked(value, secrets[::-1])


def has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Whether there is a key for wandb's server: in the environment, or in the file that ``wandb login`` writes."""
    if environment.get("WANDB_API_KEY"):
        return True
    file = Path(environment.get("NETRC") or "~/.netrc").expanduser()
    try:
        return urlsplit(environment.get("WANDB_BASE_URL") or WANDB_SERVER).hostname in netrc(file).hosts
    except (OSError, NetrcParseError):
        return False


def _masked(value: Value, secrets: list[str]) -> Value:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, MASK)
        return value
    if isinstance(value, Mapping):
        return {_masked(key, secrets): _masked(inner, secrets) for key, inner in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(_masked(inner, secrets) for inner in value)  # type: ignore[return-value]
    return value
