"""Packed linear maps against nn.Linear, their slow twin: the same numbers, the same weights given back."""

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

pytestmark = pytest.mark.skipif(not can_prepack(), reason="this build of torch has no oneDNN")
WIDE = {"hidden_size": 256, "num_heads": 4}  # maps large enough to be packed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (5,), (40,), (3, 7), (2, 1)], ids=str)
def test_a_packed_map_gives_what_the_plain_one_gives(rows, bias):
    torch.manual_seed(0)
    plain, x = nn.Linear(192, 320, bias=bias), torch.randn(*rows, 192)
    torch.testing.assert_close(
        prepack_linear(plain.weight, plain.bias, "blocks")(x), plain(x).detach(), atol=1e-5, rtol=1e-5
    )


def test_int8_is_off_by_less_than_half_a_step_of_each_row_and_what_bfloat16_rounds():
    torch.manual_seed(0)
    plain = nn.Linear(256, 128)
    whole = prepack_linear(plain.weight, plain.bias, "int8")
    steps = plain.weight.abs().amax(1, keepdim=True) / 127
    assert ((whole.weights() - plain.weight).abs() <= steps * (0.5 + 127 * 2**-8)).all(), "scales are bfloat16"
    x = torch.randn(9, 256)
    error = (whole(x) - plain(x)).pow(2).mean().sqrt() / plain(x).std()
    assert error < 0.01
    assert whole(x).dtype == torch.float32


@pytest.mark.parametrize("kind", ["blocks", "int8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(5,), (3, 7)], ids=str)
def test_gradients_pass_through_to_what_was_given(rows, bias, kind):
    """They are those of nn.Linear with the weights that were kept; the numbers forward are the same as without them."""
    torch.manual_seed(0)
    plain, x = nn.Linear(192, 320, bias=bias), torch.randn(*rows, 192)
    whole = prepack_linear(plain.weight, plain.bias, kind)
    plain.weight.data = whole.weights()
    given, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    read, upstream = whole(given), torch.randn(*rows, 320)
    assert torch.equal(read, whole(x)) and not whole(x).requires_grad
    (read * upstream).sum().backward()
    (plain(twin) * upstream).sum().backward()
    torch.testing.assert_close(given.grad, twin.grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not whole(given).requires_grad


def test_a_row_of_zeros_stays_one():
    weight = torch.randn(64, 64)
    weight[3] = 0
    assert (prepack_linear(weight, None, "int8")(torch.randn(2, 64))[:, 3] == 0).all()


@pytest.mark.parametrize("kind", ["blocks", "int8"])
def test_packed_maps_copy_pickle_and_tell_their_weights(kind):
    plain = nn.Linear(256, 256)
    whole = prepack_linear(plain.weight, plain.bias, kind)
    x = torch.randn(3, 256)
    for again in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        torch.testing.assert_close(again(x), whole(x), atol=0.02 if kind == "int8" else 1e-5, rtol=1e-2)
    told = nn.Sequential(whole).state_dict()
    assert list(told) == ["0.weight", "0.bias"]
    if kind == "blocks":
        assert torch.equal(told["0.weight"], plain.weight) and torch.equal(told["0.bias"], plain.bias)


def test_large_maps_alone_are_packed():
    parts = nn.ModuleDict({"large": nn.Linear(256, 256), "small": nn.Linear(16, 16)})
    assert parts["large"].weight.numel() >= MIN_NUMEL
    prepack(parts, "blocks")
    assert type(parts["large"]) is PrepackedLinear and type(parts["small"]) is nn.Linear
    prepack(parts, "int8")
    assert type(parts["large"]) is PrepackedLinear, "what is packed stays as it is"


def test_weights_of_another_kind_are_refused():
    with pytest.raises(MmxError, match="weights of torch.float64 on cpu cannot be packed"):
        prepack_linear(torch.randn(256, 256, dtype=torch.float64), None, "blocks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "wide", tiny_model(**WIDE))


def test_a_loaded_model_is_packed_speaks_alike_and_can_be_saved_again(folder, tmp_path):
    asked, plain = load(folder), Pipeline(load_model(folder))
    kinds = {type(part) for part in asked.model.decoder.modules()}
    assert PrepackedLinear in kinds
    inputs = [{"numbers": [0.1 * i, 0.5]} for i in range(6)]
    assert asked.caption(inputs, max_new_tokens=6) == plain.caption(inputs, max_new_tokens=6)
    again = load_model(save_model(tmp_path / "again", asked.model))
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_types_speak(folder, dtype):
    asked = load(folder, dtype=dtype)
    assert isinstance(asked.caption({"numbers": [0.3]}, max_new_tokens=4), str)
    assert (Int8Linear in {type(part) for part in asked.model.decoder.modules()}) == (dtype == "int8")
    plain = Pipeline(load_model(folder))
    memory = plain.encode(numbers=[[0.3]])
    tokens = torch.tensor([[[1, 3, 7, 9]]])
    with torch.inference_mode():
        expected = plain.model.decoder(tokens, memory)
        kept = memory.to(dtype=asked.model.decoder.embedding.weight.dtype)
        error = (asked.model.decoder(tokens, kept).float() - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.05
