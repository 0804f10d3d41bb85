"""The words that photographs of everyday life are captioned with (Flickr8k, Flickr30k, COCO), in English: each spelling
to the name that questions and answers use. For `mmx.data.derived`."""

from __future__ import annotations


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
CROWDS = {
    **MEN,
    **PERSONS,
    **dict.fromkeys(("players", "riders", "bikers", "skiers", "hikers", "cyclists", "adults", "runners"), "person"),
}
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
STOPS = {
    "in",
    "on",
    "at",
    "by",
    "with",
    "while",
    "and",
    "as",
    "from",
    "for",
    "to",
    "near",
    "over",
    "through",
    "the",
    "of",
    "into",
    "down",
    "up",
    "off",
    "behind",
    "next",
    "is",
    "are",
}
