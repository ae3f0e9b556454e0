import io
import json
import shutil

import pytest
from rich.console import Console

from rtpurbo.config import HeadMap
from rtpurbo.models.artifact_config import LOG_FILE
from rtpurbo.reporting.headmap import head_map_picture
from rtpurbo.reporting.inspection import inspect_artifact
from rtpurbo.training.curves import sparkline, training_curves


def printed(renderable):
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_head_map_marks_retrieval_heads_and_shades_the_others():
    head_map = HeadMap(
        ((1, 3), None, ()), 4, 2, scores=((0.0, 1.0, 0.3, 0.5), None, (0.01, 0.05, 0.2, 0.99))
    )
    first, second, third, legend = printed(head_map_picture(head_map))
    assert first == "layer   0  · ● ▒ ●  2"
    assert "window of its own" in second
    assert third == "layer   2  · ░ ▒ █"
    assert "2 of 8" in legend


def test_head_map_without_scores():
    head_map = HeadMap.uniform([0], [True], 4, 2)
    assert printed(head_map_picture(head_map))[0] == "layer   0  ● · · ·  1"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        (list(range(8)), "▁▂▃▄▅▆▇█"),
        ([0.0] * 100 + [1.0] * 100, "▁" * 4 + "█" * 4),
    ],
)
def test_sparkline(values, expected):
    assert sparkline(values, width=8) == expected


def test_curves_for_each_stage_and_figure():
    entries = [
        {"stage": "stage1", "step": 1, "loss": 2.0},
        {"stage": "stage1", "step": 2, "loss": 1.0, "recall": 0.5, "tokens_read": None},
        {"stage": "stage2", "step": 1, "loss": 0.3},
    ]
    assert printed(training_curves(entries)) == [
        "stage1 loss    █▁  2 → 1",
        "stage1 recall  ▁   0.5 → 0.5",
        "stage2 loss    ▁   0.3 → 0.3",
    ]


def test_inspection_shows_everything(tiny_artifact, tmp_path):
    folder = shutil.copytree(tiny_artifact, tmp_path / "copy")
    lines = "\n".join(printed(inspect_artifact(folder)))
    assert "training ──" not in lines

    (folder / LOG_FILE).write_text(json.dumps({"stage": "stage1", "step": 1, "loss": 2.0}) + "\n{")
    lines = "\n".join(printed(inspect_artifact(folder)))
    for part in (
        "4 of 12",
        "layer   1  ● ● · · · ·",
        "stage1 loss",
        "adapter/adapter_model.safetensors",
        "sparse, float32",
    ):
        assert part in lines
