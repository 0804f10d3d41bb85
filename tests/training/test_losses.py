"""Losses against torch and against values computed by hand."""

import math

import pytest
import torch
from torch import nn

from mmx.training.losses import distillation_loss, scst_loss, token_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_loss_equals_cross_entropy_summed_over_tokens(smoothing):
    logits = torch.randn(40, 17)
    labels = torch.randint(0, 17, (40,))
    labels[::3] = -100
    kept = labels >= 0
    expected = nn.functional.cross_entropy(logits[kept], labels[kept], label_smoothing=smoothing) * kept.sum()
    assert float(token_loss(logits, labels, smoothing)) == pytest.approx(float(expected), rel=1e-6)


def test_token_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    expected = -math.log(3 / 4) + math.log(2)
    assert float(token_loss(logits, torch.tensor([1, 0]), 0.0)) == pytest.approx(expected, rel=1e-6)
    assert float(token_loss(logits, torch.tensor([-100, -100]), 0.0)) == 0.0


def test_token_loss_of_half_precision_is_summed_in_float32():
    logits = torch.randn(3000, 11).bfloat16()
    labels = torch.randint(0, 11, (3000,))
    assert token_loss(logits, labels, 0.0).dtype == torch.float32
    assert float(token_loss(logits, labels, 0.0)) == float(token_loss(logits.float(), labels, 0.0))


def test_scst_loss_weights_sampled_tokens_and_smooths_only_references():
    logits = torch.randn(6, 9)
    labels = torch.randint(0, 9, (6,))
    labels[5] = -100
    advantages = torch.tensor([math.nan, 0.5, -2.0, 0.0, math.nan, 1.0])
    references = token_loss(logits[[0, 4]], labels[[0, 4]], 0.1)
    for temperature in (1.0, 0.5):
        logprobs = (logits / temperature).log_softmax(-1)[range(6), labels.clamp(min=0)]
        expected = references - 0.5 * logprobs[1] + 2.0 * logprobs[2]
        loss = scst_loss(logits, labels, 0.1, advantages, temperature)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    only_references = torch.full((6,), math.nan)
    expected = token_loss(logits, labels, 0.1)
    assert float(scst_loss(logits, labels, 0.1, only_references)) == pytest.approx(float(expected))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_loss_is_minimal_for_the_teachers_logits(temperature):
    teacher = torch.randn(5, 7)
    labels = torch.tensor([1, 2, -100, 3, 4])
    probs = (teacher / temperature).softmax(-1)
    entropies = -(probs * probs.log()).sum(-1)
    expected = temperature**2 * entropies[labels >= 0].sum()
    student = teacher.clone().requires_grad_()
    loss = distillation_loss(student, probs, labels, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert float(student.grad.abs().max()) < 1e-5
    other = distillation_loss(torch.randn(5, 7), probs, labels, temperature)
    assert float(other) > float(expected)


def test_distillation_from_one_hot_probabilities_equals_token_loss():
    logits = torch.randn(5, 7)
    labels = torch.tensor([1, 2, -100, 3, 4])
    one_hot = nn.functional.one_hot(labels.clamp(min=0), 7).float()
    expected = token_loss(logits, labels, 0.0)
    assert float(distillation_loss(logits, one_hot, labels)) == pytest.approx(float(expected), rel=1e-6)
