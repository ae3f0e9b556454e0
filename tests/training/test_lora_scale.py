"""The scale of stage 2's LoRA and the held-out sequences that choose it."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from rtpurbo.conversion import convert, distill
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact import load
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.sparsify import runtime
from rtpurbo.models.stage2_weights import ADAPTER_FOLDER
from rtpurbo.settings import DistillationSettings, no_progress
from rtpurbo.training.lora_scale import SCALES, TOLERANCE, choose_scale, losses_by_scale
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.stage2 import loss_on
from rtpurbo.training.student import trainable
from rtpurbo.training.teacher import teacher_targets
from tests.conversion.test_run import SETTINGS
from tests.tiny_models import VOCABULARY, sparse_model
from tests.training.test_stage2 import open_student

LEARNT = DistillationSettings(targets_per_sequence=30, lora_rank=2, top_logits=5, decode_queries=8)
IDS = torch.randint(VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0)).tolist()
SEQUENCES = [TrainingSequence(IDS[0], 7), TrainingSequence(IDS[1])]


def test_scales_interpolate_between_the_model_before_and_after():
    model = sparse_model(prefill_mode="dense", dtype=torch.float32)
    with runtime(model).dense():
        held_out = [(each, teacher_targets(model, each, LEARNT, "seed")) for each in SEQUENCES]

    def loss():
        with torch.no_grad():
            return sum(loss_on(model, *each, LEARNT).item() for each in held_out) / 2

    before = loss()
    with trainable(model, LEARNT, seed=0) as student:
        open_student(student)
        after = loss()
        found = losses_by_scale(
            student,
            {"answers": held_out},
            partial(loss_on, model, settings=LEARNT),
            no_progress,
        )
        assert loss() == after  # as it was
    assert tuple(found) == SCALES
    found = {scale: losses["answers"] for scale, losses in found.items()}
    assert found[0.0] == pytest.approx(before, abs=1e-6)
    assert found[1.0] == pytest.approx(after, abs=1e-6)
    assert len({round(value, 6) for value in found.values()}) == len(SCALES)
    # The teacher is the model itself: what was opened at random leads away from it.
    assert found[0.0] < found[0.5] < found[1.0]


@pytest.fixture(scope="module")
def kept(tiny_base, tmp_path_factory):
    """Artifacts that keep all, half, and what is best."""
    folder = tmp_path_factory.mktemp("scales")
    changes = {"all": 1.0, "half": 0.5, "best": None}
    return {
        name: convert(
            str(tiny_base),
            folder / name,
            settings=replace(SETTINGS, stage2=replace(SETTINGS.stage2, lora_scale=scale)),
            device="cpu",
        )
        for name, scale in changes.items()
    }


def adapter(folder):
    described = json.loads((folder / ADAPTER_FOLDER / "adapter_config.json").read_text())
    return described, load_file(folder / ADAPTER_FOLDER / "adapter_model.safetensors")


def test_a_scale_changes_the_factor_and_not_the_weights(kept, tiny_base):
    (whole, weights), (half, same) = (adapter(kept[name]) for name in ("all", "half"))
    assert half["lora_alpha"] == whole["lora_alpha"] / 2
    for name, weight in weights.items():
        assert torch.equal(weight, same[name])
    dense, all_of_it, half_of_it = (
        load(kept[name], stage2=stage2, dtype=torch.float32)[0].state_dict()
        for name, stage2 in (("all", False), ("all", True), ("half", True))
    )
    moved = 0
    for name, weight in dense.items():
        if ".indexer." not in name:
            expected = (weight + all_of_it[name]) / 2
            torch.testing.assert_close(half_of_it[name], expected, atol=1e-6, rtol=1e-5)
            moved += not torch.equal(weight, all_of_it[name])
    assert moved


def test_the_scale_is_chosen_on_held_out_sequences(kept):
    artifact = ArtifactConfig.read(kept["best"])
    assert artifact.settings["stage2"]["lora_scale"] is None
    found = artifact.figures["stage2"]
    losses = {float(scale): loss for scale, loss in found["losses_by_scale"].items()}
    assert set(losses) == set(SCALES)
    assert found["lora_scale"] == choose_scale(losses)
    if not found["lora_scale"]:
        assert artifact.stage2 == "none"
        assert not (kept["best"] / ADAPTER_FOLDER).exists()
        return
    (whole, _), (best, _) = (adapter(kept[name]) for name in ("all", "best"))
    assert best["lora_alpha"] == whole["lora_alpha"] * found["lora_scale"]
    assert "stage2" not in ArtifactConfig.read(kept["all"]).figures


def test_another_stage2_does_not_report_the_previous_scale(kept, tmp_path):
    again = distill(kept["best"], tmp_path / "again", settings=SETTINGS, device="cpu")
    figures = ArtifactConfig.read(again).figures
    assert set(figures) == {"stability", "stage1", "refresh", "top_p"}
    assert figures["stage1"] == ArtifactConfig.read(kept["best"]).figures["stage1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_scale": 1.5}, "from 0 to 1"),
        ({"lora_scale": -0.1}, "from 0 to 1"),
        ({"lora_scale": None, "lora_rank": 0}, "only a LoRA"),
    ],
)
def test_scales_that_are_refused(changes, message):
    with pytest.raises(RTPurboError, match=message):
        replace(LEARNT, **changes)


def test_the_scale_that_helps_most_without_harm():
    losses = {
        0.0: {"conversations": 0.0, "needles": 0.5},
        0.5: {"conversations": TOLERANCE / 2, "needles": 0.2},
        1.0: {"conversations": 2 * TOLERANCE, "needles": 0.1},
    }
    assert choose_scale(losses) == 0.5
    # Without the kind that it harms, all of the LoRA is best.
    needles = {scale: {"needles": each["needles"]} for scale, each in losses.items()}
    assert choose_scale(needles) == 1.0


def test_a_lora_that_only_degrades_is_left_out():
    assert choose_scale({0.0: {"prose": 0.1}, 0.25: {"prose": 0.105}, 1.0: {"prose": 0.3}}) == 0.0


def test_at_scale_zero_nothing_is_written(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("rtpurbo.training.stage2.choose_scale", lambda losses: 0.0)
    folder = convert(
        str(tiny_base),
        tmp_path / "artifact",
        settings=replace(SETTINGS, stage2=replace(SETTINGS.stage2, lora_scale=None)),
        device="cpu",
    )
    artifact = ArtifactConfig.read(folder)
    assert artifact.stage2 == "none"
    assert artifact.figures["stage2"]["lora_scale"] == 0
    assert not (folder / ADAPTER_FOLDER).exists()
    assert load(folder, dtype=torch.float32)[0].rtpurbo_config == artifact.config
