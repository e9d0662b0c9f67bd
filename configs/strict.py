"""The base classes of every configuration: frozen, strict, and open about what has no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A frozen block of keys that accepts no others.

    Recipes spell a key as its alias. Code that builds a configuration may use the Python name instead.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True, protected_namespaces=()
    )


@dataclass(frozen=True)
class Inert:
    """A key that is accepted and changes nothing: the one value that needs no warning, and what to know about the others."""

    harmless: object
    reason: str


class Parameters(StrictModel):
    """A block of an algorithm's parameters.

    ``inert`` lists the keys that are accepted without effect, by their Python names. ``spellings`` are further keys that the
    class reads before its own: spelling -> key.
    """

    inert: ClassVar[Mapping[str, Inert]] = {}
    spellings: ClassVar[Mapping[str, str]] = {}

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """One line for each key that the recipe sets and that has no effect, those of nested blocks included."""
        lines: list[str] = []
        for name, field in type(self).model_fields.items():
            value, key = self.__dict__[name], f"{prefix}{field.alias or name}"
            if isinstance(value, Parameters):
                lines.extend(value.warnings(f"{key}."))
            elif name in self.inert and name in self.model_fields_set and value != self.inert[name].harmless:
                lines.append(f"{key} has no effect: {self.inert[name].reason}")
        return tuple(lines)


class AlgorithmParameters(Parameters):
    """What a plugin's ``Config`` tells the loader and the runner; all other keys are the plugin's own.

    ``algorithm`` is the name under which the recipe holds the block, ``stage_names`` are the stages in their order, and
    ``export_formats`` are the formats that EXPORT may name, the default first. ``overwrite`` is true for every stage, or names
    those to run again.
    """

    algorithm: ClassVar[str]
    stage_names: ClassVar[tuple[str, ...]]
    export_formats: ClassVar[tuple[str, ...]]

    save_intermediate_results: bool = False
    overwrite: bool | tuple[str, ...] = False

    @property
    def evaluate_only(self) -> bool:
        """Whether the recipe asks for figures of the uncompressed model and nothing else."""
        return False

    @property
    def tracks(self) -> bool:
        """Whether a key of the algorithm's own asks for tracking; TRACKING at the top of the recipe comes before it."""
        return False

    @property
    def runs_alone(self) -> bool:
        """Whether no stage can be shared, so that several devices start no further processes."""
        return False

    def export_warnings(self, exports: Sequence[str], prefix: str = "") -> tuple[str, ...]:
        """One line for each key that the recipe sets and that has no effect on these formats; none named is the default."""
        return ()

    def memory_remedies(self) -> tuple[str, ...]:
        """Overrides (``KEY=VALUE``, below the algorithm's block) that need less memory, gentlest first."""
        return ()
