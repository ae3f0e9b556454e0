import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.harness.suite import SPLITS, local_config
from tests.evaluation.harness.support import aime24_file, mmlu_pro_folder, write_lines


def test_a_file_is_used_for_every_split(tmp_path):
    file = aime24_file(tmp_path)
    config = local_config("aime24", file)
    assert config["task"] == "aime24"
    assert (config["dataset_path"], config["dataset_name"]) == ("json", None)
    assert config["dataset_kwargs"]["data_files"] == dict.fromkeys(SPLITS, str(file))


def test_a_folder_has_a_file_for_each_split(tmp_path):
    folder = mmlu_pro_folder(tmp_path)
    (folder / "README.md").write_text("not data")
    config = local_config("mmlu_pro_math", folder)
    assert config["dataset_kwargs"]["data_files"] == {
        split: str(folder / f"{split}.jsonl") for split in ("test", "validation")
    }


def test_mistakes_are_reported(tmp_path):
    with pytest.raises(RTPurboError, match=r"there is no file .*nothing.jsonl with data for the"):
        local_config("aime24", tmp_path / "nothing.jsonl")
    with pytest.raises(RTPurboError, match="has no data for the task aime24"):
        local_config("aime24", tmp_path)
    with pytest.raises(RTPurboError, match="must be of one format: "):
        local_config("aime24", write_lines(tmp_path / "data.xlsx", []))
    for name in ("test.jsonl", "validation.parquet"):
        write_lines(tmp_path / name, [])
    with pytest.raises(RTPurboError, match="must be of one format"):
        local_config("aime24", tmp_path)
