"""Whether the type of an answer fits the question: "what animal is this?" is not answered with a color.

The words of each type are those of `mmx.data.lexicon`, and the reference answers to all questions of the same type.
"""

from collections.abc import Collection, Mapping, Sequence

from mmx.data.lexicon import ACTIONS, ANIMALS, COLORS, OBJECTS, PEOPLE, PLACES, PLURAL_PEOPLE
from mmx.data.unanswerable_questions import CANNOT_TELL
from mmx.evaluation.report import EvaluatedText

_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_YES_NO = frozenset(("yes", "no"))
# The words that answer the questions of a type.
ANSWER_WORDS: Mapping[str, Collection[str]] = {
    "color": COLORS.keys(),
    "count": frozenset((*_NUMBER_WORDS, *map(str, range(101)))),
    "animal": ANIMALS.keys(),
    "subject": PEOPLE.keys() | PLURAL_PEOPLE.keys() | ANIMALS.keys(),
    "action": ACTIONS.keys(),
    "object": OBJECTS.keys(),
    "place": PLACES.keys(),
    "exists": _YES_NO,
    "verify": _YES_NO,
}


def answer_type_fits(question_type: str, answers: Sequence[EvaluatedText]) -> float:
    """Return the fraction of answers whose type fits. "Can't tell" fits every question.

    Args:
        question_type: a key of ANSWER_WORDS.
        answers: to questions of this type; at least one.
    """
    known = {_normalize(target) for text in answers for target in text.targets}
    known.update((*ANSWER_WORDS[question_type], CANNOT_TELL))
    fitting = sum(_is_known(_normalize(text.prediction), known) for text in answers)
    return fitting / len(answers)


def cannot_tell_rate(answers: Sequence[EvaluatedText]) -> float:
    """Return the fraction of questions that are answered "can't tell" although the answer is another one."""
    answerable = [text for text in answers if CANNOT_TELL not in map(_normalize, text.targets)]
    if not answerable:
        return 0.0
    return sum(_normalize(text.prediction) == CANNOT_TELL for text in answerable) / len(answerable)


def _is_known(answer: str, known: Collection[str]) -> bool:
    """Return whether all parts of an answer such as "black and white" are known."""
    return answer in known or all(part in known for part in answer.split(" and "))


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
