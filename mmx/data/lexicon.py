"""English words of captions of everyday photographs (Flickr8k, Flickr30k, COCO), for `mmx.data.derived_questions`.

The tables map each spelling to the name that questions and answers use.
"""

from __future__ import annotations

from collections import defaultdict


def _word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _parse_table(table: str) -> list[tuple[str, frozenset[str]]]:
    """Parse lines of the form "name: words"."""
    rows = []
    for line in table.strip().splitlines():
        name, words = line.split(":")
        rows.append((name.strip(), _word_set(words)))
    return rows


def _canonical_names(table: str) -> dict[str, str]:
    """Parse lines of the form "name: other spellings" and return the name of every spelling."""
    names = {}
    for name, others in _parse_table(table):
        for word in (name, *others):
            names[word] = name
    return names


def _word_sets(table: str) -> dict[str, frozenset[str]]:
    """Parse lines of the form "name: words" and return the words of each name; a name may have several lines."""
    sets: dict[str, frozenset[str]] = defaultdict(frozenset)
    for name, words in _parse_table(table):
        sets[name] |= words
    return dict(sets)


# ---- colors and numbers ------------------------------------------------------------------------------------------

COLORS = _canonical_names("""
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
COLORED_THINGS = _canonical_names("""
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
NUMBER_NAMES = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
CROWD_WORDS = _word_set("""
    group several crowd many some couple bunch team pack family others crowded lot audience onlookers spectators
    officers bystanders passengers opponents band crew class
""")
ADDITION_WORDS = _word_set("another other second")

# ---- people, dogs, things ----------------------------------------------------------------------------------------

PEOPLE = _canonical_names("""
    man: guy gentleman
    woman: lady
    boy:
    girl:
    child: kid toddler baby
    person: player rider biker skateboarder skier snowboarder surfer climber cyclist hiker swimmer runner adult teenager
""")
PLURAL_PEOPLE = _canonical_names("""
    men: guys
    women: ladies
    boys:
    girls:
    children: kids toddlers babies
    people: players riders bikers skiers hikers cyclists adults runners
""")
DOG_SINGULAR = _word_set("dog puppy")
DOG_PLURAL = _word_set("dogs puppies")
BEINGS = DOG_SINGULAR | DOG_PLURAL | PEOPLE.keys() | PLURAL_PEOPLE.keys()
THINGS = _canonical_names("""
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
MASS_NOUNS = _word_set("snow water")
# If a caption has one of these words, the thing may be in the image although no caption names it.
AMBIGUOUS_WORDS = _word_sets("""
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
_PEOPLE_OF_ANY_KIND = {**PEOPLE, **PLURAL_PEOPLE}
_UNSPECIFIC_PEOPLE = frozenset(word for word, name in _PEOPLE_OF_ANY_KIND.items() if name in ("person", "people"))
_ANY_ADULT = _UNSPECIFIC_PEOPLE | _word_set("""
    someone group crowd team family couple skater skaters bicyclist bicyclists athlete athletes officer officers police
    soldier soldiers fisherman performer performers motorcyclist dancer dancers climbers surfers spectators they
""")
_ANY_YOUTH = _ANY_ADULT | _word_set("child children kid kids toddler baby teenagers youth youths")
AMBIGUOUS_WORDS |= {"man": _ANY_ADULT | {"male"}, "woman": _ANY_ADULT | {"female"}}
AMBIGUOUS_WORDS |= {"boy": _ANY_YOUTH | {"male"}, "girl": _ANY_YOUTH | {"female"}}

# ---- places, actions, objects of actions ----------------------------------------------------------------------------

PLACES = _canonical_names("""
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
ACTIONS = _canonical_names("""
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
TRANSITIVE_VERBS = _canonical_names("""
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
OBJECTS = _canonical_names("""
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
WEARABLE = _word_set("""
    hat shirt helmet dress jacket uniform suit costume glasses swimsuit jeans shorts pants sweater collar
""")
PHRASE_ENDS = _word_set("""
    in on at by with while and as from for to near over through the of into down up off behind next is are
""")

# ---- animals ------------------------------------------------------------------------------------------------------

ANIMALS = _canonical_names("""
    dog: dogs puppy puppies greyhound greyhounds terrier retriever poodle collie dachshund dalmatian rottweiler beagle
    cat: cats kitten kittens
    horse: horses pony ponies
    bird: birds seagull seagulls pigeon pigeons duck ducks goose geese swan swans eagle parrot flamingo
    cow: cows cattle calf
    bull: bulls
    sheep: lamb lambs
    goat: goats
    elephant: elephants
    monkey: monkeys
    rabbit: rabbits bunny
    fish:
    camel: camels
    deer:
    donkey: donkeys
    squirrel: squirrels
    fox: foxes
    bear: bears
    pig: pigs
    turtle: turtles
    butterfly: butterflies
""")
# Words with which an animal may be none, as in "a boy in a cow costume", or of another kind.
NOT_LIVING_WORDS = _word_set("""
    statue statues costume costumes stuffed carousel sculpture painting painted inflatable mask doll mascot mascots
""")
ANIMAL_WORDS = frozenset(ANIMALS) | _word_set("""
    animal animals pet pets shepherd husky pitbull hound hounds pup pups bulldog boxer lab labrador spaniel chihuahua
    sheltie rottweiler corgi wolf lion tiger zebra giraffe dolphin whale seal frog lizard snake hamster insect bug
    calves sled carriage jockey rodeo cowboy zoo
""")
HUMAN_WORDS = (
    frozenset(_PEOPLE_OF_ANY_KIND)
    | _ANY_YOUTH
    | _word_set("""
    male female males females human humans hand hands owner owners mother father mom dad parent parents son daughter
    brother brothers sister sisters friend friends bride groom worker workers jockey jockeys cowboy cowboys driver
    racer racers passenger artist musician singer fighter fighters wrestler wrestlers cheerleader cheerleaders pitcher
    catcher batter goalie referee coach trainer face leg legs arm arms feet foot skates swimmers swimmer rollerblader
    individual individuals persons he she himself herself they
""")
)
WORN_THINGS = _word_set("""
    shirt jacket coat dress shorts pants hat helmet uniform sweater hair swimsuit wetsuit jersey vest
""")

# ---- what excludes an answer "yes" -----------------------------------------------------------------------------------

# Colors that captions may name for the same thing, by color.
SIMILAR_COLORS = _word_sets("""
    black: gray brown blue
    white: gray tan blond yellow
    brown: tan gold red orange black blond
    red: pink orange purple brown
    blue: purple green black gray
    green: blue yellow
    yellow: gold orange tan blond green white
    orange: red yellow gold brown tan
    pink: red purple
    purple: pink blue red
    gray: white black tan blue
    tan: brown white gold yellow orange blond gray
""")
# Actions that a being is not doing while it does another one.
EXCLUDED_ACTIONS = _word_sets("""
    running: sitting lying sleeping swimming standing climbing
    jumping: sitting lying sleeping
    sitting: running jumping walking swimming climbing standing skateboarding surfing skiing dancing
    standing: running sitting lying sleeping swimming
    walking: sitting lying sleeping swimming running jumping climbing
    swimming: sitting running walking climbing skateboarding standing
    climbing: sitting swimming running lying sleeping
    lying: running jumping walking standing swimming climbing
    sleeping: running jumping walking swimming climbing eating
    riding: swimming sleeping walking running lying climbing
    skateboarding: sitting swimming lying sleeping climbing
    surfing: sitting running walking climbing sleeping
    skiing: sitting swimming lying sleeping climbing running
    snowboarding: sitting swimming lying sleeping climbing running
    dancing: sitting lying sleeping swimming climbing
    sliding: walking swimming standing sleeping
    swinging: walking swimming running lying
    racing: sitting sleeping lying swimming
""")
INDOOR_WORDS = _word_set("""
    indoors indoor kitchen bedroom bathroom bathtub couch sofa carpet carpeted classroom office ballroom
    gymnasium bowling livingroom hallway
""")
OUTDOOR_WORDS = _word_set("""
    outdoors outdoor outside beach shore snow snowy ocean lake river pond sea creek waves wave field meadow pasture
    grass grassy lawn street road sidewalk park playground woods wooded forest mountain mountains mountainside cliff
    hill sand sandy desert yard backyard trail sky trees beachfront hillside path
""")
PLACE_PHRASES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "water": "in the water",
    "pool": "in a pool",
    "street": "on the street",
    "woods": "in the woods",
    "grass": "on the grass",
}
# If a caption has one of these words, the image may be of the place although no caption names it.
WORDS_OF_PLACES = {
    "beach": AMBIGUOUS_WORDS["beach"],
    "snow": AMBIGUOUS_WORDS["snow"],
    "water": AMBIGUOUS_WORDS["water"],
    "pool": _word_set("water swim swims swimming swimmer swimmers splash splashing splashes dive dives diving tub"),
    "street": _word_set("""
        city urban car cars truck bus parade market shop shops store building buildings pavement traffic town bicycle
        bike bikes motorcycle motorcycles cyclists cyclist race marathon concrete cement paved path skateboard parking
    """),
    "woods": _word_set("tree trees wooded trail path bushes jungle leaves branch branches log logs park hill mountain"),
    "grass": _word_set("""
        grassy field park yard backyard lawn meadow pasture garden green soccer football baseball rugby outside hill
        outdoors trail woods forest
    """),
}
