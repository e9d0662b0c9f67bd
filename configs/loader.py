"""From a recipe file to frozen, typed objects, or to one error with every problem of the recipe in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from configs.compatibility import legacy_warnings, take_legacy_keys
from configs.diagnosis import all_keys, note_problems
from configs.document import COMMAND_LINE, Document, read_document
from configs.errors import RecipeError, UnknownAlgorithm
from configs.interpolation import interpolate
from configs.recipe import Recipe
from configs.strict import AlgorithmParameters
from configs.tree import KeyPath
from configs.values import nearest_name

BLOCK = "llm"  # TASK names the block that holds the algorithms' parameters, and this is the only task
ConfigOf = Callable[[str], type[AlgorithmParameters]]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class LoadedRecipe:
    """A recipe that holds: the envelope, the algorithm's parameters, and what they were read from.

    ``resolved`` is the recipe as written, overrides and references applied; ``overrides`` are those of the command line, as
    typed; ``warnings`` has one line for each key that changes nothing.
    """

    recipe: Recipe
    parameters: AlgorithmParameters
    resolved: dict[str, object]
    file: Path
    warnings: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def load_recipe(path: Path, overrides: Sequence[str] = (), *, plugin_config: ConfigOf, as_json: bool = False) -> LoadedRecipe:
    """Read, merge, resolve and check a recipe.

    Args:
        path: a YAML file, or a JSON one (by its suffix, or because ``as_json`` says so).
        overrides: ``KEY=VALUE`` texts, dotted keys for blocks; the last one wins.
        plugin_config: the class that types an algorithm's block, by the algorithm's name.
        as_json: read JSON whatever the suffix.

    Raises:
        RecipeError: with every problem of the envelope and of the algorithm's block.
    """
    document = read_document(path, overrides, as_json=as_json, dotted=BLOCK)
    values = interpolate(document)
    algorithm = _Algorithm(document, values, plugin_config)
    envelope = take_legacy_keys(document, {key: value for key, value in values.items() if key != BLOCK})
    if algorithm.is_named:
        envelope["ALGORITHM"] = algorithm.key  # its own name, where the recipe uses another
    recipe = _validated(document, Recipe, envelope, (), algorithm)
    algorithm.devices = () if recipe is None else recipe.cuda_id
    parameters = None
    if algorithm.config is not None:
        parameters = _validated(document, algorithm.config, algorithm.parameters(), (BLOCK, algorithm.key), algorithm)
    if document.problems or recipe is None or parameters is None:
        raise RecipeError(sorted(document.problems, key=lambda problem: (problem.file == COMMAND_LINE, problem.line or 0)))
    prefix = f"{BLOCK}.{algorithm.key}."
    own = (*parameters.warnings(prefix), *parameters.export_warnings(recipe.export, prefix))
    warnings = (*legacy_warnings(values, recipe), *_tracking_warnings(recipe, parameters), *algorithm.warnings(), *own)
    return LoadedRecipe(
        recipe=recipe, parameters=parameters, resolved=values, file=path, warnings=warnings, overrides=tuple(overrides)
    )


def _tracking_warnings(recipe: Recipe, parameters: AlgorithmParameters) -> tuple[str, ...]:
    """A line for a TRACKING block that says where, but not whether."""
    asked = recipe.tracking
    if asked is None or asked.wandb is not None or parameters.tracks or not asked.model_fields_set - {"wandb"}:
        return ()
    return ("TRACKING has no effect without TRACKING.wandb: true",)


class _Algorithm:
    """The algorithm that a recipe names, and the block of its parameters among those of others."""

    def __init__(self, document: Document, values: Mapping[str, object], plugin_config: ConfigOf) -> None:
        self._document, self._values, self._plugin_config = document, values, plugin_config
        config = self._named()
        self.is_named = config is not None
        self.config = config or self._supposed()
        self.key = str(values.get("ALGORITHM")) if self.config is None else self.config.algorithm
        self.devices: tuple[int, ...] = ()  # of the envelope, once that is read
        self._unused: list[str] = []

    def _named(self) -> type[AlgorithmParameters] | None:
        name = self._values.get("ALGORITHM")
        if not isinstance(name, str) or not name.strip():
            return None  # the envelope reports it
        try:
            return self._plugin_config(name)
        except UnknownAlgorithm as error:
            self._document.problem(("ALGORITHM",), name, f"an algorithm ({error})", nearest_name(name, error.known))
            return None

    def _supposed(self) -> type[AlgorithmParameters] | None:
        """Where the name is missing or wrong: the first algorithm with a block, so that the block is checked all the same."""
        blocks = self._values.get(BLOCK)
        for name in blocks if isinstance(blocks, dict) else ():
            with suppress(UnknownAlgorithm):
                return self._plugin_config(name)
        return None

    def parameters(self) -> Mapping[str, object]:
        """The raw parameters; empty where the recipe has none, which means their defaults."""
        blocks = self._values.get(BLOCK)
        if blocks is None:
            return {}
        if not isinstance(blocks, dict):
            self._document.problem((BLOCK,), blocks, f"a block that holds the parameters, as in {BLOCK}.{self.key}")
            return {}
        found: object = None
        ours = [name for name, block in blocks.items() if self._is_ours(name, block)]
        for name in ours[:1]:
            found, self.key = blocks[name], name
        for name in ours[1:]:
            self._document.problem((BLOCK, name), blocks[name], f"one block for the algorithm ({BLOCK}.{self.key} is another)")
        if found is not None and not isinstance(found, dict):
            self._document.problem((BLOCK, self.key), found, "a block of keys (without the block, its defaults hold)")
            return {}
        return found or {}

    def _is_ours(self, name: str, block: object) -> bool:
        """Whether a block belongs to the algorithm; those of others are kept in mind, and typing errors reported."""
        try:
            if self._plugin_config(name) is self.config:
                return True
        except UnknownAlgorithm as error:
            self._document.problem((BLOCK, name), block, f"the block of an algorithm ({error})", self.key)
            return False
        self._unused.append(name)
        return False

    def warnings(self) -> tuple[str, ...]:
        """One line for each block of another algorithm."""
        return tuple(f"{BLOCK}.{name} has no effect: ALGORITHM is {self.key}" for name in self._unused)

    def context(self) -> dict[str, tuple[str | int, ...]]:
        """What checks need to know of elsewhere: stages, formats, the texts of CORPORA, the devices of CUDA_ID."""
        local = self._values.get("CORPORA")
        context = {"corpora": tuple(local) if isinstance(local, dict) else (), "devices": self.devices}
        if self.config is not None:
            context |= {"stages": self.config.stage_names, "formats": self.config.export_formats}
        return context

    def elsewhere(self) -> dict[str, KeyPath]:
        """Every valid key of the recipe -> its path, for keys that stand in the wrong block."""
        inner = () if self.config is None else all_keys(self.config, (BLOCK, self.key))
        paths = [*all_keys(Recipe, ()), (BLOCK,), *inner]
        return {str(path[-1]).casefold(): path for path in reversed(paths)}


def _validated(
    document: Document, model: type[Model], values: Mapping[str, object], prefix: KeyPath, algorithm: _Algorithm
) -> Model | None:
    """An instance of ``model``, or None once its problems are noted."""
    try:
        return model.model_validate(values, context=algorithm.context(), by_alias=True, by_name=False)
    except ValidationError as error:
        note_problems(document, error, model, prefix, algorithm.elsewhere())
        return None
