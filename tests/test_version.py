from rtpurbo import version


def test_a_library_outside_a_repository_has_no_commit(tmp_path, monkeypatch):
    copy = tmp_path / "version.py"
    copy.touch()
    monkeypatch.setattr(version, "__file__", str(copy))
    assert version.library_commit() is None
