"""Prose for calibration, training and evaluation: built in, from files, or from the Hub."""

from __future__ import annotations

import importlib
import random
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from rtpurbo.data.sources import read_source
from rtpurbo.errors import RTPurboError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 0.2
"""Approximate share of the characters that `load_texts` holds out for evaluation."""

SENTENCE_END = re.compile(r"(?:[.!?][\"')\]]*(?=\s)|[\u3002\uff01\uff1f])")
"""End of a sentence, in Latin and in Chinese and Japanese punctuation."""

_SENTENCE_BREAK = re.compile(SENTENCE_END.pattern + r"\s*")
_PARAGRAPH_BREAK = re.compile(r"\n(?:[ \t]*\n)+")
_LINES_OF_MARKUP = re.compile(r"^(?:[*=~^#+|-]{3,}.*|[+|].*[+|]|-\[ .* \]-)$\n?", re.MULTILINE)
_INLINE_MARKUP = re.compile(r"(?<!\w)\*{1,2}(\w[^*\n]*?)\*{1,2}(?!\w)| \[\d+\](?=\W|$)")


# Passages of short texts are often drawn twice; for each passage, this many draws are made at most.
_MAX_DRAWS = 10


class Prose(Protocol):
    """Source of prose: a `TextCorpus`, or a part of a stream."""

    def sample_tokens(
        self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, rng: random.Random
    ) -> list[int]:
        """Returns exactly `num_tokens` tokens of prose."""


@dataclass(frozen=True)
class TextCorpus:
    """Documents of prose.

    Attributes:
        name: name of the corpus in error messages.
        documents: texts in a fixed order; none is empty.
    """

    name: str
    documents: tuple[str, ...]

    def sample_tokens(
        self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, rng: random.Random
    ) -> list[int]:
        """Returns exactly `num_tokens` tokens of prose from a random place.

        The document is drawn with a probability proportional to its length, and the text begins at the start
        of a paragraph or sentence. If no document is long enough, consecutive documents are joined
        cyclically.

        Args:
            tokenizer: the model's; no special tokens are added.
            num_tokens: number of tokens.
            rng: source of all randomness.

        Raises:
            RTPurboError: the whole corpus is shorter than `num_tokens`.
        """
        example = self.documents[0][:4096]
        characters_per_token = len(example) / max(1, len(encode(tokenizer, example)))
        needed = int(1.1 * num_tokens * characters_per_token) + 1

        long_enough = [document for document in self.documents if len(document) >= needed]
        if long_enough:
            [document] = rng.choices(long_enough, weights=[len(text) for text in long_enough])
            start = _next_start(document, rng.randint(0, len(document) - needed))
            size = needed
            while True:
                token_ids = encode(tokenizer, document[start : start + size])
                # The last token before the cut may be part of a word, so it is not used.
                if len(token_ids) > num_tokens:
                    return token_ids[:num_tokens]
                if start + size >= len(document):
                    break
                size *= 2

        first = rng.randrange(len(self.documents))
        token_ids = []
        for document in self.documents[first:] + self.documents[:first]:
            token_ids += encode(tokenizer, document + "\n\n")
            if len(token_ids) >= num_tokens:
                return token_ids[:num_tokens]
        raise RTPurboError(
            f"the text corpus '{self.name}' has only {len(token_ids):,} tokens, but "
            f"{num_tokens:,} are needed; give more text or ask for a shorter length."
        )


def load_texts(
    sources: Sequence[str] | None, split: Literal["train", "heldout"] = "train"
) -> TextCorpus:
    """Loads the training or the held-out part of some texts.

    The held-out part is the end of the texts, about a fifth of their characters: whole documents if these
    make 10 to 25 %, else the end of one document, cut at a paragraph. Both parts depend only on the texts and
    their order.

    Args:
        sources: None for the documentation of the Python language that comes with Python
            (about 360,000 characters; each part is one long document). Otherwise each source is a
            file, `.txt`, `.md`, `.jsonl`, `.jsonl.gz` or `.parquet`, the last three with a field
            `text` in each row; or a dataset of the Hugging Face Hub,
            `hf:NAME[:CONFIGURATION][:SPLIT]`.
        split: part to return.

    Raises:
        RTPurboError: a source is missing, unreadable, empty or of an unknown kind.
    """
    if sources is None:
        name, documents = "Python documentation", _python_documentation()
    else:
        if isinstance(sources, str):
            sources = [sources]
        name, documents = ", ".join(sources), []
        for source in sources:
            documents += read_source(source)
        if not documents:
            raise RTPurboError("no text source was given; name at least one file or dataset.")

    train, held_out = _split_documents(documents)
    part = train if split == "train" else held_out
    if not train or not held_out:
        raise RTPurboError(
            f"the text in {name} is too short to be split into a training and a held-out part; "
            "give more text."
        )
    if sources is None:
        part = ["\n\n".join(part)]
    return TextCorpus(name=f"{name} ({split})", documents=tuple(part))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encodes text without special tokens and without a warning about its length."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the BOS token if the tokenizer puts one before every text."""
    return [
        token_id
        for token_id in tokenizer("")["input_ids"][:1]
        if token_id == tokenizer.bos_token_id
    ]


def bos_and_prose(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> list[int]:
    """Returns exactly `length` tokens: the BOS token, if the tokenizer puts one before every text, and prose."""
    start = bos_ids(tokenizer)
    return start + corpus.sample_tokens(tokenizer, length - len(start), rng)


def draw_passages(
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    length: int,
    count: int,
    rng: random.Random,
    found: Sequence[list[int]] = (),
) -> list[list[int]]:
    """Returns `count` different passages of `length` tokens: those of `found`, and others.

    Raises:
        RTPurboError: the corpus is shorter than a passage, or has too few different ones.
    """
    passages, draws = list(found), 0
    while len(passages) < count:
        passage = bos_and_prose(tokenizer, corpus, length, rng)
        draws += 1
        if passage not in passages:
            passages.append(passage)
        elif draws >= _MAX_DRAWS * count:
            raise RTPurboError(
                f"{corpus.name} has no {count} different passages of {length:,} tokens; "
                "give more text, or ask for fewer or shorter ones."
            )
    return passages


def _next_start(document: str, position: int) -> int:
    """Returns the start of the next paragraph, sentence or word near `position`, in this order of preference."""
    if position == 0:
        return 0
    nearby = document[position : position + 1000]
    for pattern in (_PARAGRAPH_BREAK, _SENTENCE_BREAK, re.compile(r"\s+")):
        found = pattern.search(nearby)
        if found:
            return position + found.end()
    return position


def _split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits documents into training and held-out ones, as described in `load_texts`."""
    target = HELD_OUT_SHARE * sum(len(document) for document in documents)
    train, size = list(documents), 0
    held_out: list[str] = []
    while train and size < target and size + len(train[-1]) <= 1.25 * target:
        size += len(train[-1])
        held_out.insert(0, train.pop())
    if size < 0.5 * target:
        document = train.pop()
        cut = _next_start(document, len(document) - round(target - size))
        head, tail = document[:cut].rstrip(), document[cut:]
        if head:
            train.append(head)
        if tail:
            held_out.insert(0, tail)
    return train, held_out


def _python_documentation() -> list[str]:
    """Returns the topics of Python's documentation in alphabetical order, as clean prose."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise RTPurboError(
            "this Python has no built-in documentation (pydoc_data) to use as text; "
            "name text files of your own."
        ) from error

    # Topics share sections. Each paragraph is kept once, so that held-out text is not in the training
    # part too.
    seen: set[str] = set()
    documents = []
    for topic in sorted(topics):
        paragraphs = []
        for paragraph in _PARAGRAPH_BREAK.split(topics[topic]):
            paragraph = _clean_paragraph(paragraph)
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append("\n\n".join(paragraphs))
    return documents


def _clean_paragraph(paragraph: str) -> str:
    """Removes reStructuredText markup and line breaks inside sentences."""
    paragraph = textwrap.dedent(paragraph)
    paragraph = _LINES_OF_MARKUP.sub("", paragraph)
    paragraph = _INLINE_MARKUP.sub(lambda match: match[1] or "", paragraph).strip()
    lines = paragraph.split("\n")
    # Lines of prose are long; those of code and of lists of short items are not.
    is_prose = all(len(line) > 45 for line in lines[:-1])
    return " ".join(line.strip() for line in lines) if is_prose else paragraph
