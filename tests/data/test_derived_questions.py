"""Derived questions: asked where captions agree, and answered "yes" as often as "no"."""

import json
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.loader import parse_config
from mmx.config.schema import DataConfig
from mmx.data.derived_questions import DERIVED_QUESTION_TYPES, derive_questions
from mmx.data.examples import Example, TextTask
from mmx.data.formats import read_examples
from mmx.data.lexicon import COLORS, THINGS
from mmx.errors import ConfigError, DataError


def derived_answers(*captions: str) -> dict[str, str]:
    """Return the answers by question that the captions of one image give, without questions of existence."""
    (example,) = derive_questions([Example("a", {}, (TextTask(captions),))])
    questions = [task for task in example.tasks if task.question and task.question_type != "exists"]
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
        (["a man holds a stick, the dog jumps", "a man beside a jumping dog"], "what is the man doing?", None),
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
    assert [task.question_type for task in found.tasks[2:]] == ["count", "action"]


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
