"""TextGenerator: inputs are prepared and encoded, prompts are built, and texts are generated over the memory.

B: inputs; K: streams (questions about each input); n: texts for each stream; T: text positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mmx.boxes import Box
from mmx.config.loader import parse_config
from mmx.config.schema import GenerationConfig
from mmx.encoders.contract import PreparedInput, prepare
from mmx.errors import ConfigError, MmxError
from mmx.generation import CachedDecodeStep, DecodeStep, PromptBatch, generate, stream
from mmx.generation.guidance import GuidedDecodeStep
from mmx.generation.logits_processors import StoppingCriterion
from mmx.generation.outputs import GenerationOutput
from mmx.inference.inputs import InputReader, no_source_error
from mmx.inference.options import implied_options
from mmx.inference.outputs import GeneratedText
from mmx.inference.speech import (
    SpeechProperties,
    is_without_speech,
    resolve_speech_options,
    speech_prompt,
    speech_properties,
)
from mmx.memory import Memory
from mmx.models.batching import pad_texts, stack_boxes
from mmx.models.fingerprint import model_fingerprint
from mmx.models.model import Model
from mmx.models.source import SourceBatch, collate_inputs
from mmx.text.prompts import empty_question_error, is_empty_question, normalize_question


@dataclass(frozen=True)
class DecodingInputs:
    """What decoding starts from: the step over a memory, prompts [B, K, T] with their mask, and the options.

    speech: of each row, for a speech recognition model.
    """

    step: DecodeStep
    tokens: Tensor
    mask: Tensor
    options: GenerationConfig
    speech: list[SpeechProperties] | None


class TextGenerator(InputReader):
    """A model with its default decoding options."""

    def __init__(self, model: Model, generation: GenerationConfig | None = None) -> None:
        super().__init__(model.eval())
        self.generation = generation or GenerationConfig()

    def generation_config(self, overrides: Mapping[str, object]) -> GenerationConfig:
        """Return the default options with some replaced; `None` keeps the default.

        A default that contradicts a replaced option gives way, see `mmx.inference.options`.

        Raises:
            ConfigError: an option does not exist, is out of range, or contradicts another that was replaced.
        """
        replaced = {name: value for name, value in overrides.items() if value is not None}
        merged = {**self.generation.model_dump(), **implied_options(replaced), **replaced}
        config = parse_config(merged, GenerationConfig, where="generation options")
        self.check_token_ids(config)
        return resolve_speech_options(self.model.config.speech, config)

    def check_token_ids(self, options: GenerationConfig) -> None:
        """Raise ConfigError (generation.token_id) if an option names a token that is not in the vocabulary."""
        vocab_size = len(self.model.tokenizer)
        ids = {"suppress_tokens": options.suppress_tokens, "begin_suppress_tokens": options.begin_suppress_tokens}
        if options.forced_eos_token_id is not None:
            ids["forced_eos_token_id"] = (options.forced_eos_token_id,)
        for name, tokens in ids.items():
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise ConfigError(
                        f"generation options: {name} has token {token}; expected 0 to {vocab_size - 1}, the vocabulary "
                        "of this model.",
                        code="generation.token_id",
                        key=name,
                        token=token,
                        vocab_size=vocab_size,
                    )

    @torch.inference_mode()
    def encode_prepared(self, rows: Sequence[Mapping[str, PreparedInput]], allow_unconditional: bool = False) -> Memory:
        """Return the memory of B prepared inputs, which need not have the same sources.

        Raises MmxError (input.no_source) for a row without any, unless `allow_unconditional`.
        """
        for row, inputs in enumerate(rows):
            if not inputs and not allow_unconditional:
                raise no_source_error(f"row {row}", dict(inputs), list(self.model.encoders), row=row)
        batch = collate_inputs(self.model.encoders, rows)
        return self._encode_sources(batch, len(rows))

    def unconditional_memory(self, batch_size: int = 1) -> Memory:
        """Return the memory of B rows without any source, over which the decoder is a language model.

        An input that names no source is refused everywhere else (code `input.no_source`).
        """
        return self.model.encode({}, batch_size)

    @torch.inference_mode()
    def _encode_sources(self, batch: Mapping[str, SourceBatch], rows: int) -> Memory:
        moved = {name: part.to(self.model.device) for name, part in batch.items()}
        return replace(self.model.encode(moved, rows), fingerprint=self.fingerprint)

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

    def prompt_of(self, memory: Memory, question: str | None, options: GenerationConfig) -> list[int]:
        """Return the prompt of a question about a memory of one row, whose language may have to be detected."""
        prompt = self.prompt_tokens(question)
        if self.model.config.speech is None:
            return prompt
        speech = speech_properties(self.model, self.decoder_memory(memory, [[question]]), 1, options)
        return prompt if speech is None else speech_prompt(self.model, prompt, speech[0])

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

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the model, see `mmx.models.fingerprint`. Every memory that this object encodes has it."""
        return model_fingerprint(self.model)

    def check_memory(self, memory: Memory) -> None:
        """Raise MmxError (memory.other_model) for the memory of another model. One without a fingerprint is allowed."""
        if memory.fingerprint not in (None, self.fingerprint):
            raise MmxError(
                f"the memory was made by another model ({memory.fingerprint}) than this one ({self.fingerprint}); "
                "encode the input again with this model, or load the model that made it.",
                code="memory.other_model",
                fingerprint=memory.fingerprint,
                expected=self.fingerprint,
            )

    def with_boxes(self, memory: Memory, boxes: Sequence[Sequence[Box | None]], streams: int) -> Memory:
        """Return the memory in which each of K streams attends only to its box. boxes: [B][up to K], None for all."""
        stacked = stack_boxes(boxes, streams)
        return memory if stacked is None else memory.focus(stacked)

    def with_questions(self, memory: Memory, questions: Sequence[Sequence[str | None]]) -> Memory:
        """Return the memory that the decoder attends to, once a text source or question encoder has read [B][K].

        Raises MmxError (memory.other_model) for a memory of another model.
        """
        self.check_memory(memory)
        name = self.model.config.question_input
        if name == "prompt":
            return memory
        streams = len(questions[0])
        texts: list[str] = []
        rows: list[int] = []
        for row, asked in enumerate(questions):
            for stream_, question in enumerate(asked):
                if question is not None:
                    texts.append(normalize_question(question))
                    rows.append(row * streams + stream_)
        if not texts:
            return self.model.with_questions(memory, None)
        batch = self.model.collate(name, texts, rows)
        return self.model.with_questions(memory, batch._replace(streams=streams))

    @torch.inference_mode()
    def decoder_memory(self, memory: Memory, questions: Sequence[Sequence[str | None]]) -> Memory:
        """Return `with_questions(memory, questions)` in the floating type that the decoder computes in.

        Raises:
            MmxError: memory.not_finite, if a slot that exists is too large for this type.
        """
        dtype = self.model.decoder.embedding.weight.dtype
        converted = self.with_questions(memory, questions).to(dtype=dtype)
        if not _is_finite(converted):
            name = str(dtype).removeprefix("torch.")
            raise MmxError(
                f"the memory has values that are not finite in {name}; check the features of the encoders, or load the "
                "model with dtype float32.",
                code="memory.not_finite",
                dtype=name,
            )
        return converted

    def generate_batch(
        self,
        memory: Memory,
        questions: Sequence[Sequence[str | None]],
        options: GenerationConfig,
        boxes: Sequence[Sequence[Box | None]] = (),
    ) -> list[list[list[GeneratedText]]]:
        """Generate texts for K questions about each of B inputs.

        Args:
            memory: of B rows.
            questions: [B][up to K]; None asks for a caption.
            options: see `generation_config`.
            boxes: [B][up to K], the region of each question; None for the whole input.

        Returns:
            [B][K][num_return_sequences], best first.
        """
        if not any(questions):
            return [[] for _ in questions]
        focused = self.with_boxes(memory, boxes, max(len(row) for row in questions))
        start = self.decoding_inputs(focused, questions, options)
        texts: list[list[list[GeneratedText]]] = []
        for index, (row, asked) in enumerate(zip(self._generate(start), questions, strict=True)):
            streams = row[: len(asked)]  # rows with fewer questions were padded
            speech = None if start.speech is None else start.speech[index]
            texts.append([[self._decode(output, options, speech) for output in stream_] for stream_ in streams])
        return texts

    def generate_tokens(
        self, memory: Memory, questions: Sequence[Sequence[str | None]], options: GenerationConfig
    ) -> list[list[list[GenerationOutput]]]:
        """Like `generate_batch`, but return token ids [B][K][num_return_sequences], padded rows included."""
        return self._generate(self.decoding_inputs(memory, questions, options))

    @torch.inference_mode()
    def _generate(self, start: DecodingInputs) -> list[list[list[GenerationOutput]]]:
        eos = self.model.tokenizer.eos_token_id
        criteria = self._stopping_criteria(start.options)
        return generate(start.step, PromptBatch(start.tokens, start.mask), start.options, eos, (), criteria)

    @torch.inference_mode()  # as a decorator it is off between the yields, in the caller's code
    def stream_texts(self, memory: Memory, question: str | None, options: GenerationConfig) -> Iterator[str]:
        """Yield the text so far after each token, for a memory of one row."""
        start = self.decoding_inputs(memory, [[question]], options)
        if start.speech is not None and start.speech[0].may_lack_speech:  # known once the text is complete
            yield self._decode(self._generate(start)[0][0][0], start.options, start.speech[0]).text
            return
        eos = self.model.tokenizer.eos_token_id
        generated: list[int] = []
        criteria = self._stopping_criteria(start.options)
        for row in stream(start.step, PromptBatch(start.tokens, start.mask), start.options, eos, (), criteria):
            generated.append(row[0])
            yield self._truncate_at_stop_strings(self.model.tokenizer.decode(generated), start.options)

    @torch.inference_mode()
    def decoding_inputs(
        self, memory: Memory, questions: Sequence[Sequence[str | None]], options: GenerationConfig
    ) -> DecodingInputs:
        """Build the prompts and the decoding step. Rows with fewer questions are padded to K streams."""
        self.check_token_ids(options)
        streams = max(len(row) for row in questions)
        prompts = [[self.prompt_tokens(question) for question in row] for row in questions]
        padded = [[*row, *[None] * (streams - len(row))] for row in questions]
        conditional = self.decoder_memory(memory, padded)
        speech = speech_properties(self.model, conditional, streams, options)
        if speech is not None:
            for row, properties in zip(prompts, speech, strict=True):
                row[:] = [speech_prompt(self.model, prompt, properties) for prompt in row]
        padding = next(prompt for row in prompts for prompt in row)  # any valid prompt; its texts are dropped later
        eos = self.model.tokenizer.eos_token_id
        texts: list[list[tuple[list[int], list[int]]]] = []
        for row in prompts:
            missing = streams - len(row)
            texts.append([(prompt, [eos]) for prompt in [*row, *[padding] * missing]])
        batch = pad_texts(texts, streams, self.model.tokenizer.pad_token_id)
        tokens, mask, _ = (tensor.to(self.model.device) for tensor in batch)
        has_questions = any(question is not None for row in questions for question in row)
        options = self._limit_new_tokens(options, has_questions)
        return DecodingInputs(self._step(conditional, padded, options), tokens, mask, options, speech)

    def _step(
        self, conditional: Memory, questions: Sequence[Sequence[str | None]], options: GenerationConfig
    ) -> DecodeStep:
        """The decoding step; classifier-free guidance adds a second one over the questions alone.

        conditional: the memory that the decoder attends to, with the questions.
        """
        decoder = self.model.decoder
        step = CachedDecodeStep(decoder, conditional, options.max_new_tokens)
        if options.guidance_scale == 1.0:
            return step
        without_sources = self.unconditional_memory(conditional.batch_size)
        unconditional = self.with_questions(without_sources, questions).to(dtype=conditional.keys.dtype)
        return GuidedDecodeStep(
            step, CachedDecodeStep(decoder, unconditional, options.max_new_tokens), options.guidance_scale
        )

    def _limit_new_tokens(self, options: GenerationConfig, has_questions: bool) -> GenerationConfig:
        """Limit max_new_tokens to the learned positions left after the longest possible prompt.

        The actual prompt is not used: the answer to one question must not depend on the others of its batch.
        """
        decoder = self.model.config.decoder
        prompt_length = self.max_prompt_length if has_questions else len(self.prompt_tokens(None))
        available = decoder.max_new_tokens_after(prompt_length)
        if available is None or options.max_new_tokens <= available:
            return options
        return options.model_copy(update={"max_new_tokens": available})

    def _decode(
        self, output: GenerationOutput, options: GenerationConfig, speech: SpeechProperties | None
    ) -> GeneratedText:
        if speech is not None and is_without_speech(speech, output):
            return GeneratedText("", output.score, (), **asdict(speech))
        tokenizer = self.model.tokenizer
        tokens = tuple(
            (tokenizer.decode([token]), logprob) for token, logprob in zip(output.tokens, output.logprobs, strict=False)
        )
        text = self._truncate_at_stop_strings(tokenizer.decode(output.tokens), options)
        logprob = sum(output.logprobs)
        probability = math.exp(min(logprob, 0.0) / options.answer_temperature)
        properties = asdict(speech or SpeechProperties())
        return GeneratedText(text, output.score, tokens, logprob, probability, **properties)

    def _stopping_criteria(self, options: GenerationConfig) -> list[StoppingCriterion]:
        """End a stream once its text contains one of the stop strings."""
        if not options.stop_strings:
            return []

        def contains_stop_string(generated: Tensor, logits: Tensor) -> Tensor:
            found = []
            for row in generated.tolist():
                text = self.model.tokenizer.decode(row)
                found.append(any(string in text for string in options.stop_strings))
            return torch.tensor(found, device=generated.device)

        return [contains_stop_string]

    def _truncate_at_stop_strings(self, text: str, options: GenerationConfig) -> str:
        for string in options.stop_strings:
            text = text.split(string)[0]
        return text.strip()


def check_question(question: object) -> None:
    """Raise MmxError if a question is not a text (question.type), or is empty (input.empty_question)."""
    if not isinstance(question, str):
        raise MmxError(
            f"the question is a {type(question).__name__}; expected a text, such as 'what is this?'.",
            code="question.type",
        )
    if is_empty_question(question):
        raise empty_question_error()


def _is_finite(memory: Memory) -> bool:
    """Whether keys and values of every slot that exists are finite."""
    finite = memory.keys.isfinite().all(-1) & memory.values.isfinite().all(-1)  # [L, B, H, S]
    return bool((finite | ~memory.mask[:, None]).all())
