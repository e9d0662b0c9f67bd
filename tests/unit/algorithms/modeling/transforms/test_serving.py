import copy
import math
from itertools import pairwise

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from algorithms.modeling.activations import embed
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.serving import CacheQuantization, Serving
from tests.support.models import FAMILIES, confident, save_family, token_sequences

W4A8KV4 = Serving(activation_bits=8, cache=CacheQuantization(bits=4))
KV4 = Serving(cache=CacheQuantization(bits=4))
NOTHING = Serving(cache=CacheQuantization(bits=4, keys=False, values=False))


def _source(folder, family="llama", attention="sdpa", **changes):
    return ModelSource(confident(save_family(folder, family, **changes)), attn_implementation=attention)


def _model(source):
    return source.model_from(source.tensors(source.weight_files))


def _served(source, serving, model=None):
    model = _model(source) if model is None else model
    serving.apply(model, source.architecture.linears, source.architecture)
    return model


def _tokens(count=2, length=14, seed=0):
    return torch.cat(token_sequences(count, length, seed))


def _difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def _int8(inputs):
    """Tokens [..., n] in float64, and their steps; which end of a token lies on a tie, rounding noise decides."""
    steps = inputs.abs().amax(-1, keepdim=True) / 127.5
    return (inputs / steps).clamp(-128, 127).round() * steps, steps


def _cached(token, bits, group_size):
    """One head of one token [head_dim], float64."""
    parts = []
    for group in token.split(group_size):
        low, high = min(group.min().item(), 0), max(group.max().item(), 0)
        step = torch.tensor((high - low) / (2**bits - 1)).half().item()
        zero = round(-low / step)
        parts.append(((group / step + zero).round().clamp(0, 2**bits - 1) - zero) * step)
    return torch.cat(parts)


def _each(function, tensor, *args):
    rows = tensor.reshape(-1, tensor.shape[-1])
    return torch.stack([function(row, *args) for row in rows]).view_as(tensor)


def _llama_block(block, config, hidden, bits, group_size, inputs_of):
    """A llama block in float64, written out: hidden [length, n]. It goes on with the inputs that its linears have seen."""
    weights = {name: tensor.double() for name, tensor in block.state_dict().items()}
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = hidden.shape[0]

    def _linear(name, inputs):
        expected, steps = _int8(inputs)
        found = inputs_of[name].double()
        is_end = inputs.abs() > (1 - 1e-5) * inputs.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(found[~is_end], expected[~is_end], rtol=1e-5, atol=1e-6)
        assert torch.all((found - inputs).abs() <= steps * 0.5001)
        return found @ weights[f"{name}.weight"].T

    def _norm(name, inputs):
        return inputs / (inputs.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def _turn(states):
        angles = torch.arange(length).double()[:, None] * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
        first, second = states.chunk(2, -1)
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)

    normed = _norm("input_layernorm", hidden)
    queries = _turn(_linear("self_attn.q_proj", normed).view(length, heads, size).transpose(0, 1))
    keys = _turn(_linear("self_attn.k_proj", normed).view(length, kv_heads, size).transpose(0, 1))
    values = _linear("self_attn.v_proj", normed).view(length, kv_heads, size).transpose(0, 1)
    keys, values = (_each(_cached, states, bits, group_size) for states in (keys, values))
    mixed = []
    for head in range(heads):
        shared = head * kv_heads // heads
        scores = queries[head] @ keys[shared].T / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        mixed.append(scores.softmax(-1) @ values[shared])
    hidden = hidden + _linear("self_attn.o_proj", torch.cat(mixed, -1))
    normed = _norm("post_attention_layernorm", hidden)
    gated = nn.functional.silu(_linear("mlp.gate_proj", normed)) * _linear("mlp.up_proj", normed)
    return hidden + _linear("mlp.down_proj", gated)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 4), (8, 128)])
def test_a_served_block_is_the_computation_by_hand(tmp_path, attention, bits, group_size):
    source = _source(tmp_path / "m", attention=attention)
    (stream,) = embed(source, [token_sequences(1, 12)], batch_size=1, device=torch.device("cpu"), offload=True)
    block = source.load_block(0)
    original = stream.through(block, 0).batches[0][0]
    serving = Serving(activation_bits=8, cache=CacheQuantization(bits=bits, group_size=group_size))
    serving.apply(block, source.architecture.linears, source.architecture)
    seen = {}
    for name in source.architecture.linears:
        block.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: seen.update({name: args[0][0]}))
    found = stream.through(block, 0).batches[0][0]
    expected = _llama_block(block, source.config, stream.batches[0][0].double(), bits, group_size, seen)
    assert _difference(found, expected) < 1e-5
    assert _difference(found, original) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_quantized_as_the_client_does_it(tmp_path, family):
    source = _source(tmp_path / "m", family)
    client = _model(source)
    inputs = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], input_activations=inputs)
    apply_quantization_config(client, QuantizationConfig(config_groups={"inputs": scheme}, ignore=["lm_head"]))
    found = _served(source, Serving(activation_bits=8))(_tokens()).logits
    assert torch.equal(found, client(_tokens()).logits)
    assert not torch.equal(found, _model(source)(_tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_quantization_logits_are_the_originals(tmp_path, family, attention):
    window = {"sliding_window": 5} if family == "mistral" else {}
    source = _source(tmp_path / "m", family, attention, **window)
    original, served = _model(source), _served(source, NOTHING)
    padded = torch.ones(2, 14, dtype=torch.long)
    padded[1, :6] = 0
    for mask in (None, padded):
        expected = original(_tokens(), attention_mask=mask, use_cache=False).logits
        assert torch.equal(served(_tokens(), attention_mask=mask, use_cache=False).logits, expected)
    assert original.config._attn_implementation == attention == served.config._attn_implementation


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_of_what_is_served(tmp_path, family):
    source = _source(tmp_path / "m", family)
    served = _served(source, KV4).double()
    tokens = _tokens(1, 9)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 9)], 1).long()
    padded = torch.cat([torch.full((1, 5), 3), tokens], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = served(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 5:]
    expected = served(tokens, use_cache=False).logits
    assert _difference(found, expected) < 1e-6
    assert _difference(expected, _model(source)(tokens, use_cache=False).logits) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_a_cache_logits_are_the_same(tmp_path, family, attention):
    served = _served(_source(tmp_path / "m", family, attention), KV4).double()
    tokens = _tokens(2, 10)
    whole = served(tokens, use_cache=False).logits
    first = served(tokens[:, :4], use_cache=True)
    steps = [first.logits]
    for place in range(4, 10):
        step = served(tokens[:, place : place + 1], past_key_values=first.past_key_values, use_cache=True)
        steps.append(step.logits)
    assert _difference(torch.cat(steps, 1), whole) < 1e-6
    greedy = [served.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*greedy)


def test_a_bit_less_doubles_the_errors(tmp_path):
    source = _source(tmp_path / "m", "llama", hidden=64, blocks=1)
    original = _model(source)(_tokens(4, 24), use_cache=False).logits

    def _error(serving):
        return _difference(_served(source, serving)(_tokens(4, 24), use_cache=False).logits, original)

    activations = [_error(Serving(activation_bits=bits)) for bits in (10, 8, 6)]
    caches = [_error(Serving(cache=CacheQuantization(bits=bits))) for bits in (8, 6, 4)]
    for errors in (activations, caches):
        for less, more in pairwise(errors):
            assert 3 < more / less < 5.5
    # Normal numbers reach 2.4 deviations either way among 64, and 1.5 among 16; errors are a step over the root of 12.
    assert 0.3 < activations[1] / (2 * 2.4 / 255 / 3.46) < 10
    assert 0.03 < caches[2] / (2 * 1.5 / 15 / 3.46) < 2


@pytest.mark.parametrize(("keys", "values", "queries"), [(True, False, False), (False, True, False), (False, False, True)])
def test_each_of_keys_values_and_queries_can_be_chosen(tmp_path, keys, values, queries):
    source = _source(tmp_path / "m")
    cache = CacheQuantization(bits=4, group_size=8, keys=keys, values=values, queries=queries)
    block = source.load_block(0)
    Serving(cache=cache).apply(block, (), source.architecture)
    states = torch.randn(3, 1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    query, key, value = states[0], states[1, :, :2], states[2, :, :2]
    served, plain = (AttentionInterface()[name] for name in ("bitpress-served", "sdpa"))
    found, _ = served(block.self_attn, query, key, value, None, scaling=0.3)
    chosen = [
        _each(_cached, part, 4, 8) if is_chosen else part
        for part, is_chosen in ((query, queries), (key, keys), (value, values))
    ]
    expected, _ = plain(block.self_attn, *chosen, None, scaling=0.3)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain(block.self_attn, query, key, value, None, scaling=0.3)[0], atol=1e-3)


def test_applied_again_the_latest_settings_hold(tmp_path):
    source = _source(tmp_path / "m")
    expected = _served(source, W4A8KV4)(_tokens()).logits
    model = _served(source, Serving(activation_bits=4, cache=CacheQuantization(bits=2)))
    assert _difference(model(_tokens()).logits, expected) > 0.05
    for _ in range(3):
        _served(source, W4A8KV4, model)
    assert torch.equal(model(_tokens()).logits, expected)
    assert torch.equal(_served(source, Serving(), model)(_tokens()).logits, _model(source)(_tokens()).logits)


def test_one_block_leaves_the_rest_of_the_model_alone(tmp_path):
    source = _source(tmp_path / "m")
    model, original = _model(source), _model(source)
    block = model.model.layers[1]
    W4A8KV4.apply(block, source.architecture.linears, source.architecture)
    hidden, expected = (m(_tokens(), output_hidden_states=True, use_cache=False).hidden_states for m in (model, original))
    assert torch.equal(hidden[1], expected[1])
    assert not torch.allclose(hidden[2], expected[2], atol=1e-3)
    assert model.config._attn_implementation == "sdpa"
    assert model.model.layers[0].self_attn.config is model.config


def test_a_copy_behaves_alike_and_apart(tmp_path):
    source = _source(tmp_path / "m")
    model = _served(source, W4A8KV4)
    twin = copy.deepcopy(model)
    expected = model(_tokens()).logits
    assert torch.equal(twin(_tokens()).logits, expected)
    _served(source, Serving(), model)
    assert torch.equal(twin(_tokens()).logits, expected)
    assert not torch.equal(model(_tokens()).logits, expected)


def test_a_linear_that_takes_anothers_place_is_hooked(tmp_path):
    source = _source(tmp_path / "m")
    model = _served(source, W4A8KV4)
    expected = model(_tokens()).logits
    block = model.model.layers[0]
    fresh = nn.Linear(32, 64, bias=False)
    fresh.weight.data = block.mlp.up_proj.weight.data.clone()
    block.set_submodule("mlp.up_proj", fresh)
    assert not torch.equal(model(_tokens()).logits, expected)
    W4A8KV4.hook(fresh)
    W4A8KV4.hook(fresh)
    assert torch.equal(model(_tokens()).logits, expected)


def test_gradients_reach_what_is_before_the_rounding(tmp_path):
    source = _source(tmp_path / "m")
    model = _served(source, W4A8KV4)
    weight = model.model.layers[0].self_attn.k_proj.weight.requires_grad_()
    model(_tokens(), use_cache=False).logits.square().sum().backward()
    assert weight.grad.norm() > 0


def test_heads_that_do_not_fill_bytes_are_refused(tmp_path):
    odd = PretrainedConfig(hidden_size=28, num_attention_heads=4)
    with pytest.raises(ValueError, match="4 bits keeps 2 values in a byte, and a head has 7"):
        W4A8KV4.check(odd)
    for serving in (Serving(activation_bits=8, cache=CacheQuantization(bits=8)), Serving(activation_bits=8)):
        assert serving.check(odd) is None
    source = _source(tmp_path / "m")
    block = source.load_block(0)
    assert W4A8KV4.check(source.config) is None
    block.self_attn.config.head_dim = 7
    with pytest.raises(ValueError, match="a head has 7"):
        W4A8KV4.apply(block, source.architecture.linears, source.architecture)


def test_attention_that_cannot_be_found_is_named(tmp_path):
    source = _source(tmp_path / "m")
    block = source.load_block(0)
    block.self_attn.config._attn_implementation = "somebodys"
    with pytest.raises(ValueError, match="LlamaAttention: attn_implementation 'somebodys' cannot be found"):
        W4A8KV4.apply(block, source.architecture.linears, source.architecture)


def test_a_stored_model_runs_as_it_is_served(tmp_path):
    source = _source(tmp_path / "m", "qwen3")
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    found = _served(source, W4A8KV4, client)(_tokens()).logits
    assert torch.equal(found, _served(source, W4A8KV4)(_tokens()).logits)
