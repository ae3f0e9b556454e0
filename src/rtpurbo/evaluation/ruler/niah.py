"""Needles in a haystack: values of keys, hidden in noise, prose or other needles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rtpurbo.data.fitting import Stream
from rtpurbo.data.needles import random_values
from rtpurbo.data.prompts import hide, hide_among_lines
from rtpurbo.data.wordings import NeedleWording
from rtpurbo.evaluation.ruler.draft import Draft, Request, spawn
from rtpurbo.evaluation.ruler.materials import noise_lines

TOKENS_TO_GENERATE = 128

DEPTHS = tuple(number / 39 for number in range(40))
"""Possible depths of needles, from 0 (the beginning) to 1; each is used once."""

SMALLEST = {"noise": 20, "needles": 8, "essay": 100}
"""Size of the smallest haystack: sentences of noise, distracting needles, or words of prose."""


@dataclass(frozen=True)
class NeedleTask:
    """Kind of needle task.

    Attributes:
        haystack: repeated noise, needles with other keys, or prose.
        keys: compounds of two words, or UUIDs.
        values: seven digits, or UUIDs.
        num_keys: number of keys; those that are not queried are distractors.
        num_values: number of values of each key.
        num_queries: number of queried keys.
    """

    haystack: Literal["noise", "needles", "essay"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def draft(self, request: Request) -> Draft:
        """Draws keys, values and depths."""
        rng, kind = request.rng, self.values.removesuffix("s")
        wording = NeedleWording.draw(rng, "test", kind)
        keys, values = self._keys(request), random_values(rng, kind)
        held = {
            next(keys): [next(values) for _ in range(self.num_values)] for _ in range(self.num_keys)
        }
        asked = list(held)[: self.num_queries]
        answers = [value for key in asked for value in held[key]]
        sentences = [wording.state(key, value) for key in held for value in held[key]]
        rng.shuffle(sentences)
        hidden = list(zip(sorted(rng.sample(DEPTHS, len(sentences))), sentences, strict=True))
        # Nothing else draws from these iterators, so distractors do not depend on the size.
        distractors = Stream(wording.state(*pair) for pair in zip(keys, values, strict=True))
        prose = Stream(request.materials.prose(spawn(rng)))

        def haystack(size: int) -> str:
            if self.haystack == "essay":
                return hide(" ".join(prose.first(size)), hidden)
            lines = noise_lines(size) if self.haystack == "noise" else distractors.first(size)
            return hide_among_lines(lines, hidden)

        introduction = wording.introduce(rng, len(answers))
        question = wording.ask(rng, asked, answers)
        return Draft(
            text=lambda size: f"{introduction}\n\n{haystack(size)}",
            question=question.question,
            opening=question.opening,
            answers=tuple(answers),
            smallest=SMALLEST[self.haystack],
        )

    def _keys(self, request: Request) -> Iterator[str]:
        if self.keys == "words":
            return request.materials.vocabulary.compounds(request.rng)
        return random_values(request.rng, "uuid")
