"""Training shares no six words in a row with what is evaluated."""

import ast
import json
import random
import re
from functools import cache, partial
from pathlib import Path

import pytest

import rtpurbo.evaluation
from rtpurbo.data.inventions import PEOPLE, PLACES
from rtpurbo.data.long_range import HAYSTACKS, LongRangeMix
from rtpurbo.data.needles import make_calibration_document, make_retrieval_example
from rtpurbo.data.reading import reading_example
from rtpurbo.data.texts import TextCorpus
from rtpurbo.data.variables import make_variable_example
from rtpurbo.data.wordings import fill, templates
from rtpurbo.evaluation.cases import NEEDLE_TASKS
from rtpurbo.evaluation.ruler.tasks import TASKS
from tests.evaluation.ruler.support import draft_of

WORDS_IN_A_ROW = 6

# Prose of one word, so that every other word is a template's; another word for each side.
PROSE = TextCorpus("training", ("Wum wum wum. " * 4000,))
EVALUATION_PROSE = TextCorpus("evaluation", ("Zib zib zib. " * 4000,))

# Templates of NVIDIA's own RULER generator and of BABILong, which other tools run.
PUBLISHED = Path(__file__).with_name("published_templates.txt").read_text("utf-8").splitlines()


class WordTokenizer:
    """One token for each word with the space before it, so that hundreds of sequences take seconds."""

    chat_template = None
    bos_token_id = -1

    def __init__(self):
        self.numbers, self.words = {}, []

    def __call__(self, text, **_):
        words = re.findall(r"\s?\S+|\s", text)
        for word in words:
            if self.numbers.setdefault(word, len(self.words)) == len(self.words):
                self.words.append(word)
        return {"input_ids": [self.numbers[word] for word in words]}

    def decode(self, token_ids, **_):
        return "".join(self.words[token_id] for token_id in token_ids)


def words_of(text):
    """The words of a text or template, without the fields, keys, values and names in it."""
    text = re.sub(r"\{\w+\}", " ", text)
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", " ", text)
    text = re.sub(r"\b[a-z]+-[a-z]+(-\d+)?\b|\b[A-Z]{5}\b|\b\w*\d\w*\b", " ", text)
    return re.findall(r"[a-z']+", text.lower())


def runs(text):
    """Every run of six words."""
    words = words_of(text)
    return {tuple(words[i : i + WORDS_IN_A_ROW]) for i in range(len(words) - WORDS_IN_A_ROW + 1)}


def strings_of(data):
    """Every string of nested JSON."""
    if isinstance(data, str):
        return [data]
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return [text for part in parts for text in strings_of(part)]


def literals_of(source):
    """Every string of a module but docstrings, values of f-strings as fields; adjacent literals are one."""
    tree, texts = ast.parse(source), []
    # A string that is a statement of its own documents what it follows or opens.
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in documentation:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [
                part.value if isinstance(part, ast.Constant) else "{x}" for part in node.values
            ]
            texts.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


@cache
def evaluated():
    """Runs of six words of every template of an evaluation, and of prompts drawn from each."""
    texts = [*PUBLISHED, *strings_of(templates("test"))]
    for folder in map(Path, rtpurbo.evaluation.__path__):
        for path in sorted(folder.rglob("*")):
            if path.suffix == ".py":
                texts += literals_of(path.read_text("utf-8"))
            elif path.suffix == ".json":
                texts += strings_of(json.loads(path.read_text("utf-8")))
    for name in TASKS:
        for number in range(24):
            draft = draft_of(name, number)
            texts.append(f"{draft.text(draft.smallest)}\n\n{draft.question}\n\n{draft.opening}")
    tokenizer = WordTokenizer()
    for options in NEEDLE_TASKS.values():
        for seed in range(4):
            rng = random.Random(seed)
            example = make_retrieval_example(tokenizer, EVALUATION_PROSE, 1500, rng, **options)
            texts.append(tokenizer.decode(example.prompt_ids))
    return {run for text in texts for run in runs(text)}


TOKENIZER = WordTokenizer()
MIX = LongRangeMix(TOKENIZER, PROSE)


def single(make, length, rng):
    """A retrieval example as it is trained on."""
    example = make(TOKENIZER, PROSE, length, rng, split="train")
    return [*example.prompt_ids, *example.answer_ids]


DRAWN = {
    **{
        f"needles in {haystack}": lambda rng, haystack=haystack: (
            MIX.needles(1600, rng, haystack).input_ids
        )
        for haystack in HAYSTACKS
    },
    "variables": lambda rng: MIX.variables(1600, rng).input_ids,
    "variables with a solved example": lambda rng: MIX.variables(4096, rng, "noise").input_ids,
    "passage": lambda rng: MIX.passage(400, rng).input_ids,
    "counting": lambda rng: MIX.counting(1200, rng).input_ids,
    "reading": lambda rng: reading_example(TOKENIZER, PROSE, 800, rng).input_ids,
    "one needle": partial(single, make_retrieval_example, 300),
    "one chain": partial(single, make_variable_example, 300),
    "calibration": lambda rng: make_calibration_document(TOKENIZER, PROSE, 300, rng).input_ids,
}
"""Draws of every kind of training sequence and of calibration documents."""


def test_no_template_of_training_shares_six_words_with_an_evaluation():
    facts = [
        text.replace("{who}", "{name}")
        for kind in (PEOPLE, PLACES)
        for fact in kind.facts
        for text in (fact.sentence, fact.question)
    ]
    for text in [*strings_of(templates("train")), *facts]:
        assert not runs(text) & evaluated(), text


@pytest.mark.parametrize("kind", DRAWN)
def test_no_sequence_of_training_shares_six_words_with_an_evaluation(kind):
    seen = set()
    for number in range(120):
        found = runs(TOKENIZER.decode(DRAWN[kind](random.Random(f"{kind}-{number}"))))
        assert not found & evaluated()
        seen |= found
    # What is compared is more than prose.
    assert len(seen) > 50


@pytest.mark.parametrize("kind", ["needles", "chains", "lists", "code_words"])
def test_the_check_finds_wordings_of_benchmarks(kind):
    """The comparison finds each sentence of RULER in a training sequence, whatever its values."""
    shown = [text for text in strings_of(templates("test")[kind]) if len(words_of(text)) >= 6]
    assert shown
    for text in shown:
        filled = fill(
            text, key="amber-lantern", value="7654321", noun="special magic number",
            kind="number", count=3, name="QWXYZ", source="VAR ABCDE",
        )  # fmt: skip
        assert runs(f"Wum wum. {filled} Wum.") & evaluated()
    assert runs("VAR AAAAA = 12345 " + "VAR BBBBB = VAR CCCCC " * 6) & evaluated()


def test_every_kind_has_many_wordings():
    def leaves(data):
        if isinstance(data, dict):
            return [leaf for part in data.values() for leaf in leaves(part)]
        return [data]

    trained = templates("train")
    for kind in ("needles", "chains", "lists", "code_words", "passages", "reading"):
        for part in ("introductions", "questions", "openings"):
            for options in leaves(trained[kind][part]):
                assert len(set(options)) == len(options) >= 12
    for kind in ("needles", "chains"):
        for part in ("sentences", "records"):
            assert len(set(trained[kind][part])) == len(trained[kind][part]) >= 12


def test_fields_of_templates_are_those_that_are_filled():
    fields = {
        "needles": {"noun", "Noun", "key", "value", "kind"},
        "chains": {"name", "source", "value", "count"},
        "lists": {"number", "word", "count"},
        "code_words": {"number", "word", "count"},
        "passages": {"quote"},
        "reading": {"number", "question"},
    }
    for split in ("train", "test"):
        for kind, known in fields.items():
            for text in strings_of(templates(split).get(kind, {})):
                assert set(re.findall(r"\{(\w+)\}", text)) <= known
    for split in ("train", "test"):
        needles, chains = templates(split)["needles"], templates(split)["chains"]
        for statement in (*needles["sentences"], *needles["records"]):
            assert statement.count("{key}") == statement.count("{value}") == 1
        for question in (*needles["questions"]["one"], *needles["questions"]["several"]):
            assert question.count("{key}") == 1
        for statement in (*chains["sentences"], *chains["records"]):
            assert statement.count("{name}") == statement.count("{source}") == 1
        assert all(question.count("{value}") == 1 for question in chains["questions"])
        for kind in ("lists", "code_words"):
            assert all("{count}" in question for question in templates(split)[kind]["questions"])


def test_filler_is_not_the_noise_of_tests():
    [published] = [text for text in PUBLISHED if "grass" in text]
    sentence = re.compile(r"[A-Z][^.]*\.")
    noise = {*sentence.findall(published), *sentence.findall(draft_of("niah_single_1").text(20))}
    parts = templates("train")["filler"]
    filler = {f"{subject} {end}." for subject in parts["subjects"] for end in parts["predicates"]}
    assert {"The pond is still.", "The grass is green."} <= noise
    assert len(filler) > 1000
    assert not filler & noise
