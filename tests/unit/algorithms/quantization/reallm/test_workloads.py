import pytest

from algorithms.modeling.source import ModelSource
from tests.support.models import save_family
from tests.unit.algorithms.quantization.reallm.reallm_runs import reallm

TOKENS = {"survey": 4096, "calibration": 4096, "finetune_bloc": 4096, "finetune_global": 4096}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ModelSource(save_family(tmp_path_factory.mktemp("model"), "llama"))


def _operations(source, **keys):
    algorithm = reallm(**keys)
    asked = {spec.name for spec in algorithm.stages() if spec.tokens is not None}
    found = algorithm.workloads(source, {name: TOKENS[name] for name in asked})
    assert found.keys() == asked
    return {name: workload.operations for name, workload in found.items()}


def test_every_stage_with_a_text_has_a_workload(source):
    whole = _operations(source, target_bits=4.0, block_tuning={}, global_tuning={})
    assert list(whole) == ["calibration", "survey", "finetune_bloc", "finetune_global"]
    assert whole["finetune_bloc"] > whole["calibration"]


@pytest.mark.parametrize(
    ("stage", "less", "more"),
    [
        ("calibration", {"iterations": 1}, {"iterations": 3}),
        ("calibration", {"residual": "nf"}, {"residual": "vq", "num_bits": 4}),
        ("calibration", {"residual": "vq"}, {"residual": "nerv"}),
        ("calibration", {"residual": "nerv"}, {"residual": "nerv", "nerv": {"epochs": 200}}),
        ("finetune_bloc", {"block_tuning": {"max_epochs": 2}}, {"block_tuning": {"max_epochs": 4}}),
        ("finetune_bloc", {"block_tuning": {"refit": False}}, {"block_tuning": {}}),
        ("finetune_global", {"global_tuning": {"max_epochs": 1}}, {"global_tuning": {"max_epochs": 2}}),
    ],
)
def test_what_asks_for_more_is_more_work(source, stage, less, more):
    assert _operations(source, **less)[stage] < _operations(source, **more)[stage]
