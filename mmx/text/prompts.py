"""Prompts, special tokens and normalization of texts. Imports no torch.

A prompt is a sequence of special tokens and plain strings. A special token is encoded as a single id; a plain string is
never read as a special token, whatever a user types.
"""

from dataclasses import dataclass


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
    """Return a question with single spaces and one question mark at the end."""
    return " ".join(question.split()).rstrip(" ?.") + "?"


def normalize_whitespace(text: str) -> str:
    """Return a text with single spaces, and none before punctuation."""
    normalized = " ".join(text.split())
    for sign in (".", ",", "?", "!", ";", ":", "'s", "n't"):
        normalized = normalized.replace(f" {sign}", sign)
    return normalized


def normalize_caption(caption: str) -> str:
    """Return a caption as a training target: lower case, no space before punctuation, no full stop at the end."""
    return normalize_whitespace(caption.lower()).rstrip(" .")
