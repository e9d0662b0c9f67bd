import contextlib

import pytest
import torch
from safetensors.torch import save_file

from algorithms.modeling.source import ModelSource
from configs.errors import DataError
from jobs.execution import soundness
from jobs.execution.soundness import check_weights
from jobs.workspace import open_workspace
from tests.support.byte_model import save_model
from tests.support.envelopes import envelope


@contextlib.contextmanager
def silent(description, total):
    yield lambda note: None


def check(folder, tensors):
    model = save_model(folder / "model", tokenizer=False)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check_weights(ModelSource(model), open_workspace(envelope(folder / "user")), silent)


@pytest.mark.parametrize("part", [1, 7, 1 << 26])
@pytest.mark.parametrize("row", [0, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_nan_in_any_row_is_found_whatever_is_read_at_once(tmp_path, monkeypatch, part, row, dtype):
    monkeypatch.setattr(soundness, "_PART", part)
    bad = torch.zeros(10, 3, dtype=dtype)
    check(tmp_path / "sound", {"a": bad})
    bad[row, 2] = torch.nan
    with pytest.raises(DataError, match=r"MODEL: a in .*model.safetensors holds NaN or infinity"):
        check(tmp_path / "ill", {"a": bad})


def test_whole_numbers_empty_tensors_and_scalars_are_sound(tmp_path):
    check(tmp_path, {"a": torch.ones(3, dtype=torch.int64), "b": torch.zeros(0, 4), "c": torch.zeros(())})
    assert len(list((tmp_path / "user" / ".cache" / "sound_models").iterdir())) == 1


def test_a_scalar_that_is_no_number_is_found(tmp_path):
    with pytest.raises(DataError, match="a in"):
        check(tmp_path, {"a": torch.tensor(torch.inf)})
