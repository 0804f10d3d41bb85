"""Questions about pictures, derived by rules from the captions people wrote of them.

Six kinds: `color`, `count`, `object`, `action`, `place`, `exists`. What captions say together is taken for true: an
answer needs the voice of most captions that speak of the matter, and of two at least where one caption may err. "Is
there a ...?" is asked of each thing with yes as often as with no, over all pictures that are read together, so that
nothing is to be learned from the question alone; no is said of a picture none of whose captions names the thing, or
anything that the thing might hide behind (a "player" may be a man).

The words are those that photographs of everyday life are captioned with (Flickr8k, Flickr30k, COCO), in English.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Literal, get_args

from mmx.data.examples import Example, Turn

DerivedKind = Literal["color", "count", "object", "action", "place", "exists"]
DERIVED_KINDS: tuple[str, ...] = get_args(DerivedKind)
Words = list[str]


def _canon(table: str) -> dict[str, str]:
    """Lines of "name: other spellings" -> every spelling to its name."""
    pairs = (line.split(":") for line in table.strip().splitlines())
    return {word: name.strip() for name, others in pairs for word in (name.strip(), *others.split())}


COLORS = _canon("""
    black:
    white:
    brown:
    red: maroon
    blue:
    green:
    yellow:
    orange:
    pink:
    purple:
    gray: grey
    tan: beige
    gold: golden
    blond: blonde
""")
COLORED = _canon("""
    dog: puppy
    shirt: tshirt t-shirt
    jacket:
    coat:
    dress:
    shorts:
    pants: trousers
    hat: cap
    helmet:
    uniform:
    sweater: sweatshirt
    ball:
    toy:
    collar:
    car: truck
    frisbee:
    horse:
    bird:
    bike: bicycle
    boat: kayak canoe
    slide:
    hair:
    swimsuit: bikini
    wetsuit:
    jersey:
    vest:
""")
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
NAMES_OF_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
MANY = {"group", "several", "crowd", "many", "some", "couple", "bunch", "team", "pack", "family", "others", "crowded"}
FURTHER = {"another", "other", "second"}
PEOPLE = _canon("""
    man: guy gentleman
    woman: lady
    boy:
    girl:
    child: kid toddler baby
    person: player rider biker skateboarder skier snowboarder surfer climber cyclist hiker swimmer runner adult teenager
""")
MEN = {"men": "man", "guys": "man", "women": "woman", "ladies": "woman", "boys": "boy", "girls": "girl"}
PERSONS = {"children": "child", "kids": "child", "toddlers": "child", "babies": "child", "people": "person"}
CROWDS = (
    MEN | PERSONS | dict.fromkeys("players riders bikers skiers hikers cyclists adults runners teens".split(), "person")
)
DOG, DOGS = {"dog", "puppy"}, {"dogs", "puppies"}
# What a person of each sort may be called by those who do not say which.
HIDES = {
    "man": {
        "person",
        "people",
        "adult",
        "adults",
        "someone",
        "group",
        "crowd",
        "team",
        "family",
        "couple",
        "male",
        "they",
    },
    "woman": {"person", "people", "adult", "adults", "someone", "group", "crowd", "team", "family", "couple", "female"},
    "boy": {"child", "children", "kid", "kids", "person", "people", "toddler", "baby", "teenager", "male", "group"},
    "girl": {"child", "children", "kid", "kids", "person", "people", "toddler", "baby", "teenager", "female", "group"},
    "ball": {"toy", "tennis", "soccer", "football", "basketball", "baseball", "volleyball", "rugby"},
    "bike": {"biker", "bikers", "bmx", "cyclist", "cyclists", "bicyclist", "bicyclists", "motorcycle", "motorbike"},
    "motorcycle": {"bike", "motorcyclist", "biker", "bikers", "dirtbike", "motocross", "motorbikes", "bikes"},
    "surfboard": {"surfer", "surfers", "surfing", "board", "surfs", "wakeboard", "bodyboard"},
    "skateboard": {"skateboarder", "skateboarders", "skateboarding", "skater", "board", "skates", "skateboards"},
    "water": {
        "beach",
        "pool",
        "splash",
        "splashing",
        "splashes",
        "swim",
        "swims",
        "swimming",
        "surf",
        "surfer",
        "fountain",
    },
    "snow": {"snowy", "ski", "skier", "skiing", "skis", "snowboard", "snowboarder", "snowboarding", "sled", "ice"},
    "beach": {"sand", "sandy", "shore", "ocean", "surf", "waves", "wave", "sea"},
    "boat": {"sailing", "rowing", "paddling", "raft", "rafting", "ship", "kayaker", "canoeing", "kayaking"},
    "car": {"vehicle", "traffic", "street", "race", "vehicles", "jeep", "van", "bus"},
}
THINGS = _canon("""
    dog: dogs puppy puppies
    man: men guy guys gentleman
    woman: women lady ladies
    boy: boys
    girl: girls
    horse: horses
    bird: birds
    ball: balls
    bike: bikes bicycle bicycles
    motorcycle: motorcycles motorbike
    car: cars truck trucks
    boat: boats kayak kayaks canoe canoes
    surfboard: surfboards
    skateboard:
    frisbee: frisbees
    snow:
    water: ocean lake river sea pond stream
    beach:
""")
MASSES = {"snow", "water"}
PLACES = _canon("""
    beach: shore
    snow:
    water: ocean lake river sea pond stream waves wave surf
    pool:
    field: grass lawn meadow pasture
    street: road sidewalk crosswalk
    park: playground
    woods: forest
    track: racetrack
    mountain: mountains cliff hill mountainside
    sand: desert dirt
    stage:
    yard: backyard
    room: kitchen
    bed: couch sofa
""")
ACTIONS = _canon("""
    running: runs run sprinting racing races
    jumping: jumps jump leaping leaps leap
    sitting: sits sit seated
    standing: stands stand
    walking: walks walk strolling
    swimming: swims swim
    playing: plays play
    climbing: climbs climb
    riding: rides ride biking bicycling
    skateboarding: skates
    surfing: surfs
    skiing: skis
    snowboarding: snowboards
    sleeping: sleeps asleep napping
    lying: laying lies lays
    dancing: dances
    posing: poses pose
    smiling: smiles
    eating: eats
    drinking: drinks
    swinging: swings
    sliding: slides
    fighting: wrestling
    digging: digs
    fishing:
    performing: performs
""")
HANDLING = _canon("""
    holding: holds hold
    riding: rides ride
    carrying: carries carry
    throwing: throws
    kicking: kicks
    catching: catches
    chasing: chases chase
    climbing: climbs
    pulling: pulls
    hitting: hits
    eating: eats
    wearing: wears wear
""")
OBJECTS = _canon("""
    ball: football basketball baseball volleyball
    bike: bicycle
    motorcycle: motorbike
    stick: branch
    frisbee:
    toy:
    horse:
    camera:
    skateboard:
    surfboard:
    rope:
    rock:
    cliff:
    mountain:
    wall:
    tree:
    wave:
    bull:
    bird:
    rabbit:
    dog:
    cat:
    baby:
    guitar:
    flag:
    umbrella:
    sign:
    racket: racquet
    bat:
    scooter:
    swing:
    sled:
    hat: cap
    shirt: t-shirt tshirt
    helmet:
    dress:
    jacket: coat
    uniform:
    suit:
    costume:
    glasses: sunglasses goggles
    swimsuit: bikini
    jeans:
    shorts:
    pants:
    sweater: sweatshirt
    collar:
    snowboard:
    kayak: canoe
    hose:
    net:
    fish:
    microphone:
    cigarette:
    ice:
    book:
    cup: bottle
""")
STOPS = set(
    "in on at by with while and as from for to near over through the of into down up off behind next is are".split()
)


def derive_questions(examples: Iterable[Example], seed: int = 0) -> list[Example]:
    """The examples with the questions that their captions answer added behind what was there.

    A pure function of the examples, in their order, and the seed (which pictures a thing is not in).
    """
    given = list(examples)
    captions = [[t for turn in example.turns if turn.question is None for t in turn.targets] for example in given]
    read = [[_words(caption) for caption in said] for said in captions]
    asked = [[*_colors(said), *_counts(said), *_objects(said), *_actions(said), *_places(said)] for said in read]
    for place, turn in _exists(read, Random(f"exists-{seed}")):
        asked[place].append(turn)
    return [replace(e, turns=(*e.turns, *turns)) for e, turns in zip(given, asked, strict=True)]


def _words(caption: str) -> Words:
    return re.findall(r"[a-z]+(?:-[a-z]+)*", caption.lower())


def _turn(kind: DerivedKind, question: str, answer: str) -> Turn:
    return Turn((answer,), question, kind)


def _agreed(votes: Sequence[str], least: int) -> str | None:
    """What most say, at least so many of them and more than half; None where they do not agree."""
    if not votes:
        return None
    answer, count = Counter(votes).most_common(1)[0]
    return answer if count >= least and 2 * count > len(votes) else None


# ---- what is asked -----------------------------------------------------------------------------------------------


def _colors(said: Sequence[Words]) -> Iterator[Turn]:
    """ "a black and white dog" -> what color is the dog? black and white"""
    votes: dict[str, list[str]] = defaultdict(list)
    for words in said:
        seen = {}
        for place, word in enumerate(words):
            if word in COLORED and (color := _color_before(words[:place])):
                seen.setdefault(COLORED[word], color)
        for thing, color in seen.items():
            votes[thing].append(color)
    for thing, colors in votes.items():
        if answer := _agreed(colors, least=min(2, len(colors))):
            verb = "are" if thing in ("shorts", "pants") else "is"
            yield _turn("color", f"what color {verb} the {thing}?", answer)


def _color_before(words: Words) -> str | None:
    """The color or two colors at the end of some words; None where there is none."""
    if not words or words[-1] not in COLORS:
        return None
    last = COLORS[words[-1]]
    earlier = words[-3] if len(words) > 2 and words[-2] == "and" else None
    return " and ".join(sorted({COLORS[earlier], last})) if earlier in COLORS else last


def _counts(said: Sequence[Words]) -> Iterator[Turn]:
    """ "two brown dogs", "a dog and another dog" -> how many dogs are there? two"""
    singular = {"dogs": DOG, "people": set(PEOPLE)}
    plural = {"dogs": DOGS, "people": set(CROWDS)}
    for things in ("dogs", "people"):
        votes = [_count(words, singular[things], plural[things]) for words in said]
        answer = _agreed([NAMES_OF_NUMBERS.get(v, "") for v in votes if v is not None], least=2)
        if answer:
            yield _turn("count", f"how many {things} are there?", answer)


def _count(words: Words, singular: set[str], plural: set[str]) -> int | None:
    """How many of a thing a caption tells of; 0 where it cannot be told, None where it tells of none."""
    if not any(word in singular or word in plural for word in words):
        return None
    if MANY & set(words):
        return 0
    total, number = 0, 0
    for word in words:
        if word in NUMBERS or word in FURTHER:
            number = NUMBERS.get(word, 1)
        elif word in plural:
            if number < 2:
                return 0
            total, number = total + number, 0
        elif word in singular:
            total, number = total + number, 0
        elif word in STOPS and word != "and":
            number = 0
    return total or 1  # "the dog", "dog runs": one, with no number to it


def _objects(said: Sequence[Words]) -> Iterator[Turn]:
    """ "a boy holds a red ball" -> what is the boy holding? ball"""
    votes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for words in said:
        subject = _subject(words)
        for place, word in enumerate(words):
            if subject and word in HANDLING and (thing := _object(words[place + 1 :])):
                votes[subject, HANDLING[word]].append(thing)
                break
    for (subject, deed), things in votes.items():
        if answer := _agreed(things, least=1):
            yield _turn("object", f"what is the {subject} {deed}?", answer)


def _object(words: Words) -> str | None:
    """What a noun phrase at the beginning of some words is about: its last known thing."""
    found = None
    for place, word in enumerate(words[:5]):
        if word in STOPS and not (word == "the" and place == 0):
            break
        found = OBJECTS.get(word, found)
    return found


def _actions(said: Sequence[Words]) -> Iterator[Turn]:
    """ "a dog runs", "a dog running" -> what is the dog doing? running"""
    votes: dict[str, list[str]] = defaultdict(list)
    for words in said:
        subject = _subject(words)
        deed = next((ACTIONS[word] for word in words if word in ACTIONS), None)
        if subject and deed:
            votes[subject].append(deed)
    for subject, deeds in votes.items():
        if answer := _agreed(deeds, least=2):
            yield _turn("action", f"what is the {subject} doing?", answer)


def _subject(words: Words) -> str | None:
    """Whom a caption is about, where that is one: the first dog or person in it, before any crowd."""
    for word in words:
        if word in DOGS or word in CROWDS or word in MANY:
            return None
        if word in DOG:
            return "dog"
        if word in PEOPLE:
            return PEOPLE[word]
    return None


def _places(said: Sequence[Words]) -> Iterator[Turn]:
    """ "in the snow" -> where is this? snow"""
    votes = []
    for words in said:
        here = {PLACES[word] for place, word in enumerate(words) if word in PLACES and _is_place(words[:place])}
        votes += sorted(here)
    counts = Counter(votes).most_common(2)
    if counts and counts[0][1] >= 2 and (len(counts) == 1 or counts[0][1] > counts[1][1]):
        yield _turn("place", "where is this?", counts[0][0])


def _is_place(before: Words) -> bool:
    return any(word in ("in", "on", "at", "through", "along", "across", "into", "down", "near") for word in before[-4:])


def _exists(read: Sequence[Sequence[Words]], rng: Random) -> Iterator[tuple[int, Turn]]:
    """(place of the picture, question): each thing with yes as often as with no."""
    named = [_named(said) for said in read]
    spoken = [{word for words in said for word in words} for said in read]
    for thing in sorted(set(THINGS.values())):
        shown = [place for place, counts in enumerate(named) if counts[thing] >= 2]
        hides = HIDES.get(thing, set())
        absent = [p for p, counts in enumerate(named) if spoken[p] and not counts[thing] and not hides & spoken[p]]
        each = min(len(shown), len(absent))
        question = f"is there {'' if thing in MASSES else 'a '}{thing}?"
        for answer, places in (("yes", shown), ("no", absent)):
            for place in sorted(rng.sample(places, each)):
                yield place, _turn("exists", question, answer)


def _named(said: Sequence[Words]) -> Mapping[str, int]:
    """How many captions name each thing."""
    return Counter(thing for words in said for thing in {THINGS[word] for word in words if word in THINGS})
