"""Self-critical sequence training with CIDEr-D as the reward (Rennie et al. 2017).

The baseline of a sampled caption is the mean reward of the other captions of its image (Luo 2020, "A better variant of
self-critical sequence training"). The end token counts as a word of the reward: otherwise the model learns to break off
its sentences ("a dog in a").

B rows, K streams, T text positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmx.config.schema import GenerationConfig, RunConfig
from mmx.data.batching import LABEL_MULTIPLE, TEXT_MULTIPLE, Batch, DataSets
from mmx.data.examples import captions_of
from mmx.errors import ConfigError
from mmx.evaluation.metrics.captions import Cider
from mmx.evaluation.metrics.ptb_tokenizer import ptb_tokens
from mmx.generation import CachedDecodeStep, PromptBatch, generate
from mmx.generation.outputs import GenerationOutput
from mmx.models.batching import IGNORE_INDEX, PaddedTexts, pad_texts, select_label_positions
from mmx.models.model import Model

END = "<end>"


class SelfCriticalSampler:
    """Replaces the reference captions of a batch by sampled ones with their advantages.

    Raises:
        ConfigError: only one text is drawn for each image, so there is no baseline.
    """

    def __init__(self, model: Model, config: RunConfig, sets: DataSets) -> None:
        streams = config.training.texts_per_image
        if streams < 2:
            raise ConfigError(
                "reward compares several captions of one image, and training.texts_per_image is 1; set it to 5.",
                code="training.texts_per_image",
                given=streams,
            )
        assert config.generation is not None, "resolved before training starts"
        self.model = model
        self.options = GenerationConfig(
            do_sample=True,
            temperature=config.training.reward_temperature,
            num_return_sequences=streams,
            max_new_tokens=_max_new_tokens(model, config.generation),
        )
        references: list[list[list[str]]] = []
        for data, examples in sets:
            if data.reward:
                references.extend(tokens_with_end(captions) for captions in captions_of(examples))
        self.cider = Cider(references)
        self._rewards: list[float] = []

    def sample_batch(self, batch: Batch, seed: int) -> Batch:
        """Return the batch with K sampled captions and their advantages in every row that has references."""
        rows = [row for row, references in enumerate(batch.references) if references]
        if not rows:
            return batch
        samples = self._sample(batch, rows, seed)
        advantages = torch.full(batch.tokens.shape[:2], torch.nan)
        for row, captions in zip(rows, samples, strict=True):
            rewards = torch.tensor(self._score(captions, batch.references[row]))
            self._rewards += rewards.tolist()
            # Equal to reward - (sum - reward) / (K - 1), where the second term is the mean of the others.
            advantages[row] = (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
        return self._replace_texts(batch, rows, samples, advantages.to(batch.tokens.device))

    def take_mean_reward(self) -> float | None:
        """Return the mean CIDEr-D of the captions sampled since the last call, None if there were none."""
        rewards = self._rewards
        self._rewards = []
        return sum(rewards) / len(rewards) if rewards else None

    @torch.no_grad()
    def _sample(self, batch: Batch, rows: Sequence[int], seed: int) -> list[list[GenerationOutput]]:
        """Sample K captions for each of some rows."""
        model = self.model
        device = batch.tokens.device
        options = self.options.model_copy(update={"seed": seed})
        with _evaluation_mode(model):
            inputs = {name: source for name, source in batch.sources.items() if name != model.config.question_input}
            memory = model.encode(inputs, len(batch.tokens)).select(torch.tensor(rows, device=device))
            memory = model.with_questions(memory, None)
            prompt = torch.tensor(model.tokenizer.encode_prompt(model.prompt()), device=device).expand(len(rows), 1, -1)
            prompts = PromptBatch(prompt, torch.ones_like(prompt, dtype=torch.bool))
            step = CachedDecodeStep(model.decoder, memory, options.max_new_tokens)
            outputs = generate(step, prompts, options, model.tokenizer.eos_token_id)
        return [streams[0] for streams in outputs]

    def _score(self, captions: Sequence[GenerationOutput], references: Sequence[str]) -> list[float]:
        """Return the CIDEr-D of each caption."""
        targets = tokens_with_end(references)
        scores = []
        for caption in captions:
            words = ptb_tokens(self.model.tokenizer.decode(caption.tokens))
            end = [END] if caption.finished else []
            scores.append(self.cider.score([*words, *end], targets))
        return scores

    def _replace_texts(
        self, batch: Batch, rows: Sequence[int], samples: Sequence[Sequence[GenerationOutput]], advantages: Tensor
    ) -> Batch:
        """Return the batch with sampled captions in some rows, padded to the longest text."""
        sampled = self._pad_samples(samples, batch)
        length = max(batch.tokens.shape[-1], sampled.tokens.shape[-1])
        index = torch.tensor(rows, device=batch.tokens.device)

        def merge(references: Tensor, samples_of_rows: Tensor, fill: int) -> Tensor:
            merged = F.pad(references, (0, length - references.shape[-1]), value=fill)
            merged[index] = F.pad(samples_of_rows, (0, length - samples_of_rows.shape[-1]), value=fill)
            return merged

        targets = merge(_targets(batch), sampled.targets, IGNORE_INDEX)
        selected = select_label_positions(targets, LABEL_MULTIPLE)
        return replace(
            batch,
            tokens=merge(batch.tokens, sampled.tokens, self.model.tokenizer.pad_token_id),
            mask=merge(batch.mask, sampled.mask, 0),
            label_positions=selected.positions,
            labels=selected.labels,
            advantages=advantages,
        )

    def _pad_samples(self, samples: Sequence[Sequence[GenerationOutput]], batch: Batch) -> PaddedTexts:
        tokenizer = self.model.tokenizer
        prompt = tokenizer.encode_prompt(self.model.prompt())
        texts = []
        for captions in samples:
            targets = [[*c.tokens, tokenizer.eos_token_id] if c.finished else list(c.tokens) for c in captions]
            texts.append([(prompt, target) for target in targets])
        padded = pad_texts(texts, batch.tokens.shape[1], tokenizer.pad_token_id, TEXT_MULTIPLE)
        return PaddedTexts(*(tensor.to(batch.tokens.device) for tensor in padded))


def tokens_with_end(captions: Sequence[str]) -> list[list[str]]:
    """Tokenize reference captions and append the end to each."""
    return [[*ptb_tokens(caption), END] for caption in captions]


def _max_new_tokens(model: Model, generation: GenerationConfig) -> int:
    """Return the length of a caption, limited by learned position embeddings."""
    prompt_length = len(model.tokenizer.encode_prompt(model.prompt()))
    available = model.config.decoder.max_new_tokens_after(prompt_length)
    return generation.max_new_tokens if available is None else min(generation.max_new_tokens, available)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Disable dropout inside the block, and restore the mode of each module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _targets(batch: Batch) -> Tensor:
    """Return the targets [B, K, T] of a batch; positions that only pad `label_positions` are left out."""
    targets = torch.full_like(batch.tokens, IGNORE_INDEX)
    is_label = batch.labels != IGNORE_INDEX
    targets.view(-1)[batch.label_positions[is_label]] = batch.labels[is_label]
    return targets
