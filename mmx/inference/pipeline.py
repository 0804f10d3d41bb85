"""The verbs people came for: caption, ask, rank. Pictures and texts in, texts out; one encoding for everything asked.

Alphabet: B rows (pictures), K streams (questions about each), n texts for each stream.

Where a picture is spoken of, any input of the model's sources will do: a path that one of them accepts, or several
sources by name, {"image": "a.jpg", "audio": "a.wav"}, of which any may be left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmx.config.loader import parse_config
from mmx.config.schema import GenerationConfig, Precision
from mmx.data.batching import pad_texts, stack_boxes
from mmx.encoders.contract import PreparedInput, accepts, prepare
from mmx.errors import MmxError
from mmx.generation import DecoderStep, DecodeStep, generate, score_texts, stream
from mmx.generation.generate import GenerationOutput, StoppingCriterion
from mmx.generation.guidance import GuidedStep
from mmx.hub import load_hf_model
from mmx.hub.hf_checkpoint import CONFIG as PUBLISHED
from mmx.inference.batch_inference import GeneratedText, Question, answers, captions
from mmx.interpret.look import Look, MapMethod
from mmx.interpret.teacher_forced import look_at_text, source_views
from mmx.memory import Box, Memory
from mmx.models.checkpoint import BUNDLED, is_checkpoint, load_generation, load_model
from mmx.models.model import Model
from mmx.models.source import collate_inputs, find_source, prepare_inputs
from mmx.text.prompts import normalize_question

ONE_TEXT = {"num_beams": 1, "num_return_sequences": 1}
BEST = {"num_return_sequences": 1}


@dataclass(frozen=True)
class RankedAnswer:
    """A given answer and its probability among those given."""

    answer: str
    probability: float
    logprob: float


def load(model: str | Path | None = None, device: str | torch.device = "cpu", dtype: Precision = "float32") -> Pipeline:
    """A model ready to be asked: the bundled one, that of a checkpoint folder, or a published one (its folder, or its
    public name) of a family that `mmx.hub` knows. Raises CheckpointError.

    dtype: that of the decoder. On a CPU its weights are laid out for speaking (see `mmx.nn.prepack`): such a model is for
    asking; to train one, take `mmx.models.checkpoint.load_model`.
    """
    name = BUNDLED if model is None else model
    if is_checkpoint(name) or (Path(name).is_dir() and not (Path(name) / PUBLISHED).exists()):
        loaded, generation = load_model(name, device), load_generation(name)
    else:
        loaded, generation, _ = load_hf_model(str(name), device=device)
    loaded.prepare_for_inference(dtype)
    return Pipeline(loaded, generation)


class Pipeline:
    """A model with its way of choosing words. Options bear the names of transformers' GenerationConfig."""

    def __init__(self, model: Model, generation: GenerationConfig | None = None) -> None:
        self.model, self.generation = model.eval(), generation or GenerationConfig()
        self._displacements: dict[str, tuple[float, float]] = {}  # of the encoders, measured when first looked through

    def accepts(self, path: str) -> bool:
        """Whether a file of this name is something that one of the sources reads."""
        return any(accepts(encoder, name, path) for name, encoder in self.model.encoders.items())

    def encode(self, **sources: Any) -> Memory:
        """Inputs by source name, one or a list for each (None: absent) -> Memory. Done once, asked many times.

        A list is always several inputs: one input that is itself a list goes into another, `numbers=[[1.0, 2.0]]`.
        """
        lists = {name: raw if isinstance(raw, list) else [raw] for name, raw in sources.items()}
        sizes = {name: len(raw) for name, raw in lists.items()}
        if len(set(sizes.values())) != 1:
            raise MmxError(f"encode was given {sizes or 'nothing'}; expected as many inputs for every source.")
        batch = next(iter(sizes.values()))
        rows = [{name: raw[row] for name, raw in lists.items()} for row in range(batch)]
        return self.encode_prepared([self.prepare(row) for row in rows])

    def caption(self, image: Any, **options: Any) -> Any:
        """A picture (path, bytes, PIL) or its memory -> a caption; a list, or a memory of several -> a list.

        With num_return_sequences, each is a list of captions, best first.
        """
        memory = self._memory(image)
        texts = [row[0] for row in self.generate(memory, [[None]] * memory.batch_size, self.generation_config(options))]
        captions: list[Any] = [[said.text for said in row] for row in texts]
        if "num_return_sequences" not in options:
            captions = [row[0] for row in captions]
        return captions if isinstance(image, list) or memory.batch_size > 1 else captions[0]

    def ask(self, image: Any, question: str | Sequence[str], box: Box | None = None, **options: Any) -> Any:
        """A picture or its memory and a question -> an answer; several questions -> a list, all over one encoding.

        `box` (x0, y0, x1, y1 in 0..1) points at a part of the picture: only its slots are looked at.
        """
        questions = [question] if isinstance(question, str) else list(question)
        memory = self._single_memory(image, box)
        texts = self.generate(memory, [questions], self.generation_config(options))[0]
        answers = [row[0].text for row in texts]
        return answers[0] if isinstance(question, str) else answers

    def rank(
        self, image: Any, question: str | None, candidates: Sequence[str], box: Box | None = None
    ) -> list[RankedAnswer]:
        """Given answers (or captions, where question is None) by their likelihood, most likely first; one pass."""
        if not candidates:
            raise MmxError("rank was given no candidates; pass at least one text.")
        memory, count = self._single_memory(image, box), len(candidates)
        if memory.stream_mask is not None and memory.stream_mask.shape[1] > 1:
            raise MmxError("rank was given a memory of several views; point with one box for all candidates.")
        prompt, tokenizer = self.prompt_tokens(question), self.model.tokenizer
        texts = [[(prompt, [*tokenizer.encode(candidate), tokenizer.eos]) for candidate in candidates]]
        self._check_length(max(len(prompt) + len(target) - 1 for _, target in texts[0]))
        tokens, mask, targets = (t.to(self.model.device) for t in pad_texts(texts, count, tokenizer.pad))
        with torch.inference_mode():
            memory = self.with_questions(memory, [[question]])  # one owner: all candidates see it
            logprobs = score_texts(self.model.decoder, memory, tokens, mask, targets)[0].double()
        triples = zip(candidates, logprobs.softmax(0).tolist(), logprobs.tolist(), strict=True)
        return sorted((RankedAnswer(*triple) for triple in triples), key=lambda ranked: -ranked.logprob)

    @torch.inference_mode()  # as a decorator it is off between the yields, in the caller's code
    def stream(self, image: Any, question: str | None = None, box: Box | None = None, **options: Any) -> Iterator[str]:
        """The caption or answer as it grows: yields the whole text so far after each token."""
        memory, chosen = self._single_memory(image, box), self.generation_config({**options, **ONE_TEXT})
        said: list[int] = []
        step, tokens, mask, chosen = self._start(memory, [[question]], chosen)
        for row in stream(step, tokens, mask, chosen, self.model.tokenizer.eos, stops=self._stopping_criteria(chosen)):
            said.append(row[0])
            yield self._truncate_at_stop_strings(self.model.tokenizer.decode(said), chosen)

    def captions(
        self, images: Iterable[Any], batch_size: int = 16, **options: Any
    ) -> Iterator[tuple[Any, GeneratedText | MmxError]]:
        """Many pictures, in batches: yields (picture as given, what was said or why not), in the order given."""
        return captions(self, images, batch_size, self.generation_config(options))

    def answers(
        self, asked: Sequence[Question | tuple[Any, ...]], batch_size: int = 16, **options: Any
    ) -> Iterator[GeneratedText | MmxError]:
        """(picture, question) or (picture, question, box) -> what was said or why not, in the order asked. Questions
        about the same picture are answered together, `batch_size` pictures at a time, each encoded once."""
        return answers(self, [Question(*item) for item in asked], batch_size, self.generation_config(options))

    def generate(
        self,
        memory: Memory,
        questions: Sequence[Sequence[str | None]],
        options: GenerationConfig,
        boxes: Sequence[Sequence[Box | None]] = (),
    ) -> list[list[list[GeneratedText]]]:
        """questions [B][K] (None: caption) over a memory of B rows -> texts [B][K][n], best first; `boxes` [B][K] is
        where each question points (None: nowhere)."""
        if not any(questions):
            return [[] for _ in questions]
        made = self._generate_tokens(
            self.with_boxes(memory, boxes, max(len(row) for row in questions)), questions, options
        )
        return [
            [[self._generated_text(text, options) for text in stream_] for stream_ in row[: len(asked)]]
            for row, asked in zip(made, questions, strict=True)
        ]

    def look(
        self,
        image: Any,
        question: str | None = None,
        box: Box | None = None,
        text: str | None = None,
        method: MapMethod = "weighted",
        picture: Any = None,
        **options: Any,
    ) -> Look:
        """What the words of a caption (or of the answer to a question) looked at: to be shown, saved, or computed with.

        image: as in `ask`; text: look for the words of this text, whoever said it; picture: what a memory was made of,
        to draw on, where `image` is a memory. by: see `mmx.interpret.look`.
        """
        if not isinstance(text, str | None):
            raise MmxError(f"text is a {type(text).__name__}; expected what was said, such as 'a dog on the grass'.")
        memory, raw = self._single_memory(image, box), image if picture is None else picture
        prompt, tokenizer = self.prompt_tokens(question), self.model.tokenizer
        if text is None:
            said = list(
                self._generate_tokens(memory, [[question]], self.generation_config({**options, **BEST}))[0][0][0].tokens
            )
        else:
            said = tokenizer.encode(text)
        self._check_length(len(prompt) + len(said) - 1)
        given = {} if isinstance(raw, Memory) else self._by_source(raw)
        if question is not None and self.model.config.question_input != "prompt":
            given[self.model.config.question_input] = normalize_question(question)
        memory, blind = (self._decoder_memory(view, question) for view in (memory, self.model.encode({}, 1)))
        places = source_views(self.model, memory, given, self._displacements)
        return look_at_text(self.model, memory, prompt, said, question, places, method, blind)

    def generation_config(self, overrides: dict[str, Any]) -> GenerationConfig:
        """The model's own options with some changed. Raises ConfigError for one that does not exist or contradicts."""
        merged = {**self.generation.model_dump(), **{k: v for k, v in overrides.items() if v is not None}}
        return parse_config(merged, GenerationConfig, where="generation options")

    @torch.inference_mode()
    def _generate_tokens(
        self, memory: Memory, questions: Sequence[Sequence[str | None]], options: GenerationConfig
    ) -> list[list[list[GenerationOutput]]]:
        """The texts [B][K][n] as tokens."""
        step, tokens, mask, options = self._start(memory, questions, options)
        return generate(step, tokens, mask, options, self.model.tokenizer.eos, stops=self._stopping_criteria(options))

    @torch.inference_mode()
    def _decoder_memory(self, memory: Memory, question: str | None) -> Memory:
        """What the decoder looks at, in the type it computes in."""
        return self.with_questions(memory, [[question]]).to(dtype=self.model.decoder.embedding.weight.dtype)

    def _start(
        self, memory: Memory, questions: Sequence[Sequence[str | None]], options: GenerationConfig
    ) -> tuple[DecodeStep, Tensor, Tensor, GenerationConfig]:
        """The step over a memory, the prompts [B, K, T] with their mask (rows with fewer questions are filled up), and
        the options with no more new tokens than the decoder has positions for."""
        most, eos = max(len(row) for row in questions), self.model.tokenizer.eos
        told = [[(self.prompt_tokens(question), [eos]) for question in row] for row in questions]
        spare = next(text for row in told for text in row)  # not the caption's, which a model may not have
        texts = [[*row, *([spare] * (most - len(row)))] for row in told]
        filled = [[*row, *([None] * (most - len(row)))] for row in questions]
        tokens, mask, _ = (t.to(self.model.device) for t in pad_texts(texts, most, self.model.tokenizer.pad))
        options = self._limit_new_tokens(options, asked=any(q is not None for row in questions for q in row))
        seen = self.with_questions(memory, filled).to(dtype=self.model.decoder.embedding.weight.dtype)
        step: DecodeStep = DecoderStep(self.model.decoder, seen, options.max_new_tokens)
        if options.guidance_scale != 1.0:  # beside it one that has the questions alone
            left = self.with_questions(self.model.encode({}, memory.batch_size), filled).to(dtype=seen.keys.dtype)
            blind = DecoderStep(self.model.decoder, left, options.max_new_tokens)
            step = GuidedStep(step, blind, options.guidance_scale)
        return step, tokens, mask, options

    def prompt_tokens(self, question: str | None) -> list[int]:
        """What the decoder is told, as tokens. Raises MmxError for a question longer than half of its positions or than
        what reads it, and for one that is no text."""
        if not isinstance(question, str | None):
            raise MmxError(f"a question is a {type(question).__name__}; expected a text, such as 'what is this?'.")
        if question is not None and self.model.question_reader is not None:
            prepare(self.model.question_reader, self.model.config.question_input, normalize_question(question))
        prompt = self.model.tokenizer.prompt(self.model.prompt(question))
        most = self._longest_prompt
        if len(prompt) > most:
            raise MmxError(f"the question has {len(prompt)} tokens; this model reads up to {most}, ask more shortly.")
        return prompt

    @property
    def _longest_prompt(self) -> int:
        """Half of the positions are for the question, the rest for the answer."""
        return self.model.config.decoder.max_position_embeddings // 2

    def _limit_new_tokens(self, options: GenerationConfig, asked: bool) -> GenerationConfig:
        """Cut max_new_tokens to what learned positions leave after the longest prompt there may be (not that there is:
        what is said to one picture must not depend on the questions to another)."""
        decoder = self.model.config.decoder
        room = decoder.max_position_embeddings + 1 - (self._longest_prompt if asked else len(self.prompt_tokens(None)))
        if decoder.positions != "learned" or options.max_new_tokens <= room:
            return options
        return options.model_copy(update={"max_new_tokens": room})

    def _check_length(self, length: int) -> None:
        decoder = self.model.config.decoder
        if decoder.positions == "learned" and length > decoder.max_position_embeddings:
            raise MmxError(
                f"prompt and candidate have {length} tokens; this model reads up to {decoder.max_position_embeddings}, "
                "give shorter texts."
            )

    def with_boxes(self, memory: Memory, boxes: Sequence[Sequence[Box | None]], streams: int) -> Memory:
        """The memory in which each of K `streams` sees only the part that it points at; `boxes` [B][up to K]."""
        packed = stack_boxes(boxes, streams)
        return memory if packed is None else memory.focus(packed)

    def with_questions(self, memory: Memory, questions: Sequence[Sequence[str | None]]) -> Memory:
        """What the decoder looks at, where the model's questions are read by a text encoder or by the reader."""
        name, streams = self.model.config.question_input, len(questions[0])
        asked = [(b * streams + k, q) for b, row in enumerate(questions) for k, q in enumerate(row) if q is not None]
        if name == "prompt" or not asked:
            return memory if name == "prompt" else self.model.with_questions(memory, None)
        given = self.model.collate(name, [normalize_question(q) for _, q in asked], [row for row, _ in asked])
        return self.model.with_questions(memory, given._replace(streams=streams))

    def _memory(self, image: Any) -> Memory:
        if isinstance(image, Memory):
            return image
        images = image if isinstance(image, list) else [image]
        return self.encode_prepared([self.prepare(item) for item in images])

    def _single_memory(self, image: Any, box: Box | None) -> Memory:
        memory = self._memory(image)
        if memory.batch_size != 1:
            raise MmxError(
                f"a question is about one picture, {memory.batch_size} were given; select one: memory.select([0])"
            )
        return memory if box is None else memory.focus(box)

    def prepare(self, image: Any) -> dict[str, PreparedInput]:
        """One input to the tensors of its sources. Raises MmxError, also for a source that the model does not have."""
        return prepare_inputs(self.model.encoders, self._by_source(image))

    def _by_source(self, image: Any) -> dict[str, Any]:
        """One input, or several by name, by the names of sources."""
        given = image if isinstance(image, Mapping) else {find_source(self.model.encoders, _plain(image)): image}
        for name in given:
            self.model.encoder(name)
        return {name: _plain(raw) for name, raw in given.items()}

    @torch.inference_mode()
    def encode_prepared(self, rows: Sequence[Mapping[str, PreparedInput]]) -> Memory:
        """The memory of rows that were prepared, each with the sources it has."""
        batch = collate_inputs(self.model.encoders, rows)
        return self.model.encode({name: part.to(self.model.device) for name, part in batch.items()}, len(rows))

    def _generated_text(self, text: Any, options: GenerationConfig) -> GeneratedText:
        tokenizer = self.model.tokenizer
        pieces = tuple((tokenizer.decode([t]), p) for t, p in zip(text.tokens, text.logprobs, strict=False))
        return GeneratedText(self._truncate_at_stop_strings(tokenizer.decode(text.tokens), options), text.score, pieces)

    def _stopping_criteria(self, options: GenerationConfig) -> list[StoppingCriterion]:
        """End a stream once its text holds one of the stop strings."""
        if not options.stop_strings:
            return []

        def stop(said: Tensor, logits: Tensor) -> Tensor:
            texts = (self.model.tokenizer.decode(row) for row in said.tolist())
            return torch.tensor([any(s in text for s in options.stop_strings) for text in texts], device=said.device)

        return [stop]

    def _truncate_at_stop_strings(self, text: str, options: GenerationConfig) -> str:
        for string in options.stop_strings:
            text = text.split(string)[0]
        return text.strip()


def _plain(raw: Any) -> Any:
    """Paths as texts, which is how encoders know them."""
    return os.fspath(raw) if isinstance(raw, os.PathLike) else raw
