"""Rows found by inspection against what linears are really given."""

import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from algorithms.modeling.families import tracing
from algorithms.modeling.families.inspection import InspectionError, inspect_family
from algorithms.modeling.families.merging import merged_groups
from algorithms.modeling.families.tracing import UnsuitableBlocksError
from algorithms.modeling.on_demand import shelf_of
from algorithms.modeling.source import ModelError, ModelSource
from algorithms.registry import algorithm_class, config_class
from jobs.execution.collaborators import open_source
from tests.support.byte_model import VOCABULARY
from tests.support.families.strangers import CHANGES, save_stranger, stranger, stranger_config

FAMILIES = tuple(CHANGES)
ROUTERS = ("mlp.router", "mlp.gate.wg")  # of phimoe and hunyuan_v1_moe; those of others are no linears


def seen(folder, row) -> list[list[tuple[str, torch.Tensor]]]:
    """For each block, the linears that ran on all tokens, with the values they were given, in order."""
    source = ModelSource(folder)
    model = source.model_from(source.tensors(source.weight_files, torch.float32))
    found = []
    for block in model.get_submodule(row.blocks):
        calls = []
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and name not in ROUTERS:
                module.register_forward_pre_hook(lambda _, args, name=name, calls=calls: calls.append((name, args[0].clone())))
        found.append(calls)
    with torch.no_grad():
        model(torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3)), use_cache=False)
    return found


def expected_groups(calls, row) -> list[tuple[str, ...]]:
    """Linears outside experts with bitwise equal inputs, each called once, by the first of them."""
    groups: list[tuple[list[str], torch.Tensor]] = []
    for name, value in calls:
        if row.experts is not None and name.startswith(f"{row.experts}."):
            continue
        flat = value.reshape(-1, value.shape[-1])
        home = next((names for names, other in groups if other.shape == flat.shape and torch.equal(other, flat)), None)
        if home is None:
            groups.append(([name], flat))
        else:
            home.append(name)
    return [tuple(names) for names, _ in groups]


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_those_that_real_inputs_show(tmp_path, family):
    found = inspect_family(stranger_config(family))
    row = found.architecture
    assert found.basis == "one forward without weights"
    for block in seen(save_stranger(tmp_path / "m", family), row):
        names = {name for name, _ in block}
        present = [tuple(name for name in group if name in names) for group in row.input_groups if "*" not in group[0]]
        assert [group for group in present if group] == expected_groups(block, row)
        assert len(names) == len(block) or row.experts is not None
    called_nowhere = {name for name, why in found.left_out.items() if why == "called 0 times in a forward"}
    assert called_nowhere == ({"mixer.dt_proj"} if family == "mamba" else set())


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_mixture_has_experts_and_keeps_its_router(family):
    found = inspect_family(stranger_config(family))
    row = found.architecture
    assert row.experts == "mlp.experts"
    experts = [group for group in row.input_groups if "*" in group[0]]
    assert experts == [("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",)]
    assert "mlp.gate" in found.left_out
    assert "mlp.gate" in found.warning()
    assert not {"mlp.gate", "mlp.shared_expert_gate"} & set(row.linears)


@pytest.mark.parametrize(("family", "router"), [("hunyuan_v1_moe", "mlp.gate.wg"), ("phimoe", "mlp.router")])
def test_linears_that_choose_experts_are_kept(family, router):
    """One inside a module beside the experts, and one of a class of its own."""
    found = inspect_family(stranger_config(family))
    assert found.left_out[router] == "a router"
    assert router not in found.architecture.linears


@pytest.mark.parametrize("family", ["phimoe", "gpt_oss"])
def test_files_are_read_where_names_and_tensors_of_experts_are_others(tmp_path, family):
    """phimoe's files have w1, w2, w3 and block_sparse_moe; gpt_oss has one tensor for all experts, in the model as in files."""
    model = stranger(family)
    source = ModelSource(save_stranger(tmp_path, family))
    own = source.model_from(source.tensors(source.weight_files, torch.float32))
    tokens = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(own(tokens).logits, model(tokens).logits, atol=1e-6)
    assert {source.stored_as(name) for name in source.skeleton().state_dict()} == set(source.stored_files)


def test_torch_does_not_write_tracebacks_of_what_another_try_makes_up_for():
    log, said = logging.getLogger("torch._subclasses.fake_tensor"), []
    handler = logging.Handler()
    handler.emit = said.append
    log.addHandler(handler)
    try:
        inspect_family(stranger_config("gpt_oss"))
        assert said == []
        log.error("once more")
        assert len(said) == 1
    finally:
        log.removeHandler(handler)


@pytest.mark.parametrize("family", ["stablelm", "glm4_moe"])
def test_random_weights_show_the_same(monkeypatch, family):
    plain = inspect_family(stranger_config(family))

    def _fail(*arguments):
        raise RuntimeError("needs values")

    monkeypatch.setattr(tracing, "_trace_without_values", _fail)
    found = inspect_family(stranger_config(family))
    assert "random weights" in found.basis
    assert found.architecture == plain.architecture
    monkeypatch.setattr(tracing, "LARGEST_RANDOM", 1)
    last = inspect_family(stranger_config(family))
    assert last.basis == tracing.DEFINITION
    assert all(len(group) == 1 for group in last.architecture.input_groups)
    assert set(last.architecture.linears) == set(plain.architecture.linears)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gpt2", r"blocks \(transformer\.h\) hold no linear layer, but Conv1D, LayerNorm"),
        ("bloom", "fit one sequence alone"),
        ("zamba", "share their"),
        ("granitemoe", r"all experts \(block_sparse_moe\.experts\) of a block in one tensor"),
    ],
)
def test_what_cannot_be_walked_is_refused(tmp_path, family, why):
    config = AutoConfig.for_model(family)
    with pytest.raises(InspectionError, match=why):
        inspect_family(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=why):
        _ = ModelSource(tmp_path).architecture


def test_the_warning_is_said_once_and_lists_everything(tmp_path, caplog):
    stranger_config("glm4_moe").save_pretrained(tmp_path)
    source = ModelSource(tmp_path, name="org/stranger")
    with caplog.at_level(logging.WARNING):
        _ = source.architecture, source.architecture, source.block_skeleton(), ModelSource(tmp_path).architecture
    said = [record.getMessage() for record in caplog.records if "found by inspection" in record.getMessage()]
    assert len(said) == 1
    assert "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj; self_attn.o_proj;" in said[0]
    for part in ("mlp.gate (", "model.embed_tokens", "lm_head", "families/table.py"):
        assert part in said[0]
    expanded = source.architecture.linears
    assert sum(re.fullmatch(r"mlp\.experts\.\d\.down_proj", name) is not None for name in expanded) == 4


def test_blocks_of_two_kinds_share_one_list():
    attention = {"q": "q", "k": "q", "o": "o", "up": "up"}
    recurrent = {"in": "in", "out": "out", "up": "up"}
    assert merged_groups([attention, recurrent]) == (("in",), ("out",), ("q", "k"), ("o",), ("up",))
    assert merged_groups([{"a": "a", "b": "a"}, {"a": "a", "b": "b"}]) == (("a",), ("b",))
    assert merged_groups([{"a": "a", "c": "c", "b": "a"}, {"c": "c", "b": "b"}]) == (("a",), ("c",), ("b",))
    with pytest.raises(UnsuitableBlocksError, match="different orders"):
        merged_groups([{"a": "a", "b": "b"}, {"b": "b", "a": "a"}])


@pytest.mark.parametrize("family", ["glm4_moe", "olmo"])
def test_the_model_as_it_stands_is_computed_block_by_block(tmp_path, family):
    folder = save_stranger(tmp_path / "m", family)
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    for name, tensor in stored.items():
        if "correction_bias" in name:  # a buffer, which checkpoints have, and zero in a fresh model
            tensor += torch.tensor([3.0, -3.0, 1.0, 0.0])
    save_file(stored, file, metadata={"format": "pt"})
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = open_source(ModelSource(folder))
        assert shelf_of(ours) is not None
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("algorithm", "why"), [("FlapPruner", "heads and neurons"), ("LMQuant", "queries, keys and values")])
def test_what_needs_to_know_more_refuses(tmp_path, algorithm, why):
    stranger_config("glm").save_pretrained(tmp_path)
    plugin = algorithm_class(algorithm)(config_class(algorithm)())
    with pytest.raises(ValueError, match=why):
        plugin.preflight(ModelSource(tmp_path), ("calibration", "ranking", "pruning"))
