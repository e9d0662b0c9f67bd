import pytest
from pydantic import ValidationError

from algorithms.quantization.reallm.config import ReallmConfig
from tests.unit.algorithms.quantization.reallm.reallm_runs import reallm


def _config(**values):
    return ReallmConfig.model_validate(values)


def test_defaults_are_the_recipe_of_two_bits_with_block_tuning():
    config = _config()
    assert (config.rank, config.num_bits, config.bucket, config.residual) == (64, 2, 2, "vq")
    assert config.permute is False
    assert config.block_tuning is not None
    assert config.global_tuning is None
    assert config.target_bits is None
    assert [spec.name for spec in reallm(block_tuning={}).stages()] == ["calibration", "finetune_bloc", "conversion"]
    names = [spec.name for spec in reallm(target_bits=3, global_tuning={}).stages()]
    assert names == ["survey", "calibration", "finetune_global", "conversion"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"residual": "pq"}, "one of vq, nf, aqlm, nerv"),
        ({"num_bits": 8, "bucket": 2}, "at most 1: num_bits times bucket"),
        ({"residual": "nf", "num_bits": 5}, "2, 3 or 4 with residual: nf"),
        ({"low_rank_bits": 12}, "from 4 to 8, or 16"),
        ({"rank": -1}, "at least 0"),
        ({"target_bits": 0}, "above 0"),
        ({"block_tuning": {"low_rank_step": 2}}, "at most 1"),
        ({"global_tuning": {"loss": "hinge"}}, "distillation, causal_lm"),
        ({"global_tuning": {"batch_size": 4, "micro_batch_size": 3}}, "a divisor of batch_size, which is 4"),
        ({"global_tuning": {"val_size": 0}}, "false, since val_size is 0"),
        ({"ranks": 8}, "Extra inputs"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, said):
    with pytest.raises(ValidationError, match=said):
        _config(**values)


def test_keys_without_effect_are_named():
    assert _config(rank=8, bucket=1).warnings() == ()
    said = _config(rank=8, target_bits=3.0, residual="nf", permute=True, nerv={"patch_size": 64}).warnings("llm.ReALLM.")
    assert [line.split(" has")[0].removeprefix("llm.ReALLM.") for line in said] == ["rank", "permute", "nerv"]
    assert _config(residual="nf", bucket=2).warnings()[0].startswith("bucket has no effect")


def test_settings_of_a_stage_are_what_shapes_it():
    def settings(**keys):
        return {spec.name: dict(spec.settings) for spec in reallm(**keys).stages()}

    plain = settings()
    assert settings(block_tuning={})["calibration"] == plain["calibration"]
    assert settings(eval_datasets=["wikitext2"]) == plain
    assert settings(rank=5)["calibration"] != plain["calibration"]
    chosen = settings(target_bits=3.0)
    assert settings(target_bits=3.0, rank=5) == chosen
    assert settings(target_bits=3.5)["survey"] != chosen["survey"]
    tuned = settings(block_tuning={}, global_tuning={})
    assert settings(block_tuning={"micro_batch_size": 1}, global_tuning={"print_every_steps": 7}) == tuned
    assert settings(block_tuning={"max_epochs": 3})["finetune_bloc"] != tuned["finetune_bloc"]
    assert settings(global_tuning={"loss": "causal_lm"})["finetune_global"] != tuned["finetune_global"]


def test_texts_are_measured_after_each_stage():
    specs = {spec.name: spec for spec in reallm(block_tuning={}, global_tuning={}, eval_datasets=["a", "b"]).stages()}
    for name in ("calibration", "finetune_bloc", "finetune_global"):
        assert specs[name].evaluates == ("a", "b")
    assert specs["finetune_bloc"].tokens.validation_samples == 2
    assert specs["calibration"].tokens.validation_samples == 0
