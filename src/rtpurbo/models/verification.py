"""Check of sparse models of types without tests of their own: the logits must equal the dense ones.

The sparse model, with a window over all tokens, runs two forwards of a few tokens, the second over the
cache of the first, and is compared with the dense model.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.config import RTPurboConfig
from rtpurbo.errors import RTPurboError, first_line
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.decoder import evaluating
from rtpurbo.models.families import FAMILIES

NUM_TOKENS = 24
# Tokens of the first forward; the second one continues its cache.
FIRST = 16
# Left padding of one of the two sequences.
PADDING = 5
# Largest difference of a logit, relative to the largest logit.
TOLERANCE = 1e-3
# In half precision: relative difference of a token's logits (2-norm), of the median token. Rounding moves
# single tokens much further, where it changes the experts of a mixture.
HALF_TOLERANCE = 5e-2


# Models that passed, and whether with retrieval heads; they are not checked again.
_checked: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def needs_check(model: PreTrainedModel, config: RTPurboConfig) -> bool:
    """True if the type of a model has no tests of its own and the model was not checked before."""
    retrieves = config.head_map.num_retrieval_heads > 0
    is_checked = model in _checked and _checked[model] >= retrieves
    return model.config.model_type not in FAMILIES and not is_checked


@torch.no_grad()
def logits_over_cache(model: PreTrainedModel) -> Tensor:
    """Returns the logits of two forwards, the second over the cache of the first: [tokens, vocabulary].

    They are those of two sequences, one with left padding, because some models derive positions from the mask.

    Raises:
        RTPurboError: the model does not run over a cache.
    """
    size = model.config.vocab_size
    tokens = torch.randint(0, size, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :PADDING] = 0
    device = model.get_input_embeddings().weight.device
    tokens, mask = tokens.to(device), mask.to(device)
    try:
        with evaluating(model):
            options = {"attention_mask": mask[:, :FIRST], "use_cache": True}
            first = model(input_ids=tokens[:, :FIRST], **options)
            options = {"attention_mask": mask, "use_cache": True}
            cache = {CACHE_NAME: getattr(first, CACHE_NAME)}
            second = model(input_ids=tokens[:, FIRST:], **options, **cache)
    except (RTPurboError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = first_line(error, with_type=True)
        raise RTPurboError(
            f"{_prefix(model)} it does not run over a cache of transformers' kind ({reason})."
        ) from error
    logits = torch.cat([first.logits, second.logits], 1)
    return logits[mask.to(logits.device, torch.bool)]


def check_equal(model: PreTrainedModel, expected: Tensor) -> None:
    """Refuses a sparse model with a window over all tokens whose logits differ from those of the dense model.

    Raises:
        RTPurboError: the logits differ, or the model does not run over a cache.
    """
    difference, limit = logits_difference(logits_over_cache(model), expected)
    if not difference <= limit:
        raise RTPurboError(
            f"{_prefix(model)} with a window over everything its logits differ from those of the dense "
            f"model by {difference:.1e} of their size, and at most {limit:g} is allowed."
        )
    _checked[model] = model.rtpurbo_config.head_map.num_retrieval_heads > 0


def _prefix(model: PreTrainedModel) -> str:
    return f"this {model.config.model_type} model cannot be made sparse:"


def logits_difference(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Returns the difference of logits, and the largest that is allowed."""
    error = (actual - expected).float()
    if expected.dtype.itemsize >= 4:
        return float(error.abs().max() / expected.float().abs().max()), TOLERANCE
    relative = error.norm(dim=-1) / expected.float().norm(dim=-1)
    return float(relative.median()), HALF_TOLERANCE
