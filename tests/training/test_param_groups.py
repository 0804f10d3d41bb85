"""Parameter groups: learning rates, weight decay and frozen groups."""

import pytest
import torch
from small_modules import SmallModule, train_steps

from mmx.config.schema import ParamGroupConfig, TrainingConfig
from mmx.errors import ConfigError
from mmx.training.param_groups import build_optimizer, check_param_groups, param_group_for


def test_groups_have_their_rate_and_vectors_and_tables_no_decay():
    config = TrainingConfig(
        learning_rate=0.01, weight_decay=0.5, param_groups={"encoder": ParamGroupConfig(lr_scale=0.1)}
    )
    model = SmallModule()
    found = {}
    for group in build_optimizer(model, config).param_groups:
        for parameter in group["params"]:
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate, decay = found[id(parameter)]
        assert rate == pytest.approx(0.001 if name.startswith("encoder") else 0.01)
        assert decay == (0.5 if parameter.ndim > 1 and name != "table" else 0.0)


def test_longest_prefix_wins_and_prefixes_are_whole_names():
    groups = {"encoder": ParamGroupConfig(lr_scale=0.1), "encoder.2": ParamGroupConfig(lr_scale=0.2)}
    names = ("encoder.0.weight", "encoder.2.0.weight", "encoder2.x", "decoder")
    assert [param_group_for(name, groups).lr_scale for name in names] == [0.1, 0.2, 1.0, 1.0]


def test_frozen_group_keeps_weights_and_running_statistics():
    model = SmallModule()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_steps(model, TrainingConfig(learning_rate=0.1, param_groups={"encoder": ParamGroupConfig(freeze=True)}))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder"))
    assert not any(torch.equal(before[name], after[name]) for name in before if name.startswith("decoder"))
    assert int(after["encoder.1.num_batches_tracked"]) == 0
    assert int(after["decoder.1.num_batches_tracked"]) == 3


def test_trained_group_inside_a_frozen_one_is_in_training_mode():
    model = SmallModule()
    groups = {"encoder": ParamGroupConfig(freeze=True), "encoder.2": ParamGroupConfig()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_steps(model, TrainingConfig(learning_rate=0.1, param_groups=groups))
    modules = (model.encoder, model.encoder[1], model.encoder[2], model.encoder[2][1])
    assert [module.training for module in modules] == [False, False, True, True]
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert "encoder.2.0.weight" in changed
    assert "encoder.0.weight" not in changed


def test_lr_scale_of_zero_changes_nothing():
    model = SmallModule()
    before = model.encoder[0].weight.clone()
    train_steps(model, TrainingConfig(learning_rate=0.1, param_groups={"encoder": ParamGroupConfig(lr_scale=0.0)}))
    assert torch.equal(before, model.encoder[0].weight)


def test_unknown_group_is_named_with_the_nearest_known_one():
    with pytest.raises(ConfigError) as error:
        check_param_groups(SmallModule(), {"encodr": ParamGroupConfig()})
    assert error.value.code == "training.unknown_group"
    assert error.value.details["key"] == "encodr"
    assert "'encoder'" in str(error.value)


def test_freezing_everything_is_refused():
    groups = {name: ParamGroupConfig(freeze=True) for name in ("encoder", "decoder", "table")}
    with pytest.raises(ConfigError) as error:
        build_optimizer(SmallModule(), TrainingConfig(param_groups=groups))
    assert error.value.code == "training.all_frozen"
