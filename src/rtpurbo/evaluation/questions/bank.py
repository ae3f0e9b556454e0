"""Suites of short questions with generated answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import begin_ids, encode
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.batching import batches_by_length
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.questions.files import Row
from rtpurbo.evaluation.questions.suite import Prompt, QuestionSuite
from rtpurbo.evaluation.questions.suites import SHORT, QuestionData
from rtpurbo.evaluation.samples import Outcome, Sample
from rtpurbo.evaluation.task_suite import TaskSuite, ignore_sample
from rtpurbo.models.text import continue_tokens

SANDBOXES_AT_ONCE = 4


class QuestionBank(TaskSuite):
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

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        case: Case,
        after_sample: Callable[[], None] = ignore_sample,
        questions: range | None = None,
    ) -> list[Outcome]:
        """Returns the score of greedy answers, in percent."""
        kind, asked = SHORT[case.suite], range(case.samples) if questions is None else questions
        limit = self._limit(kind)
        rendered, rows = self._rendered(tokenizer, case.suite), self.data.shuffled(case.suite)
        answered: dict[int, Sample] = {}
        lengths = [len(rendered[number]) + limit for number in asked]
        for batch in batches_by_length(model, lengths):
            numbers = [asked[place] for place in batch]
            prompts = [rendered[number] for number in numbers]
            written = continue_tokens(model, tokenizer, prompts, limit)
            correct = _scores(kind, [rows[number] for number in numbers], written)
            for number, generated, right in zip(numbers, written, correct, strict=True):
                answers = kind.answers(rows[number])
                answered[number] = Sample.of(rendered[number], answers, generated, 100.0 * right)
                after_sample()
        return [Outcome.of([answered[number] for number in asked])]

    def _limit(self, kind: QuestionSuite) -> int:
        return self.max_new_tokens or kind.max_new_tokens

    def _rendered(self, tokenizer: PreTrainedTokenizerBase, suite: str) -> list[list[int]]:
        """Returns the prompts of all questions."""
        if suite not in self._prompts:
            render = partial(prompt_tokens, tokenizer)
            prompt = SHORT[suite].prompt
            self._prompts[suite] = [render(prompt(row)) for row in self.data.shuffled(suite)]
        return self._prompts[suite]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Returns the tokens of a prompt, in the chat template if the tokenizer has one."""
    if not tokenizer.chat_template:
        return begin_ids(tokenizer) + encode(tokenizer, prompt.text)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.message}],
        tokenize=False,
        add_generation_prompt=True,
        # Option of reasoning models' templates; others ignore it.
        enable_thinking=False,
    )
    return encode(tokenizer, str(rendered))


def _scores(kind: QuestionSuite, rows: Sequence[Row], written: Sequence[str]) -> list[bool]:
    if not kind.runs_code:
        return list(map(kind.is_correct, rows, written))
    with ThreadPoolExecutor(SANDBOXES_AT_ONCE) as threads:
        return list(threads.map(kind.is_correct, rows, written))
