"""Many sources at once: any may be absent, and rows of one batch may differ in which they have."""

import itertools

import pytest
import torch
from PIL import Image

from mmx.config.loader import parse_config
from mmx.config.schema import SourceConfig, TrainingConfig
from mmx.data.batching import TrainingDataset
from mmx.data.examples import Example, TextTask
from mmx.data.formats import read_examples
from mmx.errors import EncoderError, MmxError
from mmx.inference.batch_inference import Question
from mmx.inference.pipeline import Pipeline
from mmx.models.model import SourceBatch
from mmx.models.source import collate_inputs, find_source, prepare_inputs
from mmx.testing import ToyEncoder, tiny_model

OPTIONS = {"max_new_tokens": 4}


class Ear(ToyEncoder):
    """Reads numbers, and files that end in .snd."""

    modality = "audio"

    def prepare(self, raw):
        return super().prepare([float(word) for word in open(raw).read().split()] if isinstance(raw, str) else raw)

    def accepts(self, path):
        return path.endswith(".snd")


class Touchy(ToyEncoder):
    """Raises what it likes, where it is told to."""

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


@pytest.fixture(scope="module")
def pipeline():
    picture = SourceConfig(encoder="image", options={"backbone": "test_resnet", "size": 32})
    text = SourceConfig(encoder="text", options={"hidden_size": 32, "num_layers": 1, "num_heads": 4})
    model = tiny_model({"image": picture, "text": text, "audio": f"{__name__}:Ear"})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("sources.image.encoder"):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)  # lively, so that what is looked at matters
    return Pipeline(model)


def picture(shade):
    return Image.effect_mandelbrot((40, 40), (-2, -1.2, 1, 1.2), shade).convert("RGB")


PARTS = {"image": picture(60), "text": "two dogs", "audio": (0.5, -1.0, 2.0)}
MIXED = [{name: PARTS[name] for name in names} for n in (1, 2, 3) for names in itertools.combinations(sorted(PARTS), n)]


def logits(pipeline, memory):
    tokens = torch.tensor([[[1, 7, 70, 71, 72]]]).expand(memory.batch_size, 1, 5)
    with torch.inference_mode():
        return pipeline.model.decoder(tokens, memory)


def test_a_mixture_of_sources_in_one_batch_is_each_row_alone(pipeline):
    together = logits(pipeline, pipeline.encode_prepared([pipeline.prepare(row) for row in MIXED]))
    for row, inputs in enumerate(MIXED):
        alone = logits(pipeline, pipeline.encode(**inputs))
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)
    apart = torch.cdist(together.flatten(1), together.flatten(1))
    assert apart[~torch.eye(len(MIXED), dtype=bool)].min() > 1e-2, "each mixture says something of its own"


def test_an_absent_source_may_be_none_or_left_out(pipeline):
    one = pipeline.encode(image=[PARTS["image"], None], audio=[None, PARTS["audio"]])
    two = pipeline.encode_prepared(
        [pipeline.prepare({"image": PARTS["image"]}), pipeline.prepare({"audio": PARTS["audio"]})]
    )
    torch.testing.assert_close(logits(pipeline, one), logits(pipeline, two), atol=1e-5, rtol=1e-4)
    assert one.mask[0].sum() < one.slots


def test_everything_asks_several_sources(pipeline, tmp_path):
    (tmp_path / "a.snd").write_text("0.5 -1.0 2.0")
    question = "what is it?"
    whole = pipeline.ask(PARTS, question, **OPTIONS)
    assert whole == pipeline.ask(pipeline.encode(**PARTS), question, **OPTIONS)
    assert whole == pipeline.ask({**PARTS, "audio": str(tmp_path / "a.snd")}, question, **OPTIONS)
    answers = list(pipeline.answers([Question(row, question) for row in MIXED], batch_size=3, **OPTIONS))
    assert [said.text for said in answers] == [pipeline.ask(row, question, **OPTIONS) for row in MIXED]
    captions = [said.text for _, said in pipeline.captions(MIXED, batch_size=4, **OPTIONS)]
    assert captions == [pipeline.caption(row, **OPTIONS) for row in MIXED]
    assert pipeline.ask(tmp_path / "a.snd", question, **OPTIONS) == pipeline.ask(
        {"audio": PARTS["audio"]}, question, **OPTIONS
    )


def test_questions_that_point_stand_beside_those_that_do_not(pipeline):
    box = (0.0, 0.0, 0.5, 0.5)
    asked = [Question(PARTS, "a?"), Question(PARTS, "a?", box), Question({"image": picture(90)}, "a?", box)]
    said = [item.text for item in pipeline.answers(asked, **OPTIONS)]
    assert said[:2] == [pipeline.ask(PARTS, "a?", **OPTIONS), pipeline.ask(PARTS, "a?", box=box, **OPTIONS)]
    assert said[2] == pipeline.ask(picture(90), "a?", box=box, **OPTIONS)


def test_the_source_of_an_input_without_a_name(pipeline):
    encoders = pipeline.model.encoders
    assert find_source(encoders, "x/b.snd") == "audio"
    assert find_source(encoders, "x/b.jpeg") == "image"
    assert find_source(encoders, "x/b.unknown") == find_source(encoders, picture(3)) == "image"
    assert find_source(tiny_model().encoders, "x/b.unknown") == "numbers"
    two = tiny_model({"one": f"{__name__}:Ear", "two": "mmx.testing:ToyEncoder"}).encoders
    with pytest.raises(MmxError, match="'b.jpg' could be for any of the sources one, two; name it, as in one=..."):
        find_source(two, "b.jpg")
    with pytest.raises(MmxError, match="the model has no source 'sound'; known: audio, image, text"):
        pipeline.ask({"sound": "a.snd"}, "what?")


def test_training_learns_from_a_mixture(pipeline, tmp_path):
    rows = [
        '{"text": "a", "audio": [1, 2], "caption": "both"}',
        '{"audio": [3], "caption": "ear"}',
        '{"text": "b", "caption": "eye"}',
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    from mmx.config.schema import DataConfig

    examples = read_examples(DataConfig(path=str(tmp_path / "list.jsonl")))
    data = TrainingDataset(pipeline.model, [(DataConfig(path="x"), examples)], TrainingConfig(texts_per_image=1))
    prepared = {item.id: item for item in (data[position] for position in range(3))}
    batch = data.collate([prepared[example.id] for example in examples])
    assert batch.sources["text"].rows.tolist() == [0, 2]
    assert batch.sources["audio"].rows.tolist() == [0, 1]
    states = pipeline.model(batch.sources, batch.tokens, batch.mask)
    for row, example in enumerate(examples):
        alone = data.collate([prepared[example.id]])
        mine = pipeline.model(alone.sources, alone.tokens, alone.mask)
        length = int(alone.mask.sum())
        torch.testing.assert_close(states[row, 0, :length], mine[0, 0, :length], atol=1e-5, rtol=1e-4)


def test_training_hands_the_boxes_to_the_decoder(pipeline):
    box, config = (0.0, 0.0, 0.5, 0.5), parse_config({"path": "x"}, _data(), where="test")
    turns = (TextTask(("corner",), "what?", box=box), TextTask(("all",), "what?"))
    examples = [Example("e", {"image": picture(60)}, turns)]
    data = TrainingDataset(pipeline.model, [(config, examples)], TrainingConfig(texts_per_image=3))
    batch = data.collate([data[0]])
    pointed = [bool(torch.isfinite(row).all()) for row in batch.boxes[0]]
    assert sorted(pointed) == [False, False, True], "two questions of three streams, one of which points"
    pipeline.model.eval()
    with torch.inference_mode():
        both = pipeline.model(batch.sources, batch.tokens, batch.mask, boxes=batch.boxes)
    memory = pipeline.encode(image=picture(60))
    for k, points in enumerate(pointed):
        seen, one = memory.focus(box) if points else memory, slice(k, k + 1)
        with torch.inference_mode():
            expected = pipeline.model.decoder(batch.tokens[:, one], seen, batch.mask[:, one])
        length = int(batch.mask[0, k].sum())
        torch.testing.assert_close(both[0, k, :length], expected[0, 0, :length], atol=1e-5, rtol=1e-4)
    assert data.collate([_without_box(data[0])]).boxes is None


def test_what_points_is_not_moved_by_augmentation(pipeline):
    changes = {"min_crop_scale": 0.3, "horizontal_flip": True, "color_jitter": 0.0}
    config = parse_config({"path": "x", "augmentation": changes}, _data(), where="test")
    for box, moved in ((None, True), ((0.0, 0.0, 0.5, 0.5), False)):
        examples = [Example("e", {"image": picture(60)}, (TextTask(("a",), "what?", box=box),))]
        data = TrainingDataset(pipeline.model, [(config, examples)], TrainingConfig(texts_per_image=1))
        plain = pipeline.model.encoder("image").prepare(picture(60))["pixels"]
        same = [torch.equal(data[position].inputs["image"]["pixels"], plain) for position in range(4)]
        assert all(same) != moved


WRONG = {
    "prepare": "encoder Touchy of source 'touch' failed in prepare(str) with KeyError: 'no such finger' (--traceback",
    "floats": "encoder Touchy of source 'touch' gave 'numbers': float in prepare; expected a dict of plain tensors",
}


@pytest.mark.parametrize("raw", WRONG)
def test_what_a_plugin_raises_is_told_with_its_name(raw):
    model = tiny_model({"touch": f"{__name__}:Touchy"})
    with pytest.raises(EncoderError) as caught:
        prepare_inputs(model.encoders, {"touch": raw})
    assert str(caught.value).startswith(WRONG[raw])
    bad, good = list(Pipeline(model).captions([{"touch": raw}, {"touch": [1.0]}], **OPTIONS))
    assert str(bad[1]) == str(caught.value), "one row of many is an error of its own"
    assert good[1].text is not None


def test_what_collate_and_forward_raise_is_told_too():
    model = tiny_model({"touch": f"{__name__}:Touchy"})
    rows = [prepare_inputs(model.encoders, {"touch": [number]}) for number in (1.0, 2.0, 3.0)]
    with pytest.raises(EncoderError, match="failed in collate with RuntimeError: three are a crowd"):
        collate_inputs(model.encoders, rows)
    with pytest.raises(EncoderError, match="failed in forward with IndexError: too loud"):
        Pipeline(model).encode(touch=[[101.0]])


class Sick(ToyEncoder):
    """Gives NaN, or a mask that hides everything, as its input says."""

    def forward(self, batch):
        features = super().forward(batch)
        states = features.states.clone()
        states[batch["numbers"] == 13] = float("nan")
        return type(features)(states, features.mask & (batch["numbers"] != 7))


def test_numbers_that_spoil_an_answer_are_met_at_the_door():
    pipeline = Pipeline(tiny_model({"touch": f"{__name__}:Sick"}))
    with pytest.raises(
        EncoderError, match="Sick of source 'touch' gave NaN or infinite states in row 1, slot 1; expected"
    ):
        pipeline.encode(touch=[[1.0, 2.0], [3.0, 13.0]])
    with pytest.raises(EncoderError, match=r"gave a mask that hides every slot of row 0; .* \(is it inverted\?\)"):
        pipeline.encode(touch=[[7.0, 7.0]])
    assert pipeline.encode(touch=[[7.0, 1.0]]).mask.tolist() == [[False, True]]
    with torch.enable_grad():  # in training all ranks find it at once, in the loss
        inputs = pipeline.model.collate("touch", [[13.0]])
        assert pipeline.model.encode({"touch": inputs}, 1).keys.isnan().any()


class Double(ToyEncoder):
    """Computes in float64."""

    def forward(self, batch):
        features = super().forward(batch)
        return type(features)(features.states.double(), features.mask)


def test_an_encoder_may_compute_in_a_type_of_its_own():
    memory = Pipeline(tiny_model({"touch": f"{__name__}:Double"})).encode(touch=[[1.0, 2.0]])
    plain = Pipeline(tiny_model({"touch": "mmx.testing:ToyEncoder"})).encode(touch=[[1.0, 2.0]])
    assert memory.keys.dtype == torch.float32
    torch.testing.assert_close(memory.keys, plain.keys)


class Orphan(ToyEncoder):
    def __init__(self, options):
        torch.nn.Module.__init__(self)


class Wide(ToyEncoder):
    def __init__(self, options):
        super().__init__(options)
        self.width = True


class Deep(ToyEncoder):
    dimensions = 3


class Picky(ToyEncoder):
    def accepts(self, path):
        raise KeyError(path)


class Leaver(ToyEncoder):
    def prepare(self, raw):
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "Orphan",
            "encoder Orphan of model.sources.touch does not call super().__init__(options); self.options must be",
        ),
        ("Wide", "encoder Wide of model.sources.touch has width True; give its feature width in __init__, a whole"),
        ("Deep", "encoder Deep of model.sources.touch has dimensions 3; expected 1, or 2 for features on a grid."),
        ("Picky", "encoder Picky of source 'touch' failed in accepts with KeyError: 'a.png'"),
        ("Leaver", "encoder Leaver of source 'touch' failed in prepare(str) with SystemExit: 3"),
    ],
)
def test_odd_encoders_end_in_one_sentence(name, said):
    with pytest.raises(EncoderError) as caught:
        Pipeline(tiny_model({"touch": f"{__name__}:{name}"})).ask("a.png", "what?")
    assert str(caught.value).startswith(said)


def test_one_odd_box_of_many_is_an_error_of_its_own(pipeline):
    asked = [Question(PARTS, "a?", (0, 0, 2, 2)), Question(PARTS, "a?"), Question(PARTS, "a?", "0,0,1,1")]
    bad, good, worse = pipeline.answers(asked, **OPTIONS)
    assert "is no region" in str(bad)
    assert "is no region" in str(worse)
    assert good.text == pipeline.ask(PARTS, "a?", **OPTIONS)


def test_candidates_are_ranked_over_one_view(pipeline):
    memory = pipeline.encode(**PARTS)
    with pytest.raises(MmxError, match="rank was given a memory of several views; point with one box"):
        pipeline.rank(memory.focus([[(0, 0, 0.5, 0.5), None]]), "a?", ["yes", "no"])


def test_a_batch_moves_with_all_its_parts():
    batch = SourceBatch({"x": torch.zeros(2, 3)}, torch.tensor([0, 2]), torch.tensor([True, False]), 2)
    moved = batch.to(torch.device("meta"))
    assert {part.device.type for part in (moved.inputs["x"], moved.rows, moved.dropped)} == {"meta"}
    assert moved.streams == 2


def _data():
    from mmx.config.schema import DataConfig

    return DataConfig


def _without_box(prepared):
    from dataclasses import replace

    return replace(prepared, boxes=[None] * len(prepared.boxes))
