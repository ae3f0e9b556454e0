"""RTPurbo turns full-attention language models sparse, with a few hundred training steps.

`convert` runs the stages `calibrate`, `train_indexer` and `distill`; `load` and
`AutoRTPurboModelForCausalLM` return the result as a transformers model. Names are imported on
first use, so that `import rtpurbo` is fast.

The Auto classes of transformers load sparse models too, once transformers was imported before this package or a
name of this package was used.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rtpurbo.version import __version__

if TYPE_CHECKING:
    from rtpurbo.config import AttentionRule as AttentionRule
    from rtpurbo.config import HeadMap as HeadMap
    from rtpurbo.config import RTPurboConfig as RTPurboConfig
    from rtpurbo.conversion import calibrate as calibrate
    from rtpurbo.conversion import convert as convert
    from rtpurbo.conversion import distill as distill
    from rtpurbo.conversion import train_indexer as train_indexer
    from rtpurbo.errors import RTPurboError as RTPurboError
    from rtpurbo.evaluation.run import evaluate as evaluate
    from rtpurbo.models.artifact import load as load
    from rtpurbo.models.auto import AutoRTPurboModelForCausalLM as AutoRTPurboModelForCausalLM
    from rtpurbo.models.cache import HeadwiseCache as HeadwiseCache
    from rtpurbo.models.sparsify import restore as restore
    from rtpurbo.models.sparsify import sparsify as sparsify
    from rtpurbo.serving.export import export as export

_HOMES = {
    "convert": "rtpurbo.conversion",
    "load": "rtpurbo.models.artifact",
    "AutoRTPurboModelForCausalLM": "rtpurbo.models.auto",
    "sparsify": "rtpurbo.models.sparsify",
    "restore": "rtpurbo.models.sparsify",
    "calibrate": "rtpurbo.conversion",
    "train_indexer": "rtpurbo.conversion",
    "distill": "rtpurbo.conversion",
    "evaluate": "rtpurbo.evaluation.run",
    "export": "rtpurbo.serving.export",
    "HeadwiseCache": "rtpurbo.models.cache",
    "RTPurboConfig": "rtpurbo.config",
    "AttentionRule": "rtpurbo.config",
    "HeadMap": "rtpurbo.config",
    "RTPurboError": "rtpurbo.errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rtpurbo' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    _register_auto_classes()
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register_auto_classes() -> None:
    """Registers sparse models with the Auto classes of transformers, if transformers is imported."""
    if "transformers" in sys.modules:
        import_module("rtpurbo.models.auto")


_register_auto_classes()
