"""Look: the maps of words equal those of token-by-token generation; numbers, files and errors."""

import json
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from decoder_cases import randomize_parameters
from PIL import Image
from safetensors.torch import load_file

from mmx.config.schema import GenerationConfig, SourceConfig
from mmx.errors import MmxError
from mmx.generation import CachedDecodeStep, PromptBatch, generate
from mmx.inference.pipeline import Pipeline
from mmx.interpret import QueryRecorder, attention_for_tokens
from mmx.interpret.attention_maps import value_weighted_attention
from mmx.interpret.look import check_suffix
from mmx.interpret.teacher_forced import TargetText, look_at_text, source_views
from mmx.memory import cat
from mmx.nn.attention import attention_weights
from mmx.testing.toys import tiny_model

IMAGE = SourceConfig(encoder="image", options={"backbone": "resnet18", "size": 64, "stage": 2})
TEXT = SourceConfig(encoder="text", options={"hidden_size": 32, "num_layers": 1, "num_heads": 2})


class RecordingStep:
    """A decode step that keeps, for every text that was tried, the queries of each of its tokens."""

    def __init__(self, step):
        self.step = step
        self.queries = {}
        self.streams = []

    def prefill(self, tokens, mask):
        logits = self.step.prefill(tokens, mask)
        self.streams = [((), self._last_queries(0)) for _ in range(len(logits))]
        self.queries |= dict(self.streams)
        return logits

    def __call__(self, tokens):
        logits = self.step(tokens)
        streams = []
        for i, ((text, queries), token) in enumerate(zip(self.streams, tokens.tolist(), strict=True)):
            streams.append(((*text, token), torch.cat([queries, self._last_queries(i)], 2)))
        self.streams = streams
        self.queries |= dict(streams)
        return logits

    def reorder(self, index):
        self.step.reorder(index)
        self.streams = [self.streams[i] for i in index.tolist()]

    def select(self, rows):
        self.step.select(rows)

    def _last_queries(self, stream):
        """[L, H, 1, D]: the queries of the last token of a stream."""
        recorder = self.step.recorder
        by_layer = [recorder.recorded(layer)[-1].queries[0] for layer in recorder.layers]
        length = by_layer[0].shape[1] if not self.queries else 1  # the first call has the whole prompt
        return torch.stack([queries[:, stream * length + length - 1][:, None] for queries in by_layer])


@pytest.fixture(scope="module")
def model():
    return randomize_parameters(tiny_model({"image": IMAGE})).eval()


@pytest.fixture(scope="module")
def text_model():
    """A model of an image and a text."""
    return randomize_parameters(tiny_model({"image": IMAGE, "text": TEXT})).eval()


@pytest.fixture(scope="module")
def photo():
    numbers = torch.randint(0, 255, (48, 80, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(numbers.numpy(), "RGB")


# ---- the maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 4])
def test_one_pass_has_the_attention_of_token_by_token_generation(model, photo, beams):
    pipeline = Pipeline(model)
    memory = pipeline.encode(image=photo)
    prompt = pipeline.prompt_tokens(None)
    tokens = torch.tensor([[prompt]])
    batch = PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    options = GenerationConfig(num_beams=beams, max_new_tokens=8, min_new_tokens=4)
    with torch.inference_mode():
        step = RecordingStep(CachedDecodeStep(model.decoder, memory, 8, QueryRecorder()))
        output = generate(step, batch, options, model.tokenizer.eos_token_id)[0][0][0]
        generated = list(output.tokens)
        queries = step.queries[tuple(generated[:-1])]
        maps = attention_for_tokens(model.decoder, memory, torch.tensor([[[*prompt, *generated[:-1]]]]))
    of_generated = maps[0, 0, len(prompt) - 1 :]
    for layer in range(2):
        expected = attention_weights(queries[layer][None], memory.layer(layer)[0])[0].transpose(0, 1)
        torch.testing.assert_close(of_generated[:, layer], expected, atol=1e-5, rtol=1e-4)
    assert len(generated) >= 4


def test_value_weighted_attention_by_definition(model, photo):
    memory = Pipeline(model).encode(image=photo)
    maps = attention_for_tokens(model.decoder, memory, torch.tensor([[[1, 3, 70, 71]]]))
    out = [layer.cross_attention.out.weight.detach() for layer in model.decoder.layers]
    found = value_weighted_attention(model.decoder, memory, maps)
    for layer, head in product(range(2), range(4)):
        values = memory.layer(layer)[1][0, head] @ out[layer][:, head * 8 : head * 8 + 8].T
        expected = maps[0, 0, :, layer, head] * values.norm(dim=-1)
        torch.testing.assert_close(found[0, 0, :, layer, head], expected, atol=1e-5, rtol=1e-4)
    values = memory.values.clone()
    values[:, :, :, 5] = 0
    assert value_weighted_attention(model.decoder, replace(memory, values=values), maps)[..., 5].eq(0).all()


@pytest.mark.parametrize("method", ["weighted", "attention", "relevance", "both"])
def test_a_look_has_a_map_for_each_word(model, photo, method):
    look = Pipeline(model).look(photo, text="a dog runs", method=method)
    assert [word.text for word in look.words] == ["a", "dog", "runs"]
    assert look.attention.shape == look.weighted.shape == (3, 2, 4, 64)
    assert (look.relevance is not None) == (method in ("relevance", "both"))
    torch.testing.assert_close(look.attention.sum(-1), torch.ones(3, 2, 4))
    for word in ("a", "dog", 2):
        assert look.map(word).sum() == pytest.approx(1.0, abs=1e-5)
        assert (look.map(word) >= 0).all()
    parts = {"attention": look.attention, "weighted": look.weighted, "relevance": look.relevance}
    averaged = ("weighted", "relevance") if method == "both" else (method,)
    expected = [parts[name][1, 1, 2].clamp(min=0) for name in averaged]
    mean = sum(part / part.sum() for part in expected) / len(averaged)
    torch.testing.assert_close(look.map("dog", layer=1, head=2), mean)
    assert look.heatmap("dog", 30, 50).shape == (30, 50)
    assert look.shares()["image"].tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_log_probabilities_and_gains_are_those_of_the_decoder(model, photo):
    pipeline = Pipeline(model)
    look = pipeline.look(photo, text="a dog")
    tokens = model.tokenizer.encode("a dog")
    prompt = pipeline.prompt_tokens(None)
    start = len(prompt) - 1
    inputs = torch.tensor([[[*prompt, *tokens]]])
    with torch.inference_mode():
        conditional = model.decoder(inputs, pipeline.encode(image=photo))[0, 0].log_softmax(-1)
        unconditional = model.decoder(inputs, model.decoder.empty_memory(1))[0, 0].log_softmax(-1)
    logprob = sum(float(conditional[start + i, token]) for i, token in enumerate(tokens))
    baseline = sum(float(unconditional[start + i, token]) for i, token in enumerate(tokens))
    assert sum(word.logprob for word in look.words) == pytest.approx(logprob, abs=1e-4)
    assert sum(word.gain for word in look.words) == pytest.approx((logprob - baseline) / math.log(2), abs=1e-4)
    end = float(conditional[start + len(tokens), model.tokenizer.eos_token_id])
    assert pipeline.rank(photo, None, ["a dog"])[0].logprob == pytest.approx(logprob + end, abs=1e-4)


def test_the_text_is_that_of_caption_and_ask(model, photo):
    pipeline = Pipeline(model)
    options = {"max_new_tokens": 6, "num_beams": 3}
    assert pipeline.look(photo, **options).text == pipeline.caption(photo, **options)
    assert pipeline.look(photo, "what is it?", **options).text == pipeline.ask(photo, "what is it?", **options)


def test_a_memory_with_its_original_image(model, photo):
    pipeline = Pipeline(model)
    memory = pipeline.encode(image=photo)
    without = pipeline.look(memory, text="a dog")
    with_image = pipeline.look(memory, text="a dog", original=photo)
    assert without.views[0].image is None
    assert with_image.views[0].image.size == (80, 48)
    torch.testing.assert_close(without.weighted, with_image.weighted)
    assert without.render(0).width > 200


def test_a_box_masks_the_other_slots(model, photo):
    look = Pipeline(model).look(photo, box=(0.0, 0.0, 0.5, 0.5), text="a dog")
    assert look.visible.sum(-1).tolist() == [16, 16]
    assert look.attention[..., ~look.visible[0]].eq(0).all()
    heatmap = look.heatmap("dog", 64, 64)
    assert heatmap[48:, 48:].max() < heatmap.max() / 10


def test_several_sources_share_the_attention_and_a_text_has_labels(text_model, photo):
    look = Pipeline(text_model).look({"image": photo, "text": "two dogs"}, text="a dog")
    shares = look.shares()
    torch.testing.assert_close(shares["image"] + shares["text"], torch.ones(2))
    assert shares["text"].min() > 0
    assert shares["text"].max() < 1
    labels = look.views[1].labels
    assert "".join(labels).startswith("twodogs")
    assert labels[-1] == "end"
    numbers = look.to_dict()
    assert numbers["sources"]["text"]["slots"] == len(labels)
    assert len(numbers["words"][0]["maps"]["text"]) == len(labels)
    assert look.render().height > 300


def test_a_question_for_a_text_source_has_labels_and_is_part_of_the_baseline(photo):
    model = randomize_parameters(tiny_model({"image": IMAGE, "text": TEXT}, question_input="text")).eval()
    pipeline = Pipeline(model)
    look = pipeline.look(photo, "is it red", text="yes")
    assert [view.segment.source for view in look.views] == ["image", "text"]
    assert "".join(look.views[1].labels) == "isitred?end"
    answer = model.tokenizer.encode("yes")
    prompt = pipeline.prompt_tokens("is it red?")
    inputs = torch.tensor([[[*prompt, *answer]]])
    with torch.inference_mode():
        memory = pipeline.with_questions(pipeline.encode(image=photo), [["is it red?"]])
        baseline = pipeline.with_questions(model.encode({}, 1), [["is it red?"]])
        difference = model.decoder(inputs, memory).log_softmax(-1) - model.decoder(inputs, baseline).log_softmax(-1)
    nats = sum(float(difference[0, 0, len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
    assert look.words[0].gain == pytest.approx(nats / math.log(2), abs=1e-4)


def test_the_order_of_the_sources_changes_no_map(text_model, photo):
    pipeline = Pipeline(text_model)
    image = pipeline.encode(image=photo)
    text = pipeline.encode(text="two dogs")
    one = pipeline.look(cat(image, text), text="a dog")
    other = pipeline.look(cat(text, image), text="a dog")
    torch.testing.assert_close(one.attention[..., :64], other.attention[..., -64:], atol=1e-5, rtol=1e-4)


def test_two_images_of_one_source_are_numbered(model, photo):
    pipeline = Pipeline(model)
    memory = cat(pipeline.encode(image=photo), pipeline.encode(image=photo.rotate(90, expand=True)))
    look = pipeline.look(memory, text="a dog")
    assert [view.source_name for view in look.views] == ["image 1", "image 2"]
    shares = look.shares()
    torch.testing.assert_close(shares["image 1"] + shares["image 2"], torch.ones(2))
    assert not torch.equal(look.heatmap(0, 8, 8, source="image 1"), look.heatmap(0, 8, 8, source="image 2"))
    numbers = look.to_dict()
    assert sorted(numbers["words"][0]["maps"]) == sorted(numbers["sources"]) == ["image 1", "image 2"]
    assert look.views[0].image is None, "it is unknown which of them an image would be"


def test_masked_slots_do_not_enter_the_normalized_entropy():
    model = randomize_parameters(tiny_model({"text": TEXT}, wait_k=1)).eval()
    look = Pipeline(model).look({"text": "two dogs run over the snow"}, text="zwei hunde")
    visible = look.visible.sum(-1).tolist()
    assert visible[0] < visible[1] < look.visible.shape[1]
    found = torch.tensor(look.to_dict()["words"][1]["normalized_entropy"])
    for layer, head in product(range(2), range(4)):
        weights = look.attention[1, layer, head]
        expected = -(weights * weights.clamp(min=1e-30).log2()).sum() / math.log2(visible[1])
        assert found[layer, head] == pytest.approx(float(expected), abs=1e-4)


def test_a_part_that_is_zero_does_not_enter_the_mean(model, photo):
    look = Pipeline(model).look(photo, text="a dog", method="both")
    negative = replace(look, relevance=-look.relevance.abs())
    torch.testing.assert_close(negative.map("dog"), replace(look, method="weighted").map("dog"))
    only_relevance = replace(negative, method="relevance")
    assert only_relevance.map("dog").eq(0).all()
    assert only_relevance.render(0).width > 200


def test_look_at_text_is_the_function_behind_pipeline_look(model, photo):
    pipeline = Pipeline(model)
    memory = pipeline.encode(image=photo)
    text = TargetText(pipeline.prompt_tokens(None), model.tokenizer.encode("dogs"))
    look = look_at_text(model, memory, text, source_views(model, memory, {"image": photo}))
    torch.testing.assert_close(look.weighted, pipeline.look(photo, text="dogs").weighted)


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_are_found_without_punctuation_at_all_positions(model, photo, tmp_path):
    look = Pipeline(model).look(photo, text='a "red" dog, a (big) dog !')
    assert look.indices("red") == [1]
    assert look.indices("dog.") == [2, 5]
    assert look.indices("big") == [4]
    assert look.indices("!") == [6]
    with Image.open(look.save(tmp_path / "dogs.png", words="dog")) as image:
        assert image.width == 3 * 256 + 16, "the input, and the word twice"


def test_a_generated_text_without_words(model, photo, tmp_path, monkeypatch):
    pipeline = Pipeline(model)
    monkeypatch.setattr(pipeline, "generate_tokens", lambda *arguments: [[[SimpleNamespace(tokens=[])]]])
    look = pipeline.look(photo)
    assert look.words == ()
    assert look.attention.shape[0] == 0
    assert look.to_dict()["words"] == []
    look.save(tmp_path / "where.png")


# ---- files and errors ------------------------------------------------------------------------------------------------


def test_saved_images_numbers_and_arrays(model, photo, tmp_path):
    look = Pipeline(model).look(photo, text="a dog")
    with Image.open(look.save(tmp_path / "sub" / "where.png")) as image:
        assert image.width > 3 * 240
        assert image.height > 200
    numbers = json.loads(look.save(tmp_path / "where.json").read_text())
    assert [word["word"] for word in numbers["words"]] == ["a", "dog"]
    assert numbers["method"] == "weighted"
    assert numbers["words"][1]["information_gain"] == pytest.approx(look.words[1].gain, abs=1e-5)
    maps = torch.tensor(numbers["words"][1]["maps"]["image"])
    assert maps.shape == (8, 8)
    torch.testing.assert_close(maps.flatten(), look.map("dog"), atol=1e-5, rtol=0)
    arrays = load_file(look.save(tmp_path / "where.safetensors"))
    assert arrays.keys() == {"attention", "weighted", "visible"}
    assert torch.equal(arrays["attention"], look.attention)
    assert torch.equal(arrays["weighted"], look.weighted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sub", "where.json", "where.safetensors"]


ERRORS = {
    "suffix": (lambda look, folder: look.save(folder / "where.gif"), "look.suffix"),
    "a file as folder": (lambda look, folder: look.save(folder / "where.png" / "x.png"), "look.write"),
    "null byte": (lambda look, folder: look.save(folder / "a\0.png"), "look.write"),
    "word": (lambda look, folder: look.map("cat"), "look.word"),
    "index": (lambda look, folder: look.map(2), "look.word"),
    "bool": (lambda look, folder: look.map(True), "look.word"),
    "word of an image": (lambda look, folder: look.save(folder / "a.webp", words="cat"), "look.word"),
    "layer": (lambda look, folder: look.map(0, layer=2), "look.layer"),
    "layer of numbers": (lambda look, folder: look.save(folder / "a.json", layer=9), "look.layer"),
    "head": (lambda look, folder: look.map(0, head=-1), "look.head"),
    "source": (lambda look, folder: look.heatmap(0, 8, 8, source="audio"), "look.no_grid"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_leave_no_partial_file(model, photo, tmp_path, name):
    (tmp_path / "where.png").write_bytes(b"old")
    look = Pipeline(model).look(photo, text="a dog")
    call, code = ERRORS[name]
    with pytest.raises(MmxError) as error:
        call(look, tmp_path)
    assert error.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["where.png"]
    assert (tmp_path / "where.png").read_bytes() == b"old"


def test_details_of_errors(model, photo):
    look = Pipeline(model).look(photo, text="a dog")
    with pytest.raises(MmxError) as error:
        look.map(0, layer=2)
    assert error.value.details == {"given": 2, "count": 2}
    with pytest.raises(MmxError) as error:
        look.heatmap(0, 8, 8, source="audio")
    assert error.value.details == {"source": "audio", "known": ["image"]}
    with pytest.raises(MmxError) as error:
        check_suffix("where.gif")
    assert error.value.details["path"] == "where.gif"


def test_an_unknown_method(model, photo):
    with pytest.raises(MmxError) as error:
        Pipeline(model).look(photo, text="a", method="magic")
    assert error.value.code == "look.method"
    assert error.value.details["expected"] == ("weighted", "attention", "relevance", "both")


def test_encoders_name_slots_of_what_they_prepare(model, photo, monkeypatch):
    """`labels` and `window` receive the types that the contract states for `prepare`, not those of the caller."""
    pipeline = Pipeline(model)
    encoder = model.encoder("image")
    received = []
    window = type(encoder).window
    monkeypatch.setattr(type(encoder), "window", lambda self, raw: received.append(type(raw)) or window(self, raw))
    look = pipeline.look(np.asarray(photo))
    assert received == [Image.Image]
    assert look.text == pipeline.look(photo).text
