"""Models that two processes share by FSDP against whole ones."""

import pytest
import torch

from rtpurbo.errors import RTPurboError
from rtpurbo.models import sharding
from rtpurbo.models.sharding import Sharding
from rtpurbo.processes import Processes
from tests.tiny_artifact import save_tiny_artifact, save_tiny_base
from tests.tiny_models import FAMILIES
from tests.two_processes import run_in_two_processes

_COMPARE = r"""
import sys
import torch
from rtpurbo.models.artifact import ArtifactConfig, load_base
from rtpurbo.models.stage2_weights import apply_stage2
from rtpurbo.models.base import load_base_model
from rtpurbo.models.sharding import is_sharded, own_part
from rtpurbo.processes import init_distributed
from pathlib import Path

processes = init_distributed(torch.device("cpu"), "fsdp")
ids = torch.arange(40)[None]
DTYPES = {"base": "auto", "half": torch.float16}
STORED = {"base": torch.bfloat16, "half": torch.float16}

def logits(model):
    with torch.no_grad():
        return model.get_output_embeddings()(model.base_model(ids).last_hidden_state)

def held(model):
    return sum(own_part(weight).nbytes for weight in model.base_model.layers.parameters())

for kind, folder in (argument.split("=") for argument in sys.argv[1:]):
    folder = Path(folder)
    loaded = []
    for each in (None, processes):
        options = {} if each is None else {"processes": each}
        if kind in DTYPES:
            loaded.append(load_base_model(str(folder), dtype=DTYPES[kind], **options))
        else:
            loaded.append(load_base(folder, **options))
            apply_stage2(loaded[-1].model, folder, kind)
    one, part = loaded
    assert is_sharded(part.model) and not is_sharded(one.model)
    assert part.reference == one.reference
    assert part.model.config.to_dict() == one.model.config.to_dict()
    assert part.model.dtype == one.model.dtype == STORED.get(kind, torch.float32)
    assert list(part.model.state_dict()) == list(one.model.state_dict())
    assert abs(held(part.model) / held(one.model) - 0.5) < 0.01
    assert torch.equal(logits(part.model), logits(one.model)), folder
    print(f"same {folder.name}\n", end="", flush=True)
"""


def test_logits_of_every_kind_of_model_are_those_of_the_whole(tmp_path):
    bases = {family: {"family": family} for family in FAMILIES}
    bases["llama"] |= {"tie_word_embeddings": True}
    bases["qwen3"] |= {"intermediate_size": 51}  # which two processes cannot share evenly
    arguments = [
        f"base={save_tiny_base(tmp_path / name, **kind, dtype='bfloat16')}"
        for name, kind in bases.items()
    ]
    arguments.append(f"half={save_tiny_base(tmp_path / 'half', dtype='bfloat16')}")
    base = save_tiny_base(tmp_path / "base")
    for kind in ("lora", "full"):
        arguments.append(f"{kind}={save_tiny_artifact(tmp_path / kind, base, stage2=kind)}")
    said = run_in_two_processes(_COMPARE, tmp_path, *arguments)
    for name in (*bases, "half", "lora", "full"):
        assert said.splitlines().count(f"same {name}") == 2


def test_old_transformers_are_refused(monkeypatch):
    import transformers.distributed

    def without_fsdp(tp_size=None):
        return None

    monkeypatch.setattr(transformers.distributed, "DistributedConfig", without_fsdp)
    with pytest.raises(RTPurboError, match=r"transformers 5\.17 or later"):
        sharding.load_sharded(
            "any", Sharding(Processes(count=2, parallelism="fsdp"), torch.device("cpu"))
        )
