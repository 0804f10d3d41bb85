"""What a run optimizes: cross-entropy, self-critical sequence training, distillation, and noise on the inputs.

B images in a batch, K texts of each, T text positions, n label positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from accelerate import Accelerator
from torch import Tensor

from mmx.config.schema import RunConfig, TrainingConfig
from mmx.data.batching import Batch, DataSets
from mmx.errors import MmxError
from mmx.models.model import Model
from mmx.training.distillation import Teachers
from mmx.training.distributed import raise_on_all_ranks
from mmx.training.losses import distillation_loss, scst_loss, token_loss
from mmx.training.scst import SelfCriticalSampler
from mmx.training.token_noise import noisy_tokens, plain_tokens


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of dropout, sampling and noise in one step, equal in a resumed run."""
    return Random(f"{seed}-{step}-{rank}").getrandbits(31)


class Objective:
    """The loss of a batch, and what is done to the batch before.

    Args:
        model: the model that is trained.
        config: the run, with its generation options.
        options: the training options of the run with all parameter groups.
        sets: the training data.
        accelerator: gives the device and the precision.

    Raises:
        ConfigError: a teacher does not fit, or there is only one text an image for SCST.
    """

    def __init__(
        self, model: Model, config: RunConfig, options: TrainingConfig, sets: DataSets, accelerator: Accelerator
    ) -> None:
        self.options = options
        self.accelerator = accelerator
        uses_reward = any(data.reward for data in config.train)
        self.scst = SelfCriticalSampler(model, config, sets) if uses_reward else None
        self.teachers: Teachers | None = None
        if options.distillation is not None:
            self.teachers = Teachers(options.distillation, model, sets, accelerator.device)
        self.noise_candidates: Tensor | None = None
        if options.target_noise:
            self.noise_candidates = plain_tokens(model.tokenizer).to(accelerator.device)

    def sample_batches(self, batches: Sequence[Batch], seed: int) -> Sequence[Batch]:
        """Return the batches with sampled captions in rows that are trained by reward.

        Raises:
            MmxError: the features or logits of any rank are not finite. All ranks raise the same error.
        """
        if self.scst is None:
            return batches
        error = None
        sampled: list[Batch] = []
        try:
            for number, batch in enumerate(batches):
                sampled.append(self.scst.sample_batch(batch, seed + number))
        except MmxError as own_error:
            error = own_error
        raise_on_all_ranks(self.accelerator, error)
        return sampled

    def decoder_inputs(self, batch: Batch, seed: int) -> Tensor:
        """Return the decoder inputs [B, K, T], with noise if configured."""
        if self.noise_candidates is None:
            return batch.tokens
        generator = torch.Generator(self.accelerator.device).manual_seed(seed)
        return noisy_tokens(batch, self.options.target_noise, self.noise_candidates, generator)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of logits [n, V], summed over tokens. With teachers, all ranks must call this together.

        Raises:
            MmxError: the features of a teacher are not finite on any rank. All ranks raise the same error.
        """
        options = self.options
        if batch.advantages is not None:
            text_index = batch.label_positions // batch.tokens.shape[-1]
            advantages = batch.advantages.flatten()[text_index]
            return scst_loss(logits, batch.labels, options.label_smoothing, advantages, options.reward_temperature)
        loss = token_loss(logits, batch.labels, options.label_smoothing)
        if self.teachers is None or options.distillation is None:
            return loss
        teacher_probs = self._teacher_probs(self.teachers, batch)
        weight = options.distillation.weight
        soft_loss = distillation_loss(logits, teacher_probs, batch.labels, options.distillation.temperature)
        return (1 - weight) * loss + weight * soft_loss

    def _teacher_probs(self, teachers: Teachers, batch: Batch) -> Tensor:
        """Return the probabilities of the teachers, [n, V]. Raises the error of any rank on all ranks."""
        error = None
        probs = torch.empty(0)
        try:
            with self.accelerator.autocast():
                probs = teachers.probabilities(batch)
        except MmxError as own_error:
            error = own_error
        raise_on_all_ranks(self.accelerator, error)
        return probs

    def take_mean_reward(self) -> float | None:
        """Return the mean reward since the last call, None if no caption was sampled."""
        return self.scst.take_mean_reward() if self.scst else None
