"""TextGenerator: inputs are prepared and encoded, prompts are built, and texts are generated over the memory.

B: inputs; K: streams (questions about each input); n: texts for each stream; T: text positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mmx.boxes import Box
from mmx.config.loader import parse_config
from mmx.config.schema import GenerationConfig
from mmx.encoders.contract import PreparedInput
from mmx.errors import ConfigError, MmxError
from mmx.generation import CachedDecodeStep, DecodeStep, PromptBatch, generate, stream
from mmx.generation.guidance import GuidedDecodeStep
from mmx.generation.outputs import GenerationOutput
from mmx.inference.generated_texts import TextOutput
from mmx.inference.inputs import no_source_error
from mmx.inference.options import implied_options
from mmx.inference.outputs import GeneratedText
from mmx.inference.prompts import PromptEncoder, StartRows
from mmx.inference.speech import (
    SpeechProperties,
    resolve_speech_options,
    speech_prompt,
    speech_properties,
)
from mmx.memory import Memory
from mmx.models.batching import pad_texts, stack_boxes
from mmx.models.fingerprint import model_fingerprint
from mmx.models.model import Model
from mmx.models.source import SourceBatch, collate_inputs
from mmx.text.prompts import normalize_question


@dataclass(frozen=True)
class DecodingInputs:
    """What decoding starts from: the step over a memory, prompts [B, K, T] with their mask, and the options.

    starts: the forced start of each text, [B][K]. speech: of each row, for a speech recognition model.
    """

    step: DecodeStep
    tokens: Tensor
    mask: Tensor
    options: GenerationConfig
    starts: StartRows
    speech: list[SpeechProperties] | None


class TextGenerator(PromptEncoder):
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

    def prompt_of(self, memory: Memory, question: str | None, options: GenerationConfig) -> list[int]:
        """Return the prompt of a question about a memory of one row, whose language may have to be detected."""
        prompt = self.prompt_tokens(question)
        if self.model.config.speech is None:
            return prompt
        speech = speech_properties(self.model, self.decoder_memory(memory, [[question]]), 1, options)
        return prompt if speech is None else speech_prompt(self.model, prompt, speech[0])

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
        starts: Sequence[Sequence[str]] = (),
    ) -> list[list[list[GeneratedText]]]:
        """Generate texts for K questions about each of B inputs.

        Args:
            memory: of B rows.
            questions: [B][up to K]; None asks for a caption.
            options: see `generation_config`.
            boxes: [B][up to K], the region of each question; None for the whole input.
            starts: [B][up to K], the forced start of each text; without them that of the options.

        Returns:
            [B][K][num_return_sequences], best first.
        """
        if not any(questions):
            return [[] for _ in questions]
        focused = self.with_boxes(memory, boxes, max(len(row) for row in questions))
        inputs = self.decoding_inputs(focused, questions, options, starts)
        output = TextOutput(self.model.tokenizer, inputs.options)
        texts: list[list[list[GeneratedText]]] = []
        for index, row in enumerate(self._generate(inputs)):
            speech = None if inputs.speech is None else inputs.speech[index]
            row_texts: list[list[GeneratedText]] = []
            for stream_, start in zip(row, inputs.starts[index], strict=False):  # rows with fewer questions were padded
                row_texts.append([output.generated_text(tokens, start, speech) for tokens in stream_])
            texts.append(row_texts)
        return texts

    def generate_tokens(
        self, memory: Memory, questions: Sequence[Sequence[str | None]], options: GenerationConfig
    ) -> list[list[list[GenerationOutput]]]:
        """Like `generate_batch`, but return token ids [B][K][num_return_sequences], padded rows included."""
        return self._generate(self.decoding_inputs(memory, questions, options))

    @torch.inference_mode()
    def _generate(self, inputs: DecodingInputs) -> list[list[list[GenerationOutput]]]:
        eos = self.model.tokenizer.eos_token_id
        output = TextOutput(self.model.tokenizer, inputs.options)
        processors = output.logits_processors(start for row in inputs.starts for start in row)
        prompts = PromptBatch(inputs.tokens, inputs.mask)
        return generate(inputs.step, prompts, inputs.options, eos, processors, output.stopping_criteria())

    @torch.inference_mode()  # as a decorator it is off between the yields, in the caller's code
    def stream_texts(self, memory: Memory, question: str | None, options: GenerationConfig) -> Iterator[str]:
        """Yield the text so far after each token, for a memory of one row."""
        inputs = self.decoding_inputs(memory, [[question]], options)
        output = TextOutput(self.model.tokenizer, inputs.options)
        start = inputs.starts[0][0]
        if inputs.speech is not None and inputs.speech[0].may_lack_speech:  # known once the text is complete
            yield output.generated_text(self._generate(inputs)[0][0][0], start, inputs.speech[0]).text
            return
        eos = self.model.tokenizer.eos_token_id
        generated: list[int] = []
        criteria = output.stopping_criteria()
        processors = output.logits_processors([start])
        prompts = PromptBatch(inputs.tokens, inputs.mask)
        for row in stream(inputs.step, prompts, inputs.options, eos, processors, criteria):
            generated.append(row[0])
            yield output.decode(generated, start)

    @torch.inference_mode()
    def decoding_inputs(
        self,
        memory: Memory,
        questions: Sequence[Sequence[str | None]],
        options: GenerationConfig,
        starts: Sequence[Sequence[str]] = (),
    ) -> DecodingInputs:
        """Build the prompts and the decoding step. Rows with fewer questions are padded to K streams."""
        self.check_token_ids(options)
        streams = max(len(row) for row in questions)
        prompts = [[self.prompt_tokens(question) for question in row] for row in questions]
        padded = [[*row, *[None] * (streams - len(row))] for row in questions]
        conditional = self.decoder_memory(memory, padded)
        speech = speech_properties(self.model, conditional, streams, options)
        prompts = self.speech_prompts(prompts, speech)
        encoded = self.encode_starts(starts or [[options.start] * len(row) for row in questions], prompts)
        has_start = False
        for row, row_starts in zip(prompts, encoded, strict=True):
            row[:] = [prompt + start.tokens for prompt, start in zip(row, row_starts, strict=True)]
            has_start = has_start or any(start.tokens for start in row_starts)
        padding = next(prompt for row in prompts for prompt in row)  # any valid prompt; its texts are dropped later
        eos = self.model.tokenizer.eos_token_id
        texts: list[list[tuple[list[int], list[int]]]] = []
        for row in prompts:
            missing = streams - len(row)
            texts.append([(prompt, [eos]) for prompt in [*row, *[padding] * missing]])
        batch = pad_texts(texts, streams, self.model.tokenizer.pad_token_id)
        tokens, mask, _ = (tensor.to(self.model.device) for tensor in batch)
        has_questions = any(question is not None for row in questions for question in row)
        options = self._limit_new_tokens(options, has_questions or has_start)
        step = self._step(conditional, padded, options)
        return DecodingInputs(step, tokens, mask, options, encoded, speech)

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

    def _limit_new_tokens(self, options: GenerationConfig, is_long: bool) -> GenerationConfig:
        """Limit max_new_tokens to the learned positions left after the longest possible prompt.

        The actual prompt is not used: the answer to one question must not depend on the others of its batch.
        is_long: whether there is a question or a forced start.
        """
        decoder = self.model.config.decoder
        prompt_length = self.max_prompt_length if is_long else len(self.prompt_tokens(None))
        available = decoder.max_new_tokens_after(prompt_length)
        if available is None or options.max_new_tokens <= available:
            return options
        return options.model_copy(update={"max_new_tokens": available})


def _is_finite(memory: Memory) -> bool:
    """Whether keys and values of every slot that exists are finite."""
    finite = memory.keys.isfinite().all(-1) & memory.values.isfinite().all(-1)  # [L, B, H, S]
    return bool((finite | ~memory.mask[:, None]).all())
