"""Prose for calibration, training and evaluation: built in, from files, or from the Hub."""

from __future__ import annotations

import gzip
import importlib
import random
import re
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 0.2
"""Approximate share of the characters that `load_texts` holds out for evaluation."""

SENTENCE_END = re.compile(r"(?:[.!?][\"')\]]*(?=\s)|[\u3002\uff01\uff1f])")
"""End of a sentence, in Latin and in Chinese and Japanese punctuation."""

# Limits against decompression bombs: characters that are always allowed, and beyond them a maximum ratio to
# the file size.
_LEAST_EXPANDED = 2**28
_MOST_EXPANSION = 200

_SURROGATE = re.compile("[\ud800-\udfff]")
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
            documents += _read_source(source)
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


def _read_source(source: str) -> list[str]:
    """Returns the documents of one source of `load_texts`; none is empty."""
    if source.startswith("hf:"):
        documents = _read_hub_dataset(source)
    else:
        path = Path(source).expanduser()
        check_is_file(path, source)
        try:
            documents = _read_file(path, source)
        except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
            raise RTPurboError(f"cannot read the text file {source}: {error}.") from error
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise RTPurboError(f"the text source {source} is empty; give one with text in it.")
    return documents


def _read_file(path: Path, source: str) -> list[str]:
    if path.name.endswith((".txt", ".md")):
        return [path.read_text(encoding="utf-8")]
    if path.name.endswith(".jsonl"):
        with path.open(encoding="utf-8") as lines:
            return _read_json_lines(lines, source)
    if path.name.endswith(".jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return _read_json_lines(_bounded(lines, path, source), source)
    if path.name.endswith(".parquet"):
        datasets = import_datasets(source)
        try:
            dataset = datasets.Dataset.from_parquet(str(path))
        except Exception as error:  # the errors of the Parquet reader have no base of their own
            raise RTPurboError(
                f"cannot read the text file {source}: {first_line(error)}; "
                "check that it is a Parquet file."
            ) from error
        return _text_column(dataset, source)
    raise RTPurboError(
        f"the text file {source} is of an unknown kind; "
        "use .txt, .md, .jsonl, .jsonl.gz or .parquet."
    )


def check_is_file(path: Path, source: str) -> None:
    """Refuses paths that are not regular files, such as pipes and devices.

    Raises:
        RTPurboError: the file does not exist or is not a regular one.
    """
    if not path.exists():
        raise RTPurboError(f"there is no text file {source}; check the path.")
    if not path.is_file():
        raise RTPurboError(f"the text source {source} is not a regular file; name one.")


def _bounded(lines: TextIO, path: Path, source: str) -> Iterator[str]:
    """Yields the lines of a compressed file up to a maximum ratio to its size.

    Raises:
        RTPurboError: the file expands beyond that, as a decompression bomb does.
    """
    allowed = max(_LEAST_EXPANDED, _MOST_EXPANSION * path.stat().st_size)
    while line := lines.readline(allowed + 1):
        allowed -= len(line)
        if allowed < 0:
            raise RTPurboError(
                f"{source} expands to more than {_MOST_EXPANSION} times its size; decompress it, and "
                "name the result if you trust it."
            )
        yield line


def _read_json_lines(lines: Iterable[str], source: str) -> list[str]:
    return [
        _text_of_line(line, f"Line {number} of {source}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _text_of_line(line: str, place: str) -> str:
    """Returns the text in a line of JSON.

    Args:
        line: JSON object with a field `text`.
        place: name of the line in error messages.

    Raises:
        RTPurboError: the line is not such an object, or its text is invalid Unicode.
    """
    try:
        row = strict_json.parse(line)
    except ValueError as error:
        raise RTPurboError(
            f"{place} is not JSON ({error}); every line must be an object."
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise RTPurboError(f'{place} has no field "text" with a string; every line must have one.')
    text: str = row["text"]
    if _SURROGATE.search(text):
        raise RTPurboError(
            f"{place} holds half of a surrogate pair, which is invalid Unicode; write the file again as UTF-8."
        )
    return text


def parse_hub_source(source: str) -> tuple[str, str | None, str]:
    """Returns name, configuration and split of a Hub dataset, from `hf:NAME[:CONFIGURATION][:SPLIT]`.

    Raises:
        RTPurboError: the source has another form.
    """
    name, *options = source.removeprefix("hf:").split(":")
    if not name or len(options) > 2:
        raise RTPurboError(
            f"{source} does not name a dataset; write hf:NAME, hf:NAME:SPLIT "
            "or hf:NAME:CONFIGURATION:SPLIT."
        )
    return name, options[0] if len(options) == 2 else None, options[-1] if options else "train"


def _read_hub_dataset(source: str) -> list[str]:
    name, configuration, split = parse_hub_source(source)
    datasets = import_datasets(source)
    try:
        dataset = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # the library raises the errors of its many sources
        raise RTPurboError(
            f"cannot load the dataset {source}: {first_line(error)}; "
            "check its name, configuration and split, and the network."
        ) from error
    return _text_column(dataset, source)


def _text_column(dataset: Any, source: str) -> list[str]:
    if "text" not in dataset.column_names:
        raise RTPurboError(
            f'{source} has no column "text", only {", ".join(dataset.column_names)}; '
            "rename the column that holds the text."
        )
    return [text for text in dataset["text"] if text]


def import_datasets(source: str) -> Any:
    """Imports the optional package `datasets`.

    Raises:
        RTPurboError: the package is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise RTPurboError(
            f"reading {source} needs the package datasets; install it with "
            "pip install 'rtpurbo[data]'."
        ) from error
