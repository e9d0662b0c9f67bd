"""The key of a stage: the digest of everything that shapes its result, and what changed where two keys differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from algorithms.base import StageSpec
from jobs.manifest import StageRecord
from jobs.results.artifacts import canonical_digest

DATA_SET = "the data set"


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """A stage with all that its result depends on: the algorithm's name, the input's key and the key of its tokens."""

    spec: StageSpec
    algorithm: str
    input_key: str
    tokens_key: str | None

    @property
    def key(self) -> str:
        """The stage's key. Equal keys promise equal results."""
        spec = self.spec
        settings = canonical_digest(dict(spec.settings))
        return canonical_digest([self.algorithm, spec.name, spec.version, settings, self.input_key, self.tokens_key])

    def changes_since(self, record: StageRecord, spelling: Mapping[str, str] | None = None) -> list[str]:
        """What differs from the recorded stage, in words; empty where the keys are equal.

        Args:
            record: the stage as the manifest knows it.
            spelling: settings -> keys of the recipe, where they differ.
        """
        spec = self.spec
        settings = sorted(
            name
            for name in {*spec.settings, *record.settings}
            if canonical_digest(spec.settings.get(name)) != canonical_digest(record.settings.get(name))
        )
        same_request = request_record(spec) == record.request
        differs = {
            "the algorithm": record.algorithm != self.algorithm,
            "the program's version of this stage": record.version != spec.version,
            "its input": record.input_key != self.input_key,
            DATA_SET: record.tokens_key != self.tokens_key and same_request,
            "the calibration text it asks for": record.tokens_key != self.tokens_key and not same_request,
        }
        return [f"the setting {(spelling or {}).get(name, name)}" for name in settings] + [
            what for what, changed in differs.items() if changed
        ]


def request_record(spec: StageSpec) -> dict[str, object] | None:
    """The stage's token request as the manifest keeps it."""
    return None if spec.tokens is None else asdict(spec.tokens)
