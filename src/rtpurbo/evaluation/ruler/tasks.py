"""The thirteen tasks by name, with RULER's parameters."""

from __future__ import annotations

from rtpurbo.evaluation.ruler import aggregation, niah, question_answering, variable_tracking
from rtpurbo.evaluation.ruler.draft import Task
from rtpurbo.evaluation.ruler.niah import NeedleTask


def _needles(name: str, description: str, task: NeedleTask) -> Task:
    return Task(name, description, niah.TOKENS_TO_GENERATE, task.draft)


TASKS = {
    task.name: task
    for task in (
        _needles("niah_single_1", "a number in noise", NeedleTask("noise")),
        _needles("niah_single_2", "a number in prose", NeedleTask("essay")),
        _needles("niah_single_3", "a UUID in prose", NeedleTask("essay", values="uuids")),
        _needles(
            "niah_multikey_1", "one of 4 keys' numbers in prose", NeedleTask("essay", num_keys=4)
        ),
        _needles("niah_multikey_2", "a number among other keys' numbers", NeedleTask("needles")),
        _needles(
            "niah_multikey_3",
            "a UUID among other UUIDs' UUIDs",
            NeedleTask("needles", keys="uuids", values="uuids"),
        ),
        _needles(
            "niah_multivalue", "all 4 numbers of a key in prose", NeedleTask("essay", num_values=4)
        ),
        _needles(
            "niah_multiquery",
            "the numbers of 4 keys in prose",
            NeedleTask("essay", num_keys=4, num_queries=4),
        ),
        Task(
            "vt",
            "the 5 variables of a chain of assignments in noise",
            variable_tracking.TOKENS_TO_GENERATE,
            variable_tracking.draft,
        ),
        Task(
            "cwe",
            "the 10 most common words of a list",
            aggregation.COMMON_WORDS_TOKENS,
            aggregation.draft_common_words,
        ),
        Task(
            "fwe",
            "the 3 most frequent code words of a text",
            aggregation.FREQUENT_WORDS_TOKENS,
            aggregation.draft_frequent_words,
        ),
        Task(
            "qa_1",
            "a question about one of many passages",
            question_answering.TOKENS_TO_GENERATE,
            question_answering.drafting(lambda materials: materials.single_hop),
            any_answer=True,
        ),
        Task(
            "qa_2",
            "a question about two of many passages",
            question_answering.TOKENS_TO_GENERATE,
            question_answering.drafting(lambda materials: materials.two_hop),
            any_answer=True,
        ),
    )
}
"""Tasks by name, in RULER's order."""
