"""Self-critical training: captions that the model says itself, learned by how much better each is than its fellows.

Rennie et al. 2017, "Self-critical sequence training for image captioning"; the baseline of a caption is the mean reward
of the other captions of its picture (Luo 2020, "A better variant of self-critical sequence training"). The reward is
CIDEr-D against people's captions, the end counting as a word: without it sentences learn to break off ("a dog in a").

Alphabet: B rows, K streams, T text positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmx.config.schema import DataConfig, GenerationConfig, RunConfig
from mmx.data.batching import IGNORE_INDEX, LABEL_MULTIPLE, TEXT_MULTIPLE, Batch, pad_texts, select_label_positions
from mmx.data.examples import Example, captions_of
from mmx.errors import ConfigError
from mmx.evaluation.metrics.captions import Cider
from mmx.evaluation.metrics.ptb_tokenizer import ptb_tokens
from mmx.generation import CachedDecodeStep, PromptBatch, generate
from mmx.generation.outputs import GenerationOutput
from mmx.models.model import Model
from mmx.text.prompts import normalize_caption

END = "<end>"


class SelfCriticalTrainer:
    """Lets a model caption the rewarded rows of a batch, and puts what it said, weighed, in the place of the texts."""

    def __init__(self, model: Model, config: RunConfig, sets: Sequence[tuple[DataConfig, Sequence[Example]]]) -> None:
        streams = config.training.texts_per_image
        if streams < 2:
            raise ConfigError(
                "reward compares captions of one picture, and training.texts_per_image is 1; set it to 5."
            )
        assert config.generation is not None, "resolved before training starts"
        self.model = model
        decoder, most = model.config.decoder, config.generation.max_new_tokens
        if decoder.positions == "learned":
            most = min(most, decoder.max_position_embeddings + 1 - len(model.tokenizer.prompt(model.prompt())))
        self.options = GenerationConfig(
            do_sample=True,
            temperature=config.training.reward_temperature,
            num_return_sequences=streams,
            max_new_tokens=most,
        )
        self.heard: list[float] = []  # rewards since they were last asked for
        self.cider = Cider(
            [tokens_with_end(captions) for data, examples in sets if data.reward for captions in captions_of(examples)]
        )

    def sample_batch(self, batch: Batch, seed: int) -> Batch:
        """The batch with K sampled captions, and their advantages, in each row that has references."""
        rows = [row for row, references in enumerate(batch.references) if references]
        if not rows:
            return batch
        said = self._sample(batch, rows, seed)
        advantages = torch.full(batch.tokens.shape[:2], torch.nan)
        for row, captions in zip(rows, said, strict=True):
            rewards = torch.tensor(self._rewards(captions, batch.references[row]))
            self.heard += rewards.tolist()
            # r - (sum - r) / (K - 1), the mean of the others
            advantages[row] = (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
        return self._retold(batch, rows, said, advantages.to(batch.tokens.device))

    @torch.no_grad()
    def _sample(self, batch: Batch, rows: Sequence[int], seed: int) -> list[list[GenerationOutput]]:
        model, device = self.model, batch.tokens.device
        training = {module: module.training for module in model.modules()}
        model.eval()
        shown = {name: source for name, source in batch.sources.items() if name != model.config.question_input}
        memory = model.encode(shown, len(batch.tokens)).select(torch.tensor(rows, device=device))
        memory = model.with_questions(memory, None)  # a caption asks nothing
        start = torch.tensor(model.tokenizer.prompt(model.prompt()), device=device).expand(len(rows), 1, -1)
        options = self.options.model_copy(update={"seed": seed})
        step = CachedDecodeStep(model.decoder, memory, options.max_new_tokens)
        prompts = PromptBatch(start, torch.ones_like(start, dtype=torch.bool))
        found = generate(step, prompts, options, model.tokenizer.eos)
        for module, was in training.items():
            module.training = was
        return [streams[0] for streams in found]

    def _rewards(self, said: Sequence[GenerationOutput], references: Sequence[str]) -> list[float]:
        targets = tokens_with_end(references)
        decode = self.model.tokenizer.decode
        spoken = [[*ptb_tokens(normalize_caption(decode(s.tokens))), *([END] if s.finished else [])] for s in said]
        return [self.cider.score(candidate, targets) for candidate in spoken]

    def mean_reward(self) -> list[float]:
        """The mean CIDEr-D of what this process heard since the last call; [] where it was nothing."""
        heard, self.heard = self.heard, []
        return [sum(heard) / len(heard)] if heard else []

    def _retold(
        self, batch: Batch, rows: Sequence[int], said: Sequence[Sequence[GenerationOutput]], advantages: Tensor
    ) -> Batch:
        """The batch with what was said where people's texts stood; as wide as the longest text."""
        tokenizer, streams, device = self.model.tokenizer, batch.tokens.shape[1], batch.tokens.device
        prompt = tokenizer.prompt(self.model.prompt())
        texts = [[(prompt, [*s.tokens, *([tokenizer.eos] if s.finished else [])]) for s in row] for row in said]
        told = [t.to(device) for t in pad_texts(texts, streams, tokenizer.pad, TEXT_MULTIPLE)]
        targets = torch.full_like(batch.tokens, IGNORE_INDEX)
        real = batch.labels != IGNORE_INDEX  # what `wanted` is filled up with points at place 0, which may be learned
        targets.view(-1)[batch.label_positions[real]] = batch.labels[real]
        width = max(batch.tokens.shape[-1], told[0].shape[-1])
        merged = []
        fillings = (tokenizer.pad, 0, IGNORE_INDEX)
        for ours, theirs, filling in zip((batch.tokens, batch.mask, targets), told, fillings, strict=True):
            wide = F.pad(ours, (0, width - ours.shape[-1]), value=filling)
            wide[torch.tensor(rows, device=device)] = F.pad(theirs, (0, width - theirs.shape[-1]), value=filling)
            merged.append(wide)
        wanted, labels = select_label_positions(merged[2], LABEL_MULTIPLE)
        return replace(
            batch, tokens=merged[0], mask=merged[1], label_positions=wanted, labels=labels, advantages=advantages
        )


def tokens_with_end(captions: Sequence[str]) -> list[list[str]]:
    """People's captions as the model is to say them, tokenized, each with its end."""
    return [[*ptb_tokens(normalize_caption(caption)), END] for caption in captions]
