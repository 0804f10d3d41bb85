"""The encoder contract: what invalid outputs raise, and how prepared inputs become a batch."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmx.config.schema import SourceConfig
from mmx.encoders.base import Encoder, Features
from mmx.encoders.contract import check_features, encode, prepare
from mmx.errors import EncoderError
from mmx.models.source import SourceBatch, build_encoder
from mmx.testing import ToyEncoder, tiny_model, toy_tokenizer

B, S, F = 2, 6, 8


class GridEncoder(ToyEncoder):
    modality = "image"
    dimensions = 2


class EncoderWithoutWidth(Encoder):
    modality = "numbers"

    def prepare(self, raw):
        return {}

    def forward(self, batch):
        return None


class OneRowEncoder(ToyEncoder):
    """Returns only the first row of a batch."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states[:1], features.mask[:1])


class PrepareWithGradient(ToyEncoder):
    def prepare(self, raw):
        return {**super().prepare(raw), "numbers": self.linear.weight[:, 0]}


def toy(encoder_class=ToyEncoder):
    return encoder_class(encoder_class.Options(features=F))


def features(states=(B, S, F), mask=(B, S), grid=None, dtype=torch.float32, mask_dtype=torch.bool):
    return Features(torch.zeros(states, dtype=dtype), torch.ones(mask, dtype=mask_dtype), grid)


class RecordsInput(ToyEncoder):
    """Records what `prepare` receives."""

    def prepare(self, raw):
        self.received = raw
        return super().prepare([1.0])


def received(modality, raw):
    """Return what `prepare` of an encoder of this modality receives for an input of a caller."""
    encoder = toy(RecordsInput)
    encoder.modality = modality
    prepare(encoder, "x", raw)
    return encoder.received


@pytest.mark.parametrize("modality", ["image", "audio", "numbers"])
def test_prepare_receives_a_path_as_str(modality):
    assert received(modality, Path("folder") / "a.png") == str(Path("folder") / "a.png")
    assert received(modality, "a.png") == "a.png"


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_prepare_receives_a_buffer_as_bytes(modality):
    for raw in (b"data", bytearray(b"data"), memoryview(b"data")):
        found = received(modality, raw)
        assert type(found) is bytes
        assert found == b"data"


def test_prepare_of_an_image_encoder_receives_arrays_and_open_files_as_images():
    image = Image.effect_mandelbrot((6, 4), (-2, -1.2, 1, 1.2), 20).convert("RGB")
    file = BytesIO()
    image.save(file, "png")
    array = np.array(image)
    for raw in (file, array, torch.from_numpy(array).permute(2, 0, 1)):
        found = received("image", raw)
        assert isinstance(found, Image.Image)
        assert np.array_equal(np.array(found), array)
    assert received("image", image) is image


def test_prepare_of_other_encoders_receives_the_value_of_the_caller():
    for raw in ([1.0, 2.0], torch.ones(2), np.ones(2), bytearray(b"data"), BytesIO(b"data")):
        assert received("numbers", raw) is raw


FEATURES = "Features(states, mask, grid)"
INVALID = {  # name: output of the encoder, `given` and `expected` of the error
    "None": (None, "NoneType", FEATURES),
    "a tensor": (torch.zeros(B, S, F), "Tensor", FEATURES),
    "a pair of integers": ((1, 2), "tuple of (int, int)", FEATURES),
    "integer window": (
        Features(torch.zeros(B, S, F), torch.ones(B, S, dtype=torch.bool), None, torch.zeros(B, 4, dtype=torch.long)),
        f"a window [{B}, 4]",
        f"floating-point [{B}, 4], x0, y0, x1, y1 of each input, or None",
    ),
    "no mask": (Features(torch.zeros(B, S, F), None), "Features of (Tensor, NoneType, NoneType, NoneType)", FEATURES),
    "list of states": (Features([[0.0]], torch.ones(B, S)), "Features of (list, Tensor, NoneType, NoneType)", FEATURES),
    "two axes": (features(states=(S, F)), "states [6, 8]", "[B, S, F] with F = its width 8"),
    "four axes": (features(states=(B, 2, 3, F)), "states [2, 2, 3, 8]", "[B, S, F] with F = its width 8"),
    "another width": (features(states=(B, S, 7)), "states [2, 6, 7]", "[B, S, F] with F = its width 8"),
    "integer states": (features(dtype=torch.int64), "states of torch.int64", "floating-point states"),
    "float mask": (features(mask_dtype=torch.float32), "a mask torch.float32 [2, 6]", "bool [2, 6]"),
    "integer mask": (features(mask_dtype=torch.int64), "a mask torch.int64 [2, 6]", "bool [2, 6]"),
    "short mask": (features(mask=(B, 5)), "a mask torch.bool [2, 5]", "bool [2, 6]"),
    "mask of three axes": (features(mask=(B, 1, S)), "a mask torch.bool [2, 1, 6]", "bool [2, 6]"),
    "grid too large": (features(grid=(2, 4)), "grid (2, 4) for 6 slots", "(rows, columns)"),
    "grid of one": (features(grid=(6,)), "grid (6,) for 6 slots", "(rows, columns)"),
    "fractional grid": (features(grid=(1.5, 4)), "grid (1.5, 4) for 6 slots", "(rows, columns)"),
    "empty grid": (features(grid=(0, 6)), "grid (0, 6) for 6 slots", "(rows, columns)"),
    "string as grid": (features(grid="2x"), "grid 2x for 6 slots", "(rows, columns)"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_output_is_an_error(name):
    output, given, expected = INVALID[name]
    with pytest.raises(EncoderError) as caught:
        check_features(output, toy(), "audio")
    error = caught.value
    assert error.code == "encoder.features"
    assert (error.details["encoder"], error.details["source"]) == ("ToyEncoder", "audio")
    assert error.details["given"] == given
    assert error.details["expected"].startswith(expected)
    assert "\n" not in str(error)


def test_two_dimensional_encoder_must_return_its_grid():
    with pytest.raises(EncoderError) as caught:
        check_features(features(), toy(GridEncoder), "image")
    assert caught.value.details["given"] == "grid None for 6 slots"
    assert check_features(features(grid=[2, 3]), toy(GridEncoder), "image").grid == (2, 3)
    assert check_features(features(grid=(1, 5)), toy(GridEncoder), "image").grid == (1, 5), "one prefix slot"


def test_mask_and_states_must_be_on_the_device_of_the_batch():
    output = Features(torch.zeros(B, S, F), torch.ones(B, S, dtype=torch.bool, device="meta"))
    with pytest.raises(EncoderError) as caught:
        check_features(output, toy(), "audio")
    assert caught.value.details["given"] == "a mask on meta"
    with pytest.raises(EncoderError) as caught:
        check_features(features(), toy(), "audio", torch.device("meta"))
    assert caught.value.details["given"] == "states on cpu"


def test_hidden_rows_and_invalid_values_are_errors_without_gradients():
    hidden = Features(torch.zeros(B, S, F), torch.zeros(B, S, dtype=torch.bool))
    invalid = Features(torch.full((B, S, F), torch.nan), torch.ones(B, S, dtype=torch.bool))
    for output, given in ((hidden, "every slot of row 0"), (invalid, "row 0, slot 0")):
        check_features(output, toy(), "audio")
        with torch.no_grad(), pytest.raises(EncoderError) as caught:
            check_features(output, toy(), "audio")
        assert given in caught.value.details["given"]


def test_prepare_must_return_plain_tensors():
    with pytest.raises(EncoderError) as caught:
        prepare(toy(PrepareWithGradient), "x", [1.0])
    assert caught.value.code == "encoder.tensors"
    assert caught.value.details["given"] == "'numbers' with a gradient or on cpu"
    for output, given in ((None, "None"), ({}, "an empty dict"), ([1], "list"), ({"a": 1}, "'a': int")):
        encoder = toy()
        encoder.prepare = lambda raw, output=output: output
        with pytest.raises(EncoderError) as caught:
            prepare(encoder, "x", [1.0])
        assert (caught.value.details["method"], caught.value.details["given"]) == ("prepare", given)


def test_exceptions_of_an_encoder_are_converted_except_out_of_memory():
    encoder = toy()

    def fail(error):
        def forward(batch):
            raise error

        encoder.forward = forward

    fail(ValueError("wrong"))
    with pytest.raises(EncoderError, match="ValueError: wrong") as caught:
        encode(encoder, "x", {}, torch.device("cpu"))
    assert caught.value.code == "encoder.failed"
    assert caught.value.details == {"encoder": "ToyEncoder", "source": "x", "method": "forward"}
    fail(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        encode(encoder, "x", {}, torch.device("cpu"))


def test_valid_features_are_returned_unchanged():
    output = features()
    checked = check_features(output, toy(), "audio")
    assert checked.states is output.states
    assert checked.mask is output.mask
    assert isinstance(check_features((output.states, output.mask, None), toy(), "audio"), Features)


def test_model_checks_the_number_of_rows():
    """A single row must not be broadcast to all inputs."""
    model = tiny_model({"numbers": f"{__name__}:OneRowEncoder"})
    batch = model.collate("numbers", [[1.0], [2.0]])
    with pytest.raises(EncoderError) as caught:
        model.encode({"numbers": batch}, 2)
    assert caught.value.code == "encoder.batch_size"
    model = tiny_model()
    batch = model.collate("numbers", [[1.0], [2.0]])
    first_row = SourceBatch({name: tensor[:1] for name, tensor in batch.inputs.items()}, batch.rows)
    with pytest.raises(EncoderError) as caught:
        model.encode({"numbers": first_row}, 2)
    assert caught.value.code == "encoder.batch_size"


def test_encoder_must_set_its_width():
    with pytest.raises(EncoderError, match="EncoderWithoutWidth of model.sources.x"):
        build_encoder(SourceConfig(encoder=f"{__name__}:EncoderWithoutWidth"), toy_tokenizer(), "model.sources.x")


def test_base_class_says_what_to_define():
    encoder = Encoder(Encoder.Options())
    for method in (encoder.prepare, encoder.forward):
        with pytest.raises(EncoderError) as caught:
            method({})
        assert caught.value.code == "encoder.not_implemented"
        assert caught.value.details["method"] == method.__name__
    assert encoder.accepts("a.png") is False


def test_collate_stacks_tensors_of_one_shape():
    items = [{"x": torch.full((2, 3), float(n)), "n": torch.tensor(n)} for n in range(3)]
    batch = toy().collate(items)
    assert batch["x"].shape == (3, 2, 3)
    assert batch["x"][:, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert batch["n"].tolist() == [0, 1, 2]
    assert batch["n"].dtype == torch.int64


def test_collate_pads_with_zeros_and_false():
    encoder = toy()
    batch = encoder.collate([encoder.prepare([1.0, 2.0, 3.0]), encoder.prepare([4.0])])
    assert batch["numbers"].tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]
    assert batch["mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["mask"].dtype == torch.bool


@pytest.mark.parametrize("shapes", [[(2, 3), (2, 4)], [(2,), (2, 2)], [(), (1,)]])
def test_collate_names_tensors_that_cannot_be_padded(shapes):
    with pytest.raises(EncoderError) as caught:
        toy().collate([{"x": torch.zeros(shape)} for shape in shapes])
    assert (caught.value.code, caught.value.details["tensor"]) == ("encoder.collate_shapes", "x")


def test_collate_names_tensors_that_some_inputs_lack():
    with pytest.raises(EncoderError) as caught:
        toy().collate([{"x": torch.zeros(1), "y": torch.zeros(1)}, {"x": torch.zeros(1)}])
    assert (caught.value.code, caught.value.details["tensor"]) == ("encoder.collate_names", "y")


def test_padding_does_not_change_features():
    encoder = toy().eval()
    batched = encoder(encoder.collate([encoder.prepare([1.0, 2.0, 3.0]), encoder.prepare([4.0])]))
    alone = encoder(encoder.collate([encoder.prepare([4.0])]))
    assert torch.equal(batched.states[1:, :1], alone.states)
