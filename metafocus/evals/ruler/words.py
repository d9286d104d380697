"""Keys, values and noise from lists of our own, so that nothing is downloaded."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Iterator

ADJECTIVES = tuple(
    """able agile amber ample ancient ardent azure balmy bold brave breezy brief bright brisk broad
    bronze calm candid careful casual cheerful chilly civic classic clean clear clever cloudy
    coastal cosmic cozy crimson crisp curious daring deep dense distant eager early earnest eastern
    elegant fair famous fancy fast fearless fertile festive fierce final fine firm fluent fond
    formal frank fresh frosty gentle giant gifted glad golden graceful grand grateful green handy
    happy hardy hasty hidden honest humble icy idle ivory jolly joyful keen kind late lavish lean
    light lively local lofty loyal lucid lucky lunar mellow merry mighty mild misty modest narrow
    nimble noble northern odd olive orderly patient placid plain polite proud pure quaint quick
    quiet rapid rare ready rosy round royal rural rustic sandy scarlet secret serene sharp shiny
    silent silver simple sincere sleek slender slow smooth snowy sober soft solar solid southern
    spare steady stern stout strong sturdy subtle sudden sunny swift tall tame tender thorough tidy
    timely tiny tranquil upper urban useful velvet vivid warm wary western wide wild willing windy
    wise witty wooden young zealous""".split()
)

NOUNS = tuple(
    """acorn anchor apron arrow badge bakery balcony banner barley barrel basin basket beacon bell
    bench berry blanket blossom bottle boulder bracket branch bread bridge brook broom brush bucket
    button cabin cactus candle canyon cape carpet castle cedar cellar chapel cherry chimney cider
    cliff clock clover coast comet compass copper coral corner cottage cradle crane creek crown
    crystal curtain cushion daisy dune easel ember engine falcon feather fence fern ferry fiddle
    field flute forest fountain fox galaxy garment gate glacier globe glove granite grove hammer
    harbor harvest hawk hazel hedge heron hill hinge honey horizon island ivy jacket jewel kettle
    ladder lagoon lake lantern lark lemon lens lever lily linen lobby locket lumber magnet mango
    mantle maple marble market marsh meadow melon meteor mill mirror mitten moose mosaic moss
    mountain museum needle nest oak oasis ocean orchard otter oven owl paddle palace paper parade
    pasture pebble pencil pepper piano pillow pine planet plaza plum pocket pond poplar portal
    prairie quarry quilt rabbit raft railway ravine reef ribbon ridge river robin rocket saddle
    sail salmon satchel saucer shelf shell shore shovel signal sparrow spindle spruce squirrel
    stable stair statue stone stream sugar summit table tavern temple thicket thimble thistle
    timber torch tower trail tulip tunnel turnip turtle valley vessel village violin wagon walnut
    waterfall wharf wheel willow window winter workshop yarn""".split()
)

# One line of the haystack called "noise" in RULER: five short sentences.
NOISE = (
    "Rain falls on the roof. The road is long. A dog sleeps by the door. Here comes the bus. "
    "Out and home again."
)


def word_keys(rng: random.Random) -> Iterator[str]:
    """Yield all distinct adjective-noun keys in random order."""
    size = len(NOUNS)
    for number in rng.sample(range(len(ADJECTIVES) * size), len(ADJECTIVES) * size):
        yield f"{ADJECTIVES[number // size]}-{NOUNS[number % size]}"


def numbers(rng: random.Random) -> Iterator[str]:
    """Yield distinct numbers of seven digits."""
    return _distinct(lambda: str(rng.randint(10**6, 10**7 - 1)))


def uuids(rng: random.Random) -> Iterator[str]:
    """Yield distinct random UUIDs, which a seed reproduces."""
    return _distinct(lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)))


def letters(rng: random.Random, size: int, alphabet: str = string.ascii_lowercase) -> Iterator[str]:
    """Yield distinct words of random letters."""
    return _distinct(lambda: "".join(rng.choices(alphabet, k=size)))


def _distinct(draw) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        found = draw()
        if found not in seen:
            seen.add(found)
            yield found
