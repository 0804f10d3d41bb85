"""Accuracy of answers to questions, in 0..1.

`vqa_accuracy` equals the official script of the VQA benchmark (Antol et al., "VQA: Visual Question Answering", 2015,
section 3; `PythonEvaluationTools/vqaEvaluation/vqaEval.py` of GT-Vision-Lab/VQA), which differs from the description on
its website and from several other implementations:

* Punctuation and articles are removed from the prediction, and number words become digits. From the annotators' answers
  only punctuation is removed, and only if the answers are not all equal: "the dog" given by all ten cannot be matched.
* Each answer in turn is left out, min(matches among the others / 3, 1) is computed, and the mean is returned.
* At most 32 full stops are removed (a flag was passed in place of a count), "none" becomes 0, and the annotators'
  answers are case-sensitive.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = 32

_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate(_DIGITS.split())}}

# The contractions that the official script repairs if one apostrophe is missing: "dont", "couldn'tve", "couldnt've".
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""


def _misspellings() -> dict[str, str]:
    """Contractions by their spelling without one of the apostrophes."""
    repaired = {"somebody'd": "somebodyd"}  # reversed in the official script
    for word in _CONTRACTIONS.split():
        for index, char in enumerate(word):
            if char == "'":
                repaired[word[:index] + word[index + 1 :]] = word
    return repaired


_REPAIRED = _misspellings()


def answer_metrics(predictions: Mapping[Key, str], answers: Mapping[Key, Sequence[str]]) -> dict[str, float]:
    """Mean exact match and mean VQA accuracy over questions, by question id.

    Raises ValueError without questions, or for different ids.
    """
    if not answers:
        raise ValueError("Answer metrics need at least one question; got none.")
    unmatched = predictions.keys() ^ answers.keys()
    if unmatched:
        raise ValueError(
            f"Predictions and answers need the same ids: {len(unmatched)} are in one of the two only, "
            f"such as {min(unmatched, key=str)!r}."
        )
    matches = [exact_match(predictions[key], given) for key, given in answers.items()]
    accuracies = [vqa_accuracy(predictions[key], given) for key, given in answers.items()]
    return {"exact match": sum(matches) / len(answers), "VQA accuracy": sum(accuracies) / len(answers)}


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers except for case and white space, else 0.0.

    The maximum over the answers as in Rajpurkar et al., "SQuAD", 2016, section 6.1, who also remove articles and
    punctuation.
    """
    _check_answers(answers)
    return float(_normalize(prediction) in map(_normalize, answers))


def most_frequent_answer_accuracy(questions: Mapping[Key, str], answers: Mapping[Key, Sequence[str]]) -> float:
    """Mean exact match of a baseline that ignores the image and gives each question its most frequent answer.

    Answers are counted over all examples with the same question. A question that occurs once counts as wrong.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for key, given in answers.items():
        counts[_normalize(questions[key])].update({_normalize(answer) for answer in given})
    occurrences = Counter(_normalize(questions[key]) for key in answers)
    best = {question: max((n, answer) for answer, n in counted.items())[1] for question, counted in counts.items()}
    correct = 0
    for key, given in answers.items():
        question = _normalize(questions[key])
        correct += occurrences[question] > 1 and best[question] in map(_normalize, given)
    return correct / len(answers)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official VQA accuracy of one prediction against the annotators' answers, ten in the benchmark; 0 for only one."""
    _check_answers(answers)
    stripped = prediction.replace("\n", " ").replace("\t", " ").strip()
    ours = _normalize_words(_remove_punctuation(stripped))
    equal = len(set(answers)) == 1
    theirs = list(answers) if equal else [_remove_punctuation(answer) for answer in answers]
    matches = theirs.count(ours)
    # Leaving out an answer that matches leaves one match fewer.
    return sum(min(1.0, (matches - (answer == ours)) / 3) for answer in theirs) / len(theirs)


def _normalize(text: str) -> str:
    """The text without differences in case and white space."""
    return " ".join(text.casefold().split())


def _remove_punctuation(text: str) -> str:
    """Remove a mark if one of its kind is next to a space, or if there are digits around a comma; else make it a
    space."""
    result = text
    for mark in _PUNCTUATION:
        next_to_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if next_to_space or _DIGITS_AROUND_COMMA.search(text) else " ")
    return _FULL_STOP.sub("", result, count=_MAX_FULL_STOPS)


def _normalize_words(text: str) -> str:
    """Replace number words, remove articles, and repair contractions."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def _check_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"A question needs a list of at least one answer; got {answers!r}.")
