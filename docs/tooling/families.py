"""The page of model families, made from the zoo of tests and from what the code supports.

    python docs/tooling/families.py > families.md

prints it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rtpurbo.config import RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import convertible_layers, layer_types
from rtpurbo.models.families import FAMILIES
from rtpurbo.models.sparsify import empty_head_map, sparsify
from rtpurbo.ops.triton.heads import MAX_HEAD_DIM
from rtpurbo.serving.export import VLLM_WINDOWED_ARCHITECTURES

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.models.zoo.configurations import EQUAL, REFUSED
from tests.models.zoo.multimodal import WRAPPERS, wrapper_config
from tests.tiny_models import COMMON, DROPPED, any_model
from tests.vllm.checkpoints import FAMILIES as SERVED_FAMILIES

_ABOUT = f"""# Model families

Generated from the tests when this site is built. For every row, a test builds a tiny random model and
compares the sparse model, which attends to everything, with the dense one: prefill, chunked prefill and
decoding, with left padding. Types that are not listed are probed when they are converted, and checked in
the same way with a few tokens; a type that differs is refused.

The Triton kernels take a `head_dim` up to {MAX_HEAD_DIM}; layers with larger heads run with PyTorch operators.
Layers that do not attend to all earlier tokens keep their own attention, window or recurrent state.
*Fused decode entry*: one kernel norms, rotates and appends the keys of a decode step; other families run
transformers' own code for that. *vLLM*: rtpurbo's plugin serves the model type; a test compares the tokens of vLLM's
engine with those of transformers.

## Supported
"""
_MULTIMODAL = """## Text decoders of multimodal models

A checkpoint of these types is loaded without its vision weights and becomes a sparse model of text. Its
logits are compared with those of the whole model whenever it is loaded. Images are refused.
"""
_REFUSED = """## Refused

The reasons are those that conversion gives.
"""
_HEAD = """| model | `model_type` | layers that stay | fused decode entry | vLLM |
| --- | --- | --- | --- | --- |"""


def families_page() -> str:
    """Returns the page in Markdown."""
    supported = [_row(name, _config(*entry)) for name, entry in EQUAL.items()]
    multimodal = [_row(kind, wrapper_config(kind).get_text_config()) for kind in WRAPPERS]
    refused = [f"| {name} | `{entry[0]}` | {_refusal(*entry)} |" for name, entry in REFUSED.items()]
    return "\n".join(
        [
            *(_ABOUT, _HEAD, *supported, ""),
            *(_MULTIMODAL, _HEAD, *multimodal, ""),
            *(_REFUSED, "| model | `model_type` | reason |\n| --- | --- | --- |", *refused, ""),
        ]
    )


def _config(model_type: str, changes: dict[str, Any]) -> Any:
    values = {name: value for name, value in (COMMON | changes).items() if value is not DROPPED}
    return CONFIG_MAPPING[model_type](**values)


def _row(name: str, config: Any) -> str:
    kind = config.model_type
    converted = convertible_layers(config)
    kept = {
        one for one, is_sparse in zip(layer_types(config), converted, strict=True) if not is_sparse
    }
    windows = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) in VLLM_WINDOWED_ARCHITECTURES
    on_vllm = kind in SERVED_FAMILIES and kept <= ({"sliding_attention"} if windows else set())
    cells = [
        name,
        f"`{kind}`",
        ", ".join(f"`{one}`" for one in sorted(kept)) or "none",
        "yes" if kind in FAMILIES else "no",
        "yes" if on_vllm else "no",
    ]
    return f"| {' | '.join(cells)} |"


def _refusal(model_type: str, changes: dict[str, Any]) -> str:
    """The reason in the sentence of a refusal."""
    model = any_model(model_type, **changes)
    try:
        sparsify(model, RTPurboConfig(empty_head_map(model)))
    except RTPurboError as error:
        sentence = str(error).rstrip(".").replace("|", "\\|")
        return sentence.rpartition("cannot be made sparse: ")[2]
    raise AssertionError(f"{model_type} is listed as refused, but can be made sparse")


if __name__ == "__main__":
    print(families_page(), end="")
