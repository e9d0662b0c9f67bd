"""The envelope of a recipe: model, data, job, algorithm name, exports and evaluation. The algorithm's own block is not here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.names import (
    JobReference,
    TaskRequest,
    check_format_string,
    custom_model,
    dataset_reference,
    devices,
    folder_name,
    hub_repository,
    job_reference,
    model_name,
    service_name,
    task_request,
    token,
)
from configs.strict import StrictModel
from configs.values import (
    FLOAT_DTYPE,
    Choice,
    Count,
    Flag,
    Nullable,
    OptionalCount,
    OptionalFlag,
    OptionalPath,
    OptionalText,
    Text,
    Whole,
    expected,
    flag,
    inside,
    names,
    nearest_name,
    path,
)

CHUNKED = "gptq_wikitext"  # the one task that is not lm-eval's
EVALUATION_CORPORA = ("wikitext2", "ptb", "ptb_new", "c4", "c4_new", "pajama")
DEFAULT_MODEL = "huggyllama/llama-7b"
SPLITS = Choice(("train", "validation", "test"))


def _known(given: tuple[str, ...], known: tuple[str, ...] | None, what: str) -> tuple[str, ...]:
    """``given`` again, if all of it is among ``known``; None knows everything."""
    for name in given:
        if known is not None and name not in known:
            raise expected(f"{what}: {', '.join(known)} (not {name})", nearest_name(name, known))
    return given


def _from_context(info: ValidationInfo, key: str) -> tuple[str, ...] | None:
    """What the loader knows about the algorithm and the recipe, where there is a loader."""
    return (info.context or {}).get(key)


def _local_corpora(value: object) -> dict[str, Path | dict[str, Path]]:
    """Reads CORPORA: the name of a text -> its file, or a file for each split."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise expected("a block of names, each with a file, or with files for train, validation and test")
    return {_local_name(name, files): _local_files(name, files) for name, files in value.items()}


def _local_name(name: str, files: object) -> str:
    with inside((name,), files):
        return token(name)


def _local_files(name: str, files: object) -> Path | dict[str, Path]:
    if not isinstance(files, Mapping):
        with inside((name,), files):
            return path(files)
    found: dict[str, Path] = {}
    for split, file in files.items():
        with inside((name, split), file):
            found[SPLITS(split)] = path(file)
    return found


def _columns(value: object) -> tuple[str, ...]:
    """Reads TEXT_COLUMN: "a,b" or a list, at least one name."""
    found = names(value)
    if not found:
        raise expected("one or more names of columns")
    return found


Columns = Annotated[tuple[str, ...], BeforeValidator(_columns, json_schema_input_type=str | list[str])]
Corpora = Annotated[
    Mapping[str, Path | Mapping[str, Path]],
    BeforeValidator(
        _local_corpora, json_schema_input_type=dict[str, Path | dict[Literal["train", "validation", "test"], Path]] | None
    ),
]


def _tasks(value: object) -> tuple[str, ...]:
    """Reads a list of tasks, "gsm8k:5,gptq_wikitext" or a YAML list."""
    requests = [task_request(name) for name in names(value)]
    if any(request.name == CHUNKED and request.num_fewshot for request in requests):
        raise expected(f"{CHUNKED} without examples: it is a perplexity")
    return tuple(map(str, requests))


Tasks = Annotated[tuple[str, ...], BeforeValidator(_tasks, json_schema_input_type=str | list[str] | None)]


class EvaluationConfig(StrictModel):
    """What is measured once the stages are done. ``sequence_length`` and ``max_tokens`` count tokens.

    ``tasks`` are lm-eval's, and gptq_wikitext; those of one's own are YAML files in ``task_folder``. ``limit`` takes so many
    samples of each. Without ``add_bos_token``, texts begin with BOS where the tokenizer does so of itself. Models compute in
    ``dtype``.
    """

    corpora: Annotated[tuple[str, ...], BeforeValidator(names)] = Field(default=(), alias="perplexity")
    sequence_length: Annotated[int, BeforeValidator(Whole(2))] = 2048
    max_tokens: OptionalCount = None
    kl_divergence: Flag = True
    tasks: Tasks = ()
    task_folder: OptionalPath = None
    limit: OptionalCount = None
    batch_size: Count = 16
    add_bos_token: OptionalFlag = None
    dtype: Annotated[str, BeforeValidator(FLOAT_DTYPE)] = "float32"
    apply_chat_template: Flag = False

    @property
    def requests(self) -> tuple[TaskRequest, ...]:
        """The tasks, read."""
        return tuple(task_request(name) for name in self.tasks)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be measured."""
        return not self.corpora and not self.tasks

    @field_validator("corpora")
    @classmethod
    def _corpora_are_known(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        local = _from_context(info, "corpora")
        known = None if local is None else (*EVALUATION_CORPORA, *(name for name in local if name not in EVALUATION_CORPORA))
        return _known(value, known, "texts to evaluate on, local ones named under CORPORA")


class TrackingConfig(StrictModel):
    """Figures in wandb, beside metrics.jsonl. ``wandb`` null leaves it to the algorithm's keys."""

    wandb: Annotated[bool | None, BeforeValidator(Nullable(flag))] = None
    project: OptionalText = None
    entity: OptionalText = None
    name: OptionalText = None


class Recipe(StrictModel):
    """What a job is, but for the parameters of its algorithm. Relative paths count from the working folder."""

    algorithm: Text = Field(alias="ALGORITHM")
    task: Annotated[str, BeforeValidator(Choice(("llm",)))] = Field(default="llm", alias="TASK")
    job_service: Annotated[str, BeforeValidator(service_name)] = Field(default="Kompress", alias="JOB_SERVICE")
    job_id: Annotated[str, BeforeValidator(folder_name)] = Field(alias="JOB_ID")
    user_folder: Annotated[Path, BeforeValidator(path)] = Field(default=Path("user_data"), alias="USER_FOLDER")
    cache_path: OptionalPath = Field(default=None, alias="CACHE_PATH")
    logging_path: OptionalPath = Field(default=None, alias="LOGGING_PATH")
    # Historical meaning: where the compressed model goes, in place of the job folder. Not where a model comes from.
    model_path: OptionalPath = Field(default=None, alias="MODEL_PATH")
    model: Annotated[str, BeforeValidator(model_name)] = Field(default=DEFAULT_MODEL, alias="MODEL")
    custom_model_path: Annotated[Path | None, BeforeValidator(Nullable(custom_model, unset=True))] = Field(
        default=None, alias="CUSTOM_MODEL_PATH"
    )
    dataset_name: Annotated[str | None, BeforeValidator(Nullable(dataset_reference, unset=True))] = Field(
        default=None, alias="DATASET_NAME"
    )
    dataset_subname: OptionalText = Field(default=None, alias="DATASET_SUBNAME")
    data_path: OptionalPath = Field(default=None, alias="DATA_PATH")
    text_column: Columns = Field(default=("text",), alias="TEXT_COLUMN")
    split: Text = Field(default="train", alias="SPLIT")
    format_string: OptionalText = Field(default=None, alias="FORMAT_STRING", validate_default=True)
    cuda_id: Annotated[tuple[int, ...], BeforeValidator(devices)] = Field(default=(), alias="CUDA_ID")
    stages: Annotated[tuple[str, ...] | None, BeforeValidator(Nullable(names))] = Field(default=None, alias="STAGES")
    export: Annotated[tuple[str, ...], BeforeValidator(names)] = Field(default=(), alias="EXPORT")
    corpora: Corpora = Field(default_factory=dict, alias="CORPORA")
    evaluation: EvaluationConfig | None = Field(default=None, alias="EVALUATION")
    tracking: TrackingConfig | None = Field(default=None, alias="TRACKING")
    push_to_hub: Annotated[str | None, BeforeValidator(Nullable(hub_repository, unset=True))] = Field(
        default=None, alias="PUSH_TO_HUB"
    )
    num_processes: OptionalCount = Field(default=None, alias="NUM_PROCESSES")
    trust_remote_code: Flag = Field(default=False, alias="TRUST_REMOTE_CODE")

    @field_validator("format_string")
    @classmethod
    def _format_string_fits_the_columns(cls, value: str | None, info: ValidationInfo) -> str | None:
        columns = info.data.get("text_column")  # missing where TEXT_COLUMN itself is wrong
        return value if columns is None else check_format_string(value, columns)

    @field_validator("stages")
    @classmethod
    def _stages_are_known(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        known = _from_context(info, "stages")
        if value == ():
            raise expected(f"null for all stages, or some of {', '.join(known or ('calibration',))}")
        return _known(value or (), known, "stages of the algorithm") or None

    @field_validator("export")
    @classmethod
    def _formats_are_known(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        return _known(value, _from_context(info, "formats"), "formats that the algorithm writes")

    @property
    def model_job(self) -> JobReference | None:
        """The job whose output MODEL names, if it names one."""
        return job_reference(self.model)

    @property
    def job_folder(self) -> Path:
        """Where the job lives: MODEL_PATH, or USER_FOLDER/jobs/JOB_SERVICE/JOB_ID."""
        return self.model_path or self.user_folder / "jobs" / self.job_service / self.job_id
