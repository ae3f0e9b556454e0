"""Invented people and places: paragraphs about them, and questions.

Models cannot know the answers and must read them. Names and facts differ from those of RULER's questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from rtpurbo.data.words import NAMES

NUM_FACTS = 3
"""Facts of each person or place, in addition to its connection with another."""


@dataclass(frozen=True)
class Fact:
    """Sentence about `{who}` with a `{value}`, and the question for the value of `{name}`."""

    sentence: str
    question: str
    values: Sequence[str]


@dataclass(frozen=True)
class Connection:
    """Sentence that connects `{who}` with `{other}`, and a paraphrase of the other without its name."""

    sentence: str
    paraphrase: str


@dataclass(frozen=True)
class Kind:
    """Kind of subject: people or places.

    Attributes:
        facts: possible facts, of which each subject has a few.
        connections: possible connections with a subject of the other kind, of which each has one.
    """

    facts: tuple[Fact, ...]
    connections: tuple[Connection, ...]


@dataclass(frozen=True)
class Subject:
    """Person or place.

    Attributes:
        name: full name, in the first sentence and in questions.
        short_name: name in all other sentences.
        facts: facts with their values.
        connection: connection with the other subject.
        other: name of the other subject.
    """

    name: str
    short_name: str
    facts: tuple[tuple[Fact, str], ...]
    connection: Connection
    other: str

    def paragraph(self, rng: random.Random) -> str:
        """Returns all sentences in random order."""
        sentences = [(fact.sentence, {"value": value}) for fact, value in self.facts]
        sentences.append((self.connection.sentence, {"other": self.other}))
        rng.shuffle(sentences)
        return " ".join(
            sentence.format(who=self.short_name if number else self.name, **values)
            for number, (sentence, values) in enumerate(sentences)
        )

    def paraphrase_of_other(self) -> str:
        """Returns the paraphrase of the other subject."""
        return self.connection.paraphrase.format(name=self.name)


COLOURS = ("yellow", "red", "green", "violet", "white", "brown", "black", "pink", "grey")
MONTHS = ("January", "February", "March", "April", "May", "June", "August", "September", "November")
YEARS = tuple(str(year) for year in range(1842, 1930))

PEOPLE = Kind(
    (
        Fact("{who} worked as a {value} for most of a long life.", "What did {name} work as?", (
            "tailor", "saddler", "glazier", "cooper", "weaver", "potter", "locksmith", "gardener", "roofer",
            "midwife", "teacher", "bookbinder", "chemist", "judge", "porter", "tanner")),
        Fact("{who} spoke {value} at home and nothing else.", "Which language did {name} speak at home?", (
            "Danish", "Welsh", "Basque", "Polish", "Latin", "Frisian", "Breton", "Maltese", "Greek", "Finnish")),
        Fact("{who} was never seen without a {value} hat.", "Which colour was the hat of {name}?", COLOURS),
        Fact("{who} collected {value} in a cupboard under the stairs.", "What did {name} collect?", (
            "spoons", "shells", "stamps", "keys", "maps", "corks", "coins", "feathers", "dolls", "dice")),
        Fact("{who} was afraid of {value} and told nobody.", "Of what was {name} afraid?", (
            "spiders", "thunder", "heights", "moths", "geese", "deep water", "horses", "fire", "strangers")),
        Fact("{who} left school at the age of {value}.", "At what age did {name} leave school?", (
            "nine", "ten", "eleven", "fourteen", "fifteen", "sixteen", "seventeen", "nineteen")),
        Fact("{who} was married in {value}, on a day of heavy rain.", "In which month was {name} married?", MONTHS),
        Fact("{who} made a fortune with {value} and gave it away.", "With what did {name} make a fortune?", (
            "candles", "umbrellas", "bicycles", "needles", "matches", "carpets", "lemonade", "wallpaper", "tin toys")),
        Fact("{who} drank {value} with every meal.", "What did {name} drink with every meal?", (
            "cider", "buttermilk", "black tea", "cocoa", "beer", "hot water", "red wine", "plum brandy")),
        Fact("{who} built a house of {value} for a sister.", "Of what was the house that {name} built?", (
            "brick", "granite", "clay", "larch", "limestone", "bottles", "driftwood", "concrete")),
    ),
    (
        Connection("{who} was born in {other}.", "the town where {name} was born"),
        Connection("{who} moved to {other} in old age.", "the town to which {name} moved in old age"),
        Connection("{who} owned a mill near {other}.", "the town near which {name} owned a mill"),
        Connection("{who} taught the children of {other}.", "the town whose children {name} taught"),
    ),
)  # fmt: skip

PLACES = Kind(
    (
        Fact("{who} lies on the river {value}.", "On which river does {name} lie?", (
            "Orle", "Tamsin", "Wend", "Asker", "Lume", "Varra", "Sill", "Eddern", "Pirn", "Ulloch", "Isen", "Nave")),
        Fact("{who} has {value} inhabitants, fewer than a century ago.", "How many inhabitants has {name}?",
            tuple(f"{thousands},{hundreds}00" for thousands, hundreds in product(range(2, 40), range(1, 10)))),
        Fact("{who} has had a railway station since {value}.", "Since which year has {name} had a railway station?",
            YEARS),
        Fact("{who} shows {value} on its coat of arms.", "What is on the coat of arms of {name}?", (
            "a bear", "an oak leaf", "two swords", "a ship", "three stars", "a beehive", "a swan", "an open hand")),
        Fact("{who} sends {value} to the capital.", "What does {name} send to the capital?", (
            "plums", "barley", "hops", "leeks", "trout", "walnuts", "onions", "ducks", "peas", "asparagus")),
        Fact("{who} has a church with a roof of {value}.", "Of what is the roof of the church of {name}?", (
            "lead", "thatch", "zinc", "red tiles", "glass", "shingles", "turf", "tin")),
        Fact("{who} keeps a library of {value} books.", "How many books has the library of {name}?",
            tuple(f"{hundreds}00" for hundreds in range(3, 99) if hundreds % 10)),
        Fact("{who} is twinned with {value}.", "With which town is {name} twinned?", (
            "Ghent", "Lucca", "Odense", "Porto", "Graz", "Tartu", "Bilbao", "Leiden", "Zadar", "Uppsala", "Reims")),
        Fact("{who} pumps its water from a well {value} metres deep.", "How many metres deep is the well of {name}?",
            tuple(str(metres) for metres in range(18, 240, 3))),
        Fact("{who} paints its front doors {value}.", "Which colour are the front doors of {name}?", COLOURS),
    ),
    (
        Connection("{who} owes its school to {other}.", "the person to whom {name} owes its school"),
        Connection("{who} has a canal that {other} paid for.", "the person who paid for the canal of {name}"),
        Connection("{who} was often painted by {other}.", "the person who often painted {name}"),
        Connection("{who} made {other} its first mayor.", "the first mayor of {name}"),
    ),
)  # fmt: skip

FAMILY_NAMES = (
    "Abel", "Arden", "Bauer", "Birch", "Calder", "Carey", "Dorn", "Ellis", "Falk", "Fenwick", "Garland",
    "Hale", "Holt", "Ivers", "Jansen", "Kemp", "Kruse", "Lang", "Lorimer", "Madsen", "Moss", "Nash", "Orr",
    "Pike", "Quist", "Reed", "Rowe", "Sand", "Sharp", "Stone", "Tate", "Thorpe", "Vance", "Voss", "Ward",
    "Webb", "Wolff", "Yates",
)  # fmt: skip

TOWNS = tuple(
    start + end
    for start, end in product(
        ("Alder", "Amber", "Black", "Coldin", "Elm", "Gander", "Hazel", "Kings", "Lang", "Mill", "North",
         "Otter", "Raven", "Silver", "Sunder", "Swan", "Under", "West", "Winter", "Wood"),
        ("bridge", "bury", "dale", "field", "ford", "gate", "ham", "hill", "stead", "stoke", "ton", "well"),
    )
)  # fmt: skip


def subjects(rng: random.Random) -> Iterator[tuple[Subject, Subject]]:
    """Yields pairs of connected subjects, person and place in alternating order, with distinct names."""
    people = [f"{first} {last}" for first, last in product(NAMES, FAMILY_NAMES)]
    towns = list(TOWNS)
    rng.shuffle(people)
    rng.shuffle(towns)
    names = {PEOPLE: people, PLACES: towns}
    kinds = [PEOPLE, PLACES]
    rng.shuffle(kinds)
    while len(towns) >= 2:
        first, second = kinds
        leading, led_to, beyond = names[first].pop(), names[second].pop(), names[first].pop()
        yield _subject(first, leading, led_to, rng), _subject(second, led_to, beyond, rng)
        kinds.reverse()


def _subject(kind: Kind, name: str, other: str, rng: random.Random) -> Subject:
    return Subject(
        name,
        name.split()[-1] if kind is PEOPLE else "The town",
        tuple((fact, rng.choice(fact.values)) for fact in rng.sample(kind.facts, NUM_FACTS)),
        rng.choice(kind.connections),
        other,
    )
