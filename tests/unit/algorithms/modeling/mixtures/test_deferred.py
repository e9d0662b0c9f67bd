import copy

import pytest
import torch

from algorithms.modeling.activations import embed
from algorithms.modeling.lockstep import BlockWalk
from algorithms.modeling.mixtures.deferred import change_weight, hold_all, is_deferred, mixtures, restore, take
from algorithms.modeling.source import ModelError, ModelSource
from tests.support.families.cases import save_case
from tests.support.models import token_sequences

GATE, DOWN = "mlp.experts.2.gate_proj", "mlp.experts.2.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ModelSource(save_case(tmp_path_factory.mktemp("mixtral"), "mixtral"))


def _inputs(source, count=5):
    sequences = token_sequences(count, 12)
    (inputs,) = embed(source, [sequences], batch_size=1, device=torch.device("cpu"), offload=True)
    return inputs


def _reads(monkeypatch):
    """The names of tensors in the order in which they are read."""
    names, tensors = [], ModelSource.tensors

    def _noted(self, wanted, dtype=None):
        wanted = list(wanted)
        names.extend(wanted)
        return tensors(self, wanted, dtype)

    monkeypatch.setattr(ModelSource, "tensors", _noted)
    return names


def _held(block):
    """Experts that have weights now."""
    experts = mixtures(block)["mlp.experts"]
    return [number for number, expert in enumerate(experts) if not any(p.is_meta for p in expert.parameters())]


def test_each_expert_is_read_once_for_all_batches_and_one_is_held(source, monkeypatch):
    inputs, names = _inputs(source), _reads(monkeypatch)
    whole = inputs.through(source.load_block(0), 0).batches
    late = source.load_block(0, late_experts=True)
    assert is_deferred(late)
    assert _held(late) == []
    names.clear()
    outputs = inputs.through(late, 0).batches
    assert all(torch.equal(a, b) for a, b in zip(outputs, whole, strict=True))
    assert [name.split(".")[5] for name in names] == [str(number) for number in range(4) for _ in range(3)]
    assert _held(late) == [3]


def test_a_walk_reads_each_expert_once_too(source, monkeypatch):
    inputs, names = _inputs(source), _reads(monkeypatch)
    late = source.load_block(0, late_experts=True)
    stops = ["self_attn.o_proj", "mlp.experts.0.gate_proj", "mlp.experts.0.down_proj", GATE, DOWN]
    names.clear()
    with BlockWalk(late, 0, inputs, stops) as walk:
        for stop in stops:
            for _ in walk.next_stop():
                assert len(_held(late)) <= 1
            take(late, stop)
        outputs = list(walk.outputs())
    assert len(names) == len(set(names)) == 12
    assert all(torch.equal(a, b) for a, b in zip(outputs, inputs.through(source.load_block(0), 0).batches, strict=True))


def test_to_compute_without_weights_is_an_error_and_no_silent_result(source):
    inputs, late = _inputs(source), source.load_block(0, late_experts=True)
    with pytest.raises(AssertionError, match="without its weights"), BlockWalk(late, 0, inputs, [GATE, DOWN]) as walk:  # noqa: PT012
        list(walk.next_stop())
        list(walk.next_stop())
        take(late, "mlp.experts.3.gate_proj")  # while the forwards are at expert 2
        list(walk.outputs())


def test_a_changed_weight_is_changed_whenever_it_is_read(source):
    block, late = source.load_block(0), source.load_block(0, late_experts=True)
    wanted = 2 * block.get_submodule(GATE).weight + 1
    for module in (block, late):
        change_weight(module.get_submodule(GATE), lambda weight: 2 * weight)
        take(module, GATE)
        change_weight(module.get_submodule(GATE), lambda weight: weight + 1)
    for number in (0, 2, 1, 2):
        take(late, f"mlp.experts.{number}.gate_proj")
    assert torch.equal(block.get_submodule(GATE).weight, wanted)
    assert torch.equal(late.get_submodule(GATE).weight, wanted)


def test_copies_are_read_apart(source):
    late = source.load_block(0, late_experts=True)
    other = copy.deepcopy(late)
    change_weight(other.get_submodule(GATE), lambda weight: 0 * weight)
    take(late, GATE)
    take(other, DOWN)
    assert late.get_submodule(GATE).weight.any()
    assert not other.get_submodule(GATE).weight.any()


@pytest.mark.parametrize("late", [False, True])
def test_a_block_takes_what_is_stored_of_it(source, late):
    stored = {f"{name}.half": tensor.half() for name, tensor in source.load_block(1).state_dict().items()}

    def _decode(tensors):
        return {name.removesuffix(".half"): tensor.float() for name, tensor in tensors.items()}

    block = source.load_block(0, late_experts=late)
    restore(block, stored, _decode)
    assert is_deferred(block) == late
    inputs = _inputs(source)
    expected = source.load_block(1)
    expected.load_state_dict(_decode(stored))
    outputs = [a.through(b, 0).batches for a, b in ((inputs, block), (inputs, expected))]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert _held(block) == ([3] if late else [0, 1, 2, 3])


def test_a_block_can_be_read_for_good(source):
    late, whole = source.load_block(0, late_experts=True), source.load_block(0)
    take(late, GATE)
    hold_all(late)
    assert not is_deferred(late)
    take(late, "mlp.experts.0.gate_proj")
    assert all(torch.equal(a, b) for a, b in zip(late.parameters(), whole.parameters(), strict=True))


def test_a_damaged_expert_is_named_when_it_is_read(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_case(tmp_path, "mixtral")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource(folder)
    block = source.load_block(0, late_experts=True)
    with pytest.raises(ModelError, match=r"experts\.2\.gate_proj\.weight.*NaN"):
        _inputs(source).through(block, 0)
