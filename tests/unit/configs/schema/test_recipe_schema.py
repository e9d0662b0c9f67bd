"""The schema against the loader, key for key and value for value; every shipped recipe against the schema."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from algorithms.registry import config_class, rows
from configs.errors import RecipeError
from configs.loader import load_recipe
from configs.recipe import Recipe
from configs.schema.descriptions import DESCRIPTIONS
from configs.schema.readers import inner_block
from configs.tree import read_tree
from jobs.command_line.editor_schema import current_schema
from tests.support.recipes import SMALL
from tests.support.source_tree import ROOT, shipped_recipes

FILE = ROOT / "configs/schema/recipe.schema.json"
RECIPES = shipped_recipes()
SCHEMA = json.loads(FILE.read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)

# What the loader accepts here, the schema has to; of the values of another kind, it has to refuse what the loader refuses.
OTHER_KINDS = [None, True, False, {"nope": 1}, [{}]]
VALUES = [0, 3, -1, 0.5, 256.0, "4", "1e-3", "", "TRUE", "a,b", "a:5", [], ["a"], [[1, -1]], "inf", "torch.float16", "zint4"]
TOLD_BY_OTHER_KEYS = [("LMQuant", "loads_with_qserve", True)]  # a wrong value beside others, of the right kind

VALID = [
    "",
    "STAGES: calibration\nEXPORT: [aqlm, dense]\nCUDA_ID: 0,1\nTEXT_COLUMN: [text]\nTRUST_REMOTE_CODE: 'True'\n",
    "STAGES: null\nEXPORT: null\nCUDA_ID: 3\nMODEL_PATH: ''\nNUM_PROCESSES: '2'\nFORMAT_STRING: ''\nDATASET_SUBNAME: 5\n",
    "CUDA_ID: [0, '1']\nCORPORA: {mine: a.txt, other: {train: b.txt, test: c.txt}}\nEVALUATION: {perplexity: mine}\n",
    "EVALUATION: {perplexity: [wikitext2], sequence_length: 1e3, max_tokens: null}\nUSER_FOLDER: ${oc.env:HOME}\n",
    "JOB_SERVICE: adapt\nJOB_PATH: anything\nOUTPUT_PATH: 3\nVLM_DATASET: ''\nCUSTOM_MODEL_PATH: ''\nCORPORA: null\n",
]
BLOCKS = [
    "llm: null\n",
    "llm: {AQLM: null}\n",
    "llm: {aqlm: {calibration_config: {nsamples: '8', val_size: 2.0}}, ReALLM: {a: 1}, GPTQ: [no, block]}\n",
    "llm: {AQLM: {calibration_config.nsamples: 8, calibration_config.val_size: '${JOB_ID}', finetune_config: null}}\n",
    "llm: {AQLM.finetune_config: null, AQLM.overwrite: [calibration]}\n",
    "llm: {AQLM: {overwrite: 'true', calibration_config: {dtype: torch.float16, devices: '', finetune_lr: '1e-4'}}}\n",
]
ENVELOPE = SMALL.partition("llm:")[0].replace("trial", "2")
INVALID = [
    ENVELOPE + "nope: 1\n",
    ENVELOPE + "TASK: vision\n",
    ENVELOPE + "EXPORT: [gguf]\n",
    ENVELOPE + "STAGES: [pruning]\n",
    ENVELOPE + "IMAGE_COLUMN: image\n",
    ENVELOPE + "SPLIT: null\n",
    ENVELOPE + "EVALUATION: {sequence_length: 1}\n",
    ENVELOPE + "CORPORA: {mine: {dev: a.txt}}\n",
    ENVELOPE + "JOB_SERVICE: Elsewhere\n",
    ENVELOPE + "CUDA_ID: [a]\n",
    ENVELOPE + "llm: {AQLM: {calibration_config.nsampels: 8}}\n",
    ENVELOPE + "llm: {AQLM: {calibration_config.nsamples: many}}\n",
    ENVELOPE + "llm: {Aqlmm: {}}\n",
    ENVELOPE + "llm: []\n",
    ENVELOPE.replace("AQLM", "AQLMM"),
    ENVELOPE.replace("JOB_ID: 2", "JOB_ID: a/b"),
    ENVELOPE.replace("JOB_ID: 2", ""),
]


def paths(block: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key in a block and in the blocks inside it."""
    for name, field in block.model_fields.items():
        path = (*prefix, field.alias or name)
        yield path
        inner = inner_block(field.annotation)
        if inner is not None:
            yield from paths(inner, path)


def nested(path: tuple[str, ...], value: object) -> object:
    return nested(path[:-1], {path[-1]: value}) if path else value


def accepts(block: type, path: tuple[str, ...], value: object) -> bool:
    """Whether the class takes the value at a key when all others have their defaults."""
    config = config_class("AQLM")  # whose stages and formats the envelope has to name
    context = {"devices": (), "stages": config.stage_names, "formats": config.export_formats}
    try:
        block.model_validate(nested(path, value), context=context, by_alias=True, by_name=False)
    except ValidationError:
        return False
    return True


def loads(text: str, folder: Path) -> bool:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        load_recipe(file, plugin_config=config_class)
    except RecipeError:
        return False
    return True


def is_valid(text: str) -> bool:
    return VALIDATOR.is_valid(read_tree(text).root)


def test_the_file_is_what_the_command_writes_and_a_schema_of_its_draft():
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    again = "python main.py schema --output configs/schema/recipe.schema.json"
    assert FILE.read_text(encoding="utf-8") == current_schema(), f"keys have changed; write the schema again with: {again}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_shipped_recipe_names_the_schema_in_its_first_line_and_holds(recipe):
    text = recipe.read_text(encoding="utf-8")
    mark, place = text.splitlines()[0].split("=")
    assert mark == "# yaml-language-server: $schema"
    assert (recipe.parent / place).resolve() == FILE
    assert [error.message for error in VALIDATOR.iter_errors(read_tree(text).root)] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_key_that_does_not_exist_is_refused_in_every_block_of_every_recipe(recipe):
    def blocks(value: object) -> Iterator[dict]:
        if isinstance(value, dict):
            yield value
            for key, inner in value.items():
                if key != "CORPORA":  # its keys are names of the recipe's own
                    yield from blocks(inner)

    root = read_tree(recipe.read_text(encoding="utf-8")).root
    for block in blocks(root):
        block["nope"] = 1
        assert not VALIDATOR.is_valid(root)
        del block["nope"]
    assert VALIDATOR.is_valid(root)


@pytest.mark.parametrize("name", [row.name for row in rows()])
def test_every_key_takes_what_the_loader_takes_and_refuses_other_kinds(name):
    block = config_class(name)
    chosen = next(one["then"] for one in SCHEMA["allOf"] if name in one["if"]["properties"]["ALGORITHM"]["enum"])
    reference = chosen["properties"]["llm"]["properties"][name]["anyOf"][0]
    validator = Draft202012Validator({**reference, "$defs": SCHEMA["$defs"]})
    for path in paths(block):
        for value in VALUES:
            if accepts(block, path, value):
                assert validator.is_valid(nested(path, value)), (path, value)
                assert validator.is_valid({".".join(path): value}), (path, value)
        for value in OTHER_KINDS:
            if (name, ".".join(path), value) not in TOLD_BY_OTHER_KEYS:
                assert validator.is_valid(nested(path, value)) == accepts(block, path, value), (path, value)


def test_the_envelope_too():
    given = {"ALGORITHM": "AQLM", "JOB_ID": "one"}
    for path in list(paths(Recipe))[1:]:  # which algorithms there are, only the loader knows
        for values, both_ways in ((VALUES, False), (OTHER_KINDS, True)):
            for value in values:
                recipe = {**given, **nested(path, value)}
                loaded, valid = accepts(Recipe, (), recipe), VALIDATOR.is_valid(recipe)
                assert valid or not loaded, (path, value)
                assert loaded or not (valid and both_ways), (path, value)


@pytest.mark.parametrize("text", [*(ENVELOPE + more for more in VALID), *(ENVELOPE + block for block in BLOCKS)])
def test_what_loads_is_valid(text, tmp_path):
    assert loads(text, tmp_path)
    assert is_valid(text)


@pytest.mark.parametrize("text", INVALID)
def test_what_does_not_load_is_not_valid(text, tmp_path):
    assert not loads(text, tmp_path)
    assert not is_valid(text)


def test_other_spellings_are_keys_as_well(tmp_path):
    text = ENVELOPE.replace("AQLM", "FLAP") + "llm: {FLAP: {seqlen: 64}}\n"
    assert loads(text, tmp_path)
    assert is_valid(text)


def test_every_key_of_the_envelope_is_described():
    for block in [Recipe, *filter(None, (inner_block(field.annotation) for field in Recipe.model_fields.values()))]:
        own = [field.alias or name for name, field in block.model_fields.items()]
        described = [key for name, key in DESCRIPTIONS if name == block.__name__]
        inner = [field.alias for field in block.model_fields.values() if inner_block(field.annotation)]
        assert set(own) - set(inner) <= set(described), f"configs/schema/descriptions.py lacks keys of {block.__name__}"
        assert set(described) <= set(own)


def test_the_command_writes_it_without_torch(tmp_path):
    code = "import sys, main; main.main(sys.argv[1:]); sys.exit(bool({'torch', 'numpy', 'jsonschema'} & set(sys.modules)))"
    argv = [sys.executable, "-c", code, "schema"]
    printed = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert printed.stdout.decode() == current_schema()
    written = tmp_path / "schema.json"
    assert subprocess.run([*argv, "--output", str(written)], cwd=ROOT, check=True, capture_output=True).stdout == b""
    assert written.read_text(encoding="utf-8") == current_schema()
