"""Pipeline: caption, ask, rank and look. One encoding serves every question about an input.

Wherever an image is expected, any input of the model's sources is accepted: a path, bytes, an open file, a PIL image,
an array or a tensor; audio; or several sources by name, {"image": "a.jpg", "audio": "a.wav"}. A `Memory` from
`Pipeline.encode` is accepted too, and is not encoded again.

B: inputs; K: streams (questions about each input); n: texts for each stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, Unpack, overload

import torch

from mmx.boxes import Box
from mmx.config.schema import GenerationConfig, Precision
from mmx.errors import MmxError
from mmx.generation import score_texts
from mmx.inference.arguments import check_candidates, check_inputs, check_questions
from mmx.inference.batch_inference.answers import answer_questions
from mmx.inference.batch_inference.captions import caption_images
from mmx.inference.inputs import InputWindow, no_source_error
from mmx.inference.options import DecodingOptions, GenerationOptions
from mmx.inference.outputs import GeneratedText, ModelInput, Question, RankedAnswer
from mmx.inference.pretrained import PretrainedGenerator
from mmx.inference.prompts import check_question
from mmx.inference.windows import caption_windows, stream_windows
from mmx.interpret.look import Look, MapMethod
from mmx.interpret.teacher_forced import TargetText, look_at_text, source_views
from mmx.memory import Memory
from mmx.models.batching import pad_texts
from mmx.models.checkpoint import BUNDLED
from mmx.models.model import Model
from mmx.models.source import SourceBatch
from mmx.text.prompts import normalize_question

InputT = TypeVar("InputT", bound="ModelInput | MmxError")


def load(
    model: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: Precision = "float32",
    revision: str | None = None,
) -> Pipeline:
    """Load a model for inference.

    Args:
        model: a folder or public name of a checkpoint of mmx or of a published model (ViT-GPT2, TrOCR, BLIP, Marian,
            Whisper); or None, the bundled model.
        device: where the model runs, such as "cpu" or "cuda:0".
        dtype: type of the decoder's weights; "int8" runs on a CPU only. On a CPU the weights are prepacked for
            single-token decoding, so the model cannot be trained; use `mmx.models.checkpoint.load_model` for that.
        revision: branch, tag or commit of a public name.

    Raises:
        CheckpointError: the model does not exist, is damaged, or belongs to a family that is not supported.
        MmxError: load.device, if the device is not available.

    Example:
        >>> model = mmx.load()
        >>> model.caption("dog.jpg")
    """
    name = BUNDLED if model is None else model
    if not isinstance(name, str | Path):
        raise MmxError(
            f"load was given a {type(name).__name__}; expected a folder or a public name, such as 'runs/mine/best'.",
            code="model.type",
        )
    return Pipeline.from_pretrained(name, revision, device, dtype)


class Pipeline(PretrainedGenerator):
    """Captions, answers and attention maps of one model. `load` makes one.

    Decoding options are keyword arguments named as in transformers' GenerationConfig, such as `num_beams=5` or
    `do_sample=True, temperature=0.8`; see `mmx.inference.options`. An option that is not given keeps its default.
    """

    def __init__(self, model: Model, generation: GenerationConfig | None = None, folder: Path | None = None) -> None:
        super().__init__(model, generation, folder)
        # Displacement of each encoder's grid, measured when first needed: see `mmx.interpret.grid.displacement`.
        self._grid_displacements: dict[str, tuple[float, float]] = {}

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        sources = ", ".join(self.model.config.sources)
        return f"Pipeline(sources: {sources}; {parameters / 1e6:.1f} M parameters; device: {self.model.device})"

    def encode(self, **sources: object) -> Memory:
        """Encode inputs once, to ask about them many times.

        Args:
            sources: one input by source name, or a list of B inputs; None leaves a source out of a row that has
                another. A list is always several inputs: an input that is itself a list goes into another,
                `numbers=[[1.0, 2.0]]`.

        Returns:
            Memory of B rows.

        Raises:
            MmxError: no source or an unknown one is named, lists differ in length, a row has no source, or an input
                cannot be read. `unconditional_memory` returns a memory without sources.

        Example:
            >>> memory = model.encode(image="dog.jpg")
            >>> model.ask(memory, ["what animal is this?", "what is it doing?"])
        """
        inputs = {name: raw if isinstance(raw, list) else [raw] for name, raw in sources.items()}
        sizes = {name: len(raw) for name, raw in inputs.items()}
        if len(set(sizes.values())) != 1:
            raise MmxError(
                f"encode was given {sizes or 'nothing'}; expected the same number of inputs for every source.",
                code="encode.sizes",
                sizes=sizes,
            )
        for name in inputs:
            self.model.encoder(name)
        batch_size = next(iter(sizes.values()))
        for row in range(batch_size):
            if all(raw[row] is None for raw in inputs.values()):
                given = dict.fromkeys(inputs)
                raise no_source_error(f"row {row}", given, list(self.model.encoders), row=row)
        batch: dict[str, SourceBatch] = {}
        for name, raw in inputs.items():
            rows = [row for row, item in enumerate(raw) if item is not None]
            if rows:
                present = [self.by_source({name: raw[row]})[name] for row in rows]
                batch[name] = self.model.collate(name, present, rows)
        return self._encode_sources(batch, batch_size)

    def caption(self, image: ModelInput | Memory, **options: Unpack[DecodingOptions]) -> str:
        """Return the caption of one input. For many inputs use `captions`, for several captions `generate`.

        Raises:
            MmxError: the input cannot be read.
            ConfigError: an option does not exist, is out of range, or contradicts another.

        Example:
            >>> model.caption("dog.jpg", num_beams=5)
            'a brown dog runs through the grass'
        """
        return self._caption(image, self._single_text(options)).text

    @overload
    def ask(
        self, image: ModelInput | Memory, question: str, box: Box | None = None, **options: Unpack[DecodingOptions]
    ) -> str: ...
    @overload
    def ask(
        self,
        image: ModelInput | Memory,
        question: list[str] | tuple[str, ...],
        box: Box | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[str]: ...
    def ask(
        self,
        image: ModelInput | Memory,
        question: str | list[str] | tuple[str, ...],
        box: Box | None = None,
        **options: Unpack[DecodingOptions],
    ) -> str | list[str]:
        """Return the answer to a question about one input, or a list of answers to several questions.

        Args:
            image: the input, or its memory. It is encoded once.
            question: one text, or a list of texts.
            box: (x0, y0, x1, y1), each in 0..1 from the top left: only this region is attended to.
            options: decoding options.

        Raises:
            MmxError: the input cannot be read, a question is too long, or the box is empty or outside the image.

        Example:
            >>> model.ask("dog.jpg", "what color is the dog?")
            'brown'
        """
        questions = list(question) if isinstance(question, list | tuple) else [question]
        for item in questions:
            check_question(item)
        memory = self._single_memory(image, box)
        texts = self.generate_batch(memory, [questions], self._single_text(options))[0]
        answers = [stream[0].text for stream in texts]
        return answers[0] if isinstance(question, str) else answers

    def generate(
        self,
        image: ModelInput | Memory,
        question: str | None = None,
        box: Box | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[GeneratedText]:
        """Return num_return_sequences captions (or answers to a question) with their scores, best first.

        Example:
            >>> [text.text for text in model.generate("dog.jpg", num_beams=5, num_return_sequences=3)]
        """
        config = self.generation_config(dict(options))
        if question is None and box is None and config.num_return_sequences == 1:
            return [self._caption(image, config)]
        memory = self._single_memory(image, box)
        return self.generate_batch(memory, [[question]], config)[0][0]

    def rank(
        self, image: ModelInput | Memory, question: str | None, candidates: Sequence[str], box: Box | None = None
    ) -> list[RankedAnswer]:
        """Return the candidate answers (captions, if question is None) by their likelihood, most likely first.

        All candidates are scored in one pass.

        Raises:
            MmxError: the candidates are not a list of texts, there are none, or one is too long.

        Example:
            >>> model.rank("dog.jpg", "is it indoors?", ["yes", "no"])[0].answer
        """
        candidates = check_candidates(candidates)
        memory = self._single_memory(image, box)
        if memory.stream_mask is not None and memory.stream_mask.shape[1] > 1:
            raise MmxError(
                f"rank was given a memory of {memory.stream_mask.shape[1]} streams; expected one for all candidates.",
                code="rank.streams",
            )
        prompt = self.prompt_of(memory, question, self.generation)
        tokenizer = self.model.tokenizer
        texts = [(prompt, [*tokenizer.encode(candidate), tokenizer.eos_token_id]) for candidate in candidates]
        self.check_length(max(len(prompt) + len(target) - 1 for _, target in texts))
        padded = pad_texts([texts], len(candidates), tokenizer.pad_token_id)
        tokens, mask, targets = (tensor.to(self.model.device) for tensor in padded)
        with torch.inference_mode():
            memory = self.with_questions(memory, [[question]])  # one stream of the memory: all candidates attend to it
            logprobs = score_texts(self.model.decoder, memory, tokens, mask, targets)[0].double()
        if not bool(logprobs.isfinite().all()):
            raise MmxError(
                "the log-probabilities of the candidates are not finite; check the features of the encoders, or load "
                "the model with dtype float32.",
                code="generation.not_finite",
            )
        answers = [
            RankedAnswer(candidate, probability, logprob)
            for candidate, probability, logprob in zip(
                candidates, logprobs.softmax(0).tolist(), logprobs.tolist(), strict=True
            )
        ]
        return sorted(answers, key=lambda answer: -answer.logprob)

    def stream(
        self,
        image: ModelInput | Memory,
        question: str | None = None,
        box: Box | None = None,
        **options: Unpack[DecodingOptions],
    ) -> Iterator[str]:
        """Yield the caption (or the answer to a question) as it grows: the whole text so far after each token.

        Beams are not used, because their text is not known before the end. The texts of the windows of long audio
        follow each other.
        """
        greedy_or_sampled = self._single_text({**options, "num_beams": 1})
        if isinstance(image, Memory) or question is not None or box is not None:
            yield from self.stream_texts(self._single_memory(image, box), question, greedy_or_sampled)
        else:
            yield from stream_windows(self, self._single_windows(image), greedy_or_sampled)

    def captions(
        self,
        images: Iterable[InputT],
        batch_size: int = 16,
        starts: Iterable[str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[tuple[InputT, GeneratedText | MmxError]]:
        """Caption many inputs in batches.

        Yields (input, caption) in the order given; an input that cannot be read yields its error instead. Inputs with
        the same bytes are encoded once. A batch that does not fit into memory is halved. With num_return_sequences the
        caption is the best, and the others are its `alternatives`. `starts` has the option `start` of each input.

        Example:
            >>> for path, result in model.captions(["a.jpg", "b.jpg"]):
            ...     print(path, result.text if isinstance(result, mmx.GeneratedText) else result)
        """
        return caption_images(self, check_inputs(images, batch_size), batch_size, self._batch_options(options), starts)

    def answers(
        self,
        questions: Sequence[Question | tuple[ModelInput, str] | tuple[ModelInput, str, Box | None]],
        batch_size: int = 16,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[GeneratedText | MmxError]:
        """Answer many questions, each a `Question` or (input, question) or (input, question, box).

        Yields answers in the order given, an error in place of one that cannot be answered. Questions about the same
        input are answered together; `batch_size` inputs are encoded at a time. Several answers: as in `captions`.
        """
        items = check_questions(questions, batch_size)
        return answer_questions(self, items, batch_size, self._batch_options(options))

    def look(
        self,
        image: ModelInput | Memory,
        question: str | None = None,
        box: Box | None = None,
        *,
        text: str | None = None,
        method: MapMethod = "weighted",
        original: ModelInput | None = None,
        **options: Unpack[DecodingOptions],
    ) -> Look:
        """Return what each word of a caption (or of the answer to a question) attended to.

        Args:
            image, question, box, options: as in `ask`.
            text: explain this text instead of a generated one.
            method: how maps are computed, see `mmx.interpret.look`: attention, weighted, relevance or both.
            original: the input that a memory was made from, to draw maps on, if `image` is a memory.

        Example:
            >>> model.look("dog.jpg", "what is this?").save("look.png")
        """
        if not isinstance(text, str | None):
            raise MmxError(
                f"text is a {type(text).__name__}; expected a text, such as 'a dog on the grass'.",
                code="look.text_type",
            )
        if text is not None and not text.strip():
            message = "the text is empty, and has no words to look at; expected a text, such as 'a dog on the grass'."
            raise MmxError(message, code="look.empty_text")
        memory = self._single_memory(image, box)
        decoding = self._single_text(options)
        prompt = self.prompt_of(memory, question, decoding)
        if text is None:
            generated = self.generate_tokens(memory, [[question]], decoding)[0][0][0].tokens
            target = [*self.start_tokens(decoding.start, len(prompt)).tokens, *generated]
        else:
            target = self.model.tokenizer.encode(text)
        self.check_length(len(prompt) + len(target) - 1)
        inputs = self._original_inputs(image if original is None else original, question)
        conditional = self.decoder_memory(memory, [[question]])
        unconditional = self.decoder_memory(self.unconditional_memory(), [[question]])
        views = source_views(self.model, conditional, inputs, self._grid_displacements)
        analyzed = TargetText(prompt, target, question)
        return look_at_text(self.model, conditional, analyzed, views, method, unconditional)

    def _original_inputs(self, image: ModelInput | Memory, question: str | None) -> dict[str, object]:
        """The raw inputs by source name, the question among them where a source or the question encoder reads it."""
        inputs = {} if isinstance(image, Memory) else self.by_source(image)
        if question is not None and self.model.config.question_input != "prompt":
            inputs[self.model.config.question_input] = normalize_question(question)
        return inputs

    def _single_text(self, options: DecodingOptions) -> GenerationConfig:
        """The decoding options of a call that returns one text."""
        if "num_return_sequences" in options:
            raise MmxError(
                "this call returns one text, num_return_sequences was given; use generate(...) for several texts.",
                code="generation.single_text",
            )
        return self.generation_config({**options, "num_return_sequences": 1})

    def _batch_options(self, options: GenerationOptions) -> GenerationConfig:
        """The options of a call that returns one text for each input, unless more are asked for."""
        return self.generation_config({"num_return_sequences": 1, **options})

    def _caption(self, image: ModelInput | Memory, options: GenerationConfig) -> GeneratedText:
        """The caption of one input, or of the windows of long audio."""
        if isinstance(image, Memory):
            return self.generate_batch(self._single_memory(image), [[None]], options)[0][0][0]
        return caption_windows(self, self._single_windows(image), options)

    def _single_windows(self, image: ModelInput) -> list[InputWindow]:
        _check_single(image)
        return self.prepare_windows(image)

    def _single_memory(self, image: ModelInput | Memory, box: Box | None = None) -> Memory:
        """The memory of one input, restricted to a box."""
        _check_single(image)
        memory = image if isinstance(image, Memory) else self.encode_prepared([self.prepare(image)])
        self.check_memory(memory)
        if memory.batch_size != 1:
            raise MmxError(
                f"a memory of {memory.batch_size} inputs was given; expected one, select it with memory.select([0]).",
                code="memory.batch_size",
            )
        return memory if box is None else memory.focus(box)


def _check_single(image: object) -> None:
    """Raise MmxError (input.list) for a list of inputs."""
    if isinstance(image, list):
        raise MmxError(
            f"a list of {len(image)} inputs was given; expected one, use captions(...) or answers(...) for many.",
            code="input.list",
        )
