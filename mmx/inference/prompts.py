"""PromptEncoder: what the decoder reads before the text: the prompt of a question, and the forced start of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from mmx.encoders.contract import prepare
from mmx.errors import MmxError
from mmx.inference.inputs import InputReader
from mmx.inference.speech import SpeechProperties, speech_prompt
from mmx.text.prompts import empty_question_error, is_empty_question, normalize_question


class TextStart(NamedTuple):
    """The forced start of a text, and its tokens, which follow the prompt. Both are empty without one."""

    text: str
    tokens: list[int]


StartRows: TypeAlias = list[list[TextStart]]


class PromptEncoder(InputReader):
    """Encodes prompts and starts of texts to tokens, and checks their lengths."""

    def prompt_tokens(self, question: str | None) -> list[int]:
        """Return the token ids of the decoder's prompt; `None` is the caption prompt.

        Raises:
            MmxError: the question is not a text, is empty, or is longer than half of the decoder's positions.
        """
        if question is not None:
            check_question(question)
        if question is not None and self.model.question_preparer is not None:
            prepare(self.model.question_preparer, self.model.config.question_input, normalize_question(question))
        prompt = self.model.tokenizer.encode_prompt(self.model.prompt(question))
        if len(prompt) > self.max_prompt_length:
            raise MmxError(
                f"the question has {len(prompt)} tokens; this model reads up to {self.max_prompt_length}, "
                "shorten the question.",
                code="question.too_long",
                length=len(prompt),
                maximum=self.max_prompt_length,
            )
        return prompt

    def start_tokens(self, start: str, prompt_length: int) -> TextStart:
        """Return the forced start of a text, which follows a prompt of this length.

        White space at its ends is left out: the tokens of the next word have it.

        Raises MmxError (start.too_long) if both are longer than half of the decoder's positions.
        """
        text = start.strip()
        if not text:
            return TextStart("", [])
        # The texts of Whisper begin with a space, also after the tokens of language and task.
        tokens = self.model.tokenizer.encode(text if self.model.config.speech is None else f" {text}")
        length = prompt_length + len(tokens)
        if length > self.max_prompt_length:
            raise MmxError(
                f"start and prompt have {length} tokens; this model reads up to {self.max_prompt_length}, give a "
                "shorter start.",
                code="start.too_long",
                length=length,
                maximum=self.max_prompt_length,
            )
        return TextStart(text, tokens)

    def encode_starts(self, starts: Sequence[Sequence[str]], prompts: Sequence[Sequence[list[int]]]) -> StartRows:
        """Return the starts [B][up to K] of texts that follow these prompts. Raises MmxError as `start_tokens`."""
        rows: StartRows = []
        for row, row_prompts in zip(starts, prompts, strict=True):
            pairs = zip(row, row_prompts, strict=True)
            rows.append([self.start_tokens(start, len(prompt)) for start, prompt in pairs])
        return rows

    def speech_prompts(
        self, prompts: Sequence[Sequence[list[int]]], speech: Sequence[SpeechProperties] | None
    ) -> list[list[list[int]]]:
        """Return the prompts [B][up to K] with the language and the task of each row."""
        if speech is None:
            return [list(row) for row in prompts]
        rows: list[list[list[int]]] = []
        for row, properties in zip(prompts, speech, strict=True):
            rows.append([speech_prompt(self.model, prompt, properties) for prompt in row])
        return rows

    @property
    def max_prompt_length(self) -> int:
        """Half of the decoder's positions; the other half is for the answer."""
        return self.model.config.decoder.max_position_embeddings // 2

    def check_length(self, length: int) -> None:
        """Raise MmxError if a text of `length` tokens is longer than the decoder's learned positions."""
        decoder = self.model.config.decoder
        if decoder.positions == "learned" and length > decoder.max_position_embeddings:
            raise MmxError(
                f"prompt and text have {length} tokens; this model reads up to {decoder.max_position_embeddings}, "
                "give shorter texts.",
                code="text.too_long",
                length=length,
                maximum=decoder.max_position_embeddings,
            )


def check_question(question: object) -> None:
    """Raise MmxError if a question is not a text (question.type), or is empty (input.empty_question)."""
    if not isinstance(question, str):
        raise MmxError(
            f"the question is a {type(question).__name__}; expected a text, such as 'what is this?'.",
            code="question.type",
        )
    if is_empty_question(question):
        raise empty_question_error()
