"""Every key of AQLM's block: its example value from the guide, its default, its limits, its warning or refusal."""

import pytest
from pydantic import ValidationError

from algorithms.quantization.aqlm.config import AqlmConfig, CalibrationConfig, ConversionConfig, FinetuneConfig

# Keys that upstream documents, with the value of its example. The defaults that differ from it stand in DEFAULTS.
CALIBRATION = {
    **{
        "attn_implementation": None,
        "beam_size": 1,
        "codebook_value_nbits": 16,
        "codebook_value_num_groups": 1,
        "devices": None,
    },
    **{"dtype": "float16", "finetune_adam_beta1": 0.9, "finetune_adam_beta2": 0.999, "finetune_batch_size": 256},
    **{
        "finetune_early_stop": 3,
        "finetune_keep_best": True,
        "finetune_lr": 1e-4,
        "finetune_max_epochs": 25,
        "in_group_size": 8,
    },
    **{"init_max_iter": 100, "init_max_points_per_centroid": None, "load": None, "local_batch_size": 4, "lr": 1e-4},
    **{"max_epochs": 100, "mix_compression": False, "model_seqlen": 4096, "nbits_per_codebook": 16, "new_eval": False},
    **{"no_quant": False, "nsamples": 2048, "num_codebooks": 1, "offload_activations": True, "on_save": None},
    **{"out_group_size": 1, "print_frequency": 1, "relative_mse_tolerance": 0.01, "resume": False, "scale_nbits": 0, "seed": 0},
    **{"skip_out_loss": False, "steps_per_epoch": 100, "true_sequential": False, "trust_remote_code": True},
    **{"use_checkpointing": False, "use_faiss": False, "use_fast_tokenizer": False, "val_size": 256, "wandb": False},
    "exp_name": None,
}
FINETUNE = {
    **{"adam_beta1": 0.9, "adam_beta2": 0.95, "amp_dtype": "float32", "amsgrad": False, "attn_implementation": None},
    **{"base_model": None, "batch_size": 128, "beam_size": 1, "block_type": "LlamaDecoderLayer", "cache_dir": None},
    **{"code_adam_16bit": False, "code_beta1": 0, "code_beta2": 0.95, "code_dtype": "uint16", "code_lr": 1e-3},
    **{
        "code_selection_temperature": 0,
        "code_trust_ratio": 0.01,
        "dataset_config_name": None,
        "debias": True,
        "delta_decay": 0,
    },
    **{"download_num_workers": None, "eval_datasets": ["wikitext2", "c4"], "eval_every_steps": 15, "force_code_update": False},
    **{
        "gradient_checkpointing": True,
        "keep_best_model": True,
        "lamb": True,
        "limit_parallel_inits": 4,
        "load_dtype": "float32",
    },
    **{"lr": 1e-4, "master_dtype": "float32", "max_code_change_per_step": 0.01, "max_epochs": 10, "microbatch_size": 2},
    **{
        "minimize_sync": False,
        "model_seqlen": 4096,
        "monkeypatch_old_pickle": False,
        "num_workers": 8,
        "overwrite_cache": False,
    },
    **{"preprocessing_chunk_length": None, "preprocessing_keep_in_memory": False, "preprocessing_num_workers": 24},
    **{"print_every_steps": 1, "save_every_steps": 10, "seed": 1337, "skip_grouping": True, "split": "none"},
    **{"straight_through_buffer_dtype": "float32", "trust_remote_code": True, "update_codebooks_and_scales": True},
    **{"update_codes": True, "update_non_quantized_parameters": True, "use_fast_tokenizer": False, "use_fsdp_amp": False},
    **{"verbose_optimizer": True, "wandb": False, "wrap_separately": []},
}
CONVERSION = {
    **{"attn_implementation": None, "code_dtype": "int32", "load_dtype": "auto", "trust_remote_code": True},
    **{"monkeypatch_old_pickle": False, "p_finetuned_state_dict": None, "base_model": None, "quantized_model": None},
    **{"pv_fsdp_dir": None, "save": None},
}
# Keys that upstream does not have.
OURS = {
    CalibrationConfig: {"targets", "min_expert_tokens"},
    FinetuneConfig: {
        "nsamples", "val_size", "lr_schedule", "warmup_steps", "max_grad_norm", "teacher_cache", "update_codebooks",
        "update_scales", "update_norms", "update_embeddings",
    },
    ConversionConfig: set(),
}  # fmt: skip
BLOCKS = [(CalibrationConfig, CALIBRATION), (FinetuneConfig, FINETUNE), (ConversionConfig, CONVERSION)]


def by_key(block) -> dict[str, object]:
    """A block's values under the spellings of recipes."""
    return block.model_dump(by_alias=True)


@pytest.mark.parametrize(("model", "example"), BLOCKS)
def test_the_keys_are_those_of_upstream_and_take_their_examples(model, example):
    values = by_key(model.model_validate(example))
    assert set(values) - OURS[model] == set(example)
    for key, value in example.items():
        assert values[key] == (tuple(value) if isinstance(value, list) else value), key


def test_defaults_where_the_example_differs_from_them():
    differing = {
        CalibrationConfig: {"dtype": "auto", "finetune_batch_size": 16, "local_batch_size": None, "print_frequency": 10}
        | {"finetune_lr": None},
        FinetuneConfig: {"batch_size": 256, "eval_every_steps": None, "keep_best_model": False, "microbatch_size": 4}
        | {"preprocessing_num_workers": None, "save_every_steps": None, "skip_grouping": False, "block_type": None},
        ConversionConfig: {},
    }
    for model, example in BLOCKS:
        for key, value in by_key(model()).items():
            if key in OURS[model]:
                continue
            documented = {**example, "trust_remote_code": False, **differing[model]}[key]
            assert value == (tuple(documented) if isinstance(documented, list) else documented), key


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("scale_nbits", 4, "float16 scale"),
        ("codebook_value_nbits", 8, "float16 codebooks"),
        ("codebook_value_num_groups", 2, "no client"),
        ("mix_compression", True, "one num_codebooks"),
        ("devices", ["cuda:0"], "CUDA_ID"),
        ("load", "x.pth", "resumes by itself"),
        ("on_save", "import os", "never run"),
        ("use_faiss", True, "torch"),
        ("nbits_per_codebook", 17, "from 1 to 16"),
        ("nbits_per_codebook", 0, "from 1 to 16"),
        ("val_size", 2048, "fewer validation samples"),
        ("val_size", -1, "at least 0"),
        ("relative_mse_tolerance", 1.0, "below 1"),
        ("finetune_adam_beta2", 1.0, "below 1"),
        ("lr", 0, "above 0"),
        ("model_seqlen", 1, "at least 2"),
        ("attn_implementation", "flash", "eager"),
        ("dtype", "int8", "auto, float32"),
        ("nsamples", True, "whole number"),
    ],
)
def test_calibration_refuses_with_the_reason(key, value, reason):
    with pytest.raises(ValidationError) as caught:
        CalibrationConfig.model_validate({key: value})
    (error,) = caught.value.errors()
    assert error["loc"] == (key,)
    assert reason in error["ctx"]["expected"]


def test_the_default_validation_set_must_fit_as_well():
    with pytest.raises(ValidationError, match="fewer validation samples than nsamples, which is 128"):
        CalibrationConfig(num_samples=128)
    assert CalibrationConfig(num_samples=128, validation_size=0).validation_size == 0


@pytest.mark.parametrize(
    ("values", "key", "reason"),
    [
        ({"batch_size": 6, "microbatch_size": 4}, "microbatch_size", "divisor of batch_size, which is 6"),
        ({"batch_size": 6}, "microbatch_size", "divisor"),
        (
            {"update_codes": False, "update_codebooks_and_scales": False, "update_non_quantized_parameters": False},
            None,
            "nothing",
        ),
        ({"keep_best_model": True, "val_size": 0}, "keep_best_model", "val_size is 0"),
        ({"master_dtype": "bfloat16"}, "amp_dtype", "like master_dtype"),
        ({"master_dtype": "float16", "amp_dtype": "bfloat16"}, "amp_dtype", "master_dtype: float32"),
        ({"max_code_change_per_step": 0}, "max_code_change_per_step", "above 0"),
        ({"code_trust_ratio": 0}, "code_trust_ratio", "above 0"),
        ({"delta_decay": 1.5}, "delta_decay", "at most 1"),
        ({"eval_datasets": ["gsm8k:many"]}, "eval_datasets", "gsm8k:5"),
        ({"monkeypatch_old_pickle": True}, "monkeypatch_old_pickle", "never read"),
        ({"code_dtype": "float16"}, "code_dtype", "uint16"),
        ({"max_epochs": -1}, "max_epochs", "at least 0"),
    ],
)
def test_finetuning_refuses_with_the_reason(values, key, reason):
    with pytest.raises(ValidationError) as caught:
        FinetuneConfig.model_validate(values)
    (error,) = caught.value.errors()
    assert key is None or error["loc"] == (key,)
    assert reason in error["ctx"]["expected"]


def test_null_disables_where_upstream_documents_it():
    assert CalibrationConfig.model_validate({"relative_mse_tolerance": None}).relative_mse_tolerance is None
    assert FinetuneConfig.model_validate({"code_trust_ratio": None}).code_trust_ratio is None


def test_numbers_may_be_text():
    config = CalibrationConfig.model_validate({"finetune_lr": "1e-4", "nsamples": "3e3"})
    assert (config.finetune_lr, config.num_samples) == (1e-4, 3000)


def test_tuning_is_left_out_by_null_or_no_epochs():
    assert AqlmConfig().tunes
    assert not AqlmConfig.model_validate({"finetune_config": None}).tunes
    assert not AqlmConfig.model_validate({"finetune_config": {"max_epochs": 0}}).tunes


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (True, True),
        ("false", False),
        (["calibration"], ("calibration",)),
        ("calibration, conversion", ("calibration", "conversion")),
        ([], False),
    ],
)
def test_overwrite_is_a_flag_or_a_list_of_stages(value, read):
    assert AqlmConfig.model_validate({"overwrite": value}).overwrite == read


@pytest.mark.parametrize("value", [None, 1, ["calibrate"], "calibration,calibration", {"a": 1}])
def test_what_overwrite_is_not(value):
    with pytest.raises(ValidationError):
        AqlmConfig.model_validate({"overwrite": value})


def test_only_what_the_recipe_sets_and_has_no_effect_is_warned_about():
    assert AqlmConfig(finetune_config=None).warnings() == ()
    set_keys = {"calibration_config": {"lr": 1e-3, "resume": True, "seed": 3}, "finetune_config": {"split": "train", "lr": 1.0}}
    lines = AqlmConfig.model_validate(set_keys).warnings("llm.AQLM.")
    keys = ["llm.AQLM.calibration_config.lr", "llm.AQLM.finetune_config.split"]
    assert [line.split()[0] for line in lines] == keys


def test_memory_remedies_are_overrides_that_are_not_in_force_yet():
    remedies = AqlmConfig.model_validate(
        {"calibration_config": {"local_batch_size": 4}, "finetune_config": None}
    ).memory_remedies()
    assert remedies[0] == "calibration_config.local_batch_size=1"
    assert not any("microbatch" in remedy or "offload" in remedy for remedy in remedies)
