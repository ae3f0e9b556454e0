import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from rtpurbo.errors import RTPurboError
from rtpurbo.files import (
    append_text,
    check_output_folder,
    save_tensors_atomically,
    whole_file,
    whole_folder,
    write_json_atomically,
    write_text_atomically,
)


def test_text_and_json(tmp_path):
    write_text_atomically(tmp_path / "new" / "a.txt", "gr\u00fcn\n")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "gr\u00fcn\n"
    write_json_atomically(tmp_path / "a.json", {"b": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, None]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "new"]


def test_tensors(tmp_path):
    tensors = {"w": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors_atomically(tmp_path / "a.safetensors", tensors, {"format_version": "1"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format_version": "1"}
        assert torch.equal(file.get_tensor("w"), tensors["w"])
        assert file.get_tensor("b").dtype == torch.bfloat16


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_get_usual_permissions(tmp_path):
    write_text_atomically(tmp_path / "a", "")
    (tmp_path / "b").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert modes[0] == modes[1]


def test_a_folder_appears_whole(tmp_path):
    destination = tmp_path / "parent" / "result"
    with whole_folder(destination, overwrite=False) as folder:
        (folder / "a").write_text("new")
        assert not destination.exists()
        assert folder.parent.parent == destination.parent
    assert (destination / "a").read_text() == "new"
    assert list(destination.parent.iterdir()) == [destination]


def test_a_failure_leaves_the_old_folder(tmp_path):
    destination = tmp_path / "result"
    with whole_folder(destination) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ValueError, match="boom"), whole_folder(destination, overwrite=True):
        raise ValueError("boom")
    assert (destination / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [destination]


def test_overwriting_replaces_everything(tmp_path):
    destination = tmp_path / "result"
    for name in "ab":
        with whole_folder(destination, overwrite=True) as folder:
            (folder / name).touch()
    assert [path.name for path in destination.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [destination]


def test_taken_places(tmp_path, monkeypatch):
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    check_output_folder(taken, overwrite=False)  # empty, so it is free
    (taken / "precious").touch()
    file.touch()
    with pytest.raises(RTPurboError, match=r"taken exists already.*--force"):
        check_output_folder(taken, overwrite=False)
    check_output_folder(taken, overwrite=True)
    with pytest.raises(RTPurboError, match="not a folder"):
        check_output_folder(file, overwrite=True)
    with pytest.raises(RTPurboError, match="cannot write to the folder"):
        check_output_folder(file / "below", overwrite=True)
    monkeypatch.chdir(taken)
    with pytest.raises(RTPurboError, match="contains the current folder"):
        check_output_folder(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
    ],
)
def test_a_full_disk_is_named_and_leaves_what_there_was(tmp_path, error):
    file, folder = tmp_path / "a.txt", tmp_path / "folder"
    write_text_atomically(file, "old")
    for whole in (whole_file(file), whole_folder(folder)):
        message = r"no space left on the disk to write .*--resume"
        with pytest.raises(RTPurboError, match=message), whole:
            raise error
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError, match="other"), whole_file(file):
        raise OSError(errno.EACCES, "other")


def test_no_tensors_are_a_file_too(tmp_path):
    # A model without retrieval heads has no indexers.
    save_tensors_atomically(tmp_path / "none.safetensors", {})
    assert load_file(tmp_path / "none.safetensors") == {}


def test_a_folder_created_meanwhile_is_not_overwritten(tmp_path):
    destination = tmp_path / "result"
    with pytest.raises(RTPurboError, match="exists already"), whole_folder(destination):
        destination.mkdir()
        (destination / "precious").touch()
    assert (destination / "precious").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_parent(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RTPurboError, match="cannot write to the folder"):
        check_output_folder(tmp_path / "result", overwrite=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("rename", [1, 2])
def test_a_signal_between_the_renames_waits_for_both(tmp_path, monkeypatch, number, rename):
    folder, seen, renames = tmp_path / "folder", [], []
    before = signal.signal(number, lambda received, frame: seen.append((received, folder.exists())))
    with whole_folder(folder) as new:
        (new / "file").write_text("old")
    original = Path.rename

    def rename_and_signal(self, target):
        result = original(self, target)
        renames.append(target)
        if len(renames) == rename:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Path, "rename", rename_and_signal)
    try:
        with whole_folder(folder, overwrite=True) as new:
            (new / "file").write_text("new")
    finally:
        handler = signal.signal(number, before)
    assert (folder / "file").read_text() == "new"
    assert seen == [(number, True)]
    assert len(renames) == 2
    assert handler is not before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_ctrl_c_between_the_renames_ends_the_job_with_the_new_folder(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    with whole_folder(folder) as new:
        (new / "file").write_text("old")
    original = Path.rename

    def rename_and_signal(self, target):
        result = original(self, target)
        if target.name == "old":
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(Path, "rename", rename_and_signal)
    # A shell may have started the tests with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), whole_folder(folder, overwrite=True) as new:
            (new / "file").write_text("new")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (folder / "file").read_text() == "new"


def test_a_kill_between_the_renames_loses_neither_folder(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from rtpurbo.files import whole_folder

original = Path.rename
def rename_and_die(self, target):
    original(self, target)
    os.kill(os.getpid(), signal.SIGKILL)

for content in ("old", "new"):
    with whole_folder(sys.argv[1], overwrite=True) as folder:
        (folder / "file").write_text(content)
        if content == "new":
            Path.rename = rename_and_die
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "folder")])
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.read_text() for path in tmp_path.rglob("file")) == ["new", "old"]


def test_an_old_folder_that_cannot_be_put_back_is_kept(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    with whole_folder(folder) as new:
        (new / "file").write_text("old")
    original = Path.rename

    def rename_away_alone(self, target):
        if target == folder:
            raise OSError(errno.EIO, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename_away_alone)
    with pytest.raises(OSError, match="Input/output"), whole_folder(folder, overwrite=True) as new:
        (new / "file").write_text("new")
    (kept,) = tmp_path.glob(".folder.*/old/file")
    assert kept.read_text() == "old"


def test_text_is_appended_after_what_is_kept(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    size = append_text(path, "one\u00e9\n", 0)
    assert size == path.stat().st_size == 6
    with path.open("a") as file:
        file.write("cut sho")
    assert append_text(path, "two\n", size) == 10
    assert path.read_text(encoding="utf-8") == "one\u00e9\ntwo\n"
    # Its parent is a file.
    with pytest.raises(RTPurboError, match=r"cannot write to .*log.jsonl/below .*: choose another"):
        append_text(path / "below", "", 0)
