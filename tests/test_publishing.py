import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.publishing import HfApi, push_artifact


def test_an_artifact_is_uploaded_whole(tiny_artifact, monkeypatch):
    calls = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: f"https://hub/{name}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.update(options))
    assert push_artifact(tiny_artifact, "me/tiny", private=True) == "https://hub/me/tiny"
    assert calls["repo_id"] == "me/tiny"
    assert calls["folder_path"] == tiny_artifact


def test_what_is_no_artifact_is_not_uploaded(tmp_path):
    with pytest.raises(RTPurboError, match="not an rtpurbo artifact"):
        push_artifact(tmp_path, "me/tiny")


def test_the_hubs_refusal_is_one_sentence(tiny_artifact, monkeypatch):
    def refuse(*args, **options):
        raise OSError("401 Client Error.\nMore about it.")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(RTPurboError, match=r"^cannot push to 'me/tiny' \(401 Client Error\)"):
        push_artifact(tiny_artifact, "me/tiny")
