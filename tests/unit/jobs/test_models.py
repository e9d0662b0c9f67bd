import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from configs.errors import DataError
from jobs import models
from jobs.models import resolve_model
from jobs.workspace import open_workspace
from tests.support.byte_model import VOCABULARY, save_model, tiny_llama
from tests.support.envelopes import envelope


def resolve(tmp_path, **keys):
    recipe = envelope(tmp_path / "user", **keys)
    return resolve_model(recipe, open_workspace(recipe))


def binary_model(folder):
    """A folder as ``transformers`` wrote it before safetensors."""
    save_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    return folder


class Hub:
    """Stands in for snapshot_download: copies the files of a folder that match, into a cache laid out like the real one."""

    def __init__(self, content):
        self.content, self.calls = content, []

    def __call__(self, name, *, cache_dir, allow_patterns, ignore_patterns):
        self.calls.append(name)
        snapshot = Path(cache_dir) / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in self.content.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)


def test_a_local_folder_is_used_where_it_lies(tmp_path):
    folder = save_model(tmp_path / "model")
    source = resolve(tmp_path, MODEL=str(folder))
    assert source.directory == folder
    assert source.vocab_size == VOCABULARY
    assert not (tmp_path / "user").exists()


def test_a_model_kept_in_the_user_folder_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "snapshot_download", None)
    folder = save_model(tmp_path / "user" / "models" / "org" / "name")
    source = resolve(tmp_path, MODEL="org/name")
    assert (source.directory, source.name) == (folder, "org/name")


def test_a_linked_model_in_the_user_folder_is_the_users_own(tmp_path):
    folder = save_model(tmp_path / "elsewhere")
    (tmp_path / "user" / "models" / "org").mkdir(parents=True)
    (tmp_path / "user" / "models" / "org" / "name").symlink_to(folder)
    assert resolve(tmp_path, MODEL="org/name").directory.resolve() == folder


def test_a_hub_model_is_linked_once_and_not_copied(tmp_path, monkeypatch):
    hub = Hub(save_model(tmp_path / "hub"))
    monkeypatch.setattr(models, "snapshot_download", hub)
    source = resolve(tmp_path, MODEL="org/name")
    assert source.directory == tmp_path / "user" / "models" / "org" / "name"
    assert all(path.is_symlink() for path in source.directory.iterdir())
    assert source.tokenizer().eos_token_id == 2
    assert resolve(tmp_path, MODEL="org/name").directory == source.directory
    assert hub.calls == ["org/name"]


def test_links_into_a_cache_that_was_cleared_are_made_again(tmp_path, monkeypatch):
    hub = Hub(save_model(tmp_path / "hub"))
    monkeypatch.setattr(models, "snapshot_download", hub)
    resolve(tmp_path, MODEL="org/name")
    shutil.rmtree(tmp_path / "user" / ".cache")
    source = resolve(tmp_path, MODEL="org/name")
    assert all(path.exists() for path in source.directory.iterdir())
    assert hub.calls == ["org/name", "org/name"]


def test_a_hub_model_without_safetensors_is_converted(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "snapshot_download", Hub(binary_model(tmp_path / "hub")))
    source = resolve(tmp_path, MODEL="org/name")
    assert (source.directory / "model.safetensors").is_file()
    assert "lm_head.weight" not in source.weight_files
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.tensors([name])[name], tiny_llama().state_dict()[name])


def test_a_local_folder_without_safetensors_is_converted_once(tmp_path):
    folder = binary_model(tmp_path / "model")
    first = resolve(tmp_path, MODEL=str(folder)).directory
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert first.parent == tmp_path / "user" / "models"
    assert first.name.startswith("model--safetensors-")
    assert resolve(tmp_path, MODEL=str(folder)).directory == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.json", "generation_config.json", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"]
    )


def test_a_custom_folder_with_a_config_is_a_model(tmp_path):
    folder = save_model(tmp_path / "custom")
    assert resolve(tmp_path, MODEL="org/name", CUSTOM_MODEL_PATH=str(folder)).directory == folder


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_custom_state_dict_takes_config_and_tokenizer_from_the_model(tmp_path, form):
    base = save_model(tmp_path / "base")
    (tmp_path / "custom").mkdir()
    state = {name: tensor + 1 for name, tensor in tiny_llama().state_dict().items()}
    torch.save(state, tmp_path / "custom" / "weights.pt")
    custom = tmp_path / "custom" if form == "folder" else tmp_path / "custom" / "weights.pt"
    source = resolve(tmp_path, MODEL=str(base), CUSTOM_MODEL_PATH=str(custom))
    assert source.directory.name.startswith("base--custom-")
    assert source.tokenizer().bos_token_id == 1
    assert torch.equal(source.tensors(["model.norm.weight"])["model.norm.weight"], torch.full((8,), 2.0))
    again = resolve(tmp_path, MODEL=str(base), CUSTOM_MODEL_PATH=str(custom))
    assert again.directory == source.directory
    torch.save({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "custom" / "weights.pt")
    assert resolve(tmp_path, MODEL=str(base), CUSTOM_MODEL_PATH=str(custom)).directory != source.directory


def test_a_custom_state_dict_fetches_no_weights_of_the_model(tmp_path, monkeypatch):
    hub = Hub(save_model(tmp_path / "hub"))
    monkeypatch.setattr(models, "snapshot_download", hub)
    torch.save(tiny_llama().state_dict(), tmp_path / "weights.bin")
    source = resolve(tmp_path, MODEL="org/name", CUSTOM_MODEL_PATH=str(tmp_path / "weights.bin"))
    assert source.directory.parent == tmp_path / "user" / "models" / "org"
    assert not list((tmp_path / "user" / ".cache").rglob("*.safetensors"))


def test_missing_folders_name_their_neighbours(tmp_path):
    save_model(tmp_path / "llama-small")
    with pytest.raises(DataError, match=r"MODEL .*/lama-small: there is no such folder. .* holds llama-small"):
        resolve(tmp_path, MODEL=str(tmp_path / "lama-small"))
    with pytest.raises(DataError, match=r"CUSTOM_MODEL_PATH .*/lama-small: there is no such file or folder. .* llama-small"):
        resolve(tmp_path, CUSTOM_MODEL_PATH=str(tmp_path / "lama-small"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder has no config.json, so it is no model"):
        resolve(tmp_path, MODEL=str(tmp_path / "empty"))


def test_missing_shards_are_named(tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(DataError, match=r"1 of 1 shards are missing \(model-00001-of-00002.safetensors"):
        resolve(tmp_path, MODEL=str(folder))


def test_being_offline_says_what_was_tried(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(models, "snapshot_download", offline)
    with pytest.raises(
        DataError, match=r"no local folder org/name, no .*models/org/name, and the hub cannot be reached \(offline\?"
    ):
        resolve(tmp_path, MODEL="org/name")
