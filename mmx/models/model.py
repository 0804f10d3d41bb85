"""Model: sources, decoder, tokenizer. Here the two wings meet, and only here.

Alphabet: B rows (examples), K streams, T text positions, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mmx.config.schema import ModelConfig, Precision, SourceConfig
from mmx.encoders.base import Encoder
from mmx.encoders.contract import collate, prepare
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
    """Mounts any number of sources beside one decoder. Built from a ModelConfig and a tokenizer."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.sources = nn.ModuleDict(
            {name: Source(name, source, config, tokenizer) for name, source in config.sources.items()}
        )
        self.question_encoder = (
            QuestionEncoder(config.question_encoder, config.decoder, tokenizer) if config.question_encoder else None
        )
        self.decoder = TextDecoder(config.decoder, len(tokenizer))
        if config.tie_key_value == "all":
            tie_key_value(self.sources, self.decoder)  # type: ignore[arg-type]
        resolved = {
            name: source.model_copy(update={"options": self.encoder(name).options.model_dump(mode="json")})
            for name, source in config.sources.items()
        }
        self.config = config.model_copy(update={"sources": resolved})

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoder of each source by its name."""
        return {name: source.encoder for name, source in self.sources.items()}  # type: ignore[misc]

    def encoder(self, source: str) -> Encoder:
        """The encoder of a source. Raises MmxError for a name that is not mounted."""
        if source not in self.sources:
            raise MmxError(f"the model has no source {source!r}; {suggest(source, list(self.sources))}")
        return self.encoders[source]

    def prepare_for_inference(self, dtype: Precision) -> None:
        """For inference: the decoder's weights in this type and, on a CPU, laid out for speaking. Raises MmxError."""
        if dtype not in (known := get_args(Precision)):
            raise MmxError(f"dtype was given {dtype!r}; expected one of {', '.join(known)}.")
        if self.decoder.is_prepacked:
            raise MmxError("the decoder is laid out for speaking already; load the model again with another dtype.")
        on_cpu = self.device.type == "cpu"
        if dtype == "int8" and not on_cpu:
            raise MmxError(f"dtype int8 is for the CPU, the model is on {self.device}; give bfloat16, or device cpu.")
        if dtype == "bfloat16":
            self.decoder.to(torch.bfloat16)
        if on_cpu and can_prepack(self.decoder.embedding.weight.dtype):
            self.decoder.prepack("int8" if dtype == "int8" else "float")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.embedding.weight.device

    def encode(self, sources: Mapping[str, SourceBatch], batch: int) -> Memory:
        """The memory of `batch` rows: each source encoded once, an absent one not joined. Where there is a reader, it
        is what the reader looks at."""
        memories = [self._encode_source(name, given, batch) for name, given in sources.items() if len(given.rows)]
        return cat(*memories) if memories else (self.question_encoder or self.decoder).empty_memory(batch)

    def with_questions(self, memory: Memory, questions: SourceBatch | None) -> Memory:
        """What the decoder looks at, once questions are asked over the memory of the sources: both, side by side, or
        what the reader makes of them. Without a question a reader leaves nothing to see."""
        if self.question_encoder is not None:
            if questions is None or not len(questions.rows):
                return self.decoder.empty_memory(memory.batch_size)  # the sources' keys are for the reader's queries
            return self.question_encoder(questions.inputs, questions.rows, memory, questions.streams)
        if questions is None:
            return memory
        return cat(memory, self.encode({self.config.question_input: questions}, memory.batch_size))

    @property
    def question_reader(self) -> Encoder | QuestionEncoder | None:
        """What reads the questions, by `prepare` and `collate`; None where they are a part of the prompt."""
        name = self.config.question_input
        return None if name == "prompt" else self.question_encoder or self.encoder(name)

    def forward(
        self,
        sources: Mapping[str, SourceBatch],
        tokens: Tensor,
        mask: Tensor | None = None,
        label_positions: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, K, T, V] of tokens [B, K, T]; with `wanted` (int [n], places among B*K*T) only those, [n, V].
        `boxes` [B, K, 4]: where each text points, see Memory.focus."""
        asked = sources.get(self.config.question_input)
        memory = self.encode({n: s for n, s in sources.items() if s is not asked}, len(tokens))
        memory = memory if boxes is None else memory.focus(boxes)
        states = self.decoder.hidden_states(tokens, self.with_questions(memory, asked), mask)
        logits = self.decoder.logits(states if label_positions is None else states.flatten(0, 2)[label_positions])
        if torch.is_grad_enabled() and not logits.requires_grad:
            # All that is trained is a source that no row has: a gradient of zero, and here, where every rank sees it.
            for parameter in self.parameters():
                if parameter.requires_grad:
                    logits = logits + 0.0 * parameter.sum()
        return logits

    def prompt(self, question: str | None = None) -> Prompt:
        """What the decoder is told: to caption, or to answer the question."""
        if question is None:
            return caption_prompt()
        return question_prompt(question) if self.config.question_input == "prompt" else answer_prompt()

    def collate(self, source: str, raw: Sequence[Any], rows: Sequence[int] | None = None) -> SourceBatch:
        """Prepare and collate raw inputs of one source (or questions for the reader), on the model's device; rows
        default to 0, 1, 2, ..."""
        encoder = (
            self.question_encoder
            if self.question_encoder is not None and source == QUESTION_ENCODER
            else self.encoder(source)
        )
        inputs = collate(encoder, source, [prepare(encoder, source, item) for item in raw])
        return SourceBatch(inputs, torch.tensor(range(len(raw)) if rows is None else rows)).to(self.device)

    def _encode_source(self, name: str, given: SourceBatch, batch: int) -> Memory:
        memory = self.sources[name](given.inputs)
        if memory.batch_size != len(given.rows):  # one row would be shown to all of them in silence
            raise EncoderError(
                f"source {name!r} gave {memory.batch_size} rows of features for {len(given.rows)} inputs."
            )
        if given.dropped is not None:
            memory = memory.mask_out(given.dropped[:, None])
        if given.streams:
            return memory.scatter(given.rows, batch * given.streams).fold_streams(given.streams)
        in_order = len(given.rows) == batch and torch.equal(given.rows.cpu(), torch.arange(batch))
        return memory if in_order else memory.scatter(given.rows, batch)


def mount(model: Model, sources: Mapping[str, SourceConfig]) -> Model:
    """The model with sources added: the same decoder, tokenizer, encoders and weights, and beside them new ones at
    their random start. Raises ConfigError for a name that is taken."""
    if not sources:
        return model
    if taken := sorted(sources.keys() & model.config.sources.keys()):
        raise ConfigError(f"mount names {', '.join(taken)}, which the model of init has already; choose another name.")
    config = model.config.model_copy(update={"sources": {**model.config.sources, **sources}})
    grown = Model(config, model.tokenizer)
    for name, source in model.sources.items():
        grown.sources[name] = source
    grown.question_encoder, grown.decoder = model.question_encoder, model.decoder
    if config.tie_key_value == "all":
        tie_key_value(grown.sources, grown.decoder)  # type: ignore[arg-type]
    return grown
