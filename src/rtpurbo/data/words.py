"""Plain English words, from which needles are made up."""

from itertools import product
from typing import Literal

Split = Literal["train", "test"]

ADJECTIVES: tuple[str, ...] = tuple(
    """
    amber ancient autumn bitter blue bold brave bright brisk broad bronze calm careful cheerful
    clear clever cold copper coral crimson crisp curious damp dapper dark deep distant dusty eager
    early elegant emerald faint fancy fearless fierce floral foggy fragrant frosty gentle giant
    gilded glad gleaming golden graceful grand gray green happy hollow honest humble
    icy indigo ivory jolly keen kind large late lazy lively lofty lonely loud loyal
    lucky mellow merry mighty misty modest narrow noble northern olive orange pale patient plain
    polished proud purple quick quiet rapid rare red restless rough round royal rustic salty
    scarlet shaded sharp shiny silent silver simple slender
    """.split()
)

NOUNS: tuple[str, ...] = tuple(
    """
    acorn anchor apple arrow badger balloon barrel basket beacon bell bicycle blanket boat
    bottle bridge broom bucket button cabin camel candle canyon carpet castle cedar cello chair
    cherry circle clock cloud comet compass cottage cradle crown curtain desert dolphin donkey
    drum eagle engine falcon feather fiddle flute forest fountain garden
    glacier goblet guitar hammer harbor hazel helmet heron hill island jacket kettle kite ladder
    lagoon lake lantern lemon lion lizard marble meadow mirror mountain needle orchard otter owl
    paddle palace parrot pebble pencil pepper piano pillow pine planet pony prairie puzzle rabbit
    raven ribbon river rocket saddle sail
    """.split()
)

NAMES: tuple[str, ...] = tuple(
    """
    Adele Alma Anton Beatrice Boris Carlos Clara Daniel Dora Edgar Elena Felix Fiona George
    Greta Hanna Hugo Ida Igor Jasper Julia Karl Laura Leo Lydia Marcus Maria Nadia Nils Olga Oscar
    Paula Peter Rosa Samuel Sofia Theo Ursula Viktor Wanda
    """.split()
)


def words_of(split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The adjectives and the nouns of a split; the two splits share no word."""
    half = slice(0, None, 2) if split == "train" else slice(1, None, 2)
    return ADJECTIVES[half], NOUNS[half]


def key_names(split: Split) -> tuple[str, ...]:
    """Every compound key of a split, such as "amber-lantern", in a fixed order.

    The splits share neither adjectives nor nouns, so that what was trained on the keys of one
    says nothing about the keys of the other.
    """
    adjectives, nouns = words_of(split)
    return tuple(f"{adjective}-{noun}" for adjective, noun in product(adjectives, nouns))
