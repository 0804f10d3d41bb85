"""The model: named sources, one decoder, a tokenizer, and optionally a question encoder.

    sources:   raw input -> encoder -> features -> key-value projection -> memory
    decoder:   tokens and memory -> logits

B rows (examples), K streams (texts of each), T text positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from mmx.config.schema import ModelConfig, Precision, SourceConfig
from mmx.encoders.base import Encoder
from mmx.encoders.contract import InputPreparer, collate, prepare
from mmx.errors import ConfigError, EncoderError, MmxError, suggest
from mmx.memory import Memory, cat
from mmx.models.decoder import TextDecoder
from mmx.models.question_encoder import QUESTION_ENCODER, QuestionEncoder
from mmx.models.source import Source, SourceBatch
from mmx.models.weight_tying import tie_key_value
from mmx.nn.prepack import can_prepack
from mmx.text.prompts import Prompt, answer_prompt, caption_prompt, question_prompt
from mmx.text.tokenizer import Tokenizer


class Model(nn.Module):
    """Any number of sources and one decoder that attends to their memory.

    Args:
        config: configuration of the model. `model.config` holds it with the options of all encoders filled in.
        tokenizer: tokenizer of the decoder, the question encoder and text encoders.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.sources = nn.ModuleDict()
        for name, source in config.sources.items():
            self.sources[name] = Source(name, source, config, tokenizer)
        self.question_encoder: QuestionEncoder | None = None
        if config.question_encoder is not None:
            self.question_encoder = QuestionEncoder(config.question_encoder, config.decoder, tokenizer)
        self.decoder = TextDecoder(config.decoder, len(tokenizer))
        if config.tie_key_value == "all":
            tie_key_value(self.sources, self.decoder)  # type: ignore[arg-type]
        self.config = config.model_copy(update={"sources": self._resolve_sources(config)})

    def __repr__(self) -> str:
        sources = ", ".join(f"{name}: {type(encoder).__name__}" for name, encoder in self.encoders.items())
        decoder = self.config.decoder
        question_encoder = "question encoder, " if self.question_encoder is not None else ""
        num_parameters = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"Model({sources}, {question_encoder}decoder: {decoder.num_layers} layers x {decoder.hidden_size}, "
            f"{len(self.tokenizer)} tokens, {num_parameters:,} parameters, {self.device})"
        )

    # ---- memory ------------------------------------------------------------------------------------------------

    def encode(self, sources: Mapping[str, SourceBatch], batch_size: int) -> Memory:
        """Encode the sources of a batch and concatenate their memories.

        With a question encoder, this is the memory that the question encoder attends to, not the decoder.

        Args:
            sources: batches by source. Rows without a source have its slots masked out.
            batch_size: B.
        """
        memories = [self._encode_source(name, batch, batch_size) for name, batch in sources.items() if len(batch.rows)]
        if memories:
            return cat(*memories)
        return (self.question_encoder or self.decoder).empty_memory(batch_size)

    def with_questions(self, memory: Memory, questions: SourceBatch | None) -> Memory:
        """Return the memory that the decoder attends to, given the memory of the sources and encoded questions.

        Without a question encoder, questions are concatenated to the memory. With one, its output replaces the memory;
        without a question nothing is visible then.
        """
        if self.question_encoder is not None:
            if questions is None or not len(questions.rows):
                return self.decoder.empty_memory(memory.batch_size)
            return self.question_encoder(questions.inputs, questions.rows, memory, questions.streams)
        if questions is None:
            return memory
        return cat(memory, self.encode({self.config.question_input: questions}, memory.batch_size))

    def _encode_source(self, name: str, batch: SourceBatch, batch_size: int) -> Memory:
        """The memory of one source, with one row for each row of the batch."""
        memory: Memory = self.sources[name](batch.inputs)
        if memory.batch_size != len(batch.rows):  # a single row would be broadcast to all inputs
            raise EncoderError(
                f"source {name!r} returned {memory.batch_size} rows of features for {len(batch.rows)} inputs.",
                code="encoder.batch_size",
                source=name,
                rows=memory.batch_size,
                expected=len(batch.rows),
            )
        if batch.dropped is not None:
            memory = memory.mask_out(batch.dropped[:, None])
        if batch.streams:
            return memory.scatter(batch.rows, batch_size * batch.streams).fold_streams(batch.streams)
        is_complete = len(batch.rows) == batch_size and torch.equal(batch.rows.cpu(), torch.arange(batch_size))
        return memory if is_complete else memory.scatter(batch.rows, batch_size)

    # ---- logits ------------------------------------------------------------------------------------------------

    def forward(
        self,
        sources: Mapping[str, SourceBatch],
        tokens: Tensor,
        mask: Tensor | None = None,
        label_positions: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of a training batch.

        Args:
            sources: inputs by source; questions under the name `question_input`.
            tokens: int [B, K, T].
            mask: bool [B, K, T], False for padding.
            label_positions: int [n], indices among B*K*T for which logits are computed; all if None.
            boxes: [B, K, 4], the region that each text is about, see `Memory.focus`.

        Returns:
            [B, K, T, V], or [n, V] with `label_positions`.
        """
        memory = self._decoder_memory(sources, len(tokens), boxes)
        states = self.decoder.hidden_states(tokens, memory, mask)
        if label_positions is not None:
            states = states.flatten(0, 2)[label_positions]
        return self._with_all_gradients(self.decoder.logits(states))

    def _decoder_memory(self, sources: Mapping[str, SourceBatch], batch_size: int, boxes: Tensor | None) -> Memory:
        """Encode the sources, restrict them to the boxes, and add the questions."""
        question_input = self.config.question_input
        others = {name: batch for name, batch in sources.items() if name != question_input}
        memory = self.encode(others, batch_size)
        if boxes is not None:
            memory = memory.focus(boxes)
        return self.with_questions(memory, sources.get(question_input))

    def _with_all_gradients(self, logits: Tensor) -> Tensor:
        """Add zero if no trained parameter was used in this batch, so that DDP has a gradient on every rank."""
        if logits.requires_grad or not torch.is_grad_enabled():
            return logits
        for parameter in self.parameters():
            if parameter.requires_grad:
                logits = logits + 0.0 * parameter.sum()
        return logits

    # ---- inputs ------------------------------------------------------------------------------------------------

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoder of each source."""
        return {name: source.encoder for name, source in self.sources.items()}  # type: ignore[misc]

    def encoder(self, source: str) -> Encoder:
        """Return the encoder of a source. Raises MmxError (source.unknown) if the model has no such source."""
        if source not in self.sources:
            known = list(self.sources)
            raise MmxError(
                f"the model has no source {source!r}; {suggest(source, known)}",
                code="source.unknown",
                source=source,
                known=known,
            )
        return self.encoders[source]

    @property
    def question_preparer(self) -> InputPreparer | None:
        """The module that prepares and collates questions; None if questions are part of the prompt."""
        name = self.config.question_input
        if name == "prompt":
            return None
        return self.question_encoder if self.question_encoder is not None else self.encoder(name)

    def prompt(self, question: str | None = None) -> Prompt:
        """Return the prompt of a caption, or of the answer to a question."""
        if question is None:
            return caption_prompt()
        return question_prompt(question) if self.config.question_input == "prompt" else answer_prompt()

    def collate(self, source: str, raw: Sequence[object], rows: Sequence[int] | None = None) -> SourceBatch:
        """Prepare and collate raw inputs of a source, or questions for `question_encoder`, on the model's device.

        `rows` are the rows of the inputs, by default 0, 1, 2, ...
        """
        preparer: InputPreparer
        if self.question_encoder is not None and source == QUESTION_ENCODER:
            preparer = self.question_encoder
        else:
            preparer = self.encoder(source)
        inputs = collate(preparer, source, [prepare(preparer, source, item) for item in raw])
        row_index = torch.tensor(range(len(raw)) if rows is None else rows)
        return SourceBatch(inputs, row_index).to(self.device)

    # ---- inference ---------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.embedding.weight.device

    def prepare_for_inference(self, dtype: Precision) -> None:
        """Cast the decoder to a dtype; on a CPU, also prepack its weights for single-token decoding.

        Raises:
            MmxError: the dtype is unknown (inference.dtype), needs a CPU (inference.device), or the weights were
                prepacked before (inference.prepacked).
        """
        known = get_args(Precision)
        if dtype not in known:
            raise MmxError(
                f"dtype was given {dtype!r}; expected one of {', '.join(known)}.", code="inference.dtype", dtype=dtype
            )
        if self.decoder.is_prepacked:
            raise MmxError(
                "the weights of the decoder are prepacked already; load the model again to use another dtype.",
                code="inference.prepacked",
            )
        is_on_cpu = self.device.type == "cpu"
        if dtype == "int8" and not is_on_cpu:
            raise MmxError(
                f"dtype int8 needs a CPU, and the model is on {self.device}; give bfloat16, or device cpu.",
                code="inference.device",
                device=str(self.device),
            )
        if dtype == "bfloat16":
            self.decoder.to(torch.bfloat16)
        if is_on_cpu and can_prepack(self.decoder.embedding.weight.dtype):
            self.decoder.prepack("int8" if dtype == "int8" else "float")

    def _resolve_sources(self, config: ModelConfig) -> dict[str, SourceConfig]:
        """The configuration of each source with the options of its encoder filled in."""
        resolved = {}
        for name, source in config.sources.items():
            options = self.encoder(name).options.model_dump(mode="json")
            resolved[name] = source.model_copy(update={"options": options})
        return resolved


def mount(model: Model, sources: Mapping[str, SourceConfig]) -> Model:
    """Return the model with new sources, which are randomly initialized; all its other modules and weights are shared.

    Raises ConfigError (mount.name) if the model already has a source of one of the names.
    """
    if not sources:
        return model
    taken = sorted(sources.keys() & model.config.sources.keys())
    if taken:
        raise ConfigError(
            f"mount names {', '.join(taken)}, which the model of init already has; choose another name.",
            code="mount.name",
            sources=taken,
        )
    return _with_sources(model, {**model.config.sources, **sources})


def unmount(model: Model, names: Sequence[str]) -> Model:
    """Return the model without some of its sources; all other modules and weights are shared.

    Raises ConfigError (unmount.name) if the model has no source of one of the names.
    """
    for name in names:
        if name not in model.config.sources:
            known = sorted(model.config.sources)
            raise ConfigError(
                f"unmount names {name!r}, which the model of init does not have; {suggest(name, known)}",
                code="unmount.name",
                source=name,
                known=known,
            )
    kept = {name: source for name, source in model.config.sources.items() if name not in names}
    return _with_sources(model, kept) if names else model


def _with_sources(model: Model, sources: Mapping[str, SourceConfig]) -> Model:
    """Return a model of these sources: those of `model` where it has them, else new ones."""
    config = model.config.model_copy(update={"sources": dict(sources)})
    changed = Model(config, model.tokenizer)
    for name in changed.sources.keys() & model.sources.keys():
        changed.sources[name] = model.sources[name]
    changed.question_encoder = model.question_encoder
    changed.decoder = model.decoder
    if config.tie_key_value == "all":
        tie_key_value(changed.sources, changed.decoder)  # type: ignore[arg-type]
    return changed
