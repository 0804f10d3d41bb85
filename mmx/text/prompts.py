"""What the decoder is told before it speaks, and what its words mean afterwards. Text only; imports no torch.

A prompt is a sequence of marks and plain strings. Marks are single tokens with a meaning; plain strings are never read
as marks, whatever a person types.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialToken:
    """A token with a meaning of its own."""

    text: str


PAD, BOS, EOS = SpecialToken("<pad>"), SpecialToken("<bos>"), SpecialToken("<eos>")
CAPTION, QUESTION, ANSWER = SpecialToken("<caption>"), SpecialToken("<question>"), SpecialToken("<answer>")
SPECIAL_TOKENS = (PAD, BOS, EOS, CAPTION, QUESTION, ANSWER)

Prompt = tuple[SpecialToken | str, ...]


def caption_prompt() -> Prompt:
    """Describe what is there."""
    return (BOS, CAPTION)


def question_prompt(question: str) -> Prompt:
    """Answer this, the question being said by the decoder's own prompt."""
    return (BOS, QUESTION, normalize_question(question), ANSWER)


def answer_prompt() -> Prompt:
    """Answer, the question having gone to a text encoder."""
    return (BOS, ANSWER)


def normalize_question(question: str) -> str:
    """One space between words, one question mark at the end: how questions are spelt is no part of what they ask."""
    return " ".join(question.split()).rstrip(" ?.") + "?"


def normalize_whitespace(text: str) -> str:
    """Decoded text as people write it: single spaces, none before punctuation."""
    words = " ".join(text.split())
    for sign in (".", ",", "?", "!", ";", ":", "'s", "n't"):
        words = words.replace(f" {sign}", sign)
    return words


def normalize_caption(caption: str) -> str:
    """A human caption as training target: lower case, no space before its signs, no full stop at the end."""
    return normalize_whitespace(caption.lower()).rstrip(" .")
