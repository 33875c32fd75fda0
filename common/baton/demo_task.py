"""What the demo model can do: recall a value from a list in the prompt, and repeat a text.

A person can check both. A text to repeat needs every KV block of the prompt; a question needs the block that
holds its pair, so that a foreign block elsewhere in the list often changes nothing. The prompts are plain text
for one user turn; training, the first request of `make run`, load tests and tests all take them from here.

    recall   ada oslo, bob lima, carl rome. bob?      bob lima
    repeat   repeat: river lamp seven                 river lamp seven
"""

import random
from collections.abc import Sequence
from pathlib import Path

DEMO_MODEL_DIR = Path(__file__).parent / "demo_model"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    ada adam agnes alan alba alex alma amir amy ana anders andy anita anton arlo arne arthur asha astrid axel
    bea ben berta bill bob boris bruno carl carla cecil celia clara claude cora cyril dan dana dave dennis
    diana dora doris edgar edith elena eli elsa emil emma enzo eric erna esther ethan eva felix fiona flora
    frank freya fritz gabi gary george gerda gina greta gus hana hank harald heidi helga henry hilda hugo ian
    ida igor inga ines iris isaac ivan jack jana jane jean jens joan john jonas jose judith julia karl kate
    kim klaus lara lars laura lea lena leo lily linda lisa lotte louis lucy luis lukas mara marc maria max
    mia mike mila mona nadia nico nina noah nora olaf olga oscar otto pablo paul pedro peter petra pia quinn
    rafael ralf rita robin rosa ruth sam sara simon sofia stella sven tania tessa theo tim tina tom udo
    ursula vera viktor wanda will xenia yara yuri zara zoe
    """
)

TOWNS = _words(
    """
    aachen accra agra aleppo algiers amman amsterdam ankara antwerp athens atlanta auckland austin baghdad
    baku bamako bangkok barcelona basel beirut belfast belgrade bergen berlin bern bilbao bogota bologna
    bombay bonn bordeaux boston bremen brisbane bristol brussels budapest cairo calais calgary canberra
    caracas cardiff casablanca chicago cologne copenhagen cork cracow dakar dallas damascus delhi denver
    detroit dhaka doha dortmund dresden dubai dublin durban essen florence frankfurt geneva genoa ghent
    glasgow granada graz hamburg hanoi havana helsinki houston istanbul jakarta kabul kampala kiel kiev
    kigali kobe kyoto lagos leeds leipzig lille lima linz lisbon liverpool london luanda lusaka lyon madrid
    malaga malmo manila marseille mecca melbourne memphis miami milan minsk mombasa montreal moscow munich
    nairobi nantes naples nassau nice osaka oslo ottawa oxford panama paris perth pisa porto prague quebec
    quito rabat reims riga rome rotterdam sarajevo seattle seoul seville sparta split stockholm stuttgart
    sydney taipei tallinn tampa tehran tirana tokyo toronto trieste tripoli tunis turin utrecht valencia
    vancouver venice verona vienna vilnius warsaw wellington york zagreb zurich
    """
)

COMMON_WORDS = _words(
    """
    a about after again all and any apple are as ask at baby back bag ball bank be bear bed bell big bird
    black blue boat book bread brown bus but by cake call can car cat chair city clock cloud coat coffee cold
    come cow cup dark day deer desk do dog door down dream duck ear earth egg end eye fast fire fish five
    flag flower for forest four fox friend from garden gate give glass go gold good grass green hand happy
    hat have he hello help here hill home honey horse house how i ice if in is island it jump jumps key king
    kitchen lake lamp lazy leaf letter light like lion list little live long look love make many map may me
    milk mirror mountain mouse music my name new night nine no not now ocean of old on one or orange our over
    paper pen people piano plate play please question quick rain read red repeat river road rock room said
    salt sand say sea seven she ship shirt shoe short silver six sky slow small snow some song spoon star
    stone street sugar summer sun table tea tell ten text thank that the then there they this three time to
    town train tree two under up was water we well what where which white who wind window winter with wolf
    wood word words work world write year yellow yes you your zero
    """
)

# What the model says when it is asked for anything else.
HELP_TEXT = "hello. ask me about a list, or say repeat: and your words."

VOCABULARY = (*NAMES, *TOWNS, *COMMON_WORDS)


def sample_pairs(rng: random.Random, num_pairs: int) -> list[tuple[str, str]]:
    """`num_pairs` (name, town) pairs; no name and no town occurs twice."""
    if not 1 <= num_pairs <= min(len(NAMES), len(TOWNS)):
        raise ValueError(f"num_pairs must be 1 to {min(len(NAMES), len(TOWNS))}, got {num_pairs}")
    return list(zip(rng.sample(NAMES, num_pairs), rng.sample(TOWNS, num_pairs), strict=True))


def list_text(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {town}" for name, town in pairs) + "."


def recall_prompt(rng: random.Random, num_pairs: int, ask: int | None = None) -> tuple[str, str]:
    """A list of pairs with one question, and the answer; `ask` chooses the pair asked for by its index."""
    pairs = sample_pairs(rng, num_pairs)
    name, town = pairs[rng.randrange(num_pairs) if ask is None else ask]
    return f"{list_text(pairs)} {name}?", f"{name} {town}"


def repeat_prompt(rng: random.Random, num_words: int) -> tuple[str, str]:
    """An order to repeat `num_words` different words, and the answer."""
    if not 1 <= num_words <= len(VOCABULARY):
        raise ValueError(f"num_words must be 1 to {len(VOCABULARY)}, got {num_words}")
    text = " ".join(rng.sample(VOCABULARY, num_words))
    return f"repeat: {text}", text
