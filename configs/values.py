"""How one value of a recipe is read: the annotated types that every configuration is made of.

Recipes come from YAML 1.1 files, from JSON and from the command line, so numbers may arrive as text ("1e-4"). What never
happens is a silent change of meaning: true is not 1, 2.5 is not 2, and null is a value only where a key gives it one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

Number = TypeVar("Number", int, float)

NUMBER_LENGTH = 40  # longer digit strings are not numbers that anybody meant


def expected(what: str, nearest: str | None = None) -> PydanticCustomError:
    """The error of a validator: ``what`` completes the sentence "expected ..."."""
    return PydanticCustomError("expected", "{expected}", {"expected": what, "nearest": nearest, "below": ()})


@contextmanager
def inside(keys: Sequence[str], value: object) -> Iterator[None]:
    """Errors of validators in here are about ``value``, which stands under ``keys`` of the block that is being read.

    Raises:
        PydanticCustomError: the same error with its place.
    """
    try:
        yield
    except PydanticCustomError as error:
        context = {**(error.context or {}), "below": tuple(keys), "value": value}
        raise PydanticCustomError("expected", "{expected}", context) from None


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that ``name`` was probably meant to be, or None."""
    name, names = name[:NUMBER_LENGTH], list(names)
    folded = {known.casefold(): known for known in names}
    if name.casefold() in folded:
        return folded[name.casefold()]
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def _as_number(value: object, kind: type[Number]) -> Number | None:
    """``value`` as an int or float, or None where it is no number of that kind."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and (len(value) > NUMBER_LENGTH or "_" in value):
        return None
    try:
        return kind(value)
    except (ValueError, OverflowError):
        return None


def _whole(value: object) -> int | None:
    """A whole number, also where it is written 256.0, "256" or "1e3"."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        exact = _as_number(value, int)
        if exact is not None:
            return exact
    number = _as_number(value, float)
    return int(number) if number is not None and math.isfinite(number) and number == int(number) else None


@dataclass(frozen=True)
class Whole:
    """Reads a whole number between ``least`` and ``most``, both allowed."""

    least: int = 1
    most: int | None = None

    def __call__(self, value: object) -> int:
        """The number, or the error that says what was expected."""
        number = _whole(value)
        if number is None or number < self.least or (self.most is not None and number > self.most):
            raise expected(f"a whole number {self._range()}")
        return number

    def _range(self) -> str:
        return f"of at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"


@dataclass(frozen=True)
class Real:
    """Reads a number between ``least`` and ``most``; ``above`` and ``below`` are limits that it must not touch."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __call__(self, value: object) -> float:
        """The number, or the error that says what was expected."""
        number = _as_number(value, float)
        if number is None or not math.isfinite(number) or not self._holds(number):
            raise expected(self._description())
        return number

    def _holds(self, number: float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def _description(self) -> str:
        limits = (("of at least", self.least), ("above", self.above), ("of at most", self.most), ("below", self.below))
        named = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
        return " ".join(["a number", " and ".join(named)]).strip()


@dataclass(frozen=True)
class Choice:
    """Reads one of a few names; ``prefix`` may stand before it, as in torch.float16."""

    names: tuple[str, ...]
    prefix: str = ""

    def __call__(self, value: object) -> str:
        """The name without its prefix, or the error that lists the names."""
        name = value.removeprefix(self.prefix) if isinstance(value, str) else value
        if name not in self.names:
            near = nearest_name(value, self.names) if isinstance(value, str) else None
            raise expected(f"one of {', '.join(self.names)}", near)
        return name


@dataclass(frozen=True)
class Only:
    """Reads the one value that is supported, and says why there is no other."""

    value: object
    reason: str

    def __call__(self, value: object) -> object:
        """The value, or the error that says why it must be this one."""
        plain = None if value == "" and self.value is None else value
        if type(self.value) is int:
            plain = _whole(value)
        if plain != self.value or isinstance(plain, bool) is not isinstance(self.value, bool):
            raise expected(self.reason)
        return plain


@dataclass(frozen=True)
class Nullable:
    """Reads null as None and everything else with ``inner``; with ``unset``, an empty text is null as well."""

    inner: Callable[[object], object]
    unset: bool = False

    def __call__(self, value: object) -> object:
        """None, or what ``inner`` reads."""
        return None if value is None or (self.unset and value == "") else self.inner(value)


@dataclass(frozen=True)
class Overwrite:
    """Reads true, false, or the stages to run again."""

    stages: tuple[str, ...]

    def __call__(self, value: object) -> bool | tuple[str, ...]:
        """The value, or the error that lists the stages."""
        what = f"true, false, or some of the stages {', '.join(self.stages)}"
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.casefold() in ("true", "false"):
            return value.casefold() == "true"
        if value is None:
            raise expected(what)
        given = names(value)
        for name in given:
            if name not in self.stages:
                raise expected(what, nearest_name(name, self.stages))
        return given or False


def flag(value: object) -> bool:
    """Reads true or false; 1 and 0 are numbers."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.casefold() in ("true", "false"):
        return value.casefold() == "true"
    raise expected("true or false")


def text(value: object) -> str:
    """Reads a text that is not empty; a whole number is taken as written."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        quotes = " (in quotes: without them it is a number, true or false)" if isinstance(value, bool | float) else ""
        raise expected(f"a text{quotes}")
    if "\0" in value:
        raise expected("a text without null characters")
    return value


def path(value: object) -> Path:
    """Reads a path; ~ is the home folder."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise expected("a path")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise expected("a path (there is no such user's home folder)") from None


def names(value: object) -> tuple[str, ...]:
    """Reads a list of names, or names separated by commas, without repetitions. None is the empty list."""
    if value is None or value == "":
        return ()
    parts: object = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise expected("a list of names")
    if not all(isinstance(part, str) and part.strip() for part in parts):
        raise expected("a list of names, each a text")
    found = tuple(part.strip() for part in parts)
    if len(set(found)) != len(found):
        raise expected("a list of names without repetitions")
    return found


DTYPES = ("float32", "float16", "bfloat16")
FLOAT_DTYPE = Choice(DTYPES, prefix="torch.")
LOAD_DTYPE = Choice(("auto", *DTYPES), prefix="torch.")
ATTENTION = Nullable(Choice(("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")))
SEED = Whole(0, 2**63 - 1)

Flag = Annotated[bool, BeforeValidator(flag)]
OptionalFlag = Annotated[bool | None, BeforeValidator(Nullable(flag))]
Text = Annotated[str, BeforeValidator(text)]
OptionalText = Annotated[str | None, BeforeValidator(Nullable(text, unset=True))]
OptionalPath = Annotated[Path | None, BeforeValidator(Nullable(path, unset=True))]
Count = Annotated[int, BeforeValidator(Whole(1))]
OptionalCount = Annotated[int | None, BeforeValidator(Nullable(Whole(1)))]
NumberOrZero = Annotated[int, BeforeValidator(Whole(0))]
Seed = Annotated[int, BeforeValidator(SEED)]
Positive = Annotated[float, BeforeValidator(Real(above=0.0))]
OptionalPositive = Annotated[float | None, BeforeValidator(Nullable(Real(above=0.0)))]
Momentum = Annotated[float, BeforeValidator(Real(least=0.0, below=1.0))]
FloatDtype = Annotated[str, BeforeValidator(FLOAT_DTYPE)]
LoadDtype = Annotated[str, BeforeValidator(LOAD_DTYPE)]
Attention = Annotated[str | None, BeforeValidator(ATTENTION)]
