import json
import shutil

import pytest

import rtpurbo
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact_config import LOG_FILE
from rtpurbo.publishing import HfApi, push_artifact
from rtpurbo.serving.export import export


@pytest.fixture
def pushed(monkeypatch):
    """Uploaded files by name."""
    files = {}

    def create_commit(self, repo_id, operations, **options):
        assert repo_id == "me/tiny"
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: f"https://hub/{name}")
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return files


@pytest.fixture
def artifact(tiny_artifact, tmp_path):
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    (folder / "README.md").write_text("# A card")
    return folder


def test_the_files_of_an_artifact_are_uploaded_and_no_others(artifact, pushed):
    expected = {
        path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()
    }
    for name in (".env", "notes.md", "adapter/.env", "model.bin", "secrets/tokenizer.json"):
        (artifact / name).parent.mkdir(exist_ok=True)
        (artifact / name).write_text("TOKEN=secret")
    assert push_artifact(artifact, "me/tiny", private=True) == "https://hub/me/tiny"
    # PEFT writes its own card next to the adapter.
    assert pushed.keys() == expected - {"adapter/README.md"}
    assert pushed["indexer.safetensors"] == (artifact / "indexer.safetensors").read_bytes()


def test_an_uploaded_artifact_can_be_loaded(artifact, pushed, tiny_base, tmp_path):
    push_artifact(artifact, "me/tiny")
    for name, content in pushed.items():
        (tmp_path / "downloaded" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(content)
    model, _ = rtpurbo.load(tmp_path / "downloaded", base_model=str(tiny_base))
    assert model.rtpurbo_config == rtpurbo.load(artifact)[0].rtpurbo_config
    with pytest.raises(RTPurboError, match="the local folder base, which is not here"):
        rtpurbo.load(tmp_path / "downloaded")


def test_the_path_of_a_local_base_model_is_not_uploaded(artifact, pushed, tiny_base):
    (artifact / "README.md").write_text(f"made from {tiny_base}")
    push_artifact(artifact, "me/tiny")
    assert not any(str(tiny_base.parent).encode() in content for content in pushed.values())
    assert pushed["README.md"] == b"made from base"
    assert json.loads(pushed["rtpurbo_config.json"])["base_model"]["name"] == "base"


@pytest.mark.parametrize("act", ["push", "export"])
def test_links_out_of_the_folder_are_refused(artifact, pushed, tmp_path, act):
    (tmp_path / "secret").write_text("TOKEN=secret")
    (artifact / LOG_FILE).unlink(missing_ok=True)
    (artifact / LOG_FILE).symlink_to(tmp_path / "secret")
    with pytest.raises(RTPurboError, match=f"{LOG_FILE} is a link"):
        if act == "push":
            push_artifact(artifact, "me/tiny")
        else:
            export(artifact, tmp_path / "export", "transformers")
    assert not pushed
    assert not (tmp_path / "export").exists()


def test_links_within_and_those_of_the_hubs_cache_are_followed(artifact, pushed, tmp_path):
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(artifact, snapshot)
    (snapshot / "README.md").rename(blobs / "abc")
    (snapshot / "README.md").symlink_to("../../blobs/abc")
    push_artifact(snapshot, "me/tiny")
    assert pushed["README.md"] == b"# A card"


def test_only_artifacts_are_uploaded(tmp_path):
    with pytest.raises(RTPurboError, match="not an rtpurbo artifact"):
        push_artifact(tmp_path, "me/tiny")


def test_the_hubs_refusal_is_one_sentence(tiny_artifact, monkeypatch):
    def refuse(*args, **options):
        raise OSError("401 Client Error.\nMore about it.")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(RTPurboError, match=r"^cannot push to 'me/tiny' \(401 Client Error\)"):
        push_artifact(tiny_artifact, "me/tiny")
