"""Groups of tensors in files of bounded size, each complete or absent."""

import pytest
import torch

from rtpurbo.errors import RTPurboError
from rtpurbo.training.shards import Shards


def group(number, size=10):
    return {"values": torch.full((size,), number), "sum": torch.tensor(number * size)}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_groups_are_read_before_and_after_they_are_on_disk(tmp_path):
    shards = Shards(tmp_path / "new", max_bytes=200)
    with shards.writing():
        for number in (3, 5, 7, 9, 1):
            shards.add(number, group(number), {"place": number})
            assert torch.equal(shards.read(number)["values"], group(number)["values"])
    for found in (shards, Shards(tmp_path / "new")):
        assert 5 in found
        assert 4 not in found
        for number in (3, 5, 7, 9, 1):
            tensors = found.read(number)
            assert tensors.keys() == {"values", "sum"}
            assert int(tensors["sum"]) == 10 * number
            assert found.note(number) == {"place": number}
    assert all(path.stat().st_size < 700 for path in (tmp_path / "new").iterdir())


def test_files_have_a_maximum_size_unless_one_group_is_larger(tmp_path):
    shards = Shards(tmp_path, max_bytes=200)  # two groups of 88 bytes
    for number, size in enumerate((10, 10, 10, 100, 10)):
        shards.add(number, group(number, size))
    assert files(tmp_path) == [f"shard-00000{number}.safetensors" for number in (0, 2, 3)]
    shards.flush()
    shards.flush()
    assert files(tmp_path)[-1] == "shard-000004.safetensors"


def test_an_interruption_loses_nothing_and_a_kill_one_file_at_most(tmp_path):
    shards = Shards(tmp_path, max_bytes=200)
    for number in range(3):
        shards.add(number, group(number))
    killed = Shards(tmp_path)
    assert [number in killed for number in range(3)] == [True, True, False]
    with pytest.raises(KeyboardInterrupt), shards.writing():
        raise KeyboardInterrupt
    assert 2 in Shards(tmp_path)


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    shards = Shards(tmp_path)
    shards.add(0, group(0))
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RTPurboError, match="no space left"):
        shards.flush()
    assert not files(tmp_path)
    monkeypatch.undo()
    shards.flush()
    assert 0 in Shards(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not tensors at all"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "shard-000000.safetensors").write_bytes(content)
    with pytest.raises(RTPurboError, match=r"shard-000000\.safetensors cannot be read: remove it"):
        Shards(tmp_path)
