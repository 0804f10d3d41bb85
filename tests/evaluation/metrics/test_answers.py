"""VQA accuracy: 5,000 generated questions against the results of the official script and a slow reference.

`golden/answers.json` holds what `vqaEval.py` of GT-Vision-Lab/VQA (commit c4e6a0e) gave; `golden/make_golden.py` made
it. The reference below follows that script character by character and shares no code with the package; the spellings
that it repairs are in the golden file.
"""

import json
from itertools import product
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmx.evaluation.metrics.answers import answer_metrics, exact_match, most_frequent_answer_accuracy, vqa_accuracy

GOLDEN = Path(__file__).parent / "golden" / "answers.json"
QUESTIONS = 5_000

WORDS = """yes no a an the dog dogs two 2 none zero ten one red Red white man woman dont don't wouldn'tve cant isnt its
    it's somebody'd 3 1,000 1000 2.5 3.30pm mr. t-shirt tshirt black&white black/white x-ray ? ! . , - ' $5 50% (left)
    left [x] {y} "stop" stop a.m. u.s. @home #1 re: a_b <b> 5+5 = c:\\dir back\\slash `tick` yes. no, THE Two"""
JOINTS = [" "] * 12 + [
    "",
    ", ",
    ",",
    ". ",
    ".",
    "-",
    " - ",
    "/",
    " / ",
    "?",
    "! ",
    ";",
    "; ",
    "\n",
    "\t",
    "  ",
    " the ",
]
STARTS = """I he she it we you they that there this who what where when why how let somebody someone something not could
    would should might must need did do does had has have is are was were ought can ca ai sha wo y o ma"""
ENDS = "'s 'd 'll 're 've 'm n't 'd've n't've 'all 'all'll 'all'd've 'clock 'am"
MARKS = '; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? !'
NUMBERS = "none zero one two three four five six seven eight nine ten"


def pick(rng, things):
    return things[int(rng.random() * len(things))]  # random() alone is promised to stay the same between Pythons


def phrase(rng):
    text = pick(rng, WORDS.split())
    for _ in range(int(3 * rng.random() ** 2)):
        text += pick(rng, JOINTS) + pick(rng, WORDS.split())
    return pick(
        rng, [text] * 6 + [text.upper(), text.capitalize(), f" {text}", f"{text}\n", text + "." * 3, "." * 40 + text]
    )


def question(seed):
    """A prediction and the annotators' answers: mostly ten, from a few phrases so that some or all are equal."""
    rng = Random(seed)
    common = [phrase(rng) for _ in range(pick(rng, [1, 2, 2, 3, 3, 4]))]
    answers = [pick(rng, common) for _ in range(pick(rng, [10] * 9 + [1, 2, 3, 5]))]
    prediction = pick(rng, common)
    changes = [
        prediction,
        prediction,
        prediction.lower(),
        prediction.replace("-", " "),
        f"the {prediction}",
        prediction.rstrip(".!?"),
        prediction.replace("2", "two"),
    ]
    return pick(rng, changes), answers


def spellings():
    """English contractions, each without every subset of its apostrophes."""
    words = [start + end for start, end in product(STARTS.split(), ENDS.split())] + ["'twas", "'tis", "'ow's'at"]
    for word in words:
        parts = word.split("'")
        for marks in product(("'", ""), repeat=len(parts) - 1):
            yield "".join(part + mark for part, mark in zip(parts, (*marks, ""), strict=True))


def golden():
    return json.loads(GOLDEN.read_text())


def reference_without_punctuation(text):
    """Pass over the text once for each mark, without regular expressions."""
    comma_number = any(
        text[i] == "," and text[i - 1].isdigit() and text[i + 1].isdigit() for i in range(1, len(text) - 1)
    )
    out = text
    for mark in MARKS.split():
        near_space = False
        for i, letter in enumerate(text):
            if letter == mark and (text[i - 1 : i] == " " or text[i + 1 : i + 2] == " "):
                near_space = True
        pieces = []
        for letter in out:
            if letter != mark:
                pieces.append(letter)
            elif not near_space and not comma_number:
                pieces.append(" ")
        out = "".join(pieces)
    kept, removed = [], 0
    for i, letter in enumerate(out):
        if letter == "." and removed < 32 and not out[i + 1 : i + 2].isdigit():
            removed += 1
        else:
            kept.append(letter)
    return "".join(kept)


def reference_accuracy(prediction, answers, repaired):
    words = reference_without_punctuation(prediction.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    digits = dict(zip(NUMBERS.split(), [0, *range(11)], strict=True))
    words = [str(digits.get(word, word)) for word in words]
    words = [repaired.get(word, word) for word in words if word not in ("a", "an", "the")]
    prediction = " ".join(words)
    if any(answer != answers[0] for answer in answers):
        answers = [reference_without_punctuation(answer) for answer in answers]
    total = 0
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        matches = len([answer for answer in others if answer == prediction])
        total += 1 if matches >= 3 else matches / 3
    return total / len(answers)


def test_five_thousand_questions_equal_the_official_script():
    official = golden()["accuracy"]
    assert len(official) == QUESTIONS
    unlike = [(seed, question(seed)) for seed in range(QUESTIONS) if vqa_accuracy(*question(seed)) != official[seed]]
    assert unlike == []


def test_five_thousand_questions_equal_the_slow_reference():
    repaired = golden()["repaired"]
    unlike = [
        (seed, question(seed))
        for seed in range(QUESTIONS)
        if vqa_accuracy(*question(seed)) != reference_accuracy(*question(seed), repaired)
    ]
    assert unlike == []


def test_the_golden_has_right_wrong_and_halves():
    official = golden()["accuracy"]
    assert len({round(value, 6) for value in official}) > 10
    assert 0.2 < sum(value == 0 for value in official) / QUESTIONS < 0.8
    assert 0.1 < sum(value == 1 for value in official) / QUESTIONS < 0.8


def test_contractions_are_repaired_where_the_official_script_repairs_them_and_nowhere_else():
    repaired = golden()["repaired"]
    tried = sorted({word.lower() for word in spellings()})
    assert len(tried) > 500
    assert len(repaired) > 100
    for word in tried:
        right = repaired.get(word, word)
        assert vqa_accuracy(word, [right] * 10) == 1.0, word
        assert right == word or vqa_accuracy(word, [word] * 10) == 0.0, word


def test_accuracy_of_one_two_three_and_four_who_agree():
    # m of ten agree: leaving out one of them leaves m-1, leaving out another leaves m.
    for agree, expected in enumerate([0, 0.3, 0.6, 0.9, 1.0, 1.0]):
        answers = ["dog"] * agree + [f"other {i}" for i in range(10 - agree)]
        assert vqa_accuracy("dog", answers) == pytest.approx(expected, abs=1e-12), agree


def test_habits_of_the_official_script():
    others = ["x"] * 5
    assert vqa_accuracy("the dog", ["the dog"] * 10) == 0.0  # answers keep their articles
    assert vqa_accuracy("The two dogs!", ["2 dogs"] * 5 + others) == 1.0
    assert vqa_accuracy("two", ["two"] * 5 + others) == 0.0  # and their number words
    assert vqa_accuracy("none", ["0"] * 10) == 1.0
    assert vqa_accuracy("yes.", ["yes."] * 10) == 0.0  # punctuation stays where all agree
    assert vqa_accuracy("yes.", ["yes."] * 9 + ["no"]) == 1.0
    assert vqa_accuracy("yes", ["Yes"] * 5 + others) == 0.0  # capitals of answers count
    assert vqa_accuracy("." * 40 + "x", ["." * 8 + "x"] * 10) == 1.0  # 32 full stops go, the rest stay
    assert vqa_accuracy("t-shirt-\tred", ["tshirt red"] * 10) == 1.0  # a tab is a space before hyphens are judged
    assert vqa_accuracy("t-shirt-\nred", ["tshirt red"] * 10) == 1.0
    assert vqa_accuracy(" -t-shirt", ["t shirt"] * 10) == 1.0  # and the space in front is gone by then
    assert vqa_accuracy("dog", ["dog"]) == 0.0  # nobody is left to agree


def test_exact_match_looks_past_case_and_space_only():
    assert exact_match(" Red  Car\n", ["blue", "red car"]) == 1.0
    assert exact_match("red car.", ["red car"]) == 0.0
    assert exact_match("the red car", ["red car"]) == 0.0


def test_answer_metrics_are_means_over_questions():
    answers = {1: ["yes"] * 10, 2: ["cat"] * 3 + ["dog"] * 7, "three": ["red"] * 10, 4: ["no"] * 10}
    found = answer_metrics({"three": "blue", 1: "Yes", 2: "cat", 4: "the no"}, answers)
    assert found == {"exact match": 0.5, "VQA accuracy": pytest.approx((1 + 0.9 + 0 + 1) / 4, abs=1e-12)}


@pytest.mark.parametrize(
    ("predictions", "answers", "message"),
    [
        ({}, {}, "at least one question"),
        ({1: "a"}, {1: ["a"], 2: ["b"]}, "same ids: 1 are in one of the two only, such as 2"),
        ({1: "a"}, {1: []}, r"at least one answer; got \[\]"),
        ({1: "a"}, {1: "a"}, "at least one answer; got 'a'"),
    ],
)
def test_invalid_arguments(predictions, answers, message):
    with pytest.raises(ValueError, match=message):
        answer_metrics(predictions, answers)


# ---- most frequent answer ----------------------------------------------------------------------------------------


def test_each_question_gets_its_most_frequent_answer():
    questions = dict.fromkeys(range(4), "what color?") | {4: "How  many?", 5: "how many?", 6: "where?"}
    answers = {0: ["red"], 1: ["Red"], 2: ["red"], 3: ["blue"], 4: ["two", "2"], 5: ["2"], 6: ["here"]}
    # Wrong are "blue", and the question that occurs once.
    assert most_frequent_answer_accuracy(questions, answers) == 5 / 7


def test_equally_frequent_answers_give_one_half():
    assert most_frequent_answer_accuracy({1: "is it?", 2: "is it?"}, {1: ["yes"], 2: ["no"]}) == 0.5


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), min_size=1, max_size=12))
def test_most_frequent_answer_accuracy_by_definition(pairs):
    right = 0
    for question in "ab":
        prediction = [answer for asked, answer in pairs if asked == question]
        right += max(map(prediction.count, "xyz")) if len(prediction) > 1 else 0
    questions, answers = {n: q for n, (q, _) in enumerate(pairs)}, {n: [a] for n, (_, a) in enumerate(pairs)}
    assert most_frequent_answer_accuracy(questions, answers) == right / len(pairs)
