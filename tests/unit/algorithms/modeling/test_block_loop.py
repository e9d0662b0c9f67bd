"""The loop walks a small Llama with a compressor that writes down what it is handed, beside a plain walk over whole models."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from algorithms.modeling.activations import embed
from algorithms.modeling.block_loop import Streams, compress_blockwise, relative_output_error
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.source import ModelSource
from tests.support.models import save_family, token_sequences

CPU = torch.device("cpu")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class _Halving:
    """A compressor whose effect is known: every linear becomes 0.9 of itself. Notes all it sees."""

    def __init__(self, *, tunes=True):
        self.tunes = tunes
        self.hessians, self.wanted, self.data, self.order, self.prepared = {}, {}, {}, [], []

    def prepare_block(self, index, block, inputs):
        self.prepared.append(index)

    def compress_group(self, index, linears, statistics):
        replacements = {}
        for name, linear in linears.items():
            short = name.rpartition(".")[2]
            self.order.append((index, short))
            if statistics is not None:
                self.hessians[index, short] = statistics._sum / statistics.num_tokens
                self.wanted[index, short] = None if statistics._wanted is None else statistics._wanted / statistics.num_tokens
            replacements[name] = copy.deepcopy(linear)
            replacements[name].weight.data *= 0.9
        return replacements

    def finish_block(self, index, block, data):
        if data is not None:
            parts = (data.inputs, data.targets, data.validation_inputs, data.validation_targets)
            self.data[index] = [torch.cat(part.batches).double() for part in parts]
        return {"index": index}

    def freeze_block(self, block):
        return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}

    def restore_block(self, block, tensors):
        block.load_state_dict(tensors)


def _walk(source, folder, *, original, sequential=False, compressor=None):
    compressor = compressor or _Halving()
    sequences = token_sequences(5, 9)
    training, validation = embed(source, (sequences[:3], sequences[3:]), batch_size=2, device=CPU, offload=True)
    streams = Streams(
        training=training,
        validation=validation,
        reference=(training.copy(), validation.copy()) if original else None,
    )
    heard, reports = [], []

    def on_block(index, report):
        heard.append((index, report["index"]))
        reports.append(report)

    compress_blockwise(
        source,
        compressor,
        streams,
        store=BlockStore(folder),
        sequential=sequential,
        device=CPU,
        on_block=on_block,
    )
    assert heard == [(0, 0), (1, 1), (2, 2)]
    compressor.reports, compressor.streams = reports, streams
    return compressor


def _hidden(model, tokens):
    """Hidden states before each block, and after the last, of a whole model in float64; and every linear's inputs."""
    inputs, handles = {}, []
    for index, block in enumerate(model.model.layers):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                key = index, name.rpartition(".")[2]
                handles.append(module.register_forward_pre_hook(lambda _m, a, key=key: inputs.__setitem__(key, a[0])))
    states = []
    for block in model.model.layers:
        handles.append(block.register_forward_pre_hook(lambda _m, a: states.append(a[0])))
    handles.append(model.model.layers[-1].register_forward_hook(lambda _m, _a, output: states.append(output)))
    with torch.no_grad():
        model.model(torch.cat(tokens))
    for handle in handles:
        handle.remove()
    return states, inputs


def _compress(model, *, blocks, groups):
    """The model with the first ``blocks`` blocks and the first ``groups`` groups of the next one compressed."""
    model = copy.deepcopy(model)
    for index, block in enumerate(model.model.layers):
        done = GROUPS if index < blocks else GROUPS[:groups] if index == blocks else ()
        for name, module in block.named_modules():
            if any(name.rpartition(".")[2] in group for group in done):
                module.weight.data *= 0.9
    return model


@pytest.fixture
def source(tmp_path):
    return ModelSource(save_family(tmp_path / "m", "llama", blocks=3))


@pytest.fixture
def model(source):
    return source.model_from(source.tensors(source.weight_files)).double()


def _second_moment(left, right):
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    return left.T @ right / left.shape[0]


@pytest.mark.parametrize("original", [True, False])
def test_inputs_come_from_the_compressed_prefix_and_targets_from_original_blocks(tmp_path, source, model, original):
    seen = _walk(source, tmp_path / "s", original=original).data
    sequences = token_sequences(5, 9)
    for tokens, (inputs, targets) in ((sequences[:3], (0, 1)), (sequences[3:], (2, 3))):
        reference, _ = _hidden(model, tokens)
        for index in range(3):
            prefix, _ = _hidden(_compress(model, blocks=index, groups=0), tokens)
            torch.testing.assert_close(seen[index][inputs], prefix[index], atol=1e-5, rtol=1e-5)
            expected = reference[index + 1] if original else prefix[index + 1]
            torch.testing.assert_close(seen[index][targets], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("original", "sequential"), [(True, False), (False, True), (False, False)])
def test_statistics_are_those_of_the_training_tokens_at_the_right_moment(tmp_path, source, model, original, sequential):
    seen = _walk(source, tmp_path / "s", original=original, sequential=sequential)
    tokens = token_sequences(5, 9)[:3]
    states, reference = _hidden(model, tokens)
    for index in range(3):
        for done, group in enumerate(GROUPS):
            earlier = done if original or sequential else 0
            partly, inputs = _hidden(_compress(model, blocks=index, groups=earlier), tokens)
            now = inputs[index, group[0]]
            wanted = None
            if original and group == ("o_proj",):
                o_proj = model.model.layers[index].self_attn.o_proj
                wanted = states[index] + o_proj(reference[index, "o_proj"]) - partly[index]
            elif original and group == ("down_proj",):  # which is not compressed yet in this model
                middle = partly[index + 1] - model.model.layers[index].mlp.down_proj(now)
                wanted = states[index + 1] - middle
            for name in group:
                torch.testing.assert_close(seen.hessians[index, name], _second_moment(now, now), atol=1e-5, rtol=1e-4)
                if wanted is None:
                    assert seen.wanted[index, name] is None
                else:
                    torch.testing.assert_close(seen.wanted[index, name], _second_moment(wanted, now), atol=1e-5, rtol=1e-4)
    assert seen.order == [(index, name) for index in range(3) for group in GROUPS for name in group]


@pytest.mark.parametrize("original", [True, False])
def test_stored_blocks_are_taken_as_they_are_and_the_rest_sees_the_same(tmp_path, source, original):
    whole = _walk(source, tmp_path / "s", original=original)
    BlockStore(tmp_path / "s").discard(2)
    resumed = _walk(source, tmp_path / "s", original=original)
    assert {index for index, _ in resumed.order} == {2}
    assert all(torch.equal(a, b) for a, b in zip(resumed.data[2], whole.data[2], strict=True))
    assert torch.equal(resumed.hessians[2, "down_proj"], whole.hessians[2, "down_proj"])


@pytest.mark.parametrize(("original", "sequential"), [(True, False), (False, True), (False, False)])
def test_without_tuning_the_outputs_of_the_same_pass_are_the_next_inputs(tmp_path, source, original, sequential):
    tuned, plain = (
        _walk(source, tmp_path / name, original=original, sequential=sequential, compressor=_Halving(tunes=tunes))
        for name, tunes in (("a", True), ("b", False))
    )
    assert plain.data == {}
    for key, hessian in tuned.hessians.items():
        assert torch.equal(plain.hessians[key], hessian)
    errors = [report.get("output_error") for report in plain.reports]
    if original:
        expected = [torch.sum((data[0] - data[1]) ** 2) / torch.sum(data[1] ** 2) for data in _outputs(tuned)]
        assert errors[:2] == pytest.approx([error.item() for error in expected], rel=1e-4)
    else:
        assert errors == [None] * 3


def _outputs(seen):
    """Outputs of each block but the last, which are the next one's inputs, with the outputs that were wanted."""
    return [(seen.data[index + 1][0], seen.data[index][1]) for index in range(2)]


def test_without_data_every_linear_is_compressed_all_the_same(tmp_path, source):
    compressor = _Halving(tunes=False)
    compress_blockwise(
        source, compressor, None, store=BlockStore(tmp_path), sequential=False, device=CPU, on_block=lambda index, report: None
    )
    assert compressor.prepared == [0, 1, 2]
    assert compressor.order == [(index, name) for index in range(3) for group in GROUPS for name in group]
    stored = BlockStore(tmp_path).load(1)[0]["mlp.up_proj.weight"]
    torch.testing.assert_close(stored, 0.9 * source.load_block(1).mlp.up_proj.weight)


@pytest.mark.parametrize("tunes", [False, True])
def test_a_block_is_freed_before_the_next_one_is_compressed(tmp_path, source, monkeypatch, tunes):
    """By counting references: two blocks beside their originals would be twice the memory until garbage is collected."""
    seen, alive, deepcopy = [], [], copy.deepcopy

    def _noted(value, memo=None):
        copied = deepcopy(value, memo)
        if hasattr(copied, "self_attn") and not any(parameter.is_meta for parameter in copied.parameters()):
            seen.append(weakref.ref(copied))
        return copied

    class _Watching(_Halving):
        def prepare_block(self, index, block, inputs):
            alive.append([other() is not None for other in seen[:-1]])  # the last one is this block's original
            seen.append(weakref.ref(block))

    monkeypatch.setattr(copy, "deepcopy", _noted)
    gc.collect()
    gc.disable()
    try:
        _walk(source, tmp_path, original=True, compressor=_Watching(tunes=tunes))
    finally:
        gc.enable()
    assert alive == [[], [False] * 2, [False] * 4]


def test_the_output_error_is_relative_to_the_targets(source):
    (activations,) = embed(source, [token_sequences(2, 6)], batch_size=1, device=CPU, offload=True)
    block = source.load_block(0)
    targets = activations.through(block, 0)
    assert relative_output_error(block, 0, activations, targets) == 0.0
    doubled = targets.copy()
    doubled.batches[:] = [2 * batch for batch in targets.batches]
    assert relative_output_error(block, 0, activations, doubled) == pytest.approx(0.25)


def test_half_precision_saturates_instead_of_overflowing(source):
    (activations,) = embed(source, [token_sequences(1, 6)], batch_size=1, device=CPU, offload=True, dtype=torch.float16)

    class _Loud(nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states.sign() * 1e6

    activations.advance(_Loud(), 0)
    assert torch.isfinite(activations.batches[0]).all()
    assert activations.batches[0].abs().max() == torch.finfo(torch.float16).max
