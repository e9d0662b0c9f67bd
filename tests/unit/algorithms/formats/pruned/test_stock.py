import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from algorithms.formats.pruned.padded import write_padded
from algorithms.formats.pruned.sizes import sizes
from algorithms.formats.pruned.stock import bias_refusal, expressible_biases, family_refusal
from algorithms.formats.pruned.structure import structure_of
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.source import ModelError
from tests.unit.algorithms.formats.pruned.pruned_models import COMPENSATION, RAGGED, UNIFORM, pruned_model, settings_of

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
NEURONS = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def config(family, **changes):
    return AutoConfig.for_model(family, num_hidden_layers=4, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, ATTENTION | NEURONS),
        ("mistral", {"sliding_window": None}, ATTENTION | NEURONS),
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}, ATTENTION | NEURONS),
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 32768}, set()),
        ("qwen2", {}, ATTENTION | NEURONS),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}, ATTENTION | NEURONS),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, ATTENTION - {"self_attn.o_proj"}),
        ("qwen3", {}, ATTENTION),
        ("gemma", {}, ATTENTION),
    ],
)
def test_places_for_biases(family, changes, expected):
    assert expressible_biases(config(family, **changes)) == expected
    assert bias_refusal(config(family, **changes), sorted(expected)) is None


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen3", {}, "a qwen3 configuration has no place for biases of mlp.down_proj."),
        ("gemma", {}, "a gemma configuration has no place for biases of mlp.down_proj."),
        (
            "mistral",
            {},
            "a mistral configuration has no place for biases of mlp.down_proj, self_attn.o_proj, and a sliding window of 4096 "
            "tokens keeps it from being written as a llama, which has.",
        ),
    ],
)
def test_the_refusal_names_linears_and_reason(family, changes, said):
    assert bias_refusal(config(family, **changes), COMPENSATION) == said


@pytest.mark.parametrize(
    ("family", "kept", "biased", "model_type", "flags"),
    [
        ("llama", UNIFORM, (), "llama", {"attention_bias": False, "mlp_bias": False}),
        ("llama", UNIFORM, COMPENSATION, "llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", UNIFORM, COMPENSATION[:1], "llama", {"attention_bias": True, "mlp_bias": False}),
        ("llama", RAGGED, (), "mistral", {"sliding_window": None}),
        (
            "llama",
            RAGGED,
            COMPENSATION,
            "seed_oss",
            {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "residual_dropout": 0.0},
        ),
        ("mistral", RAGGED, (), "mistral", {}),
        ("mistral", UNIFORM, COMPENSATION, "llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", RAGGED, (), "qwen2", {}),
        ("qwen2", UNIFORM, COMPENSATION, "llama", {"attention_bias": True, "mlp_bias": True, "bos_token_id": None}),
        ("qwen2", RAGGED, COMPENSATION, "seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
        ("qwen3", RAGGED, (), "qwen3", {"attention_bias": False}),
        ("gemma", UNIFORM, (), "gemma", {"attention_bias": False}),
    ],
)
def test_the_configuration(tmp_path, family, kept, biased, model_type, flags):
    write_padded(pruned_model(tmp_path, family, kept=kept, biased=biased).calibrated, tmp_path)
    settings = settings_of(tmp_path)
    groups, neurons = (2, 40) if kept is UNIFORM else (3, 53)
    expected = {
        "model_type": model_type,
        "head_dim": 4,
        "num_attention_heads": 2 * groups,
        "num_key_value_heads": groups,
        "intermediate_size": neurons,
        "hidden_size": 32,
        "dtype": "float16",
        "torch_dtype": "float16",
        **flags,
    }
    assert {key: settings[key] for key in expected} == expected
    assert settings["architectures"] == [{"seed_oss": "SeedOss"}.get(model_type, model_type.capitalize()) + "ForCausalLM"]
    loaded, original = AutoConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path / "origin")
    for key in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"):
        assert getattr(loaded, key) == getattr(original, key)


@pytest.mark.parametrize(("family", "changes"), [("gemma", {}), ("qwen3", {}), ("mistral", {"sliding_window": 4})])
def test_biases_without_a_place_are_refused(tmp_path, family, changes):
    model = pruned_model(tmp_path, family, biased=COMPENSATION, **changes)
    with pytest.raises(ModelError, match=r"cannot be written for stock loaders: a \w+ configuration has no place for"):
        write_padded(model.calibrated, tmp_path)
    assert set(sizes(model.calibrated)) == {"original", "ragged"}


def test_linears_that_do_not_fit_together_are_refused(tmp_path):
    model = pruned_model(tmp_path, "llama")
    _, tensors = list(model.calibrated.blocks())[1]
    BlockStore(model.calibrated.directory).save(1, {**tensors, "mlp.up_proj.weight": tensors["mlp.up_proj.weight"][1:]}, {})
    with pytest.raises(ModelError, match=r"block 1 of .*: mlp\.up_proj do not fit its other linears"):
        structure_of(model.calibrated)


def test_a_missing_block_is_named(tmp_path):
    model = pruned_model(tmp_path, "llama")
    (model.calibrated.directory / "2.json").unlink()
    with pytest.raises(ValueError, match=r"block 2 of .* is missing or damaged"):
        structure_of(model.calibrated)


def test_phi3_with_longrope_takes_no_other_number_of_heads():
    """transformers counts the factors against the hidden size over the number of heads, whatever head_dim says."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    sizes = {"hidden_size": 64, "pad_token_id": 0, "head_dim": 16}
    long = {**sizes, "rope_parameters": {**rope, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}
    whole = config("phi3", num_attention_heads=4, **long)
    with pytest.raises(StrictDataclassError, match="length 10, got 8"):
        config("phi3", num_attention_heads=3, **long)
    assert "longrope" in family_refusal(whole)
    assert family_refusal(config("phi3", num_attention_heads=3, **sizes)) is None
