"""A mixture whose model and whose blocks are larger than what the process may allocate."""

from pathlib import Path

from tests.benchmarks.mixtures.larger_than_memory import run_worker, write_model

_HIDDEN, _NEURONS, _EXPERTS = 512, 512, 64
_MEGABYTES = 110


def test_a_block_larger_than_the_memory_is_compressed(tmp_path: Path):
    model = tmp_path / "model"
    parameters = write_model(model, hidden=_HIDDEN, neurons=_NEURONS, experts=_EXPERTS, blocks=2)
    block = 4 * 3 * _HIDDEN * _NEURONS * _EXPERTS
    assert min(block, 2 * parameters) > 1.8e6 * _MEGABYTES  # in float32, as it computes, and in bfloat16, as it is stored
    limit = ["--beyond-libraries", "--megabytes", str(_MEGABYTES), "--tokens", "1024"]
    whole = run_worker("block", model, tmp_path / "none", limit)
    assert whole.returncode != 0
    assert "memory" in whole.stderr.lower()
    done = run_worker("job", model, tmp_path / "out", limit)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "calibration" / "1.safetensors").is_file()
    assert (tmp_path / "out" / "converted" / "model.safetensors").is_file()
