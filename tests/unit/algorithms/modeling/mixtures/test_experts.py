import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from algorithms.modeling.mixtures.experts import Expert, Experts, in_step, separate_experts
from algorithms.modeling.on_demand import resident, source_on_demand
from algorithms.modeling.source import ModelSource
from tests.support.families.cases import MIXTURES, save_case
from tests.support.models import token_sequences

TOKENS = torch.cat(token_sequences(3, 20))


def _logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def _stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_computes_what_transformers_does(tmp_path, family):
    folder = save_case(tmp_path, family)
    assert torch.equal(_logits(resident(source_on_demand(ModelSource(folder)))), _logits(_stock(folder)))


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_found_in_one_tensor_too(tmp_path, family):
    folder = save_case(tmp_path / "apart", family)
    _stock(folder).save_pretrained(tmp_path / "together", save_original_format=False)
    source = ModelSource(tmp_path / "together")
    assert "model.layers.0.mlp.experts.gate_up_proj" in source.stored_files
    apart, together = (ModelSource(place).load_block(0).state_dict() for place in (folder, tmp_path / "together"))
    assert apart.keys() == together.keys()
    assert all(torch.equal(apart[name], together[name]) for name in apart)


def test_files_name_mixtral_s_tensors_as_its_authors_do(tmp_path):
    source = ModelSource(save_case(tmp_path, "mixtral"))
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert source.stored_as(name) == "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    assert torch.equal(source.tensors([name])[name], stored[source.stored_as(name)])
    assert {source.stored_as(parameter) for parameter in source.weight_files} == stored.keys()


def test_a_model_without_the_name_of_its_base_is_found(tmp_path):
    folder = save_case(tmp_path / "whole", "olmoe")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    stored = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in stored.items()}, bare / "model.safetensors")
    assert torch.equal(_logits(resident(source_on_demand(ModelSource(bare)))), _logits(_stock(folder)))


def test_blocks_have_the_groups_of_their_own_linears(tmp_path):
    source = ModelSource(save_case(tmp_path, "qwen2_moe"))
    mixed, plain = (source.architecture.groups_in(source.load_block(index)) for index in (0, 1))
    assert plain == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    assert mixed[2:4] == (("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), ("mlp.shared_expert.down_proj",))
    assert mixed[4:] == tuple(
        group
        for number in range(4)
        for group in (
            (f"mlp.experts.{number}.gate_proj", f"mlp.experts.{number}.up_proj"),
            (f"mlp.experts.{number}.down_proj",),
        )
    )
    every = {name for name, module in source.load_block(0).named_modules() if isinstance(module, torch.nn.Linear)}
    assert every - {name for group in mixed for name in group} == {"mlp.shared_expert_gate"}


def _random_experts(count=3, hidden=6, neurons=4):
    experts = [Expert(hidden, neurons, torch.nn.functional.silu).to_empty(device="cpu") for _ in range(count)]
    generator = torch.Generator().manual_seed(0)
    for parameter in torch.nn.ModuleList(experts).parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return Experts(experts).requires_grad_(False)


def test_a_token_gets_the_weighted_sum_of_its_experts():
    experts = _random_experts()
    hidden, weights = torch.randn(5, 6), torch.rand(5, 2)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 3], [0, 2]])  # 3: nowhere
    expected = torch.zeros(5, 6)
    for token in range(5):
        for place in range(2):
            if chosen[token, place] < 3:
                expected[token] += weights[token, place] * experts[int(chosen[token, place])](hidden[token])
    torch.testing.assert_close(experts(hidden, chosen, weights), expected)


def test_in_step_every_expert_is_called_and_those_that_see_everything_change_nothing():
    experts = _random_experts()
    hidden, chosen, weights = torch.randn(5, 6), torch.tensor([[0], [0], [2], [0], [2]]), torch.rand(5, 1)
    plain, seen = experts(hidden, chosen, weights), {}
    for number, expert in enumerate(experts):
        expert.gate_proj.register_forward_pre_hook(lambda _, inputs, number=number: seen.update({number: len(inputs[0])}))
    experts(hidden, chosen, weights)
    assert seen == {0: 3, 2: 2}
    experts.everywhere = frozenset({1, 2})
    with in_step(experts):
        torch.testing.assert_close(experts(hidden, chosen, weights), plain)
    assert seen == {0: 3, 1: 5, 2: 5}
    assert not experts.in_step


class _Fused(torch.nn.Module):
    def __init__(self, **further):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.empty(2, 8, 3, device="meta"))
        self.down_proj = torch.nn.Parameter(torch.empty(2, 3, 4, device="meta"))
        self.act_fn = torch.nn.functional.silu
        for name, value in further.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "further",
    [
        {"gate_up_proj_bias": torch.nn.Parameter(torch.zeros(2, 8))},
        {"down_proj": torch.nn.Parameter(torch.zeros(2, 4, 3))},
        {"gate_up_proj": torch.nn.Parameter(torch.zeros(2, 4, 3))},
    ],
)
def test_experts_of_another_form_stay_as_they_are(further):
    model = torch.nn.ModuleDict({"plain": _Fused(), "other": _Fused(**further)})
    separate_experts(model)
    assert isinstance(model.plain, Experts)
    assert isinstance(model.other, _Fused)
