"""Generated scenes: pure functions of their seed, drawn where they say, with texts checked by a slow reference."""

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

from mmx.data import scene_folder
from mmx.data.scene_folder import write_scenes
from mmx.data.scene_texts import SceneQuestion, captions, full_caption, pointed_questions, questions
from mmx.data.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Scene,
    SceneObject,
    generate_scene,
    position_name,
    relation_holds,
    render_scene,
)
from mmx.errors import DataError

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
# The best accuracy of one constant answer, by question type.
MAX_CONSTANT_ACCURACY = {
    "exists": 0.52,
    "count": 0.35,
    "color": 0.18,
    "shape": 0.24,
    "size": 0.55,
    "relation": 0.34,
    "position": 0.27,
}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

any_scene = st.builds(generate_scene, st.integers(), st.integers(min_value=0))


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [generate_scene(1, index) for index in range(1000)]


# ---- reference ---------------------------------------------------------------------------------------------------
# It does not know how texts are generated, only what their words mean.


def fits(item: SceneObject, phrase: str) -> bool:
    """Return whether a phrase such as "red stars" describes an object."""
    words = [re.sub(r"(?<=ss)es$|(?<!s)s$", "", word) for word in phrase.split()]
    return all(word in (item.size, item.color, item.shape, "thing", "shape") for word in words)


def count_fitting(scene: Scene, phrase: str) -> int:
    return sum(fits(item, phrase) for item in scene.objects)


def only_fitting(scene: Scene, phrase: str) -> SceneObject:
    (item,) = (item for item in scene.objects if fits(item, phrase))
    return item


def distances(a: SceneObject, b: SceneObject, relation: str) -> tuple[float, float]:
    """Return the distance from b to a in the direction of a relation, and across it."""
    x = (a.box[0] + a.box[2] - b.box[0] - b.box[2]) / 2
    y = (a.box[1] + a.box[3] - b.box[1] - b.box[3]) / 2
    return {"left of": (-x, abs(y)), "right of": (x, abs(y)), "above": (-y, abs(x)), "below": (y, abs(x))}[relation]


def is_clear(a: SceneObject, b: SceneObject, relation: str) -> bool:
    along, across = distances(a, b, relation)
    return along >= 0.15 and along >= across


def answer_relation(scene: Scene, first: str, relation: str, second: str) -> str:
    a = only_fitting(scene, first)
    b = only_fitting(scene, second)
    assert is_clear(a, b, relation) != is_clear(a, b, OPPOSITES[relation]), "neither is clear"
    return "yes" if is_clear(a, b, relation) else "no"


def answer_neighbor(scene: Scene, relation: str, name: str) -> str:
    b = only_fitting(scene, name)
    (a,) = (a for a in scene.objects if a is not b and distances(a, b, relation)[0] > 0)
    assert is_clear(a, b, relation)
    return f"{a.color} {a.shape}"


def position(item: SceneObject) -> str | None:
    """Return the named position of an object, None between two regions."""
    x = (item.box[0] + item.box[2]) / 2
    y = (item.box[1] + item.box[3]) / 2
    if 0.42 <= x <= 0.58 and 0.42 <= y <= 0.58:
        return "center"
    if 0.35 < x < 0.65 or 0.35 < y < 0.65:
        return None
    return f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"


RELATION = "(left of|right of|above|below)"
ANSWERS: dict[str, Callable[..., str | None]] = {
    r"is there an? (.+)\?": lambda scene, phrase: "yes" if count_fitting(scene, phrase) else "no",
    r"how many (.+) are there\?": lambda scene, phrase: str(count_fitting(scene, phrase)),
    r"what (color|shape|size) is the (.+)\?": lambda scene, word, name: getattr(only_fitting(scene, name), word),
    rf"is the (.+) {RELATION} the (.+)\?": answer_relation,
    rf"what is {RELATION} the (.+)\?": answer_neighbor,
    r"where is the (.+)\?": lambda scene, name: position(only_fitting(scene, name)),
}


def reference_answer(scene: Scene, question: str) -> str | None:
    matches = [(answer, match) for text, answer in ANSWERS.items() if (match := re.fullmatch(text, question))]
    ((answer, match),) = matches
    return answer(scene, *match.groups())


def lists_all_objects(scene: Scene, caption: str) -> bool:
    """Return whether the caption names every object exactly once."""
    total = 0
    for item in re.split(r", | and ", caption):
        number, phrase = item.split(" ", 1)
        if count_fitting(scene, phrase) != NUMBERS[number]:
            return False
        total += NUMBERS[number]
    return total == len(scene.objects)


def is_true(scene: Scene, caption: str) -> bool:
    if match := re.fullmatch(r"(\w+) shapes? on a (.+) background", caption):
        return NUMBERS[match[1]] == len(scene.objects) and match[2] == scene.background
    if match := re.fullmatch(r"an? (.+) in the (.+)", caption):
        return any(position(item) == match[2] for item in scene.objects if fits(item, match[1]))
    if match := re.fullmatch(rf"an? (.+) {RELATION} an? (.+)", caption):
        firsts = [item for item in scene.objects if fits(item, match[1])]
        seconds = [item for item in scene.objects if fits(item, match[3])]
        return any(a is not b and is_clear(a, b, match[2]) for a in firsts for b in seconds)
    return lists_all_objects(scene, caption)


# ---- scenes and images -------------------------------------------------------------------------------------------


@given(any_scene)
@settings(max_examples=60, deadline=None)
def test_objects_are_inside_the_image_and_apart(scene: Scene) -> None:
    assert 1 <= len(scene.objects) <= 4
    for item in scene.objects:
        x0, y0, x1, y1 = item.box
        assert min(x0, y0) >= 0.0199 and max(x1, y1) <= 0.9801
        assert item.center == ((x0 + x1) / 2, (y0 + y1) / 2)
        low, high = {"small": (0.1699, 0.2001), "large": (0.2999, 0.3501)}[item.size]
        assert low <= x1 - x0 <= high and low <= y1 - y0 <= high
    for a, b in combinations([item.box for item in scene.objects], 2):
        assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= 0.0299  # GAP, less one rounding


def test_seed_and_index_determine_the_scene() -> None:
    state = random.getstate()
    for index in range(30):
        first = generate_scene(5, index)
        second = generate_scene(5, index)
        assert first == second and render_scene(first).tobytes() == render_scene(second).tobytes()
        assert captions(first) == captions(second) and questions(first) == questions(second)
    assert random.getstate() == state, "the global generator was used"


def test_scenes_are_equal_on_every_machine() -> None:
    """A change of this digest changes every generated data set, so it must be intended."""
    scenes = [generate_scene(0, index) for index in range(50)]
    records = []
    for scene in scenes:
        records.append([(q.question, q.answer, q.question_type, q.evidence) for q in questions(scene)])
    text = repr([(scene, captions(scene)) for scene in scenes]) + repr(records)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f3775a68e282ba0c"


def test_other_seeds_and_indices_give_other_scenes(many: list[Scene]) -> None:
    scenes = [generate_scene(seed, index) for seed in range(20) for index in range(20)]
    assert len(set(scenes)) == 400
    assert len({captions(many[7], seed) for seed in range(20)}) > 3
    assert len({questions(many[7], seed) for seed in range(20)}) == 20


def test_size_changes_the_image_only() -> None:
    small = generate_scene(3, 4, size=64)
    large = generate_scene(3, 4, size=200)
    assert small.objects == large.objects and questions(small) == questions(large)
    assert render_scene(small).size == (64, 64) and render_scene(large).size == (200, 200)
    assert render_scene(large, 64).tobytes() == render_scene(small).tobytes()


@pytest.mark.parametrize("size", [96, 128, 224])
def test_boxes_contain_their_shapes(size: int, many: list[Scene]) -> None:
    for scene in many[:60]:
        rendered = render_scene(scene, size)
        rest = rendered.copy()
        for item in scene.objects:
            alone = render_scene(replace(scene, objects=(item,)), size)
            around = outward(item, size)
            assert_fills_its_box(alone, scene, item)
            assert rendered.crop(around).tobytes() == alone.crop(around).tobytes()
            rest.paste(BACKGROUNDS[scene.background], around)
        assert rest.getcolors() == [(size * size, BACKGROUNDS[scene.background])]


def outward(item: SceneObject, size: int) -> tuple[int, int, int, int]:
    """Return the box in whole pixels, rounded outwards."""
    x0, y0, x1, y1 = (value * size for value in item.box)
    return int(x0), int(y0), int(x1) + 1, int(y1) + 1


def assert_fills_its_box(alone: Image.Image, scene: Scene, item: SceneObject) -> None:
    background = Image.new("RGB", alone.size, BACKGROUNDS[scene.background])
    change = ImageChops.difference(alone, background).convert("L")
    half = max(value for value, count in enumerate(change.histogram()) if count) // 2
    solid = change.point([255 * (value > half) for value in range(256)])  # pixels more than half inside the shape
    for edges, slack in ((change.getbbox(), 1), (solid.getbbox(), 2)):
        assert edges is not None
        assert all(abs(edge - value * alone.width) <= slack for edge, value in zip(edges, item.box, strict=True))
    middle = alone.getpixel((int(item.center[0] * alone.width), int(item.center[1] * alone.width)))
    assert middle == COLORS[item.color]


def test_shapes_and_colors_differ() -> None:
    for a, b in combinations([*COLORS.values()], 2):
        assert dist(a, b) > 75
    assert all(dist(a, b) > 110 for a in COLORS.values() for b in BACKGROUNDS.values())
    lone = [Scene((SceneObject(shape, "black", "small", (0.4, 0.4, 0.56, 0.56)),), "white") for shape in SHAPES]
    images = [render_scene(scene).convert("L").crop((51, 51, 72, 72)) for scene in lone]
    for one, other in combinations(images, 2):
        different = sum(ImageChops.difference(one, other).point(lambda v: v > 128).histogram()[1:])
        assert different >= 40  # of 21 x 21 pixels


def test_doubtful_relations_and_positions_are_left_out() -> None:
    def at(x: float, y: float) -> SceneObject:
        return SceneObject("star", "red", "small", (x - 0.1, y - 0.1, x + 0.1, y + 0.1))

    assert relation_holds(at(0.3, 0.5), at(0.5, 0.4), "left of")
    assert not relation_holds(at(0.3, 0.5), at(0.5, 0.4), "below")  # further apart from left to right
    assert not relation_holds(at(0.36, 0.5), at(0.5, 0.5), "left of")  # hardly apart at all
    assert [position_name(at(x, 0.9)) for x in (0.3, 0.36, 0.5, 0.7)] == ["bottom left", None, None, "bottom right"]
    assert [position_name(at(x, 0.5)) for x in (0.43, 0.41, 0.1)] == ["center", None, None]


# ---- texts -------------------------------------------------------------------------------------------------------


def test_every_answer_is_correct(many: list[Scene]) -> None:
    for scene in many:
        found = questions(scene)
        assert 6 <= len(found) <= 10 and len({each.question for each in found}) == len(found)
        for each in found:
            assert reference_answer(scene, each.question) == each.answer, (scene, each)
            assert_evidence_is_of_the_object(scene, each)
            assert each.question_type not in ("color", "shape", "size") or each.answer not in each.question


def assert_evidence_is_of_the_object(scene: Scene, question: SceneQuestion) -> None:
    if question.question_type in ("exists", "count"):
        assert question.evidence is None
        return
    (about,) = (item for item in scene.objects if item.box == question.evidence)
    if match := re.fullmatch(rf"what is {RELATION} the (.+)\?", question.question):
        assert question.answer == f"{about.color} {about.shape}" and not fits(about, match[2])
    else:
        subject = re.search(rf"is the (.+?)( {RELATION} .*)?\?", question.question)
        assert subject is not None and only_fitting(scene, subject[1]) is about


@given(any_scene, st.integers())
@settings(max_examples=60, deadline=None)
def test_texts_of_any_scene_are_true(scene: Scene, seed: int) -> None:
    assert all(reference_answer(scene, each.question) == each.answer for each in questions(scene, seed))
    assert all(is_true(scene, caption) for caption in captions(scene, seed))


def test_every_caption_is_true(many: list[Scene]) -> None:
    for scene in many:
        texts = captions(scene)
        assert 3 <= len(texts) <= 5 and len(set(texts)) == len(texts)
        for caption in texts:
            assert caption == caption.lower().strip(" .") and is_true(scene, caption), (scene, caption)
        if len(scene.objects) <= 3:  # each item has number, size, color and shape
            assert lists_all_objects(scene, texts[0])
            assert {len(item.split()) for item in re.split(", | and ", texts[0])} == {4}


def test_reference_detects_false_texts() -> None:
    star = SceneObject("star", "red", "small", (0.1, 0.4, 0.28, 0.58))
    square = SceneObject("square", "blue", "large", (0.6, 0.4, 0.92, 0.72))
    scene = Scene((star, square), "white")
    assert reference_answer(scene, "is the star left of the square?") == "yes"
    assert reference_answer(scene, "is the star right of the blue thing?") == "no"
    assert reference_answer(scene, "how many red stars are there?") == "1"
    for true in ("a small red star and a large blue square", "two shapes on a white background"):
        assert is_true(scene, true) and not is_true(replace(scene, objects=(star,)), true)
    for false in ("a square left of a star", "a red star and a blue cross", "two stars", "a red star in the top left"):
        assert not is_true(scene, false)


def test_no_constant_answer_is_accurate(many: list[Scene]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in many:
        for each in questions(scene):
            answers[each.question_type][each.answer] += 1
    assert set(answers) == set(MAX_CONSTANT_ACCURACY)
    for question_type, counter in answers.items():
        assert max(counter.values()) / counter.total() <= MAX_CONSTANT_ACCURACY[question_type], (question_type, counter)
    for question_type in ("exists", "relation"):
        yes = answers[question_type]["yes"]
        no = answers[question_type]["no"]
        assert 0.45 <= yes / (yes + no) <= 0.55
    assert set(answers["count"]) == set("01234") and len(answers["position"]) == 5


def test_wording_does_not_predict_existence(many: list[Scene]) -> None:
    """Within each wording (which attributes are mentioned), yes and no are about as frequent."""
    answers_by_wording: dict[tuple[bool, ...], Counter[str]] = defaultdict(Counter)
    for scene in many:
        for each in questions(scene):
            if each.question_type == "exists":
                words = each.question.strip("?").split()
                wording = tuple(
                    any(word in words for word in values) for values in (("small", "large"), COLORS, SHAPES)
                )
                answers_by_wording[wording][each.answer] += 1
    assert len(answers_by_wording) == 6
    assert all(0.4 <= counter["yes"] / counter.total() <= 0.6 for counter in answers_by_wording.values())


def test_pointed_questions_name_each_object(many: list[Scene]) -> None:
    scene = next(scene for scene in many if len(scene.objects) > 1)
    found = pointed_questions(scene)
    assert [each.box for each in found] == [each.evidence for each in found] == [item.box for item in scene.objects]
    assert not pointed_questions(next(scene for scene in many if len(scene.objects) == 1))
    assert [each.answer for each in found] == [f"{item.color} {item.shape}" for item in scene.objects]
    assert {(each.question, each.question_type) for each in found} == {("what is this?", "pointed")}


def test_full_caption_has_the_position_of_each_mention(many: list[Scene]) -> None:
    found = 0
    for scene in many:
        descriptions = {(item.size, item.color, item.shape) for item in scene.objects}
        full = full_caption(scene)
        assert (full is None) == (len(scene.objects) > 3 or len(descriptions) < len(scene.objects))
        if full is not None:
            assert full.text == captions(scene)[0] and len(full.mentions) == len(scene.objects)
            for each, item in zip(full.mentions, scene.objects, strict=True):
                before = full.text[: each.start].split()
                assert full.text[each.start :].startswith(each.word) and before[-2:] == [item.size, item.color]
                assert (each.word, each.box) == (item.shape, item.box)
            assert len({each.start for each in full.mentions}) == len(full.mentions)
            found += 1
    assert found > 500


# ---- folders -----------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_folder_holds_images_texts_and_objects(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "deep" / "set", 5, seed=9, size=64)
    scenes = [generate_scene(9, index, size=64) for index in range(5)]
    assert [path.name for path in folder.parent.iterdir()] == ["set"], "a temporary folder was left behind"
    names = [row["image"] for row in lines(folder / "scenes.jsonl")]
    assert names == [f"images/{index:06d}.png" for index in range(5)]
    for name, scene, row in zip(names, scenes, lines(folder / "captions.jsonl"), strict=True):
        assert row == {"image": name, "captions": list(captions(scene))}
        with Image.open(folder / str(name)) as stored:
            assert stored.mode == "RGB" and stored.tobytes() == render_scene(scene).tobytes()
        rows = [row for row in lines(folder / "questions.jsonl") if row["image"] == name]
        assert [as_question(row) for row in rows] == [*questions(scene), *pointed_questions(scene)]
    assert [as_scene(row) for row in lines(folder / "scenes.jsonl")] == scenes


def as_question(row: dict[str, Any]) -> SceneQuestion:
    assert None not in row.values()
    evidence, box = (tuple(row[name]) if name in row else None for name in ("evidence", "box"))
    return SceneQuestion(row["question"], row["answer"], row["question_type"], evidence, box)


def as_scene(row: dict[str, Any]) -> Scene:
    objects = (SceneObject(**{**each, "box": tuple(each["box"])}) for each in row["objects"])
    return Scene(tuple(objects), row["background"], row["pixels"])


def test_written_folders_are_bytewise_equal(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()  # an empty folder is accepted
    one, two = (write_scenes(tmp_path / name, 3, seed=2) for name in "ab")
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 6
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("precious")
    for path in (tmp_path / "set", tmp_path / "set" / "mine.txt"):
        with pytest.raises(DataError) as error:
            write_scenes(path, 2)
        assert (error.value.code, error.value.details["path"]) == ("data.folder_in_use", str(path))
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "mine.txt"]


@pytest.mark.parametrize(("count", "size"), [(0, 128), (-1, 128), (3, 31)])
def test_impossible_numbers_are_refused(tmp_path: Path, count: int, size: int) -> None:
    with pytest.raises(DataError) as error:
        write_scenes(tmp_path / "set", count, size=size)
    assert error.value.code == "data.scene_numbers"
    assert (error.value.details["count"], error.value.details["size"]) == (count, size)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scene: Scene) -> Image.Image:
        if scene == generate_scene(0, 2):
            raise OSError("disk full")
        return render_scene(scene)

    monkeypatch.setattr(scene_folder, "render_scene", broken)
    with pytest.raises(OSError, match="disk full"):
        write_scenes(tmp_path / "set", 3)
    assert not list(tmp_path.iterdir())
