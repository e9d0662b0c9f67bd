"""What is refused and what is only warned of."""

import dataclasses
import logging
from pathlib import Path

import pytest

from algorithms.registry import config_class
from algorithms.workload import ModelShapes
from configs.errors import DataError, MemoryShortageError
from configs.loader import load_recipe
from jobs.estimation.forecast import Forecast
from jobs.estimation.prediction import CERTIFICATE, EVALUATION, Basis, Prediction
from jobs.estimation.requirements import require
from jobs.estimation.room import Room

RECIPE = Path(__file__).resolve().parents[4] / "examples" / "quickstart" / "recipe.yaml"
SHAPES = ModelShapes(blocks=4, block_parameters=1000, outside_parameters=500, hidden=8, vocabulary=32)
STAGE = Prediction(user_cpu_s=1, wall_s=1, peak_memory_bytes=30_000, disk_bytes=10_000, basis=Basis.PROBE)
PLENTY = Room(disk=10**9, memory=10**9, memory_limit=10**9)


@pytest.fixture(scope="module")
def loaded():
    """The quickstart's recipe."""
    return load_recipe(RECIPE, plugin_config=config_class)


def said(caplog, loaded, room, *, written=0, **predictions):
    """The warnings; a refusal is raised."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="jobs.estimation.requirements"):
        require(loaded, Forecast(predictions=predictions), room, SHAPES, written=written)
    return [record.getMessage() for record in caplog.records]


def changed(prediction, **changes):
    return dataclasses.replace(prediction, **changes)


def test_enough_of_everything_is_not_worth_a_word(caplog, loaded):
    assert said(caplog, loaded, PLENTY, calibration=STAGE, conversion=STAGE) == []
    assert said(caplog, loaded, Room(disk=20_000), calibration=STAGE, conversion=STAGE) == []


def test_a_disk_that_measured_files_do_not_fit_on_is_refused(caplog, loaded):
    room = changed(PLENTY, disk=17_000)  # 20,000 bytes were measured, and 18,000 are sure
    with pytest.raises(DataError, match=r"write 20\.0 kB, and 17\.0 kB of disk are free.*USER_FOLDER or MODEL_PATH"):
        said(caplog, loaded, room, calibration=STAGE, conversion=STAGE)
    (warning,) = said(caplog, loaded, changed(PLENTY, disk=19_000), calibration=STAGE, conversion=STAGE)
    assert "up to 20.0 kB" in warning


def test_what_an_interrupted_run_has_written_is_not_needed_again(caplog, loaded):
    room = changed(PLENTY, disk=5_000)
    assert said(caplog, loaded, room, written=15_000, calibration=STAGE, conversion=STAGE) == []


def test_a_guess_never_refuses_a_disk(caplog, loaded):
    guess = changed(STAGE, basis=Basis.SHAPES)
    (warning,) = said(caplog, loaded, changed(PLENTY, disk=100), calibration=guess)
    assert "up to 10.0 kB" in warning


def test_memory_that_is_taken_by_others_is_a_warning_with_the_overrides_that_help(caplog, loaded):
    (warning,) = said(caplog, loaded, changed(PLENTY, memory=29_000), calibration=STAGE)
    assert "calibration 30.0 kB (from a probe)" in warning
    assert "  llm.AQLM.calibration_config.local_batch_size=1" in warning.splitlines()
    assert warning.splitlines()[2:] == [f"  llm.AQLM.{line}" for line in loaded.parameters.memory_remedies()]


def test_a_limit_is_refused_only_beyond_the_error_of_a_probe(caplog, loaded):
    (warning,) = said(caplog, loaded, Room(disk=10**9, memory=21_000, memory_limit=21_000), calibration=STAGE)
    assert "than is free" in warning
    with pytest.raises(MemoryShortageError, match=r"than there is, 20\.0 kB: calibration 30\.0 kB"):
        said(caplog, loaded, Room(disk=10**9, memory=20_000, memory_limit=20_000), calibration=STAGE)


def test_a_guess_refuses_only_what_one_block_alone_exceeds(caplog, loaded):
    guess = changed(STAGE, basis=Basis.SHAPES)  # one block of 1000 parameters in float32: 4000 bytes
    assert said(caplog, loaded, Room(disk=10**9, memory=4_001, memory_limit=4_001), calibration=guess)
    with pytest.raises(MemoryShortageError):
        said(caplog, loaded, Room(disk=10**9, memory=3_999, memory_limit=3_999), calibration=guess)


def test_a_mixture_whose_block_alone_exceeds_the_memory_is_not_refused(caplog, loaded):
    """Its experts are compressed in turn: of this block, a tenth is in memory at once."""
    guess, mixture = changed(STAGE, basis=Basis.SHAPES), dataclasses.replace(SHAPES, held=0.1)
    forecast = Forecast(predictions={"calibration": guess})
    with caplog.at_level(logging.WARNING, logger="jobs.estimation.requirements"):
        require(loaded, forecast, Room(disk=10**9, memory=401, memory_limit=401), mixture)
    assert "than is free" in caplog.text
    with pytest.raises(MemoryShortageError):
        require(loaded, forecast, Room(disk=10**9, memory=399, memory_limit=399), mixture)


def test_what_follows_the_stages_is_never_a_reason_to_refuse(caplog, loaded):
    room = Room(disk=10**9, memory=100, memory_limit=100)
    (warning,) = said(caplog, loaded, room, **{CERTIFICATE: STAGE, EVALUATION: STAGE})
    assert "EVALUATION=null" in warning
    assert "llm.AQLM" not in warning


def test_a_device_has_a_memory_of_its_own(caplog, loaded):
    stage = changed(STAGE, peak_cuda_memory_bytes=50_000)
    room = changed(PLENTY, device=40_000, device_limit=80_000)
    (warning,) = said(caplog, loaded, room, calibration=stage)
    assert "the device's memory than is free, 40.0 kB: calibration 50.0 kB" in warning
    with pytest.raises(MemoryShortageError, match="the device's memory than there is"):
        said(caplog, loaded, changed(room, device_limit=30_000), calibration=stage)
