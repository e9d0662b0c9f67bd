"""Ranking and pruning on several ranks, beside those of one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from algorithms.modeling.source import ModelSource
from algorithms.parallel.ranks import ALONE
from tests.support.models import save_family
from tests.support.rank_processes import run_on_ranks
from tests.unit.algorithms.pruning.flap.pruner_runs import kept, pruner
from tests.unit.algorithms.quantization.plugin_runs import blocks, calibrate, logits, run_stage


def _stages(ranks, model, folder, keys):
    algorithm, source = pruner(**keys), ModelSource(model)
    ranking = calibrate(algorithm, source, folder / "ranking", ranks=ranks)
    return ranking, run_stage(algorithm, source, folder / "pruning", "pruning", ranking, ranks=ranks)


# Of three ranks the last has no sequence.
@pytest.mark.parametrize(("size", "nsamples"), [(2, 8), (3, 2)])
@pytest.mark.parametrize("metric", ["OBS", "WIFV"])
def test_ranks_find_what_one_process_finds(tmp_path, metric, size, nsamples):
    model = save_family(tmp_path / "base", "llama", blocks=3)
    keys = {"metrics": metric, "nsamples": nsamples, "pruning_ratio": 0.4}
    one = _stages(ALONE, model, tmp_path / "one", keys)
    several = run_on_ranks(_stages, size, model, tmp_path / "several", keys)
    assert several == several[:1] * size
    ranking, pruned = several[0]
    assert kept(ranking) == kept(one[0])
    means, expected = (load_file(artifact.directory / "means.safetensors") for artifact in (ranking, one[0]))
    assert means.keys() == expected.keys()
    for name in means:
        torch.testing.assert_close(means[name], expected[name])
    assert blocks(pruned, "output_error") == pytest.approx(blocks(one[1], "output_error"), rel=1e-3)
    algorithm = pruner(**keys)
    torch.testing.assert_close(logits(algorithm.load(pruned)), logits(algorithm.load(one[1])), atol=1e-3, rtol=1e-2)
    assert algorithm.bits(pruned) == algorithm.bits(one[1])


def _ranked_with_noise(ranks, model, folder):
    """Every rank but the first rounds differently, so much that it would choose otherwise."""
    from algorithms.pruning.flap import ranking

    if not ranks.is_main:
        original = ranking.block_scores

        def other(*arguments, **named):
            scores = original(*arguments, **named)
            return ranking.BlockScores(**{name: -values for name, values in vars(scores).items()})

        ranking.block_scores = other
    return _stages(ranks, model, folder, {"pruning_ratio": 0.4})


def test_what_rank_0_chooses_is_everyones(tmp_path):
    model = save_family(tmp_path / "base", "llama", blocks=2)
    expected = _stages(ALONE, model, tmp_path / "one", {"pruning_ratio": 0.4})
    found = run_on_ranks(_ranked_with_noise, 2, model, tmp_path / "two")
    assert found[0] == found[1]
    assert kept(found[0][0]) == kept(expected[0])
    report = json.loads((found[0][1].directory / "calibration.json").read_text())
    assert [block["neurons"] for block in report["blocks"]] == [len(neurons) for _, neurons in kept(expected[0])]
