"""Derived questions: asked where captions agree, and answered "yes" as often as "no"."""

import json
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.loader import parse_config
from mmx.config.schema import DataConfig
from mmx.data.derived_questions import DERIVED_QUESTION_TYPES, derive_questions
from mmx.data.examples import Example, TextTask
from mmx.data.formats import read_examples
from mmx.data.lexicon import (
    ACTIONS,
    COLORS,
    EXCLUDED_ACTIONS,
    PLACE_PHRASES,
    PLACES,
    SIMILAR_COLORS,
    THINGS,
    WORDS_OF_PLACES,
)
from mmx.data.question_wordings import HELD_BACK, SEEN, word_question
from mmx.data.unanswerable_questions import CANNOT_TELL
from mmx.errors import ConfigError, DataError


def derived_answers(*captions: str) -> dict[str, str]:
    """Return the answers by question that the captions of one image give, without questions of existence."""
    (example,) = derive_questions([Example("a", {}, (TextTask(captions),))])
    questions = [task for task in example.tasks if task.question and task.question_type not in ("exists", "verify")]
    return {task.question: task.targets[0] for task in questions}


@pytest.mark.parametrize(
    ("captions", "question", "answer"),
    [
        (["A brown dog runs.", "The brown dog is wet."], "what color is the dog?", "brown"),
        (["a white and black dog", "a black and white dog"], "what color is the dog?", "black and white"),
        (["a dog with a grey ball", "a dog"], "what color is the ball?", "gray"),
        (["a boy in blonde hair and red shorts"], "what color are the shorts?", "red"),
        (["A brown dog runs.", "The black dog runs."], "what color is the dog?", None),
        (["Two dogs run.", "two brown dogs", "dogs run"], "how many dogs are there?", "two"),
        (["a dog and another dog", "Two dogs."], "how many dogs are there?", "two"),
        (["a dog", "The dog"], "how many dogs are there?", "one"),
        (["a dog", "two dogs"], "how many dogs are there?", None),
        (["a group of people", "several people"], "how many people are there?", None),
        (["a man and two girls", "Three people."], "how many people are there?", "three"),
        (["Two men in a boat.", "A man and two officers.", "a man", "a man rows"], "how many people are there?", None),
        (["a man and woman", "a man", "a man"], "how many people are there?", None),
        (["one dog chases another", "a dog", "a dog"], "how many dogs are there?", None),
        (["a dog while a crowd watches", "a dog"], "how many people are there?", None),
        (["blue, pink and yellow shorts"], "what color are the shorts?", None),
        (["a man in a red shirt and a man in a blue shirt"], "what color is the shirt?", None),
        (["a brown dog near three dogs", "four dogs"], "what color is the dog?", None),
        (["a man holds a stick, the dog jumps", "a man next to a jumping dog"], "what is the man doing?", None),
        (["a dog jumps while a man holds a stick"], "what is the dog holding?", None),
        (["a woman eating a hot dog"], "what is the woman eating?", "hot-dog"),
        (["a man wearing a helmet riding a bike"], "what is the man wearing?", "helmet"),
        (["a man wearing a mountain"], "what is the man wearing?", None),
        (["a girl eats ice cream"], "what is the girl eating?", "ice-cream"),
        (["A guy racing his motorcycle", "a man races"], "what is the man doing?", "racing"),
        (["a boy on a couch", "a boy on the sofa"], "where is this?", "couch"),
        (["A boy holds a big red ball.", "a boy"], "what is the boy holding?", "ball"),
        (["a man riding his bicycle", "a man rides"], "what is the man riding?", "bike"),
        (["a man holding hands with a boy"], "what is the man holding?", None),
        (["Two men holding a rope"], "what is the man holding?", None),
        (["A dog leaps.", "a dog jumping over a log"], "what is the dog doing?", "jumping"),
        (["A dog leaps.", "a dog"], "what is the dog doing?", None),
        (["a girl on the beach", "a girl at the shore"], "where is this?", "beach"),
        (["a girl in the snow", "a girl"], "where is this?", None),
        (["a man in the snow near a lake", "a man in snow near the lake"], "where is this?", None),
        (["A puppy runs.", "two dogs", "a field"], "what animal is this?", "dog"),
        (["a girl on a pony", "a horse"], "what animal is this?", "horse"),
        (["a dog chases a cat", "a dog and a cat"], "what animal is this?", None),
        (["a dog", "a field"], "what animal is this?", None),
        (["a boy in a dog costume", "a dog costume"], "what animal is this?", None),
        (["a girl on monkey bars", "monkey bars"], "what animal is this?", None),
        (["a man", "a guy runs", "the man"], "who is this?", "man"),
        (["a dog", "a puppy", "the dog"], "what is this?", "dog"),
        (["a man", "a man and a woman", "a man"], "who is this?", None),
        (["a man", "a man", "a man with a dog"], "who is this?", None),
        (["a player", "a player", "a player", "a woman"], "who is this?", None),
    ],
)
def test_question_is_derived_where_captions_agree(captions, question, answer):
    assert derived_answers(*captions).get(question) == answer


def test_captions_without_known_words_give_no_question():
    assert derived_answers("colourless green ideas sleep furiously", "") == {}


def test_derived_questions_are_added_after_the_tasks():
    tasks = (TextTask(("a dog", "the dog runs", "a dog running")), TextTask(("yes",), "is it?", "own"))
    found = derive_questions([Example("a", {"image": "a.jpg"}, tasks, "here")])[0]
    assert (found.id, found.sources, found.origin) == ("a", {"image": "a.jpg"}, "here")
    assert found.tasks[:2] == tasks
    assert [task.question_type for task in found.tasks[2:]] == ["count", "action", "animal", "subject"]


NOUNS = sorted({*THINGS, "person", "people", "player", "snowy", "pool", "tree"})
SENTENCES = st.lists(st.sampled_from(NOUNS), min_size=1, max_size=4).map(lambda words: "a " + " and a ".join(words))
IMAGES = st.lists(st.lists(SENTENCES, min_size=1, max_size=3), min_size=1, max_size=25)


@given(IMAGES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_existence_is_answered_yes_as_often_as_no(images, seed):
    examples = [Example(str(n), {}, (TextTask(tuple(captions)),)) for n, captions in enumerate(images)]
    found = derive_questions(examples, seed)
    rows = []
    for example in found:
        questions = [task for task in example.tasks if task.question_type == "exists"]
        rows += [(task.question, task.targets[0], example) for task in questions]
    counts = Counter((question, answer) for question, answer, _ in rows)
    for question, _ in counts:
        assert counts[question, "yes"] == counts[question, "no"]
    for question, answer, example in rows:
        thing = question.removeprefix("is there ").removeprefix("a ").rstrip("?")
        named = [{THINGS.get(word) for word in caption.split()} for caption in example.tasks[0].targets]
        assert sum(thing in names for names in named) >= (2 if answer == "yes" else 0)
        assert answer == "yes" or not any(thing in names for names in named)
    assert derive_questions(examples, seed) == found


def test_no_is_not_the_answer_where_a_word_may_include_the_thing():
    """A player may be a man, so there is no such question about the second image; a dog is not a man."""
    images = [["a man", "the man"], ["a player", "a player runs"], ["a dog", "the dog runs"]]
    found = derive_questions([Example(str(n), {}, (TextTask(tuple(captions)),)) for n, captions in enumerate(images)])
    answers = {}
    for example in found:
        for task in example.tasks:
            if task.question_type == "exists":
                answers[task.question, example.id] = task.targets[0]
    assert answers[("is there a man?", "0")] == "yes"
    assert answers[("is there a man?", "2")] == "no"
    assert ("is there a man?", "1") not in answers


def test_every_color_has_one_name():
    assert {COLORS[name] for name in COLORS.values()} == set(COLORS.values())


def test_data_set_with_derive_questions(tmp_path):
    rows = [{"image": f"{n}.jpg", "captions": ["a red dog runs", "the dog is running"]} for n in range(4)]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = read_examples(DataConfig(path=str(path)))
    assert [len(example.tasks) for example in plain] == [1, 1, 1, 1]
    only = DataConfig(
        path=str(path), derive_questions=True, tasks=("ask",), question_types=("color", "action"), fraction=(0, 0.5)
    )
    found = read_examples(only)
    assert [[(t.question, t.targets) for t in example.tasks] for example in found] == [
        [("what color is the dog?", ("red",)), ("what is the dog doing?", ("running",))]
    ] * 2
    everything = read_examples(DataConfig(path=str(path), derive_questions=True))
    types = {task.question_type for example in everything for task in example.tasks}
    assert types - {None} <= set(DERIVED_QUESTION_TYPES)


def test_max_examples_is_applied_before_balancing(tmp_path):
    path = tmp_path / "some.jsonl"
    captions = [["a bird", "the bird"], *[["a horse", "the horse"]] * 8]
    rows = [{"image": f"{n}.jpg", "captions": texts} for n, texts in enumerate(captions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_examples(
        DataConfig(path=str(path), derive_questions=True, max_examples=3, tasks=("ask",), question_types=("exists",))
    )
    counts = Counter((task.question, task.targets[0]) for example in found for task in example.tasks)
    assert counts == {(f"is there a {thing}?", word): 1 for thing in ("horse", "bird") for word in ("yes", "no")}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tasks": ["caption"]}, "derive_questions is true, and tasks has no questions; add ask to tasks"),
        ({"reward": "cider"}, "reward applies to captions only; list the data a second time with derive_questions"),
    ],
)
def test_contradicting_options_are_refused(fields, problem):
    with pytest.raises(ConfigError, match=problem):
        parse_config({"path": "a.jsonl", "derive_questions": True, **fields}, DataConfig, where="data")


def test_scenes_derive_no_questions():
    with pytest.raises(DataError) as error:
        read_examples(DataConfig(path="scenes", derive_questions=True))
    assert error.value.code == "data.derive_questions"


def test_data_with_a_reward_has_captions_only(tmp_path):
    path = tmp_path / "some.jsonl"
    rows = [{"image": "a.jpg", "caption": "a dog"}, {"image": "a.jpg", "question": "why?", "answer": "so"}]
    rows += [{"image": "b.jpg", "question": "why?", "answer": "so"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (only,) = read_examples(DataConfig(path=str(path), reward="cider"))
    assert only.tasks == (TextTask(("a dog",)),)


def test_seed_selects_the_images_of_existence_questions():
    rng = Random(0)
    captions = [rng.choice(["a dog runs", "a horse", "a bird sits"]) for _ in range(40)]
    examples = [Example(str(n), {}, (TextTask((text, text)),)) for n, text in enumerate(captions)]
    assert derive_questions(examples, 1) != derive_questions(examples, 2)


# -- questions to verify ----------------------------------------------------------------------------------------------


def examples_of(*images: list[str]) -> list[Example]:
    return [Example(str(n), {}, (TextTask(tuple(captions)),)) for n, captions in enumerate(images)]


def answers_of_type(examples: list[Example], question_type: str) -> dict[tuple[str, str], str]:
    """Return the answers to the questions of one type by example and question."""
    found = {}
    for example in examples:
        for task in example.tasks:
            if task.question_type == question_type:
                found[example.id, task.question] = task.targets[0]
    return found


BROWN_DOG = ["a brown dog runs in the snow", "a brown dog running in snow"]
WHITE_DOG = ["a white dog sits on the street", "a white dog sitting on a street"]
TAN_DOG = ["a tan dog", "the tan dog"]
KITCHEN = ["a woman in a kitchen", "a woman"]


def test_what_the_captions_agree_on_is_verified():
    found = answers_of_type(derive_questions(examples_of(BROWN_DOG, WHITE_DOG, KITCHEN)), "verify")
    expected = {
        ("0", "is the dog brown?"): "yes",
        ("1", "is the dog brown?"): "no",
        ("0", "is the dog white?"): "no",
        ("1", "is the dog white?"): "yes",
        ("0", "is the dog running?"): "yes",
        ("1", "is the dog running?"): "no",
        ("0", "is the dog sitting?"): "no",
        ("1", "is the dog sitting?"): "yes",
        ("0", "is it in the snow?"): "yes",
        ("1", "is it in the snow?"): "no",
        ("0", "is it on the street?"): "no",
        ("1", "is it on the street?"): "yes",
        ("2", "is it indoors?"): "yes",
        ("2", "is it outdoors?"): "no",
    }
    for setting, answer in (("indoors", "no"), ("outdoors", "yes")):
        (drawn,) = {key for key in found if key[1] == f"is it {setting}?"} - expected.keys()
        assert drawn[0] in "01"
        expected[drawn] = answer
    assert found == expected


@pytest.mark.parametrize(
    ("images", "question"),
    [
        ([BROWN_DOG, TAN_DOG], "is the dog brown?"),  # tan may be called brown
        ([BROWN_DOG, [*WHITE_DOG, "a dog near a brown door"]], "is the dog brown?"),
        ([BROWN_DOG, [*WHITE_DOG, "a dog runs"]], "is the dog running?"),
        ([BROWN_DOG, ["a dog plays", "a dog playing"]], "is the dog running?"),
        ([BROWN_DOG, [*WHITE_DOG, "a skier"]], "is it in the snow?"),
        ([KITCHEN, ["a woman on a couch in a yard", "a yard"]], "is it indoors?"),
        ([KITCHEN, ["a woman", "a woman in a field"]], "is it indoors?"),
    ],
)
def test_no_is_the_answer_only_where_captions_exclude_yes(images, question):
    found = answers_of_type(derive_questions(examples_of(*images)), "verify")
    assert ("1", question) not in found


def test_tables_of_exclusion_have_known_names():
    assert SIMILAR_COLORS.keys() <= set(COLORS.values())
    assert all(similar <= set(COLORS.values()) for similar in SIMILAR_COLORS.values())
    assert EXCLUDED_ACTIONS.keys() <= set(ACTIONS.values())
    assert all(excluded <= set(ACTIONS.values()) for excluded in EXCLUDED_ACTIONS.values())
    assert PLACE_PHRASES.keys() == WORDS_OF_PLACES.keys() <= set(PLACES.values())


@given(IMAGES, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_verified_questions_are_answered_yes_as_often_as_no(images, seed):
    colored = [[f"{caption} and a {['red', 'blue', 'white'][len(caption) % 3]} dog" for caption in i] for i in images]
    found = answers_of_type(derive_questions(examples_of(*colored), seed), "verify")
    counts = Counter((question, answer) for (_, question), answer in found.items())
    for question, _ in counts:
        assert counts[question, "yes"] == counts[question, "no"]


# -- questions without an answer --------------------------------------------------------------------------------------


def many_images() -> list[Example]:
    dogs = ["a black dog runs on grass", "a black dog is running"]
    people = ["a man in a red shirt stands and holds a stick", "a man in a red shirt is standing"]
    return examples_of(*[dogs, people] * 50)


def test_fraction_of_unanswerable_questions():
    found = derive_questions(many_images(), unanswerable=0.1)
    types = Counter(task.question_type for example in found for task in example.tasks if task.question)
    assert types["unanswerable"] / types.total() == pytest.approx(0.1, abs=0.002)
    assert found == derive_questions(many_images(), unanswerable=0.1)
    assert not answers_of_type(derive_questions(many_images()), "unanswerable")
    without = [replace(e, tasks=tuple(t for t in e.tasks if t.question_type != "unanswerable")) for e in found]
    assert without == derive_questions(many_images())


def test_unanswerable_questions_are_about_what_the_image_does_not_show():
    found = answers_of_type(derive_questions(many_images(), unanswerable=0.2), "unanswerable")
    about_dogs = {"what color is the dog?", "what is the dog doing?", "what animal is this?"}
    about_men = {"what color is the shirt?", "what is the man holding?", "what is the man doing?"}
    asked = {0: set(), 1: set()}
    for (image, question), answer in found.items():
        assert answer == CANNOT_TELL
        asked[int(image) % 2].add(question)
    assert asked == {0: about_men, 1: about_dogs}


def test_a_question_may_be_answerable_if_a_word_may_include_its_subject():
    images = [["a black dog runs", "a black dog running"], ["an animal", "a pet"], ["some players", "skaters"]]
    found = answers_of_type(derive_questions(examples_of(*images), unanswerable=0.5), "unanswerable")
    assert {image for image, _ in found} == {"2"}


# -- wordings ---------------------------------------------------------------------------------------------------------


def test_every_form_has_wordings_and_different_ones_held_back():
    assert SEEN.keys() == HELD_BACK.keys()
    for form, seen in SEEN.items():
        assert len(seen) >= 6
        assert len(HELD_BACK[form]) >= 2
        assert len(set(seen)) == len(seen)
    seen_anywhere = {text for texts in SEEN.values() for text in texts}
    assert not seen_anywhere & {text for texts in HELD_BACK.values() for text in texts}


SLOTS = {
    "article": "a ", "thing": "dog", "things": "dogs", "be": "is", "do": "does", "subject": "man", "verb": "holding",
    "action": "running", "color": "red", "place": "in the snow", "setting": "indoors",
}  # fmt: skip


@pytest.mark.parametrize("form", SEEN)
def test_wordings_are_drawn_by_key(form):
    first = {word_question(form, SLOTS, "first", str(key)) for key in range(20)}
    seen = [word_question(form, SLOTS, "seen", str(key)) for key in range(400)]
    held_back = {word_question(form, SLOTS, "held_back", str(key)).lower().rstrip("?") for key in range(400)}
    assert first == {SEEN[form][0].format_map(SLOTS)}
    assert {text.lower().rstrip("?") for text in seen} == {t.format_map(SLOTS).rstrip("?") for t in SEEN[form]}
    assert held_back == {text.format_map(SLOTS).rstrip("?") for text in HELD_BACK[form]}
    assert any(text.isupper() for text in seen)
    assert any(text[0].isupper() and not text.isupper() for text in seen)
    assert any(text.endswith("?") for text in seen)
    assert any(not text.endswith("?") for text in seen)


def test_wordings_change_the_questions_and_nothing_else():
    plain = derive_questions(many_images(), unanswerable=0.1)
    drawn = derive_questions(many_images(), wordings="seen", unanswerable=0.1)
    assert drawn == derive_questions(many_images(), wordings="seen", unanswerable=0.1)
    assert drawn != derive_questions(many_images(), 1, "seen", unanswerable=0.1)
    assert len({task.question for example in drawn for task in example.tasks}) > 50
    for one, other in zip(plain, drawn, strict=True):
        assert [(t.targets, t.question_type) for t in one.tasks] == [(t.targets, t.question_type) for t in other.tasks]


def test_data_set_with_wordings(tmp_path):
    path = tmp_path / "some.jsonl"
    rows = [{"image": f"{n}.jpg", "captions": ["a red dog runs", "the dog is running"]} for n in range(40)]
    rows += [{"image": f"m{n}.jpg", "captions": ["a man stands", "the man stands"]} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(path=str(path), derive_questions=True, tasks=("ask",), question_types=("animal",))
    held_back = read_examples(config.model_copy(update={"wordings": "held_back"}))
    questions = {task.question.lower().rstrip("?") for example in held_back for task in example.tasks}
    assert questions == {text.rstrip("?") for text in HELD_BACK["animal"]}
    only = {"unanswerable": 0.1, "question_types": ("unanswerable",)}
    found = read_examples(config.model_copy(update=only))
    assert {task.targets for example in found for task in example.tasks} == {(CANNOT_TELL,)}


@pytest.mark.parametrize("fields", [{"wordings": "seen"}, {"unanswerable": 0.1}])
def test_options_of_derived_questions_need_them(fields):
    with pytest.raises(ConfigError):
        parse_config({"path": "a.jsonl", **fields}, DataConfig, where="data")
