"""From generated tokens to texts: the forced start of a text, stop strings, missing speech."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig
from mmx.generation.logits_processors import LogitsProcessor, StoppingCriterion
from mmx.generation.outputs import GenerationOutput
from mmx.generation.word_constraints import WordConstraints, Words, compile_words
from mmx.inference.outputs import GeneratedText
from mmx.inference.prompts import TextStart
from mmx.inference.speech import SpeechProperties, is_without_speech
from mmx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextOutput:
    """Turns the tokens of one call into texts, and says which words the options ask for in vain."""

    tokenizer: Tokenizer
    options: GenerationConfig

    @property
    def words(self) -> Words | None:
        """The words of `avoid` and `include`; None without any."""
        if not (self.options.avoid or self.options.include):
            return None
        return compile_words(self.tokenizer, self.options.avoid, self.options.include)

    def logits_processors(self, starts: Iterable[TextStart]) -> list[LogitsProcessor]:
        """Return the constraints on words in texts with these starts.

        Starts that differ are not taken into account: a word of which they have a part can be reported as unmet.
        """
        words = self.words
        if words is None:
            return []
        texts = {start.text for start in starts}
        start = texts.pop() if len(texts) == 1 else ""
        return [WordConstraints(words, start, self.options.max_new_tokens, self.options.num_beams > 1)]

    def decode(self, tokens: Sequence[int], start: TextStart) -> str:
        """Return the start as it was given and the text of the generated tokens, up to a stop string."""
        if not start.tokens:
            return self._truncate(self.tokenizer.decode(tokens)).strip()
        whole = self.tokenizer.decode([*start.tokens, *tokens])
        prefix = self.tokenizer.decode(start.tokens)  # unlike the start itself if the tokenizer normalizes texts
        if not whole.startswith(prefix):
            return self._truncate(whole).strip()
        return (start.text + self._truncate(whole[len(prefix) :])).strip()

    def generated_text(
        self, output: GenerationOutput, start: TextStart, speech: SpeechProperties | None
    ) -> GeneratedText:
        """Return a text with its scores, which are those of the generated tokens. It is empty without speech."""
        if speech is not None and is_without_speech(speech, output):
            return GeneratedText("", output.score, (), unmet=self._unmet(""), **asdict(speech))
        tokens = tuple(
            (self.tokenizer.decode([token]), logprob)
            for token, logprob in zip(output.tokens, output.logprobs, strict=False)
        )
        logprob = sum(output.logprobs)
        probability = math.exp(min(logprob, 0.0) / self.options.answer_temperature)
        properties = asdict(speech or SpeechProperties())
        text = self.decode(output.tokens, start)
        unmet = self._unmet(text)
        return GeneratedText(text, output.score, tokens, logprob, probability, unmet=unmet, **properties)

    def stopping_criteria(self) -> list[StoppingCriterion]:
        """End a stream once its generated text contains one of the stop strings."""
        if not self.options.stop_strings:
            return []

        def contains_stop_string(generated: Tensor, logits: Tensor) -> Tensor:
            found = []
            for row in generated.tolist():
                text = self.tokenizer.decode(row)
                found.append(any(string in text for string in self.options.stop_strings))
            return torch.tensor(found, device=generated.device)

        return [contains_stop_string]

    def _unmet(self, text: str) -> tuple[str, ...]:
        words = self.words
        return () if words is None else words.unmet(text)

    def _truncate(self, text: str) -> str:
        for string in self.options.stop_strings:
            text = text.split(string)[0]
        return text
