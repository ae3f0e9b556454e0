"""How much of a score of lm-eval's `ruler_fwe` is the one order in which it shuffles its words?

    python experiments/ruler_word_order.py ARTIFACT --length 1024 --orders 24 --samples 8 -o word-order.json

lm-eval (`pip install 'rtpurbo[lm-eval]'`) shuffles the words of every sample by the same seed, 42, and all
samples of a length have the same counts: only the letters of the words differ. This asks its dense base
model the same task, made by lm-eval's own code, in that order and in others, and tells whether the mean
score depends on the order by more than the samples of one order differ (analysis of variance, its
p-value by permutation).
"""

from __future__ import annotations

import argparse
import io
import random
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from lm_eval.tasks.ruler import fwe_utils
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import encode
from rtpurbo.devices import default_dtype, device_name, resolve_device
from rtpurbo.evaluation.bootstrap import bootstrap_interval
from rtpurbo.evaluation.policies import POLICIES, Source
from rtpurbo.evaluation.ruler.scoring import answer_score
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact_folder import find_artifact
from rtpurbo.models.text import continue_tokens

THEIR_ORDER = fwe_utils.SEED
PERMUTATIONS = 10_000


def scores_in_order(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    samples: int,
    order: int,
    letters: int,
) -> list[float]:
    """The model's scores in percent on samples that lm-eval makes.

    Args:
        model: asked.
        tokenizer: the model's.
        length: tokens of a prompt, as lm-eval counts them.
        samples: questions.
        order: seed of the shuffle.
        letters: seed of the words' letters; 0 gives the first samples of `rtpurbo eval --suite lm-eval`.
    """
    fwe_utils.SEED = order
    random.seed(letters)
    with redirect_stdout(io.StringIO()):
        questions = fwe_utils.sys_kwext(tokenizer, length, samples)
    scores = []
    for question in questions:
        turn = {"role": "user", "content": question["input"]}
        text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        prompt = encode(tokenizer, f"{text}{question['gen_prefix']}")
        tokens = fwe_utils.CONFIG["tokens_to_generate"]
        [written] = continue_tokens(model, tokenizer, [prompt], tokens)
        scores.append(100 * answer_score(written, question["outputs"], any_answer=False))
    return scores


def order_effect(scores: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """The share of the variance that lies between orders, and how often chance gives as much.

    Args:
        scores: a row for each order.
        seed: of the permutations.
    """
    rng = np.random.default_rng(seed)

    def share(values: NDArray[np.float64]) -> float:
        return float(values.mean(1).var() / values.var())

    measured = share(scores)
    shuffled = (
        share(rng.permutation(scores.ravel()).reshape(scores.shape)) for _ in range(PERMUTATIONS)
    )
    return measured, (1 + sum(value >= measured for value in shuffled)) / (1 + PERMUTATIONS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", help="its base model is asked")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--orders", type=int, default=24, help="other orders")
    parser.add_argument("--samples", type=int, default=8, help="of each order")
    parser.add_argument(
        "--letters", type=int, default=3, help="draws of words in lm-eval's own order"
    )
    parser.add_argument("--their-samples", type=int, default=30, help="of each draw")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", "-o", type=Path)
    options = parser.parse_args(arguments)

    device = resolve_device(options.device)
    source = Source(find_artifact(options.artifact), device, default_dtype(device), None, 0)
    model, tokenizer = POLICIES["full"].prepare(source)
    asked = model, tokenizer, options.length
    theirs = []
    for letters in range(options.letters):
        theirs.append(scores_in_order(*asked, options.their_samples, THEIR_ORDER, letters))
        low, high = bootstrap_interval(theirs[-1])
        print(
            f"lm-eval's order, letters {letters}: {np.mean(theirs[-1]):.1f} "
            f"(95 % interval {low:.1f} to {high:.1f})",
            flush=True,
        )
    others = []
    for order in range(options.orders):
        others.append(scores_in_order(*asked, options.samples, order, letters=order))
        print(f"order {order}: {np.mean(others[-1]):.1f}", flush=True)
    table = np.array(others)
    means = table.mean(1)
    # Samples of one order are not independent, so orders are what is drawn again.
    low, high = bootstrap_interval(means.tolist())
    share, chance = order_effect(table)
    print(
        f"{options.orders} other orders: {means.mean():.1f} (95 % interval {low:.1f} to {high:.1f}), "
        f"from {means.min():.1f} to {means.max():.1f}; {share:.0%} of the variance lies between orders "
        f"(by chance as much: p = {chance:.4f})"
    )
    if options.output:
        write_json_atomically(
            options.output,
            {
                "command": shlex.join(["python", "experiments/ruler_word_order.py", *sys.argv[1:]]),
                "device": device_name(device),
                "length": options.length,
                "their order": theirs,
                "other orders": others,
            },
        )


if __name__ == "__main__":
    main()
