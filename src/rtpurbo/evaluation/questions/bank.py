"""Suites of short questions with generated answers."""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedTokenizerBase

from rtpurbo.data.prompts import rendered_chat
from rtpurbo.data.texts import bos_ids, encode
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.questions.suite import Prompt, QuestionSuite
from rtpurbo.evaluation.questions.suites import SHORT, QuestionData
from rtpurbo.evaluation.task_suite import AnswerSuite, Instance


class QuestionBank(AnswerSuite):
    """Suites of short questions.

    Args:
        data: the questions.
        max_new_tokens: limit of an answer; None takes each suite's default.
    """

    def __init__(self, data: QuestionData, max_new_tokens: int | None = None) -> None:
        self.data, self.max_new_tokens = data, max_new_tokens
        self._prompts: dict[str, list[list[int]]] = {}

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, case: Case, context_length: int
    ) -> list[Case]:
        """Renders the prompts of a suite.

        Raises:
            RTPurboError: a prompt and its answer do not fit into the context.
        """
        limit = self._limit(SHORT[case.suite])
        longest = max(map(len, self._rendered(tokenizer, case.suite)[: case.samples]))
        if longest + limit > context_length:
            raise RTPurboError(
                f"a question of {case.suite} has {longest:,} tokens, which with {limit:,} of an "
                f"answer do not fit the model's context of {context_length:,}: lower "
                "--max-new-tokens."
            )
        return [case]

    def instances(self, tokenizer: PreTrainedTokenizerBase, case: Case) -> list[Instance]:
        """Returns the questions of a case."""
        kind, rows = SHORT[case.suite], self.data.shuffled(case.suite)[: case.samples]
        return [
            Instance(
                prompt_ids, kind.answers(row), self._limit(kind), partial(kind.is_correct, row)
            )
            for prompt_ids, row in zip(self._rendered(tokenizer, case.suite), rows, strict=False)
        ]

    def _limit(self, kind: QuestionSuite) -> int:
        return self.max_new_tokens or kind.max_new_tokens

    def _rendered(self, tokenizer: PreTrainedTokenizerBase, suite: str) -> list[list[int]]:
        """Returns the prompts of all questions."""
        if suite not in self._prompts:
            prompts = map(SHORT[suite].prompt, self.data.shuffled(suite))
            self._prompts[suite] = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
        return self._prompts[suite]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Returns the tokens of a prompt, in the chat template if the tokenizer has one."""
    if not tokenizer.chat_template:
        return bos_ids(tokenizer) + encode(tokenizer, prompt.text)
    message = {"role": "user", "content": prompt.message}
    return encode(tokenizer, rendered_chat(tokenizer, [message]))
