"""Synthetic scenes: pure, painted where they say, and every text re-checked by a slow reader of plain sentences."""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from math import dist
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from mmx.data import scene_texts
from mmx.data.scene_texts import SceneQuestion, captions, full_caption, pointed_questions, questions, write_scenes
from mmx.data.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Scene,
    SceneObject,
    corner_name,
    generate_scene,
    relation_holds,
    render_scene,
)
from mmx.errors import DataError

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
# The most a reader may score without looking, by always giving one answer.
BLIND = {
    "exists": 0.52,
    "num_examples": 0.35,
    "color_jitter": 0.18,
    "shape": 0.24,
    "size": 0.55,
    "relation": 0.34,
    "positions": 0.27,
}

any_scene = st.builds(generate_scene, st.integers(), st.integers(min_value=0))


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [generate_scene(1, index) for index in range(1000)]


# The slow reader: knows nothing of how texts are made, only what the words mean. --------------------------------------


def fits(thing: SceneObject, phrase: str) -> bool:
    words = [re.sub(r"(?<=ss)es$|(?<!s)s$", "", word) for word in phrase.split()]
    return all(word in (thing.size, thing.color, thing.shape, "thing", "shape") for word in words)


def how_many(scene: Scene, phrase: str) -> int:
    return sum(fits(thing, phrase) for thing in scene.objects)


def the_only(scene: Scene, phrase: str) -> SceneObject:
    (thing,) = (thing for thing in scene.objects if fits(thing, phrase))
    return thing


def steps(a: SceneObject, b: SceneObject, side: str) -> tuple[float, float]:
    """How far a lies on that side of b, and how far to either side of that direction."""
    x = (a.box[0] + a.box[2] - b.box[0] - b.box[2]) / 2
    y = (a.box[1] + a.box[3] - b.box[1] - b.box[3]) / 2
    return {"left of": (-x, abs(y)), "right of": (x, abs(y)), "above": (-y, abs(x)), "below": (y, abs(x))}[side]


def stands(a: SceneObject, b: SceneObject, side: str) -> bool:
    along, across = steps(a, b, side)
    return along >= 0.15 and along >= across


def is_related(scene: Scene, first: str, side: str, second: str) -> str:
    a, b = the_only(scene, first), the_only(scene, second)
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[side]
    assert stands(a, b, side) != stands(a, b, back), "neither is clear"
    return "yes" if stands(a, b, side) else "no"


def beside(scene: Scene, side: str, name: str) -> str:
    b = the_only(scene, name)
    (a,) = (a for a in scene.objects if a is not b and steps(a, b, side)[0] > 0)
    assert stands(a, b, side)
    return f"{a.color} {a.shape}"


def where(thing: SceneObject) -> str:
    x, y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
    if 0.42 <= x <= 0.58 and 0.42 <= y <= 0.58:
        return "center"
    assert not 0.35 < x < 0.65 and not 0.35 < y < 0.65, "between two regions"
    return f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"


SIDE = "(left of|right of|above|below)"
ANSWERS: dict[str, Callable[..., str]] = {
    r"is there an? (.+)\?": lambda scene, phrase: "yes" if how_many(scene, phrase) else "no",
    r"how many (.+) are there\?": lambda scene, phrase: str(how_many(scene, phrase)),
    r"what (color|shape|size) is the (.+)\?": lambda scene, word, name: getattr(the_only(scene, name), word),
    rf"is the (.+) {SIDE} the (.+)\?": is_related,
    rf"what is {SIDE} the (.+)\?": beside,
    r"where is the (.+)\?": lambda scene, name: where(the_only(scene, name)),
}


def read_answer(scene: Scene, question: str) -> str:
    found = [(rule, match) for text, rule in ANSWERS.items() if (match := re.fullmatch(text, question))]
    ((rule, match),) = found
    return rule(scene, *match.groups())


def is_listing(scene: Scene, caption: str) -> bool:
    """Whether the caption names every object exactly once."""
    groups = [part.split(" ", 1) for part in re.split(r", | and ", caption)]
    counted = [(NUMBERS[number], phrase) for number, phrase in groups]
    return sum(n for n, _ in counted) == len(scene.objects) and all(how_many(scene, p) == n for n, p in counted)


def is_true(scene: Scene, caption: str) -> bool:
    if match := re.fullmatch(r"(\w+) shapes? on a (.+) background", caption):
        return NUMBERS[match[1]] == len(scene.objects) and match[2] == scene.background
    if match := re.fullmatch(r"an? (.+) in the (.+)", caption):
        return any(where_or_none(thing) == match[2] for thing in scene.objects if fits(thing, match[1]))
    if match := re.fullmatch(rf"an? (.+) {SIDE} an? (.+)", caption):
        firsts, seconds = ([thing for thing in scene.objects if fits(thing, match[n])] for n in (1, 3))
        return any(a is not b and stands(a, b, match[2]) for a in firsts for b in seconds)
    return is_listing(scene, caption)


def where_or_none(thing: SceneObject) -> str | None:
    try:
        return where(thing)
    except AssertionError:
        return None


# Scenes and pictures. ------------------------------------------------------------------------------------------------


@given(any_scene)
@settings(max_examples=60, deadline=None)
def test_any_scene_is_sound(scene: Scene) -> None:
    assert 1 <= len(scene.objects) <= 4
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        assert min(x0, y0) >= 0.0199 and max(x1, y1) <= 0.9801
        assert thing.center == ((x0 + x1) / 2, (y0 + y1) / 2)
        low, high = {"small": (0.1699, 0.2001), "large": (0.2999, 0.3501)}[thing.size]
        assert low <= x1 - x0 <= high and low <= y1 - y0 <= high
    for a, b in combinations([thing.box for thing in scene.objects], 2):
        assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= 0.0299  # GAP, less one rounding


def test_same_seed_and_index_give_the_same_bytes() -> None:
    state = random.getstate()
    for index in range(30):
        first, second = generate_scene(5, index), generate_scene(5, index)
        assert first == second and render_scene(first).tobytes() == render_scene(second).tobytes()
        assert captions(first) == captions(second) and questions(first) == questions(second)
    assert random.getstate() == state, "the global generator was used"


def test_the_series_is_the_same_on_every_machine() -> None:
    """A change of this digest changes every data set made so far: do it on purpose or not at all."""
    scenes = [generate_scene(0, index) for index in range(50)]
    asked = [[(q.question, q.answer, q.question_type, q.evidence) for q in questions(scene)] for scene in scenes]
    text = repr([(scene, captions(scene)) for scene in scenes]) + repr(asked)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f3775a68e282ba0c"


def test_other_seeds_and_indices_give_other_scenes(many: list[Scene]) -> None:
    scenes = [generate_scene(seed, index) for seed in range(20) for index in range(20)]
    assert len(set(scenes)) == 400
    assert len({captions(many[7], seed) for seed in range(20)}) > 3
    assert len({questions(many[7], seed) for seed in range(20)}) == 20


def test_size_changes_the_picture_only() -> None:
    small, large = generate_scene(3, 4, size=64), generate_scene(3, 4, size=200)
    assert small.objects == large.objects and questions(small) == questions(large)
    assert render_scene(small).size == (64, 64) and render_scene(large).size == (200, 200)
    assert render_scene(large, 64).tobytes() == render_scene(small).tobytes()


@pytest.mark.parametrize("size", [96, 128, 224])
def test_boxes_are_true(size: int, many: list[Scene]) -> None:
    for scene in many[:60]:
        painted = render_scene(scene, size)
        rest = painted.copy()
        for thing in scene.objects:
            alone = render_scene(replace(scene, objects=(thing,)), size)
            around = outward(thing, size)
            assert_fills_its_box(alone, scene, thing)
            assert painted.crop(around).tobytes() == alone.crop(around).tobytes()
            rest.paste(BACKGROUNDS[scene.background], around)
        assert rest.getcolors() == [(size * size, BACKGROUNDS[scene.background])]


def outward(thing: SceneObject, size: int) -> tuple[int, int, int, int]:
    """The box in whole pixels, rounded to the outside."""
    x0, y0, x1, y1 = (value * size for value in thing.box)
    return int(x0), int(y0), int(x1) + 1, int(y1) + 1


def assert_fills_its_box(alone: Image.Image, scene: Scene, thing: SceneObject) -> None:
    background = Image.new("RGB", alone.size, BACKGROUNDS[scene.background])
    change = ImageChops.difference(alone, background).convert("L")
    half = max(value for value, count in enumerate(change.histogram()) if count) // 2
    solid = change.point([255 * (value > half) for value in range(256)])  # pixels more than half inside the shape
    for edges, slack in ((change.getbbox(), 1), (solid.getbbox(), 2)):
        assert edges is not None
        assert all(abs(edge - value * alone.width) <= slack for edge, value in zip(edges, thing.box, strict=True))
    middle = alone.getpixel((int(thing.center[0] * alone.width), int(thing.center[1] * alone.width)))
    assert middle == COLORS[thing.color]


def test_shapes_and_colours_can_be_told_apart() -> None:
    for a, b in combinations([*COLORS.values()], 2):
        assert dist(a, b) > 75
    assert all(dist(a, b) > 110 for a in COLORS.values() for b in BACKGROUNDS.values())
    lone = [Scene((SceneObject(shape, "black", "small", (0.4, 0.4, 0.56, 0.56)),), "white") for shape in SHAPES]
    pictures = [render_scene(scene).convert("L").crop((51, 51, 72, 72)) for scene in lone]
    for one, other in combinations(pictures, 2):
        different = sum(ImageChops.difference(one, other).point(lambda v: v > 128).histogram()[1:])
        assert different >= 40  # of 21 x 21 pixels


def test_what_is_doubtful_is_not_said() -> None:
    def at(x: float, y: float) -> SceneObject:
        return SceneObject("star", "red", "small", (x - 0.1, y - 0.1, x + 0.1, y + 0.1))

    assert relation_holds(at(0.3, 0.5), at(0.5, 0.4), "left of")
    assert not relation_holds(at(0.3, 0.5), at(0.5, 0.4), "below")  # further apart from left to right
    assert not relation_holds(at(0.36, 0.5), at(0.5, 0.5), "left of")  # hardly apart at all
    assert [corner_name(at(x, 0.9)) for x in (0.3, 0.36, 0.5, 0.7)] == ["bottom left", None, None, "bottom right"]
    assert [corner_name(at(x, 0.5)) for x in (0.43, 0.41, 0.1)] == ["center", None, None]


# Texts. --------------------------------------------------------------------------------------------------------------


def test_every_question_is_answered_right(many: list[Scene]) -> None:
    for scene in many:
        asked = questions(scene)
        assert 6 <= len(asked) <= 10 and len({each.question for each in asked}) == len(asked)
        for each in asked:
            assert read_answer(scene, each.question) == each.answer, (scene, each)
            assert_box_is_of_the_object_asked_about(scene, each)
            assert each.question_type not in ("color", "shape", "size") or each.answer not in each.question


def assert_box_is_of_the_object_asked_about(scene: Scene, asked: SceneQuestion) -> None:
    if asked.question_type in ("exists", "count"):
        assert asked.evidence is None
        return
    (about,) = (thing for thing in scene.objects if thing.box == asked.evidence)
    if match := re.fullmatch(rf"what is {SIDE} the (.+)\?", asked.question):
        assert asked.answer == f"{about.color} {about.shape}" and not fits(about, match[2])
    else:
        subject = re.search(rf"is the (.+?)( {SIDE} .*)?\?", asked.question)
        assert subject is not None and the_only(scene, subject[1]) is about


@given(any_scene, st.integers())
@settings(max_examples=60, deadline=None)
def test_texts_of_any_scene_are_true(scene: Scene, seed: int) -> None:
    assert all(read_answer(scene, each.question) == each.answer for each in questions(scene, seed))
    assert all(is_true(scene, caption) for caption in captions(scene, seed))


def test_every_caption_is_true(many: list[Scene]) -> None:
    for scene in many:
        said = captions(scene)
        assert 3 <= len(said) <= 5 and len(set(said)) == len(said)
        for caption in said:
            assert caption == caption.lower().strip(" .") and is_true(scene, caption), (scene, caption)
        if len(scene.objects) <= 3:  # each part is number, size, colour and shape
            assert is_listing(scene, said[0])
            assert {len(part.split()) for part in re.split(", | and ", said[0])} == {4}


def test_the_slow_reader_notices_a_lie() -> None:
    star = SceneObject("star", "red", "small", (0.1, 0.4, 0.28, 0.58))
    square = SceneObject("square", "blue", "large", (0.6, 0.4, 0.92, 0.72))
    scene = Scene((star, square), "white")
    assert read_answer(scene, "is the star left of the square?") == "yes"
    assert read_answer(scene, "is the star right of the blue thing?") == "no"
    assert read_answer(scene, "how many red stars are there?") == "1"
    for true in ("a small red star and a large blue square", "two shapes on a white background"):
        assert is_true(scene, true) and not is_true(replace(scene, objects=(star,)), true)
    for lie in ("a square left of a star", "a red star and a blue cross", "two stars", "a red star in the top left"):
        assert not is_true(scene, lie)


def test_no_answer_is_a_safe_guess(many: list[Scene]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in many:
        for each in questions(scene):
            answers[each.question_type][each.answer] += 1
    assert set(answers) == set(BLIND)
    for kind, counter in answers.items():
        assert max(counter.values()) / counter.total() <= BLIND[kind], (kind, counter)
    for kind in ("exists", "relation"):
        yes, no = answers[kind]["yes"], answers[kind]["no"]
        assert 0.45 <= yes / (yes + no) <= 0.55
    assert set(answers["count"]) == set("01234") and len(answers["position"]) == 5


def test_the_wording_does_not_give_existence_away(many: list[Scene]) -> None:
    """Within each wording (which words are spoken) yes and no are about as frequent."""
    shares: dict[tuple[bool, ...], Counter[str]] = defaultdict(Counter)
    for scene in many:
        for each in questions(scene):
            if each.question_type == "exists":
                spoken = each.question.strip("?").split()
                wording = tuple(any(w in spoken for w in words) for words in (("small", "large"), COLORS, SHAPES))
                shares[wording][each.answer] += 1
    assert len(shares) == 6
    assert all(0.4 <= counter["yes"] / counter.total() <= 0.6 for counter in shares.values())


def test_pointing_names_each_object(many: list[Scene]) -> None:
    scene = next(scene for scene in many if len(scene.objects) > 1)
    asked = pointed_questions(scene)
    assert [each.box for each in asked] == [each.evidence for each in asked] == [thing.box for thing in scene.objects]
    assert not pointed_questions(next(scene for scene in many if len(scene.objects) == 1)), "nothing to point out"
    assert [each.answer for each in asked] == [f"{thing.color} {thing.shape}" for thing in scene.objects]
    assert {(each.question, each.question_type) for each in asked} == {("what is this?", "pointed")}


def test_a_full_caption_tells_where_it_names_each_object(many: list[Scene]) -> None:
    told = 0
    for scene in many:
        looks = {(thing.size, thing.color, thing.shape) for thing in scene.objects}
        full = full_caption(scene)
        assert (full is None) == (len(scene.objects) > 3 or len(looks) < len(scene.objects))
        if full is not None:
            assert full.text == captions(scene)[0] and len(full.mentions) == len(scene.objects)
            for each, thing in zip(full.mentions, scene.objects, strict=True):
                before = full.text[: each.start].split()
                assert full.text[each.start :].startswith(each.word) and before[-2:] == [thing.size, thing.color]
                assert (each.word, each.box) == (thing.shape, thing.box)
            assert len({each.start for each in full.mentions}) == len(full.mentions)
            told += 1
    assert told > 500


# Folders. ------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_folder_holds_all_of_it(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "deep" / "set", 5, seed=9, size=64)
    scenes = [generate_scene(9, index, size=64) for index in range(5)]
    assert [path.name for path in folder.parent.iterdir()] == ["set"], "a temporary folder was left behind"
    names = [row["image"] for row in lines(folder / "scenes.jsonl")]
    assert names == [f"images/{index:06d}.png" for index in range(5)]
    for name, scene, said in zip(names, scenes, lines(folder / "captions.jsonl"), strict=True):
        assert said == {"image": name, "captions": list(captions(scene))}
        with Image.open(folder / str(name)) as stored:
            assert stored.mode == "RGB" and stored.tobytes() == render_scene(scene).tobytes()
        rows = [row for row in lines(folder / "questions.jsonl") if row["image"] == name]
        assert [as_question(row) for row in rows] == [*questions(scene), *pointed_questions(scene)]
    assert [as_scene(row) for row in lines(folder / "scenes.jsonl")] == scenes


def as_question(row: dict[str, Any]) -> SceneQuestion:
    assert None not in row.values()
    evidence, box = (tuple(row[name]) if name in row else None for name in ("evidence", "box"))
    return SceneQuestion(row["question"], row["answer"], row["kind"], evidence, box)


def as_scene(row: dict[str, Any]) -> Scene:
    objects = (SceneObject(**{**each, "box": tuple(each["box"])}) for each in row["max_objects"])
    return Scene(tuple(objects), row["background"], row["pixels"])


def test_writing_twice_gives_equal_bytes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()  # an empty folder is welcome
    one, two = (write_scenes(tmp_path / name, 3, seed=2) for name in "ab")
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 6
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match=r"already exists.*new or empty folder: give another one, .*set-2'\.$"):
        write_scenes(tmp_path / "set", 2)
    with pytest.raises(DataError, match="already exists"):
        write_scenes(tmp_path / "set" / "mine.txt", 2)
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "mine.txt"]


@pytest.mark.parametrize(("count", "size"), [(0, 128), (-1, 128), (3, 31)])
def test_numbers_without_a_meaning_are_refused(tmp_path: Path, count: int, size: int) -> None:
    with pytest.raises(DataError, match=f"num_examples={count} and size={size} were given"):
        write_scenes(tmp_path / "set", count, size=size)
    assert not list(tmp_path.iterdir())


def test_nothing_stays_of_a_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scene: Scene) -> Image.Image:
        if scene == generate_scene(0, 2):
            raise OSError("disk full")
        return render_scene(scene)

    monkeypatch.setattr(scene_texts, "picture", broken)
    with pytest.raises(OSError, match="disk full"):
        write_scenes(tmp_path / "set", 3)
    assert not list(tmp_path.iterdir())
