"""What is kept of stage 2, and by what it is judged."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from rtpurbo.conversion import convert, distill_artifact
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact import ADAPTER_FOLDER, ArtifactConfig, load
from rtpurbo.models.sparsify import running_dense
from rtpurbo.settings import DistillationSettings, no_progress
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.share import SHARES, losses_by_share
from rtpurbo.training.stage2 import loss_on
from rtpurbo.training.student import trainable
from rtpurbo.training.teacher import teacher_targets
from tests.test_conversion import SETTINGS
from tests.tiny_models import VOCABULARY, sparse_model
from tests.training.test_stage2 import open_student

LEARNT = DistillationSettings(labels_per_sequence=30, lora_rank=2, top_logits=5, decode_rows=8)
IDS = torch.randint(VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0)).tolist()
SEQUENCES = [TrainingSequence(IDS[0], 7), TrainingSequence(IDS[1])]


def test_shares_lie_between_the_model_before_and_after():
    model = sparse_model(prefill_mode="dense", dtype=torch.float32)
    with running_dense(model):
        held_out = [(each, teacher_targets(model, each, LEARNT, "seed")) for each in SEQUENCES]

    def loss():
        with torch.no_grad():
            return sum(loss_on(model, *each, LEARNT).item() for each in held_out) / 2

    before = loss()
    with trainable(model, LEARNT, seed=0) as student:
        open_student(student)
        after = loss()
        found = losses_by_share(
            student,
            held_out,
            partial(loss_on, model, settings=LEARNT),
            no_progress,
        )
        assert loss() == after  # as it was
    assert tuple(found) == SHARES
    assert found[0.0] == pytest.approx(before, abs=1e-6)
    assert found[1.0] == pytest.approx(after, abs=1e-6)
    assert len({round(value, 6) for value in found.values()}) == len(SHARES)
    # The teacher is the model itself: what was opened at random leads away from it.
    assert found[0.0] < found[0.5] < found[1.0]


@pytest.fixture(scope="module")
def kept(tiny_base, tmp_path_factory):
    """Artifacts that keep all, half, and what is best."""
    folder = tmp_path_factory.mktemp("shares")
    changes = {"all": 1.0, "half": 0.5, "best": None}
    return {
        name: convert(
            str(tiny_base),
            folder / name,
            settings=replace(SETTINGS, stage2=replace(SETTINGS.stage2, share=share)),
            device="cpu",
        )
        for name, share in changes.items()
    }


def adapter(folder):
    described = json.loads((folder / ADAPTER_FOLDER / "adapter_config.json").read_text())
    return described, load_file(folder / ADAPTER_FOLDER / "adapter_model.safetensors")


def test_a_share_scales_what_is_applied_not_what_was_learnt(kept, tiny_base):
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


def test_the_best_is_what_held_out_sequences_say(kept):
    artifact = ArtifactConfig.read(kept["best"])
    assert artifact.settings["stage2"]["share"] is None
    found = artifact.figures["stage2"]
    losses = {float(share): loss for share, loss in found["losses_by_share"].items()}
    assert set(losses) == set(SHARES)
    assert losses[found["share"]] == min(losses.values())
    (whole, _), (best, _) = (adapter(kept[name]) for name in ("all", "best"))
    assert best["lora_alpha"] == whole["lora_alpha"] * found["share"]
    assert "stage2" not in ArtifactConfig.read(kept["all"]).figures


def test_another_stage2_does_not_tell_of_the_one_before(kept, tmp_path):
    again = distill_artifact(kept["best"], tmp_path / "again", settings=SETTINGS, device="cpu")
    figures = ArtifactConfig.read(again).figures
    assert set(figures) == {"stability", "stage1", "refresh"}
    assert figures["stage1"] == ArtifactConfig.read(kept["best"]).figures["stage1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.5}, "from 0 to 1"),
        ({"share": -0.1}, "from 0 to 1"),
        ({"share": None, "lora_rank": 0}, "LoRA alone"),
    ],
)
def test_what_cannot_be_kept(changes, message):
    with pytest.raises(RTPurboError, match=message):
        replace(LEARNT, **changes)
