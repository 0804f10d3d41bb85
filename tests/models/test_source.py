"""Sources: each may be absent, rows of one batch may have different ones, and encoders that fail are named."""

import itertools
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmx.config.loader import parse_config
from mmx.config.schema import DataConfig, SourceConfig, TrainingConfig
from mmx.data.batching import TrainingDataset
from mmx.data.examples import Example, TextTask
from mmx.data.formats import read_examples
from mmx.encoders.base import Features
from mmx.errors import EncoderError, MmxError
from mmx.inference.outputs import Question
from mmx.inference.pipeline import Pipeline
from mmx.models.source import SourceBatch, collate_inputs, find_source, prepare_inputs
from mmx.testing import ToyEncoder, tiny_model

OPTIONS = {"max_new_tokens": 4}


class FileEncoder(ToyEncoder):
    """Reads numbers, and files that end in .snd."""

    modality = "audio"

    def prepare(self, raw):
        return super().prepare([float(word) for word in open(raw).read().split()] if isinstance(raw, str) else raw)

    def accepts(self, path):
        return path.endswith(".snd")


@pytest.fixture(scope="module")
def pipeline():
    image_source = SourceConfig(encoder="image", options={"backbone": "test_resnet", "size": 32})
    text_source = SourceConfig(encoder="text", options={"hidden_size": 32, "num_layers": 1, "num_heads": 4})
    model = tiny_model({"image": image_source, "text": text_source, "audio": f"{__name__}:FileEncoder"})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("sources.image.encoder"):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)  # large enough that the sources change the logits
    return Pipeline(model)


def image(detail):
    return Image.effect_mandelbrot((40, 40), (-2, -1.2, 1, 1.2), detail).convert("RGB")


INPUTS = {"image": image(60), "text": "two dogs", "audio": (0.5, -1.0, 2.0)}
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(sorted(INPUTS), size)]
ROWS = [{name: INPUTS[name] for name in names} for names in SUBSETS]


def logits(pipeline, memory):
    tokens = torch.tensor([[[1, 7, 70, 71, 72]]]).expand(memory.batch_size, 1, 5)
    with torch.inference_mode():
        return pipeline.model.decoder(tokens, memory)


# ---- rows with different sources -----------------------------------------------------------------------------------


def test_rows_with_different_sources_equal_each_row_alone(pipeline):
    together = logits(pipeline, pipeline.encode_prepared([pipeline.prepare(row) for row in ROWS]))
    for index, row in enumerate(ROWS):
        alone = logits(pipeline, pipeline.encode(**row))
        torch.testing.assert_close(together[index], alone[0], atol=1e-5, rtol=1e-4)
    distances = torch.cdist(together.flatten(1), together.flatten(1))
    assert distances[~torch.eye(len(ROWS), dtype=bool)].min() > 1e-2, "all subsets of sources differ"


def test_an_absent_source_is_none_or_left_out(pipeline):
    with_none = pipeline.encode(image=[INPUTS["image"], None], audio=[None, INPUTS["audio"]])
    rows = [pipeline.prepare({"image": INPUTS["image"]}), pipeline.prepare({"audio": INPUTS["audio"]})]
    left_out = pipeline.encode_prepared(rows)
    torch.testing.assert_close(logits(pipeline, with_none), logits(pipeline, left_out), atol=1e-5, rtol=1e-4)
    assert with_none.mask[0].sum() < with_none.num_slots


def test_every_method_of_the_pipeline_takes_several_sources(pipeline, tmp_path):
    path = tmp_path / "a.snd"
    path.write_text("0.5 -1.0 2.0")
    question = "what is it?"
    answer = pipeline.ask(INPUTS, question, **OPTIONS)
    assert answer == pipeline.ask(pipeline.encode(**INPUTS), question, **OPTIONS)
    assert answer == pipeline.ask({**INPUTS, "audio": str(path)}, question, **OPTIONS)
    answers = list(pipeline.answers([Question(row, question) for row in ROWS], batch_size=3, **OPTIONS))
    assert [item.text for item in answers] == [pipeline.ask(row, question, **OPTIONS) for row in ROWS]
    captions = [item.text for _, item in pipeline.captions(ROWS, batch_size=4, **OPTIONS)]
    assert captions == [pipeline.caption(row, **OPTIONS) for row in ROWS]
    by_name = pipeline.ask({"audio": INPUTS["audio"]}, question, **OPTIONS)
    assert pipeline.ask(path, question, **OPTIONS) == by_name


def test_questions_with_and_without_a_box_in_one_batch(pipeline):
    box = (0.0, 0.0, 0.5, 0.5)
    other = {"image": image(90)}
    answers = list(
        pipeline.answers([Question(INPUTS, "a?"), Question(INPUTS, "a?", box), Question(other, "a?", box)], **OPTIONS)
    )
    assert answers[0].text == pipeline.ask(INPUTS, "a?", **OPTIONS)
    assert answers[1].text == pipeline.ask(INPUTS, "a?", box=box, **OPTIONS)
    assert answers[2].text == pipeline.ask(image(90), "a?", box=box, **OPTIONS)


def test_an_invalid_box_is_the_error_of_its_question_only(pipeline):
    questions = [Question(INPUTS, "a?", (0, 0, 2, 2)), Question(INPUTS, "a?"), Question(INPUTS, "a?", "0,0,1,1")]
    outside, valid, text = pipeline.answers(questions, **OPTIONS)
    assert outside.code == text.code == "memory.box"
    assert valid.text == pipeline.ask(INPUTS, "a?", **OPTIONS)


def test_rank_needs_one_stream(pipeline):
    memory = pipeline.encode(**INPUTS)
    with pytest.raises(MmxError) as error:
        pipeline.rank(memory.focus([[(0, 0, 0.5, 0.5), None]]), "a?", ["yes", "no"])
    assert error.value.code == "rank.streams"


def test_find_source(pipeline):
    encoders = pipeline.model.encoders
    assert find_source(encoders, "x/b.snd") == "audio"
    assert find_source(encoders, "x/b.jpeg") == "image"
    assert find_source(encoders, "x/b.unknown") == find_source(encoders, image(3)) == "image"
    assert find_source(tiny_model().encoders, "x/b.unknown") == "numbers"
    two = tiny_model({"one": f"{__name__}:FileEncoder", "two": "mmx.testing:ToyEncoder"}).encoders
    with pytest.raises(MmxError) as error:
        find_source(two, "b.jpg")
    assert error.value.code == "source.ambiguous"
    assert error.value.details == {"sources": ["one", "two"]}


def test_an_unknown_source_is_refused(pipeline):
    with pytest.raises(MmxError) as error:
        pipeline.ask({"sound": "a.snd"}, "what?")
    assert error.value.code == "source.unknown"
    assert error.value.details["known"] == ["image", "text", "audio"]


def test_a_batch_moves_to_a_device_with_all_its_tensors():
    batch = SourceBatch({"x": torch.zeros(2, 3)}, torch.tensor([0, 2]), torch.tensor([True, False]), 2)
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.inputs["x"], moved.rows, moved.dropped)} == {"meta"}
    assert moved.streams == 2


# ---- training ------------------------------------------------------------------------------------------------------


def test_training_batches_may_have_rows_with_different_sources(pipeline, tmp_path):
    lines = [
        '{"text": "a", "audio": [1, 2], "caption": "both"}',
        '{"audio": [3], "caption": "ear"}',
        '{"text": "b", "caption": "eye"}',
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    examples = read_examples(DataConfig(path=str(tmp_path / "list.jsonl")))
    data = TrainingDataset(pipeline.model, [(DataConfig(path="x"), examples)], TrainingConfig(texts_per_image=1))
    prepared = {item.id: item for item in (data[position] for position in range(3))}
    batch = data.collate([prepared[example.id] for example in examples])
    assert batch.sources["text"].rows.tolist() == [0, 2]
    assert batch.sources["audio"].rows.tolist() == [0, 1]
    together = pipeline.model(batch.sources, batch.tokens, batch.mask)
    for row, example in enumerate(examples):
        alone = data.collate([prepared[example.id]])
        expected = pipeline.model(alone.sources, alone.tokens, alone.mask)
        length = int(alone.mask.sum())
        torch.testing.assert_close(together[row, 0, :length], expected[0, 0, :length], atol=1e-5, rtol=1e-4)


def test_training_passes_the_boxes_to_the_decoder(pipeline):
    box = (0.0, 0.0, 0.5, 0.5)
    tasks = (TextTask(("corner",), "what?", box=box), TextTask(("all",), "what?"))
    examples = [Example("e", {"image": image(60)}, tasks)]
    data = TrainingDataset(pipeline.model, [(DataConfig(path="x"), examples)], TrainingConfig(texts_per_image=3))
    prepared = data[0]
    batch = data.collate([prepared])
    has_box = [bool(torch.isfinite(row).all()) for row in batch.boxes[0]]
    assert sorted(has_box) == [False, False, True], "two questions in three streams, one of them with a box"
    with torch.inference_mode():
        found = pipeline.model(batch.sources, batch.tokens, batch.mask, boxes=batch.boxes)
    memory = pipeline.encode(image=image(60))
    for k in range(3):
        own_memory = memory.focus(box) if has_box[k] else memory
        stream = slice(k, k + 1)
        with torch.inference_mode():
            expected = pipeline.model.decoder(batch.tokens[:, stream], own_memory, batch.mask[:, stream])
        length = int(batch.mask[0, k].sum())
        torch.testing.assert_close(found[0, k, :length], expected[0, 0, :length], atol=1e-5, rtol=1e-4)
    without_boxes = replace(prepared, boxes=[None] * len(prepared.boxes))
    assert data.collate([without_boxes]).boxes is None


@pytest.mark.parametrize(("box", "is_moved"), [(None, True), ((0.0, 0.0, 0.5, 0.5), False)])
def test_augmentation_does_not_move_images_with_boxes(pipeline, box, is_moved):
    augmentation = {"min_crop_scale": 0.3, "horizontal_flip": True, "color_jitter": 0.0}
    config = parse_config({"path": "x", "augmentation": augmentation}, DataConfig, where="test")
    examples = [Example("e", {"image": image(60)}, (TextTask(("a",), "what?", box=box),))]
    data = TrainingDataset(pipeline.model, [(config, examples)], TrainingConfig(texts_per_image=1))
    original = pipeline.model.encoder("image").prepare(image(60))["pixels"]
    unchanged = [torch.equal(data[position].inputs["image"]["pixels"], original) for position in range(4)]
    assert all(unchanged) != is_moved


# ---- encoders that fail --------------------------------------------------------------------------------------------


class FailingEncoder(ToyEncoder):
    """Fails in the method that its input names."""

    modality = "touch"

    def prepare(self, raw):
        if raw == "prepare":
            raise KeyError("no such finger")
        return {"numbers": 3.0} if raw == "floats" else super().prepare(raw)

    def collate(self, prepared):
        if len(prepared) == 3:
            raise RuntimeError("three\nare a crowd")
        return super().collate(prepared)

    def forward(self, batch):
        if batch["numbers"].max() > 100:
            raise IndexError("too loud")
        return super().forward(batch)


class NotFiniteEncoder(ToyEncoder):
    """Returns NaN for 13, and masks 7."""

    def forward(self, batch):
        features = super().forward(batch)
        states = features.states.clone()
        states[batch["numbers"] == 13] = float("nan")
        return Features(states, features.mask & (batch["numbers"] != 7))


class DoubleEncoder(ToyEncoder):
    """Computes in float64."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states.double(), features.mask)


class NoSuperEncoder(ToyEncoder):
    def __init__(self, options):
        torch.nn.Module.__init__(self)


class BoolWidthEncoder(ToyEncoder):
    def __init__(self, options):
        super().__init__(options)
        self.width = True


class ThreeDimensionsEncoder(ToyEncoder):
    dimensions = 3


class RaisingAcceptsEncoder(ToyEncoder):
    def accepts(self, path):
        raise KeyError(path)


class ExitingEncoder(ToyEncoder):
    def prepare(self, raw):
        raise SystemExit(3)


def failing_model(name="FailingEncoder"):
    return tiny_model({"touch": f"{__name__}:{name}"})


@pytest.mark.parametrize(("raw", "code"), [("prepare", "encoder.failed"), ("floats", "encoder.tensors")])
def test_errors_of_prepare_name_the_encoder_and_its_source(raw, code):
    model = failing_model()
    with pytest.raises(EncoderError) as error:
        prepare_inputs(model.encoders, {"touch": raw})
    assert error.value.code == code
    assert error.value.details["source"] == "touch"
    assert "FailingEncoder" in str(error.value)
    (_, failed), (_, valid) = Pipeline(model).captions([{"touch": raw}, {"touch": [1.0]}], **OPTIONS)
    assert str(failed) == str(error.value), "an input that fails does not end the run"
    assert valid.text is not None


def test_errors_of_collate_and_forward_name_the_encoder_and_its_source():
    model = failing_model()
    rows = [prepare_inputs(model.encoders, {"touch": [number]}) for number in (1.0, 2.0, 3.0)]
    with pytest.raises(EncoderError, match="FailingEncoder .*collate.* RuntimeError: three are a crowd") as error:
        collate_inputs(model.encoders, rows)
    assert error.value.code == "encoder.failed"
    with pytest.raises(EncoderError, match="FailingEncoder .*forward.* IndexError: too loud") as error:
        Pipeline(model).encode(touch=[[101.0]])
    assert error.value.details["source"] == "touch"


@pytest.mark.parametrize("numbers", [[[1.0, 2.0], [3.0, 13.0]], [[7.0, 7.0]]])
def test_features_that_are_not_finite_or_all_masked_are_refused(numbers):
    with pytest.raises(EncoderError) as error:
        Pipeline(failing_model("NotFiniteEncoder")).encode(touch=numbers)
    assert error.value.code == "encoder.features"


def test_features_are_not_checked_for_nan_in_training():
    """There, the loss is checked, on all ranks at once."""
    model = failing_model("NotFiniteEncoder")
    assert Pipeline(model).encode(touch=[[7.0, 1.0]]).mask.tolist() == [[False, True]]
    with torch.enable_grad():
        assert model.encode({"touch": model.collate("touch", [[13.0]])}, 1).keys.isnan().any()


def test_an_encoder_may_compute_in_another_dtype():
    memory = Pipeline(failing_model("DoubleEncoder")).encode(touch=[[1.0, 2.0]])
    expected = Pipeline(failing_model("ToyEncoder")).encode(touch=[[1.0, 2.0]])
    assert memory.keys.dtype == torch.float32
    torch.testing.assert_close(memory.keys, expected.keys)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("NoSuperEncoder", "encoder.constructor"),
        ("BoolWidthEncoder", "encoder.constructor"),
        ("ThreeDimensionsEncoder", "encoder.constructor"),
        ("RaisingAcceptsEncoder", "encoder.failed"),
        ("ExitingEncoder", "encoder.failed"),
    ],
)
def test_encoders_that_break_the_contract_are_named(name, code):
    with pytest.raises(EncoderError) as error:
        Pipeline(failing_model(name)).ask("a.png", "what?")
    assert error.value.code == code
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prepared_row_without_any_source_is_refused(pipeline):
    """A text over it would be invented."""
    with pytest.raises(MmxError) as error:
        pipeline.encode_prepared([pipeline.prepare(ROWS[0]), {}])
    assert (error.value.code, error.value.details["row"]) == ("input.no_source", 1)
