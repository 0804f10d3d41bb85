"""Prepacked linear layers against nn.Linear: the same output, the same weights in the state_dict."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline, load
from mmx.models.checkpoint import load_model, save_model
from mmx.nn.prepack import MIN_NUMEL, Int8Linear, PrepackedLinear, can_prepack, prepack, prepack_linear
from mmx.testing import tiny_model

pytestmark = pytest.mark.skipif(not can_prepack(), reason="this build of PyTorch has no oneDNN")
every_kind = pytest.mark.parametrize("kind", ["float", "int8"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (5,), (40,), (3, 7), (2, 1)], ids=str)
def test_the_output_equals_that_of_a_linear_layer(shape, bias):
    torch.manual_seed(0)
    linear = nn.Linear(192, 320, bias=bias)
    x = torch.randn(*shape, 192)
    prepacked = prepack_linear(linear.weight, linear.bias, "float")
    torch.testing.assert_close(prepacked(x), linear(x).detach(), atol=1e-5, rtol=1e-5)


def test_int8_weights_are_within_half_a_step_of_their_row():
    torch.manual_seed(0)
    linear = nn.Linear(256, 128)
    int8 = prepack_linear(linear.weight, linear.bias, "int8")
    steps = linear.weight.abs().amax(1, keepdim=True) / 127
    bound = steps * (0.5 + 127 * 2**-8)  # scales are rounded to bfloat16
    assert ((int8.dense_weight() - linear.weight).abs() <= bound).all()
    x = torch.randn(9, 256)
    assert (int8(x) - linear(x)).pow(2).mean().sqrt() / linear(x).std() < 0.01
    assert int8(x).dtype == torch.float32


@every_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 7)], ids=str)
def test_gradients_reach_the_input(shape, bias, kind):
    """They equal those of nn.Linear with the stored weights; the output does not depend on requires_grad."""
    torch.manual_seed(0)
    linear = nn.Linear(192, 320, bias=bias)
    prepacked = prepack_linear(linear.weight, linear.bias, kind)
    linear.weight.data = prepacked.dense_weight()
    x = torch.randn(*shape, 192)
    input_of_prepacked = x.clone().requires_grad_()
    input_of_linear = x.clone().requires_grad_()
    output = prepacked(input_of_prepacked)
    factor = torch.randn(*shape, 320)
    assert torch.equal(output, prepacked(x)) and not prepacked(x).requires_grad
    (output * factor).sum().backward()
    (linear(input_of_linear) * factor).sum().backward()
    torch.testing.assert_close(input_of_prepacked.grad, input_of_linear.grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not prepacked(input_of_prepacked).requires_grad


def test_a_row_of_zeros_gives_zeros_in_int8():
    weight = torch.randn(64, 64)
    weight[3] = 0
    assert (prepack_linear(weight, None, "int8")(torch.randn(2, 64))[:, 3] == 0).all()


@every_kind
def test_prepacked_layers_can_be_copied_pickled_and_saved(kind):
    linear = nn.Linear(256, 256)
    prepacked = prepack_linear(linear.weight, linear.bias, kind)
    x = torch.randn(3, 256)
    tolerance = 0.02 if kind == "int8" else 1e-5
    for copied in (copy.deepcopy(prepacked), pickle.loads(pickle.dumps(prepacked))):
        torch.testing.assert_close(copied(x), prepacked(x), atol=tolerance, rtol=1e-2)
    state = nn.Sequential(prepacked).state_dict()
    assert list(state) == ["0.weight", "0.bias"]
    if kind == "float":
        assert torch.equal(state["0.weight"], linear.weight)
        assert torch.equal(state["0.bias"], linear.bias)


def test_a_layer_that_is_not_persistent_is_not_in_the_state_dict():
    linear = nn.Linear(64, 64)
    prepacked = prepack_linear(linear.weight, linear.bias, "float", persistent=False)
    for layer in (prepacked, copy.deepcopy(prepacked)):
        assert not nn.Sequential(layer).state_dict()


def test_only_large_layers_are_prepacked():
    modules = nn.ModuleDict({"large": nn.Linear(256, 256), "small": nn.Linear(16, 16)})
    assert modules["large"].weight.numel() >= MIN_NUMEL
    prepack(modules, "float")
    assert type(modules["large"]) is PrepackedLinear
    assert type(modules["small"]) is nn.Linear
    prepack(modules, "int8")
    assert type(modules["large"]) is PrepackedLinear, "prepacked layers stay as they are"


def test_weights_of_another_dtype_are_refused():
    with pytest.raises(MmxError) as error:
        prepack_linear(torch.randn(256, 256, dtype=torch.float64), None, "float")
    assert error.value.code == "prepack.weight"
    assert error.value.details == {"dtype": "torch.float64", "device": "cpu"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with linear layers large enough to be prepacked."""
    model = tiny_model(hidden_size=256, num_heads=4)
    return save_model(tmp_path_factory.mktemp("models") / "large", model)


def test_a_loaded_model_is_prepacked_and_can_be_saved_again(checkpoint, tmp_path):
    prepacked = load(checkpoint)
    plain = Pipeline(load_model(checkpoint))
    assert PrepackedLinear in {type(module) for module in prepacked.model.decoder.modules()}
    for i in range(6):
        inputs = {"numbers": [0.1 * i, 0.5]}
        assert prepacked.caption(inputs, max_new_tokens=6) == plain.caption(inputs, max_new_tokens=6)
    saved_again = load_model(save_model(tmp_path / "again", prepacked.model))
    assert list(prepacked.model.state_dict()) == list(plain.model.state_dict())
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(saved_again.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_dtypes_stay_close_to_float32(checkpoint, dtype):
    pipeline = load(checkpoint, dtype=dtype)
    decoder = pipeline.model.decoder
    assert isinstance(pipeline.caption({"numbers": [0.3]}, max_new_tokens=4), str)
    assert (Int8Linear in {type(module) for module in decoder.modules()}) == (dtype == "int8")
    plain = Pipeline(load_model(checkpoint))
    memory = plain.encode(numbers=[[0.3]])
    tokens = torch.tensor([[[1, 3, 7, 9]]])
    with torch.inference_mode():
        expected = plain.model.decoder(tokens, memory)
        found = decoder(tokens, memory.to(dtype=decoder.embedding.weight.dtype)).float()
    assert 0 < (found - expected).abs().max() / expected.abs().max() < 0.05
