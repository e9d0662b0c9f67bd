"""Walking a block from linear to linear, with forwards that wait and with forwards that start again."""

import pytest
import torch

from algorithms.modeling.activations import embed
from algorithms.modeling.lockstep import BlockWalk
from algorithms.modeling.source import ModelSource
from tests.support.models import FAMILIES, save_family, token_sequences

NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def _block(folder, family="llama"):
    source = ModelSource(save_family(folder, family))
    (activations,) = embed(source, [token_sequences(5, 9)], batch_size=2, device=torch.device("cpu"), offload=True)
    return source.load_block(0), activations


def inputs_of(name, block, index, activations):
    """The inputs of a linear for every batch, by a hook."""
    seen = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    activations.through(block, index)
    handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hold", [True, False])
def test_each_stop_sees_what_came_before_replaced(tmp_path, family, hold):
    block, activations = _block(tmp_path, family)
    plain, _ = _block(tmp_path, family)
    with BlockWalk(block, 0, activations, NAMES, hold=hold) as walk:
        for name in NAMES:
            expected = list(inputs_of(name, plain, 0, activations))
            found = list(walk.next_stop())
            assert len(found) == 3
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            plain.get_submodule(name).weight.data *= 0.8
            replacement = torch.nn.Linear(1, 1)
            replacement.weight, replacement.bias = plain.get_submodule(name).weight, plain.get_submodule(name).bias
            walk.replace(name, replacement)
        outputs = list(walk.outputs())
    expected = activations.through(plain, 0).batches
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(activations.through(block, 0).batches, expected, strict=True))


@pytest.mark.parametrize("hold", [True, False])
def test_outputs_are_heard_once_when_the_linear_has_run(tmp_path, hold):
    block, activations = _block(tmp_path)
    heard, caught = [], []
    inputs = list(inputs_of("self_attn.o_proj", block, 0, activations))
    with BlockWalk(block, 0, activations, NAMES, hold=hold, on_output=lambda place, y: heard.append((place, y))) as walk:
        for _ in range(3):
            before = len(heard)
            caught = list(walk.next_stop())
        late = heard[before:]
        assert len(caught) == 3
    linear = block.get_submodule("self_attn.o_proj")
    assert [place for place, _ in late] == [0, 1, 2]
    assert all(torch.equal(y, linear(x)) for (_, y), x in zip(late, inputs, strict=True))


@pytest.mark.parametrize("hold", [True, False])
def test_behind_a_linear_its_output_is_seen(tmp_path, hold):
    block, activations = _block(tmp_path)
    names = ("self_attn.o_proj", "mlp.down_proj")
    with torch.no_grad():
        expected = {name: [block.get_submodule(name)(x) for x in inputs_of(name, block, 0, activations)] for name in names}
    with BlockWalk(block, 0, activations, names, behind=True, hold=hold) as walk:
        for name in names:
            assert all(torch.equal(a, b) for a, b in zip(walk.next_stop(), expected[name], strict=True))
        outputs = list(walk.outputs())
    assert all(torch.equal(a, b) for a, b in zip(outputs, activations.through(block, 0).batches, strict=True))


@pytest.mark.parametrize("hold", [True, False])
def test_a_walk_that_ends_early_leaves_the_block_as_it_was(tmp_path, hold):
    block, activations = _block(tmp_path)
    modules = {name: block.get_submodule(name) for name in NAMES}
    with pytest.raises(ZeroDivisionError), BlockWalk(block, 0, activations, NAMES, hold=hold) as walk:  # noqa: PT012
        next(walk.next_stop())
        raise ZeroDivisionError
    assert {name: block.get_submodule(name) for name in NAMES} == modules
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("hold", [True, False])
def test_an_error_inside_the_block_reaches_the_caller(tmp_path, hold):
    block, activations = _block(tmp_path)

    class _Broken(torch.nn.Module):
        def forward(self, inputs):
            raise RuntimeError("out of memory, say")

    with BlockWalk(block, 0, activations, NAMES, hold=hold) as walk:
        list(walk.next_stop())
        walk.replace(NAMES[0], _Broken())
        with pytest.raises(RuntimeError, match="out of memory, say"):
            list(walk.next_stop())
