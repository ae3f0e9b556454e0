"""Conversion of a model in half precision: only what is trained is float32."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rtpurbo.conversion import convert
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact import load
from tests.conversion.test_run import SETTINGS
from tests.tiny_artifact import save_tiny_base

# Sizes that nothing else has.
HIDDEN, INTERMEDIATE, VOCABULARY = 42, 57, 515
BASE_SHAPES = {
    (VOCABULARY, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), (48, HIDDEN), (HIDDEN, 48),
    (24, HIDDEN),
}  # fmt: skip


class Float32Copies(TorchDispatchMode):
    """Notes every float32 tensor that has the shape of a base weight, and when it came to be."""

    def __init__(self):
        super().__init__()
        self.stage = "start"
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        outputs = function(*arguments, **(options or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                shape = tuple(tensor.shape)
                if shape in BASE_SHAPES or shape[::-1] in BASE_SHAPES:
                    self.found.append((self.stage, shape))
        return outputs

    def progress(self, stage, done, total, figures):
        self.stage = f"{stage} {done}/{total}"


@pytest.fixture(scope="module")
def half_precision_base(tmp_path_factory):
    return save_tiny_base(
        tmp_path_factory.mktemp("base"), dtype="bfloat16", hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE, vocab_size=VOCABULARY,
    )  # fmt: skip


def test_no_weight_of_the_base_is_copied_to_float32(half_precision_base, tmp_path):
    with Float32Copies() as copies:
        artifact = convert(
            str(half_precision_base), tmp_path / "artifact", settings=SETTINGS, device="cpu",
            dtype="bfloat16", progress=copies.progress,
        )  # fmt: skip
    # Merging the LoRA, the product of one layer's factors at a time.
    assert {stage for stage, _ in copies.found} <= {"stage2 6/6"}
    assert not [shape for _, shape in copies.found if VOCABULARY in shape]

    indexers = load_file(artifact / "indexer.safetensors")
    assert {weight.dtype for weight in indexers.values()} == {torch.float32}
    # Trained in more than the base's precision.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in indexers.values())
    model, _ = load(artifact, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_copies_are_noticed(half_precision_base, tmp_path):
    with Float32Copies() as copies:
        convert(
            str(half_precision_base), tmp_path / "artifact", device="cpu", progress=copies.progress,
            settings=replace(SETTINGS, stage2=replace(SETTINGS.stage2, steps=0)),
        )  # fmt: skip
    assert copies.found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "no dtype 'int8': choose one of auto, float32"),
        (
            {"dtype": "bfloat16", "changes": {"stage2.lora_rank": 0}},
            "model is bfloat16: pass --dtype float32",
        ),
    ],
)
def test_untrainable_weights_are_refused(options, message, half_precision_base, tmp_path):
    with pytest.raises(RTPurboError, match=message):
        convert(
            str(half_precision_base), tmp_path / "out", settings=SETTINGS, device="cpu", **options
        )
    assert not (tmp_path / "out.work").exists()


def test_resuming_in_another_type_is_refused(half_precision_base, tmp_path):
    class InterruptionError(Exception):
        pass

    def interrupt(stage, done, total, figures):
        raise InterruptionError

    options = {"settings": SETTINGS, "device": "cpu"}
    output = tmp_path / "out"
    with pytest.raises(InterruptionError):
        convert(str(half_precision_base), output, progress=interrupt, **options)
    plan = json.loads((tmp_path / "out.work" / "plan.json").read_text())
    assert plan["dtype"] == "float32"
    with pytest.raises(RTPurboError, match="another model, data or settings"):
        convert(str(half_precision_base), output, resume=True, dtype="bfloat16", **options)
