"""A model in which one KV head copies from far away, and sequences that need it."""

import torch

from rtpurbo.config import AttentionRule
from rtpurbo.data.prompts import Conversation
from tests.calibration.silent import silent_model

RULE = AttentionRule(num_sink_tokens=2, sliding_window=64)
LENGTH = 256


class Copies:
    """Sequences whose answer repeats the tokens after an early mark, far before the window."""

    def sequence(self, number):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(8, 500, (LENGTH,), generator=generator)
        ids[-24:] = ids[8:32]
        return Conversation(ids.tolist(), [(LENGTH - 23, LENGTH)])


def copying_model():
    """KV head 1 of layer 1 copies the token after equal ones; nothing else has any effect.

    Its queries and keys are embeddings without rotation, its values and output go straight to the
    logits; the attention of all other heads is multiplied by zero.
    """
    model = silent_model()
    attention = model.model.layers[1].self_attn
    size, kv_head, head = attention.head_dim, 1, 3
    rows = slice(head * size, (head + 1) * size)
    key = attention.k_proj.weight.data[kv_head * size : (kv_head + 1) * size]
    attention.q_proj.weight.data[rows] = 4 * key
    value = attention.v_proj.weight.data[kv_head * size : (kv_head + 1) * size]
    attention.o_proj.weight.data[:, rows] = 4 * value.T
    return model
