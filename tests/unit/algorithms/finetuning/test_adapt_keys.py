"""What keys of nyuntam-adapt mean, beside a plugin's own."""

from typing import ClassVar

import pytest
from pydantic import ValidationError

from algorithms.finetuning.adapt_keys import AdaptKeys
from algorithms.finetuning.recovery_config import RecoveryConfig
from configs.strict import AlgorithmParameters

# As the documentation of nyuntam-adapt lists them, with its spelling of each.
SHOWN = {
    "DO_TRAIN": True, "DO_EVAL": True, "NUM_WORKERS": 4, "BATCH_SIZE": 2, "EPOCHS": 5, "STEPS": 1,
    "OPTIMIZER": "paged_adamw_32bit", "LR": "1e-4", "SCHEDULER_TYPE": "linear", "WEIGHT_DECAY": 0.01, "BETA1": 0.8,
    "BETA2": 0.99, "ADAM_EPS": 1e-8, "INTERVAL": "steps", "INTERVAL_STEPS": 50, "NO_OF_CHECKPOINTS": 5, "FP16": True,
    "RESUME_FROM_CHECKPOINT": False, "GRADIENT_ACCUMULATION_STEPS": 8, "GRADIENT_CHECKPOINTING": True, "GROUP_BY_LENGTH": False,
    "LAST_LAYER_TUNING": False, "FULL_FINE_TUNING": False, "PEFT_METHOD": "LoRA", "r": 4, "alpha": 8, "dropout": 0.1,
    "peft_type_lora": "LoRA", "target_modules": "q_proj,v_proj", "fan_in_fan_out": False, "init_lora_weights": True,
    "load_in_4bit": True, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False,
    "load_in_8bit": False, "llm_int8_threshold": 6.0, "packing": False, "dataset_text_field": "text", "max_seq_length": 512,
    "flash_attention2": False, "blocksize": 128, "SAVE_METHOD": "state_dict",
}  # fmt: skip


class Pruner(AdaptKeys, AlgorithmParameters):
    """A plugin with a recovery stage."""

    algorithm: ClassVar[str] = "Pruner"
    pruning_ratio: float = 0.2


def _config(**keys):
    return Pruner.model_validate(keys, by_alias=True, by_name=False)


def test_every_key_of_the_documentation_is_taken_to_its_twin():
    config = _config(to_finetune=True, pruning_ratio=0.5, **SHOWN)
    expected = {
        "method": "lora", "batch_size": 16, "micro_batch_size": 2, "max_epochs": 5, "lr": 1e-4, "lr_schedule": "linear",
        "weight_decay": 0.01, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_eps": 1e-8, "eval_every_steps": 50,
        "save_every_steps": 50, "gradient_checkpointing": True, "rank": 4, "alpha": 8.0, "dropout": 0.1,
        "target_modules": ("q_proj", "v_proj"), "skip_grouping": True, "sequence_length": 512,
    }  # fmt: skip
    assert config.recovering == RecoveryConfig(**expected)
    assert config.recovers


def test_keys_without_effect_are_named_once():
    lines = _config(to_finetune=True, **SHOWN).warnings("llm.Pruner.")
    named = sorted(line.split()[0].removeprefix("llm.Pruner.") for line in lines)
    assert named == sorted(
        ["DO_EVAL", "NUM_WORKERS", "STEPS", "NO_OF_CHECKPOINTS", "FP16", "load_in_4bit", "bnb_4bit_compute_dtype",
         "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_threshold", "dataset_text_field", "blocksize",
         "SAVE_METHOD"]
    )  # fmt: skip
    assert all("has no effect: " in line for line in lines)


@pytest.mark.parametrize("to_finetune", [None, False])
def test_without_a_recovery_one_line_names_the_keys_that_are_for_it(to_finetune):
    said = {} if to_finetune is None else {"to_finetune": to_finetune}
    config = _config(**said, DO_EVAL=True, LR=1e-3, recovery={"seed": 3})
    lines = config.warnings("llm.Pruner.")
    assert not config.recovers
    assert [line for line in lines if "recovery, LR, DO_EVAL" in line]
    assert len(lines) == (2 if to_finetune is None else 1)
    assert ("is missing" in lines[0]) == (to_finetune is None)


def test_a_recovery_alone_needs_no_warning():
    config = _config(to_finetune=True, recovery={"method": "lora", "r": 2})
    assert config.warnings() == ()
    assert config.recovering == RecoveryConfig(method="lora", rank=2)


@pytest.mark.parametrize(("keys", "said"), [({"DO_TRAIN": False}, "DO_TRAIN"), ({"EPOCHS": 0}, None)])
def test_what_is_to_be_left_out_is(keys, said):
    config = _config(to_finetune=True, **keys)
    assert not config.recovers
    assert all(said in line for line in config.warnings())


def test_full_tuning_has_no_use_for_keys_of_adapters():
    config = _config(to_finetune=True, FULL_FINE_TUNING=True, PEFT_METHOD="LoRA", r=8)
    assert config.recovering.method == "full"
    assert [line.split()[0] for line in config.warnings()] == ["r"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"OPTIMIZER": "adafactor"}, "one of adam, adamw"),
        ({"PEFT_METHOD": "SSF"}, "LoRA"),
        ({"init_lora_weights": False}, "start at zero"),
        ({"SCHEDULER_TYPE": "inverse_sqrt"}, "cosine"),
        ({"LR": 0}, "above 0"),
        ({"BATCH_SIZE": 0}, "at least 1"),
        ({"DO_TRAIN": "maybe"}, "true or false"),
        ({"EPOCHS": 2, "recovery": {"max_epochs": 2}}, "recovery.max_epochs"),
        ({"GRADIENT_ACCUMULATION_STEPS": 2, "recovery": {"batch_size": 2}}, "recovery.batch_size"),
        ({"max_seq_length": 64, "recovery": {"model_seqlen": 64}}, "recovery.model_seqlen"),
        ({"recovery": {"batch_size": 6, "micro_batch_size": 4}}, "divisor of batch_size"),
        ({"recovery": {"val_size": 0, "keep_best": True}}, "val_size is 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message) as error:
        _config(to_finetune=True, **keys)
    assert error.value.error_count() == 1


def test_null_is_as_good_as_no_key():
    config = _config(to_finetune=True, **dict.fromkeys(SHOWN))
    assert config.recovering == RecoveryConfig()
    assert config.warnings() == ()


def test_what_changes_no_result_does_not_shape_it():
    one = _config(to_finetune=True, BATCH_SIZE=8, GRADIENT_CHECKPOINTING=True).recovering.shaping
    other = _config(to_finetune=True, BATCH_SIZE=4, GRADIENT_ACCUMULATION_STEPS=2, recovery={"r": 3}).recovering.shaping
    assert one == other
    assert RecoveryConfig(method="lora").shaping != RecoveryConfig(method="lora", rank=3).shaping
    assert RecoveryConfig(lr=RecoveryConfig().rate, lamb=True).shaping == RecoveryConfig().shaping


def test_a_rate_of_adam_is_not_taken_for_a_share():
    assert RecoveryConfig().uses_lamb
    assert not _config(to_finetune=True, LR=1e-4).recovering.uses_lamb
    assert not RecoveryConfig(method="lora").uses_lamb
    assert RecoveryConfig(method="lora", lamb=True).uses_lamb
