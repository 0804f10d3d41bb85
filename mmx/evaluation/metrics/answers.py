"""Accuracy of answers to questions, as fractions from 0 to 1.

`vqa_accuracy` equals the official script of the VQA benchmark (Antol et al., "VQA: Visual Question Answering", 2015,
section 3; `PythonEvaluationTools/vqaEvaluation/vqaEval.py` of GT-Vision-Lab/VQA), which differs from the text of its
website and from several other programs:

* The prediction loses punctuation, then articles, and number words become digits. People's answers lose only
  punctuation, and that only when they are not all the same: "the dog" said by all ten cannot be matched.
* Each answer in turn is left out, min(matches among the others / 3, 1) taken, and the mean returned.
* At most 32 full stops go (a flag was passed where a count belongs), "none" is 0, and case matters in people's answers.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32

_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate(_DIGITS.split())}}

# Every contraction the official script repairs. One apostrophe: written without it ("dont"). Two or more: written
# with any one of them missing ("couldn'tve", "couldnt've"), but not with more.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""


def _misspellings() -> dict[str, str]:
    """Each contraction with one apostrophe lost -> the contraction."""
    repaired = {"somebody'd": "somebodyd"}  # the wrong way round in the official script
    for word in _CONTRACTIONS.split():
        for place, letter in enumerate(word):
            if letter == "'":
                repaired[word[:place] + word[place + 1 :]] = word
    return repaired


_REPAIRED = _misspellings()


def answer_metrics(predictions: Mapping[Hashable, str], answers: Mapping[Hashable, Sequence[str]]) -> dict[str, float]:
    """Mean exact match and mean VQA accuracy over questions, by question id."""
    if not answers:
        raise ValueError("Answer metrics need at least one question; got none.")
    if unmatched := predictions.keys() ^ answers.keys():
        raise ValueError(
            f"Predictions and answers need the same ids: {len(unmatched)} are in one of the two only, "
            f"{min(unmatched, key=str)!r} for one."
        )
    return {
        "exact match": sum(exact_match(predictions[key], people) for key, people in answers.items()) / len(answers),
        "VQA accuracy": sum(vqa_accuracy(predictions[key], people) for key, people in answers.items()) / len(answers),
    }


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction is one of the answers, but for case and white space, else 0.0.

    The best over all answers as in Rajpurkar et al., "SQuAD", 2016, section 6.1, who also drop articles and marks.
    """
    _check(answers)
    return float(_plain(prediction) in map(_plain, answers))


def most_frequent_answer_accuracy(
    questions: Mapping[Hashable, str], answers: Mapping[Hashable, Sequence[str]]
) -> float:
    """Mean exact match of one who sees nothing, but knows how often each question has each answer and gives the most
    frequent; one that is asked only once is not known. The floor to hold a model's figure against.
    """
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    for key, people in answers.items():
        asked[_plain(questions[key])].update({_plain(answer) for answer in people})
    times = Counter(_plain(questions[key]) for key in answers)
    best = {question: max((n, answer) for answer, n in said.items())[1] for question, said in asked.items()}
    right = 0
    for key, people in answers.items():
        question = _plain(questions[key])
        right += times[question] > 1 and best[question] in map(_plain, people)
    return right / len(answers)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official VQA accuracy of one prediction against people's answers, ten in the benchmark; 0 if there is but one."""
    _check(answers)
    ours = _without_articles(_without_punctuation(prediction.replace("\n", " ").replace("\t", " ").strip()))
    people = list(answers) if len(set(answers)) == 1 else [_without_punctuation(answer) for answer in answers]
    matches = people.count(ours)
    # Leaving out an answer that matches leaves one match fewer.
    return sum(min(1.0, (matches - (answer == ours)) / 3) for answer in people) / len(people)


def _without_punctuation(text: str) -> str:
    """A mark goes where a space stands beside one of its kind, or digits round a comma anywhere; else it is a space."""
    without = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        without = without.replace(mark, "" if beside_space or _DIGITS_AROUND_COMMA.search(text) else " ")
    return _FULL_STOP.sub("", without, count=_MOST_FULL_STOPS)


def _without_articles(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def _check(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"A question needs a list of at least one answer; got {answers!r}.")
