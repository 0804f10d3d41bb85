"""Loss, rates, parts and the moving average, against torch and against sums done by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmx.config.schema import ParamGroupConfig, TrainingConfig
from mmx.errors import ConfigError
from mmx.training.optim import (
    ExponentialMovingAverage,
    build_optimizer,
    check_param_groups,
    lr_factor,
    param_group_for,
    scst_loss,
    set_mode,
    token_loss,
)


class Little(nn.Module):
    """Two parts, one of which has a part of its own, with a batch norm in each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.Dropout()))
        self.decoder = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        self.table = nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return self.decoder(self.encoder(x)) + self.table.sum(0)


def stepped(model: nn.Module, config: TrainingConfig, steps: int = 3) -> None:
    optimizer = build_optimizer(model, config)
    for _ in range(steps):
        set_mode(model, config.param_groups)
        model(torch.randn(6, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_loss_is_torchs_cross_entropy_summed_over_the_tokens_that_count(smoothing):
    logits, targets = torch.randn(40, 17), torch.randint(0, 17, (40,))
    targets[::3] = -100
    kept = targets >= 0
    expected = nn.functional.cross_entropy(logits[kept], targets[kept], label_smoothing=smoothing) * kept.sum()
    assert float(token_loss(logits, targets, smoothing)) == pytest.approx(float(expected), rel=1e-6)


def test_token_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    expected = -math.log(3 / 4) + math.log(2)
    assert float(token_loss(logits, torch.tensor([1, 0]), 0.0)) == pytest.approx(expected, rel=1e-6)
    assert float(token_loss(logits, torch.tensor([-100, -100]), 0.0)) == 0.0


def test_mixed_loss_weighs_what_was_said_and_smooths_only_what_people_wrote():
    logits, targets = torch.randn(6, 9), torch.randint(0, 9, (6,))
    targets[5] = -100
    advantages = torch.tensor([math.nan, 0.5, -2.0, 0.0, math.nan, 1.0])
    logprobs = logits.log_softmax(-1)[range(6), targets.clamp(min=0)]
    expected = token_loss(logits[[0, 4]], targets[[0, 4]], 0.1) - 0.5 * logprobs[1] + 2.0 * logprobs[2]
    assert float(scst_loss(logits, targets, 0.1, advantages)) == pytest.approx(float(expected), rel=1e-5)
    cool = (logits / 0.5).log_softmax(-1)[range(6), targets.clamp(min=0)]
    expected = token_loss(logits[[0, 4]], targets[[0, 4]], 0.1) - 0.5 * cool[1] + 2.0 * cool[2]
    assert float(scst_loss(logits, targets, 0.1, advantages, temperature=0.5)) == pytest.approx(
        float(expected), rel=1e-5
    )
    nobody = torch.full((6,), math.nan)
    assert float(scst_loss(logits, targets, 0.1, nobody)) == pytest.approx(float(token_loss(logits, targets, 0.1)))


def test_token_loss_of_half_precision_is_summed_in_full():
    logits, targets = torch.randn(3000, 11), torch.randint(0, 11, (3000,))
    half = logits.bfloat16()
    assert token_loss(half, targets, 0.0).dtype == torch.float32
    assert float(token_loss(half, targets, 0.0)) == float(token_loss(half.float(), targets, 0.0))


def test_learning_rate_by_hand():
    config = TrainingConfig(max_steps=14, warmup_steps=4, min_lr_ratio=0.1)
    rates = [lr_factor(step, config) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    assert rates[11] == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.7 * math.pi)))
    assert rates[14] == pytest.approx(0.1)
    assert lr_factor(99, config) == pytest.approx(0.1)


@given(st.integers(0, 50), st.integers(1, 80), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_learning_rate_rises_then_falls_and_stays_a_share(warmup, steps, final):
    config = TrainingConfig(max_steps=steps, warmup_steps=warmup, min_lr_ratio=final)
    rates = [lr_factor(step, config) for step in range(steps)]
    assert all(0 < rate <= 1 or rate == final for rate in rates)
    peak = min(max(warmup - 1, 0), steps - 1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_each_part_has_its_rate_and_vectors_and_tables_do_not_decay():
    config = TrainingConfig(
        learning_rate=0.01, weight_decay=0.5, param_groups={"encoder": ParamGroupConfig(lr_scale=0.1)}
    )
    model = Little()
    found = {
        id(p): (group["learning_rate"], group["weight_decay"])
        for group in build_optimizer(model, config).param_groups
        for p in group["params"]
    }
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate, decay = found[id(parameter)]
        assert rate == pytest.approx(0.001 if name.startswith("encoder") else 0.01)
        assert decay == (0.5 if parameter.ndim > 1 and name != "table" else 0.0)


def test_the_longest_prefix_wins_and_a_prefix_is_whole_names():
    parts = {"encoder": ParamGroupConfig(lr_scale=0.1), "encoder.2": ParamGroupConfig(lr_scale=0.2)}
    lrs = [
        param_group_for(name, parts).lr_scale
        for name in ("encoder.0.weight", "encoder.2.0.weight", "encoder2.x", "decoder")
    ]
    assert lrs == [0.1, 0.2, 1.0, 1.0]


def test_a_frozen_part_is_bit_equal_afterwards_statistics_included():
    model = Little()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stepped(model, TrainingConfig(learning_rate=0.1, param_groups={"encoder": ParamGroupConfig(freeze=True)}))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder"))
    assert not any(torch.equal(before[name], after[name]) for name in before if name.startswith("decoder"))
    assert int(after["encoder.1.num_batches_tracked"]) == 0
    assert int(after["decoder.1.num_batches_tracked"]) == 3


def test_a_trained_part_inside_a_frozen_one_is_in_training_mode():
    model = Little()
    parts = {"encoder": ParamGroupConfig(freeze=True), "encoder.2": ParamGroupConfig()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stepped(model, TrainingConfig(learning_rate=0.1, param_groups=parts))
    assert [m.training for m in (model.encoder, model.encoder[1], model.encoder[2], model.encoder[2][1])] == [
        False,
        False,
        True,
        True,
    ]
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert "encoder.2.0.weight" in changed
    assert "encoder.0.weight" not in changed


def test_a_rate_of_zero_moves_nothing():
    model = Little()
    before = model.encoder[0].weight.clone()
    stepped(model, TrainingConfig(learning_rate=0.1, param_groups={"encoder": ParamGroupConfig(lr_scale=0.0)}))
    assert torch.equal(before, model.encoder[0].weight)


def test_an_unknown_part_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'encodr'.*did you mean 'encoder'"):
        check_param_groups(Little(), {"encodr": ParamGroupConfig()})


def test_freezing_everything_is_refused():
    parts = {name: ParamGroupConfig(freeze=True) for name in ("encoder", "decoder", "table")}
    with pytest.raises(ConfigError, match="at least one"):
        build_optimizer(Little(), TrainingConfig(param_groups=parts))


def test_moving_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average, expected = ExponentialMovingAverage(model, 0.5), 1.0
    for step, value in enumerate((2.0, 5.0, -1.0, 7.0, 7.0, 3.0), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))  # 2/11, 3/12, 4/13, 5/14, 6/15, 7/16: the start is soon forgotten
        expected = decay * expected + (1 - decay) * value
        assert float(average.weights["weight"]) == pytest.approx(expected, rel=1e-6)


def test_swapping_twice_is_nothing_and_once_is_the_average():
    model = Little()
    average = ExponentialMovingAverage(model, 0.9)
    stepped(model, TrainingConfig(learning_rate=0.1))
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in average.weights.items()}
    average.swap(model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.named_parameters())
    average.swap(model)
    assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in average.weights.items())


def test_no_decay_means_no_average_and_frozen_parts_are_not_kept_twice():
    model = Little()
    average = ExponentialMovingAverage(model, 0.0)
    average.update(model, 1)
    average.swap(model)
    assert average.weights == {}
    model.encoder.requires_grad_(False)
    assert {name.split(".")[0] for name in ExponentialMovingAverage(model, 0.9).weights} == {"decoder", "table"}
