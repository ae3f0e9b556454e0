"""Readers of training sequences that know keys, values and names by their form, and no wording."""

import re

from rtpurbo.data.wordings import templates
from rtpurbo.data.words import key_names

UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
VALUE = rf"\b(?:{UUID}|\d{{6,9}})\b"
_KEYS = set(key_names("train"))


def keys_and_values(text):
    """Every key and value of a text in their order; a key of words may end with a number."""
    found = re.findall(rf"{UUID}|\b\d{{6,9}}\b|[a-z]+-[a-z]+(?:-\d+)?", text)
    return [each for each in found if is_value(each) or re.sub(r"-\d+$", "", each) in _KEYS]


def is_value(text):
    """True for a number or a UUID."""
    return re.fullmatch(VALUE, text) is not None


def read_needles(haystack):
    """The needles of a haystack as pairs of strings, in whichever order the wording has them."""
    found = keys_and_values(haystack)
    assert len(found) % 2 == 0
    return list(zip(found[::2], found[1::2], strict=True))


def values_of(needles, keys):
    """The values of keys, in the order of the text."""
    return {
        key: [b if a == key else a for a, b in needles if key in (a, b)]
        for key in dict.fromkeys(keys)
    }


def follow(assignments, names):
    """The value that every variable holds, where each text assigns one name from another or a number."""
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names))
    held = {}
    for text in assignments:
        mentioned = pattern.findall(text)
        numbers = re.findall(r"(?<![\w])\d{4,6}(?![\w])", text)
        known = [name for name in mentioned if name in held]
        [new] = [name for name in mentioned if name not in held]
        [source] = [*numbers, *(held[name] for name in known)]
        held[new] = source
    return held


def filler(text):
    """Number of filler sentences of a text."""
    parts = templates("train")["filler"]
    predicates = "|".join(map(re.escape, parts["predicates"]))
    subjects = "|".join(map(re.escape, parts["subjects"]))
    return len(re.findall(rf"\b(?:{subjects}) (?:{predicates})\.", text))
