"""Guesses from shapes, against the numbers that a person would multiply out."""

from types import SimpleNamespace

import pytest
import torch

from algorithms.modeling.source import ModelSource
from algorithms.registry import algorithm_class, config_class
from algorithms.workload import ModelShapes, Workload
from configs.recipe import Recipe
from jobs.estimation.coarse import CoarseEstimate, Machine
from jobs.estimation.prediction import CERTIFICATE, EVALUATION, Basis
from tests.support.families.cases import save_case
from tests.support.models import save_family

MACHINE = Machine(operations=2e9, threads=4, resident_bytes=1000)


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_of_the_stored_model(tmp_path, tied):
    source = ModelSource(save_family(tmp_path, "llama", blocks=3, hidden=32, tied=tied))
    shapes = ModelShapes.of(source)
    block = sum(parameter.numel() for parameter in source.block_skeleton().parameters())
    assert shapes.blocks == 3
    assert shapes.block_parameters == pytest.approx(block, abs=32 / 3 + 1), "the final norm is counted to the blocks"
    assert shapes.outside_parameters == (1 if tied else 2) * 259 * 32
    assert shapes.parameters == pytest.approx(source.num_parameters, abs=3)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_token_passes_the_experts_that_it_is_sent_to(tmp_path, family):
    """Counted by hand: 4 experts of 3 matrices, 2 for each token; Qwen's second block has one plain MLP, and no expert.

    The final norm is counted to the blocks.
    """
    shapes = ModelShapes.of(ModelSource(save_case(tmp_path, family, num_experts_per_tok=2)))
    neurons, mixtures = (64, 2) if family == "mixtral" else (32, 1)
    expert, blocks = 3 * 32 * neurons, shapes.blocks * shapes.block_parameters
    assert blocks * shapes.computed == pytest.approx(blocks - mixtures * 2 * expert, rel=3e-3)
    assert blocks * shapes.held == pytest.approx(blocks - mixtures * 3 * expert, rel=3e-3)
    assert shapes.forward(7) == pytest.approx(2 * 7 * (blocks - mixtures * 2 * expert), rel=3e-3)
    tuned = shapes.walk(0, tuning_epochs=1).memory_bytes - 4 * shapes.outside_parameters
    assert tuned == 4 * 10 * shapes.block_parameters
    in_turn = shapes.walk(0).memory_bytes - 4 * shapes.outside_parameters
    assert in_turn == pytest.approx((4 * 6 * (blocks - mixtures * 3 * expert) + mixtures * 3 * expert) / 2, rel=3e-3)


def test_a_forward_pass_is_two_operations_a_weight_and_token():
    shapes = ModelShapes(blocks=2, block_parameters=100, outside_parameters=10, hidden=4, vocabulary=5)
    assert shapes.forward(7) == 2 * 7 * 200
    assert shapes.forward(7, head=True) == 2 * 7 * (200 + 20)
    assert shapes.walk(7).operations == 2 * shapes.forward(7)
    assert shapes.walk(7, tuning_epochs=2).operations == 8 * shapes.forward(7)
    assert shapes.distillation(7, epochs=3, sequences=1, length=7).operations == 12 * shapes.forward(7, head=True)


def test_a_cost_is_operations_at_half_the_machines_speed():
    found = MACHINE.cost(Workload(operations=3e9, memory_bytes=24.0), seconds=1.0, disk_bytes=9)
    assert (found.user_cpu_s, found.wall_s) == (4.0, 1.75)
    assert (found.peak_memory_bytes, found.disk_bytes, found.basis) == (1024, 9, Basis.SHAPES)


def test_the_machine_is_as_fast_as_its_products():
    found = Machine.measured(torch.device("cpu"))
    assert found.threads == torch.get_num_threads()
    assert 1e8 < found.operations < 1e13
    assert found.resident_bytes > 100 << 20


def planned(algorithm):
    return [SimpleNamespace(spec=spec) for spec in algorithm.stages()]


def guess(folder, name, recipe=None, **parameters):
    config = config_class(name).model_validate(parameters)
    algorithm = algorithm_class(name)(config)
    source = ModelSource(folder)
    keys = {"ALGORITHM": name, "JOB_ID": "x", **(recipe or {})}
    estimate = CoarseEstimate(recipe=Recipe.model_validate(keys), algorithm=algorithm, source=source, machine=MACHINE)
    stages = estimate.stages(planned(algorithm), algorithm.stages())
    return {**stages, **estimate.closing()}, ModelShapes.of(source)


def test_more_text_epochs_and_codewords_take_longer(tmp_path):
    folder = save_family(tmp_path, "llama")
    few, shapes = guess(folder, "GPTQ", nsamples=8, model_seqlen=32)
    many, _ = guess(folder, "GPTQ", nsamples=80, model_seqlen=32)
    difference = many["calibration"].user_cpu_s - few["calibration"].user_cpu_s
    assert difference == pytest.approx(2 * shapes.forward(72 * 32) / 1e9, abs=2e-3)
    tuned, _ = guess(folder, "GPTQ", nsamples=8, model_seqlen=32, block_tuning={"max_epochs": 4})
    assert tuned["calibration"].user_cpu_s > 2 * few["calibration"].user_cpu_s
    aqlm = {"nsamples": 8, "val_size": 1, "model_seqlen": 32, "num_codebooks": 2}
    small, large = (
        guess(folder, "AQLM", calibration_config={**aqlm, "nbits_per_codebook": bits}, finetune_config=None)[0]
        for bits in (4, 8)
    )
    assert large["calibration"].user_cpu_s > small["calibration"].user_cpu_s


def test_every_stage_and_closing_line_has_a_figure(tmp_path):
    folder = save_family(tmp_path, "llama")
    text = {"EVALUATION": {"perplexity": ["wikitext2"], "sequence_length": 64}}
    found, _ = guess(folder, "FlapPruner", text, to_finetune=True)
    assert list(found) == ["ranking", "pruning", "recovery", "conversion", CERTIFICATE, EVALUATION]
    assert found["recovery"].user_cpu_s > found["ranking"].user_cpu_s
    assert all(prediction.peak_memory_bytes > 1000 for prediction in found.values())
    assert EVALUATION not in guess(folder, "RTN")[0]
