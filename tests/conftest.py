import os

import hypothesis
import pytest
import torch

# Without a GPU, kernels run in Triton's interpreter, which is set before anything imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from tests.tiny_artifact import save_tiny_artifact, save_tiny_base

# Tensors here are tiny: a second thread only waits, for long where cores are shared.
torch.set_num_threads(1)

# A busy machine takes longer than Hypothesis allows an example.
hypothesis.settings.register_profile("rtpurbo", deadline=None)
hypothesis.settings.load_profile("rtpurbo")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """The folder of a dense model; not to be changed."""
    return save_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_artifact(tiny_base):
    """The folder of an artifact with a LoRA of stage 2; not to be changed."""
    return save_tiny_artifact(tiny_base.with_name("artifact"), tiny_base, stage2="lora")
