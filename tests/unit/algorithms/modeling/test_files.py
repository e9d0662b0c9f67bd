import json

import pytest
import torch
from safetensors.torch import load_file

from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.files import atomic_folder, atomic_write_json, file_digest, fingerprint, folder_digest
from algorithms.modeling.shards import ShardWriter


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    atomic_write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        atomic_write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_folder_digests_follow_names_and_content(tmp_path):
    (tmp_path / "a").write_text("1")
    first = folder_digest(tmp_path)
    (tmp_path / ".hidden").write_text("2")
    (tmp_path / ".checkpoint").mkdir()
    (tmp_path / ".checkpoint" / "a").write_text("2")
    assert folder_digest(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = folder_digest(tmp_path)
    (tmp_path / "b").write_text("3")
    assert len({first, renamed, folder_digest(tmp_path)}) == 3


def test_fingerprints_of_large_files_sample_them(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(bytes(4 << 20))
    assert fingerprint(path) == file_digest(path)
    sampled = fingerprint(path, whole_below=1)
    with path.open("r+b") as stream:
        stream.seek(-5, 2)
        stream.write(b"x")
    assert fingerprint(path, whole_below=1) != sampled


def test_a_stored_block_comes_back_and_a_flipped_byte_is_noticed(tmp_path):
    store = BlockStore(tmp_path)
    assert store.load(0) is None
    store.save(0, {"w": torch.arange(6.0)}, {"index": 0})
    tensors, report = store.load(0)
    assert torch.equal(tensors["w"], torch.arange(6.0))
    assert report["index"] == 0
    content = bytearray((tmp_path / "0.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "0.safetensors").write_bytes(bytes(content))
    assert store.load(0) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_shards_and_index_hold_every_tensor(tmp_path, shard_bytes):
    writer = ShardWriter(tmp_path, shard_bytes=shard_bytes)
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    for name, tensor in tensors.items():
        writer.add({name: tensor})
    writer.close()
    if shard_bytes > 1000:
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        found = load_file(tmp_path / "model.safetensors")
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 7 * 40
        assert sorted(set(index["weight_map"].values()))[0] == "model-00001-of-00004.safetensors"
        found = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def fail_halfway(place):
    with atomic_folder(place) as partial:
        (partial / "a").write_text("half")
        raise RuntimeError("stopped")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    place = tmp_path / "models" / "m"
    with pytest.raises(RuntimeError, match="stopped"):
        fail_halfway(place)
    assert list(place.parent.iterdir()) == []
    with atomic_folder(place) as partial:
        (partial / "a").write_text("whole")
        assert not place.exists()
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {"models", "models/m", "models/m/a"}


def test_a_folder_that_another_process_finished_first_stays(tmp_path):
    place = tmp_path / "m"
    with atomic_folder(place) as partial:
        (partial / "a").write_text("mine")
        place.mkdir()
        (place / "a").write_text("theirs")
    assert (place / "a").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [place]


def test_a_folder_does_not_take_the_place_of_something_else(tmp_path):
    place = tmp_path / "m"
    place.mkdir()
    (place / "notes.txt").write_text("a user's own")
    with pytest.raises(OSError, match="not empty"), atomic_folder(place) as partial:
        (partial / "a").write_text("mine")
    assert [path.name for path in place.iterdir()] == ["notes.txt"]
