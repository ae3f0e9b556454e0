"""RTPurbo turns full-attention language models sparse, with a few hundred training steps.

`convert` does it all, `load` gives the result back as a transformers model. What is named here is
loaded when it is first used, so that `import rtpurbo` takes no time.
"""

from importlib import import_module
from typing import Any

from rtpurbo.version import __version__

_HOMES = {
    "convert": "rtpurbo.conversion",
    "load": "rtpurbo.models.artifact",
    "sparsify": "rtpurbo.models.sparsify",
    "restore": "rtpurbo.models.sparsify",
    "calibrate": "rtpurbo.calibration.calibrate",
    "train_indexers": "rtpurbo.training.stage1",
    "distill": "rtpurbo.training.stage2",
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
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
