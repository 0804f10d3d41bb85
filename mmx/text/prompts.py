"""Prompts, special tokens and questions. Imports no torch.

A prompt is a sequence of special tokens and plain strings. A special token is encoded as a single id; a plain string is
never read as a special token, whatever a user types.
"""

import re
import unicodedata
from dataclasses import dataclass

from mmx.errors import DataError, MmxError


@dataclass(frozen=True)
class SpecialToken:
    """A token with a function, such as `<bos>`."""

    text: str

    @property
    def name(self) -> str:
        """The text without brackets, as the key `special_tokens` of a configuration has it."""
        return self.text.strip("<>")


PAD = SpecialToken("<pad>")
BOS = SpecialToken("<bos>")
EOS = SpecialToken("<eos>")
CAPTION = SpecialToken("<caption>")
QUESTION = SpecialToken("<question>")
ANSWER = SpecialToken("<answer>")
SPECIAL_TOKENS = (PAD, BOS, EOS, CAPTION, QUESTION, ANSWER)

# In the Unicode names of question marks: "FULLWIDTH QUESTION MARK", "QUESTION EXCLAMATION MARK", "INTERROBANG".
QUESTION_MARK_NAMES = ("QUESTION MARK", "QUESTION EXCLAMATION", "EXCLAMATION QUESTION", "INTERROBANG")

Prompt = tuple[SpecialToken | str, ...]


def caption_prompt() -> Prompt:
    """Return the prompt of a caption."""
    return (BOS, CAPTION)


def question_prompt(question: str) -> Prompt:
    """Return the prompt of an answer if the decoder reads the question itself."""
    return (BOS, QUESTION, normalize_question(question), ANSWER)


def answer_prompt() -> Prompt:
    """Return the prompt of an answer if a text encoder or the question encoder reads the question."""
    return (BOS, ANSWER)


def normalize_question(question: str) -> str:
    """Return a question on one line, as written, with one question mark at the end.

    White space becomes single spaces; full stops and repeated question marks at the end are left out. A question that
    ends in the question mark of another script, such as "？" or "؟", gets no second one.
    """
    stripped = re.sub(r"[\s?.]+$", "", " ".join(question.split()))
    return stripped if _ends_in_question_mark(stripped) else stripped + "?"


def is_empty_question(question: str) -> bool:
    """Return whether a question has nothing but white space, full stops and question marks of any script."""
    return all(character.isspace() or character == "." or _is_question_mark(character) for character in question)


def empty_question_error(where: str = "", **details: object) -> MmxError:
    """Return the error for a question that `is_empty_question`.

    Args:
        where: the place in a file where it was read.
    """
    place = f" in {where}" if where else ""
    return DataError(
        f"the question{place} is empty; expected a text, such as 'what is this?'.",
        code="input.empty_question",
        **details,
    )


def _ends_in_question_mark(text: str) -> bool:
    # Greek keyboards write a semicolon. In Armenian the mark is on the stressed vowel, inside of the sentence.
    is_marked = "\u055e" in text or re.search(r"[\u0370-\u03ff\u1f00-\u1fff]\s*;$", text) is not None
    return is_marked or _is_question_mark(text[-1:])


def _is_question_mark(character: str) -> bool:
    return bool(character) and any(name in unicodedata.name(character, "") for name in QUESTION_MARK_NAMES)
