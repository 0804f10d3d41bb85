"""The words that photographs of everyday life are captioned with (Flickr8k, Flickr30k, COCO), in English: each spelling
to the name that questions and answers use. For `mmx.data.derived_questions`."""

from __future__ import annotations

from collections import defaultdict


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _lines(table: str) -> list[tuple[str, frozenset[str]]]:
    """Lines of "name: words"."""
    return [(name.strip(), _set(words)) for name, words in (line.split(":") for line in table.strip().splitlines())]


def _canon(table: str) -> dict[str, str]:
    """Lines of "name: other spellings" -> every spelling to its name."""
    return {word: name for name, others in _lines(table) for word in (name, *others)}


def _hiding(table: str) -> dict[str, frozenset[str]]:
    """Lines of "thing: words that it may hide behind" -> the words of each thing."""
    found: dict[str, frozenset[str]] = defaultdict(frozenset)
    for name, words in _lines(table):
        found[name] |= words
    return dict(found)


# ---- colors and numbers ------------------------------------------------------------------------------------------

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
MANY = _set("""
    group several crowd many some couple bunch team pack family others crowded lot audience onlookers spectators
    officers bystanders passengers opponents band crew class
""")
FURTHER = _set("another other second")

# ---- people, dogs, things ----------------------------------------------------------------------------------------

PEOPLE = _canon("""
    man: guy gentleman
    woman: lady
    boy:
    girl:
    child: kid toddler baby
    person: player rider biker skateboarder skier snowboarder surfer climber cyclist hiker swimmer runner adult teenager
""")
CROWDS = _canon("""
    men: guys
    women: ladies
    boys:
    girls:
    children: kids toddlers babies
    people: players riders bikers skiers hikers cyclists adults runners
""")
DOG, DOGS = _set("dog puppy"), _set("dogs puppies")
BEINGS = DOG | DOGS | PEOPLE.keys() | CROWDS.keys()
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
MASSES = _set("snow water")
# Of a picture whose captions have one of these words, nobody can say that it is without the thing.
HIDES = _hiding("""
    ball: toy tennis soccer football basketball baseball volleyball rugby golf
    bike: biker bikers bmx cyclist cyclists bicyclist bicyclists motorcycle motorbike
    motorcycle: bike bikes motorcyclist biker bikers dirtbike motocross motorbikes
    surfboard: surfer surfers surfing board surfs wakeboard bodyboard
    skateboard: skateboarder skateboarders skateboarding skater board skates skateboards
    water: beach pool splash splashing splashes swim swims swimming surf surfer fountain wave waves boat boats
    water: kayak kayaks canoe canoes raft rafting dock wakeboard wakeboarding waterskier sailboat creek rapids puddle
    snow: snowy ski skier skiers skiing skis snowboard snowboarder snowboarding sled ice
    beach: sand sandy shore ocean surf waves wave sea
    boat: sailing sailboat rowing paddling raft rafting ship kayaker canoeing kayaking dock wakeboard wakeboarding
    car: vehicle traffic street race vehicles jeep van bus
""")
_UNTOLD = frozenset(word for table in (PEOPLE, CROWDS) for word, name in table.items() if name in ("person", "people"))
_SOMEBODY = _UNTOLD | _set("""
    someone group crowd team family couple skater skaters bicyclist bicyclists athlete athletes officer officers police
    soldier soldiers fisherman performer performers motorcyclist dancer dancers climbers surfers spectators they
""")
_YOUNG = _SOMEBODY | _set("child children kid kids toddler baby teenagers youth youths")
HIDES |= {"man": _SOMEBODY | {"male"}, "woman": _SOMEBODY | {"female"}}
HIDES |= {"boy": _YOUNG | {"male"}, "girl": _YOUNG | {"female"}}

# ---- places, deeds, what is handled ------------------------------------------------------------------------------

PLACES = _canon("""
    beach: shore
    snow:
    water: ocean lake river sea pond stream waves wave surf
    pool:
    field: meadow pasture
    grass: lawn
    street: road sidewalk crosswalk
    park: playground
    woods: forest
    track: racetrack
    mountain: mountains mountainside
    cliff:
    hill:
    sand: desert
    stage:
    yard: backyard
    room: kitchen
    bed:
    couch: sofa
""")
ACTIONS = _canon("""
    running: runs run sprinting
    racing: races
    jumping: jumps jump leaping leaps leap
    sitting: sits sit seated
    standing: stands stand
    walking: walks walk strolling
    swimming: swims swim
    playing: plays play
    climbing: climbs climb
    riding: rides ride biking bicycling
    skateboarding:
    skating: skates
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
    book:
    cup:
    bottle:
    hot-dog:
    ice-cream:
""")
WORN = _set("""
    hat shirt helmet dress jacket uniform suit costume glasses swimsuit jeans shorts pants sweater collar
""")
STOPS = _set("""
    in on at by with while and as from for to near over through the of into down up off behind next is are
""")
