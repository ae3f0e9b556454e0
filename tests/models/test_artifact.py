import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact import load, load_base, read_indexers
from rtpurbo.models.artifact_config import (
    CONFIG_FILE,
    INDEXER_BEFORE_STAGE2_FILE,
    INDEXER_FILE,
    ArtifactConfig,
    find_artifact,
)
from rtpurbo.models.sparse_layers import indexer_weights
from rtpurbo.models.sparsify import restore
from rtpurbo.models.stage2_weights import ADAPTER_FOLDER
from tests.tiny_artifact import save_tiny_artifact, save_tiny_base
from tests.tiny_models import with_own_keys

ADAPTER_FILE = f"{ADAPTER_FOLDER}/adapter_model.safetensors"


@pytest.fixture
def copy(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "copy")


SHIPPED = sorted(
    path.parent for path in Path(__file__).parents[2].glob(f"artifacts/*/{CONFIG_FILE}")
)


def logits(model):
    ids = torch.arange(100, 180)[None]
    return model(ids, use_cache=False).logits


def change_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_gives_the_same_model(tiny_base, tmp_path):
    folder = save_tiny_artifact(tmp_path / "artifact", tiny_base)
    model, tokenizer = load(folder)
    again, _ = load(shutil.move(folder, tmp_path / "elsewhere"), base_model=str(tiny_base))

    assert torch.equal(logits(model), logits(again))
    assert again.rtpurbo_config == model.rtpurbo_config
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.decode(tokenizer("magic numbers")["input_ids"]) == "magic numbers"


def test_shared_index_keys_survive_saving_and_loading(tiny_base, tmp_path):
    folder = save_tiny_artifact(tmp_path / "artifact", tiny_base, (0, 1, 4), shared_keys=True)
    model, _ = load(folder)
    assert model.rtpurbo_config.indexer.shared_keys
    assert read_indexers(folder)["layers.0.indexer.query_weight"].shape[0] == 3
    assert read_indexers(folder)["layers.0.indexer.key_weight"].shape[0] == 2
    torch.testing.assert_close(logits(model), logits(with_own_keys(model)))


def test_a_config_written_before_shared_keys_has_own_ones(tiny_artifact, copy):
    path = copy / CONFIG_FILE
    data = json.loads(path.read_text())
    del data["config"]["indexer"]["shared_keys"]
    path.write_text(json.dumps(data))
    assert ArtifactConfig.read(copy) == ArtifactConfig.read(tiny_artifact)


def test_config_survives_writing_and_reading(tiny_artifact, tmp_path):
    config = ArtifactConfig.read(tiny_artifact)
    config.write(tmp_path)
    assert ArtifactConfig.read(tmp_path) == config


def test_a_restored_model_is_the_dense_one(tiny_base, tmp_path):
    folder = save_tiny_artifact(tmp_path / "artifact", tiny_base)
    dense = load_base(folder).model
    sparse, _ = load(folder)
    assert not torch.equal(logits(sparse), logits(dense))
    assert torch.equal(logits(restore(sparse)), logits(dense))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_stage2_is_merged_or_left_out(tiny_base, tmp_path, kind):
    folder = save_tiny_artifact(tmp_path / "artifact", tiny_base, stage2=kind)
    dense = load_base(folder).model
    with_stage2, _ = load(folder)
    before, _ = load(folder, stage2=False)

    # The tiny artifact's indexers before and after stage 2 differ by 1.
    for name, weight in indexer_weights(before).items():
        torch.testing.assert_close(indexer_weights(with_stage2)[name], weight + 1)
    restore(with_stage2)
    restore(before)
    assert with_stage2.state_dict().keys() == dense.state_dict().keys()
    assert torch.equal(logits(before), logits(dense))
    assert not torch.allclose(logits(with_stage2), logits(dense))


@pytest.mark.parametrize("missing", [CONFIG_FILE, INDEXER_FILE, ADAPTER_FILE])
def test_a_missing_file_is_named(copy, missing):
    (copy / missing).unlink()
    with pytest.raises(RTPurboError, match=missing.split("/")[-1]):
        load(copy)


@pytest.mark.parametrize("broken", [CONFIG_FILE, INDEXER_FILE, ADAPTER_FILE])
@pytest.mark.parametrize("keep", [0, 40])
def test_a_truncated_file_is_named(copy, broken, keep):
    path = copy / broken
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RTPurboError, match=f"{path.name} is corrupt or truncated"):
        load(copy)


def test_truncated_indexers_of_before_stage2_are_met_only_when_needed(copy):
    (copy / INDEXER_BEFORE_STAGE2_FILE).write_bytes(b"")
    load(copy)
    with pytest.raises(RTPurboError, match="corrupt"):
        load(copy, stage2=False)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"null", b'"text"', b"{}", b"\xff\xfe", b"{nonsense"],
)
def test_a_config_of_another_kind_is_corrupt(copy, content):
    (copy / CONFIG_FILE).write_bytes(content)
    with pytest.raises(RTPurboError, match="corrupt"):
        ArtifactConfig.read(copy)


def test_a_newer_format_asks_for_an_upgrade(copy):
    change_config(copy, format_version=2)
    with pytest.raises(RTPurboError, match=r"format 2, .* upgrade rtpurbo"):
        load(copy)


def test_an_unknown_field_is_named(copy):
    config = json.loads((copy / CONFIG_FILE).read_text())["config"]
    config["attention"]["windows"] = 3
    change_config(copy, config=config)
    with pytest.raises(RTPurboError, match="windows"):
        load(copy)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"num_hidden_layers": 1}, {"intermediate_size": 40}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_base_model_is_refused(tiny_artifact, tmp_path, changes):
    other = save_tiny_base(tmp_path / "other", **changes)
    with pytest.raises(RTPurboError, match="belongs to another base model"):
        load(tiny_artifact, base_model=str(other))


@pytest.mark.parametrize("head_map", [None, [], {}, {"retrieval_heads": 3}])
def test_a_head_map_of_another_kind_is_refused(copy, head_map):
    config = json.loads((copy / CONFIG_FILE).read_text())["config"]
    change_config(copy, config=config | {"head_map": head_map})
    with pytest.raises(RTPurboError, match="not complete"):
        load(copy)


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_a_broken_adapter_config_is_refused(copy, content):
    path = copy / ADAPTER_FOLDER / "adapter_config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(RTPurboError, match=r"is missing or corrupt|is of the kind None"):
        load(copy)


def test_indexers_of_another_shape_are_refused(copy):
    config = json.loads((copy / CONFIG_FILE).read_text())["config"]
    config["indexer"]["index_dim"] = 5
    change_config(copy, config=config)
    with pytest.raises(RTPurboError, match=r"do not fit .* expected \(2, 5"):
        load(copy)


def test_a_missing_artifact(monkeypatch):
    def unreachable(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(RTPurboError, match=r"somebody/something is not a folder, .* be reached"):
        find_artifact("somebody/something")


@pytest.mark.parametrize(
    ("kind", "is_hidden", "sentence"),
    [
        (RepositoryNotFoundError, False, "there is no artifact me/sparse, neither a folder nor on"),
        (RevisionNotFoundError, False, "the artifact me/sparse has no revision v2"),
        (GatedRepoError, False, "the artifact me/sparse is gated"),
        # Answers of other kinds are hidden behind an empty cache.
        (HfHubHTTPError, True, r"refused access to the artifact me/sparse \(HTTP 403\)"),
    ],
)
def test_refusals_of_the_hub_are_distinguished(monkeypatch, kind, is_hidden, sentence):
    refusal = kind.__new__(kind)
    refusal.response = SimpleNamespace(status_code=403)

    def refused(name, **options):
        if is_hidden:
            raise LocalEntryNotFoundError("nothing is in the cache") from refusal
        raise refusal

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(RTPurboError, match=sentence):
        find_artifact("me/sparse", revision="v2")


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_artifacts_are_complete_and_name_no_local_paths(folder):
    shipped = ArtifactConfig.read(folder)
    assert not Path(shipped.base.name).is_absolute()
    heads = sum(len(heads) for heads in shipped.config.head_map.retrieval_heads)
    has_stage2 = shipped.stage2 == "lora"
    for before_stage2 in (False, True)[: 1 + has_stage2]:
        indexers = read_indexers(folder, before_stage2=before_stage2)
        assert heads == sum(len(weight) for name, weight in indexers.items() if "query" in name)
    assert (folder / ADAPTER_FILE).is_file() == has_stage2


def test_several_are_shipped():
    assert len(SHIPPED) > 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stage2", "evil", "stage2 is 'evil', but it must be one of"),
        ("stage2", None, "stage2 is null"),
        ("stage2", 5, "stage2 is 5"),
        ("format_version", -5, "format_version -5"),
        ("format_version", 0, "format_version 0"),
        ("format_version", 1.9, r"format_version 1\.9"),
        ("format_version", True, "format_version True"),
        ("settings", [1], "settings is"),
        ("library_version", 5, "library_version is 5"),
        ("base_model.name", "", "'' cannot be the name"),
        ("base_model.name", "~", "'~' cannot be the name"),
        ("base_model.name", 5, "name is 5, but it must be a string"),
        ("base_model.name", ["a"], "name is"),
        ("base_model.name", "a" * 300, "the local folder a{200}, which is not here"),
        ("base_model.name", "a" * 5000, "cannot be the name"),
        ("base_model.source", "evil", "source is 'evil'"),
        ("base_model.revision", 5, "revision is 5"),
        ("config.indexer.min_wavelength", "x", "min_wavelength is 'x'"),
        ("config.indexer.min_wavelength", float("nan"), "min_wavelength is nan"),
        ("config.indexer.min_wavelength", -1.0, r"min_wavelength is -1\.0"),
        ("config.indexer.index_dim", 10**9, "index_dim is 1000000000"),
        ("config.indexer.shared_keys", "x", "shared_keys is 'x'"),
        ("config.attention.sliding_window", 8.5, r"sliding_window is 8\.5"),
        ("config.attention.sliding_window", "8", "sliding_window is '8'"),
        ("config.attention.top_p", float("inf"), "top_p is inf"),
        ("config.head_map.granularity", "evil", "granularity is 'evil'"),
        ("config.head_map.num_key_value_heads", 0, "0 KV heads"),
        ("config.head_map.num_key_value_heads", 4, "4 KV heads"),
        (
            "config.head_map.scores",
            [[1.0]],
            "scores must hold a number for each query head of its 2 layers",
        ),
        ("config.head_map.scores", "abc", "scores must hold"),
        ("config.head_map.scores", [[float("nan")] * 6] * 2, "scores must hold"),
        ("config.head_map.retrieval_heads", [["a"], [0]], "retrieval_heads must hold"),
        ("config.head_map.retrieval_heads", 5, "not complete"),
        ("config.attention", [], "not complete"),
        ("config", None, "not complete"),
        ("format_version", "x", "format_version 'x'"),
    ],
)
def test_unexpected_values_are_named(copy, path, value, message):
    file = copy / CONFIG_FILE
    data = json.loads(file.read_text())
    *parents, last = path.split(".")
    place = data
    for name in parents:
        place = place[name]
    place[last] = value
    file.write_text(json.dumps(data))
    with pytest.raises(RTPurboError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: b"[" * 100_000, "nested too deeply"),
        (lambda text: text.replace(b'"stage2"', b'"stage2": "none", "stage2"'), "'stage2' twice"),
        (lambda text: b'{"format_version": ' + b"9" * 5000 + b"}", "4300 digits"),
        (lambda text: text + b"\xff", "utf-8"),
    ],
)
def test_unexpected_json_is_named(copy, change, message):
    file = copy / CONFIG_FILE
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(RTPurboError, match=message):
        load(copy)
