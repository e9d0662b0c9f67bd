"""What is scored and what is certified where a server computes something else than the clients on this machine."""

import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import CertificateError
from jobs.runner import evaluate_only
from tests.support.fake_algorithm import FakeAlgorithm
from tests.support.fake_job import job_dir, manifest, parts, recipe, run

SERVED = {
    "served": 0.25,
    "envelope": {"EVALUATION": {"perplexity": ["wikitext2"], "sequence_length": 10}, "EXPORT": ["dense", "other"]},
}


def _perplexity(folder, factor):
    """Of the published table, its logits multiplied, over the windows of ten tokens of the fake text, in float64."""
    table = factor * load_file(job_dir(folder) / "model.safetensors")["table"].double()
    text = parts(folder).corpus_tokens("wikitext2", None, None, None)
    losses = []
    for window in text[:100].view(10, 10).tolist():
        for token, following in pairwise(window):
            losses.append(torch.logsumexp(table[token], 0).item() - table[token, following].item())
    return math.exp(sum(losses) / len(losses))


def test_figures_are_those_of_the_served_model(tmp_path):
    figures = run(tmp_path, **SERVED).figures.corpora[0]
    assert figures.perplexity == pytest.approx(_perplexity(tmp_path, 0.25), rel=1e-5)
    assert figures.perplexity != pytest.approx(_perplexity(tmp_path, 1.0), rel=1e-2)
    assert figures.tokens == 90


def test_the_certificate_compares_with_what_the_client_computes(tmp_path):
    result = run(tmp_path, **SERVED)
    assert {c.format: c.verdict.value for c in result.summary.certificates} == {"dense": "passed", "other": "passed"}


def test_compared_with_what_a_server_computes_the_client_would_fail(tmp_path):
    class Deaf(FakeAlgorithm):
        def as_served(self, model, artifact, source, client=None):
            return super().as_served(model, artifact, source)

    with pytest.raises(CertificateError, match="other"):
        run(tmp_path, changes={"algorithm_class": lambda name: Deaf}, **SERVED)


def test_scored_later_a_result_is_the_served_model_too(tmp_path):
    expected = run(tmp_path, **SERVED).figures.corpora[0].perplexity
    loaded = recipe(tmp_path, **SERVED)
    calibration = manifest(tmp_path)["stages"]["calibration"]["directory"]
    for folder in (job_dir(tmp_path) / place for place in ("", "tmp/converted", f"tmp/{calibration}", "exports/other")):
        figures = evaluate_only(loaded, folder, parts=parts(tmp_path)).figures.corpora[0]
        assert figures.perplexity == pytest.approx(expected, rel=1e-6)


def test_what_a_server_has_to_know_is_in_the_log_and_on_the_card(tmp_path):
    run(tmp_path, **SERVED)
    log = tmp_path / "user_data" / "logs" / "Kompress" / "one" / "log.log"
    for text in (log.read_text(), (job_dir(tmp_path) / "README.md").read_text()):
        assert text.count("A server multiplies by 0.25.") == 1
    other = tmp_path / "other"
    run(other, envelope=SERVED["envelope"])
    assert "A server multiplies" not in (job_dir(other) / "README.md").read_text()
    assert json.loads((job_dir(other) / "certificate.json").read_text())["formats"]
