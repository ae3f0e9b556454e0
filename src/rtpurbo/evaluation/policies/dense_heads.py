"""Head-wise attention without an index, the shape of RazorAttention and DuoAttention.

RazorAttention is arXiv 2407.15891, DuoAttention arXiv 2410.10819. Heads and weights are rtpurbo's.
"""

from __future__ import annotations

from rtpurbo.evaluation.policies.policy import RulePolicy

POLICY = RulePolicy(
    "dense-heads",
    "retrieval heads read everything, the others windows (RazorAttention, DuoAttention)",
    place=20,
    keeps_index=False,
    changes={"top_p": 1.0},
)
