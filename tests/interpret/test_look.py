"""Look: the words' maps are those of the step that said them, by beams as well; numbers, pictures and refusals."""

import json
import math
from dataclasses import replace
from itertools import product

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
from mmx.interpret.render import colors, overlay_heatmap, render_look
from mmx.interpret.teacher_forced import look_at_text, source_views
from mmx.memory import cat
from mmx.nn.attention import attention_weights
from mmx.testing.toys import tiny_model

IMAGE = SourceConfig(encoder="image", options={"backbone": "resnet18", "size": 64, "stage": 2})
TEXT = SourceConfig(encoder="text", options={"hidden_size": 32, "num_layers": 1, "num_heads": 2})


class Trail:
    """A step that remembers, for every text that was ever tried, what each of its tokens asked."""

    def __init__(self, step):
        self.step, self.asked = step, {}

    def prefill(self, tokens, mask):
        logits = self.step.prefill(tokens, mask)
        self.streams = [((), self._last(0)) for _ in range(len(logits))]
        self.asked |= dict(self.streams)
        return logits

    def __call__(self, tokens):
        logits = self.step(tokens)
        self.streams = [
            ((*text, token), torch.cat([asked, self._last(i)], 2))
            for i, ((text, asked), token) in enumerate(zip(self.streams, tokens.tolist(), strict=True))
        ]
        self.asked |= dict(self.streams)
        return logits

    def reorder(self, index):
        self.step.reorder(index)
        self.streams = [self.streams[i] for i in index.tolist()]

    def keep(self, rows):
        self.step.keep(rows)

    def _last(self, stream):
        """[L, H, 1, D]: what the last token of a stream asked in each layer."""
        recorder = self.step.recorder
        queries = [recorder.noted(layer)[-1].queries[0] for layer in recorder.layers]
        places = queries[0].shape[1] if not self.asked else 1  # at first the whole prompt was asked
        return torch.stack([q[:, stream * places + places - 1][:, None] for q in queries])


@pytest.fixture(scope="module")
def model():
    return randomize_parameters(tiny_model({"image": IMAGE})).eval()


@pytest.fixture(scope="module")
def photo():
    numbers = torch.randint(0, 255, (48, 80, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(numbers.numpy(), "RGB")


@pytest.mark.parametrize("beams", [1, 4])
def test_one_pass_asks_what_was_asked_word_by_word_and_through_the_winning_beam(model, photo, beams):
    pipeline = Pipeline(model)
    memory, prompt = pipeline.encode(image=photo), pipeline.prompt_tokens(None)
    tokens = torch.tensor([[prompt]])
    options = GenerationConfig(num_beams=beams, max_new_tokens=8, min_new_tokens=4)
    with torch.inference_mode():
        trail = Trail(CachedDecodeStep(model.decoder, memory, 8, QueryRecorder()))
        prompts = PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        (((said, *_),),) = generate(trail, prompts, options, model.tokenizer.eos_token_id)
        words = list(said.tokens)
        asked = trail.asked[tuple(words[:-1])]
        maps = attention_for_tokens(model.decoder, memory, torch.tensor([[[*prompt, *words[:-1]]]]))[
            0, 0, len(prompt) - 1 :
        ]
    for layer in range(2):
        expected = attention_weights(asked[layer][None], memory.layer(layer)[0])[0].transpose(0, 1)
        torch.testing.assert_close(maps[:, layer], expected, atol=1e-5, rtol=1e-4)
    assert len(words) >= 4


def test_a_slot_that_hands_over_nothing_is_weighed_as_nothing(model, photo):
    pipeline = Pipeline(model)
    memory, tokens = pipeline.encode(image=photo), torch.tensor([[[1, 3, 70, 71]]])
    maps = attention_for_tokens(model.decoder, memory, tokens)
    out = [block.cross_attention.out.weight.detach() for block in model.decoder.layers]
    found = value_weighted_attention(model.decoder, memory, maps)
    for layer in range(2):
        for head in range(4):
            values = memory.layer(layer)[1][0, head] @ out[layer][:, head * 8 : head * 8 + 8].T
            expected = maps[0, 0, :, layer, head] * values.norm(dim=-1)
            torch.testing.assert_close(found[0, 0, :, layer, head], expected, atol=1e-5, rtol=1e-4)
    values = memory.values.clone()
    values[:, :, :, 5] = 0
    assert value_weighted_attention(model.decoder, replace(memory, values=values), maps)[..., 5].eq(0).all()


@pytest.mark.parametrize("by", ["weighted", "attention", "relevance", "both"])
def test_a_look_holds_a_map_for_each_word(model, photo, by):
    pipeline = Pipeline(model)
    found = pipeline.look(photo, text="a dog runs", method=by)
    assert [word.text for word in found.words] == ["a", "dog", "runs"]
    assert found.attention.shape == found.weighted.shape == (3, 2, 4, 64)
    assert (found.relevance is not None) == (by in ("relevance", "both"))
    torch.testing.assert_close(found.attention.sum(-1), torch.ones(3, 2, 4))
    for word in ("a", "dog", 2):
        assert found.map(word).sum() == pytest.approx(1.0, abs=1e-5)
        assert (found.map(word) >= 0).all()
    one = found.map("dog", layer=1, head=2)
    parts = {"attention": found.attention, "weighted": found.weighted, "relevance": found.relevance}
    kinds = ("weighted", "relevance") if by == "both" else (by,)
    expected = [parts[kind][1, 1, 2].clamp(min=0) for kind in kinds]
    torch.testing.assert_close(one, sum(part / part.sum() for part in expected) / len(kinds))
    assert found.heatmap("dog", 30, 50).shape == (30, 50)
    assert found.shares()["image"].tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_the_words_log_probabilities_and_bits_are_those_of_the_decoder(model, photo):
    pipeline = Pipeline(model)
    found = pipeline.look(photo, text="a dog")
    ranked = pipeline.rank(photo, None, ["a dog"])[0]
    tokenizer = model.tokenizer
    tokens = tokenizer.encode("a dog")
    prompt = pipeline.prompt_tokens(None)
    seen = torch.tensor([[[*prompt, *tokens]]])
    with torch.inference_mode():
        sharp, blind = (
            model.decoder(seen, memory)[0, 0].log_softmax(-1)
            for memory in (pipeline.encode(image=photo), model.decoder.empty_memory(1))
        )
    at = [(len(prompt) - 1 + i, token) for i, token in enumerate(tokens)]
    assert sum(w.logprob for w in found.words) == pytest.approx(sum(float(sharp[i, t]) for i, t in at), abs=1e-4)
    bits = sum(float(sharp[i, t] - blind[i, t]) for i, t in at) / math.log(2)
    assert sum(w.gain for w in found.words) == pytest.approx(bits, abs=1e-4)
    end = float(sharp[len(prompt) + len(tokens) - 1, tokenizer.eos_token_id])
    assert ranked.logprob == pytest.approx(sum(w.logprob for w in found.words) + end, abs=1e-4)


def test_what_is_said_is_what_caption_and_ask_say(model, photo):
    pipeline = Pipeline(model)
    options = {"max_new_tokens": 6, "num_beams": 3}
    assert pipeline.look(photo, **options).text == pipeline.caption(photo, **options)
    assert pipeline.look(photo, "what is it?", **options).text == pipeline.ask(photo, "what is it?", **options)


def test_a_memory_may_be_looked_at_with_its_picture_beside_it(model, photo):
    pipeline = Pipeline(model)
    memory = pipeline.encode(image=photo)
    bare, drawn = pipeline.look(memory, text="a dog"), pipeline.look(memory, text="a dog", picture=photo)
    assert bare.views[0].picture is None
    assert drawn.views[0].picture.size == (80, 48)
    torch.testing.assert_close(bare.weighted, drawn.weighted)
    assert render_look(bare, [0]).width > 200


def test_a_box_leaves_the_rest_unseen(model, photo):
    found = Pipeline(model).look(photo, box=(0.0, 0.0, 0.5, 0.5), text="a dog")
    assert found.visible.sum(-1).tolist() == [16, 16]
    assert found.attention[..., ~found.visible[0]].eq(0).all()
    heat = found.heatmap("dog", 64, 64)
    assert heat[48:, 48:].max() < heat.max() / 10


def test_several_sources_share_the_attention_and_a_text_has_labels(photo):
    model = randomize_parameters(tiny_model({"image": IMAGE, "text": TEXT})).eval()
    found = Pipeline(model).look({"image": photo, "text": "two dogs"}, text="a dog")
    shares = found.shares()
    torch.testing.assert_close(shares["image"] + shares["text"], torch.ones(2))
    assert shares["text"].min() > 0 and shares["text"].max() < 1
    labels = found.views[1].labels
    assert "".join(labels).startswith("twodogs") and labels[-1] == "end"
    facts = found.to_dict()
    assert facts["sources"]["text"]["slots"] == len(labels)
    assert len(facts["words"][0]["maps"]["text"]) == len(labels)
    assert render_look(found, [0, 1]).height > 300


def test_a_question_read_by_a_text_source_is_labelled_and_no_part_of_what_looking_saved(photo):
    model = randomize_parameters(tiny_model({"image": IMAGE, "text": TEXT}, question_input="text")).eval()
    pipeline = Pipeline(model)
    found = pipeline.look(photo, "is it  red", text="yes")
    assert [place.segment.source for place in found.views] == ["image", "text"]
    assert "".join(found.views[1].labels) == "isitred?end"
    with torch.inference_mode():
        blind = pipeline.with_questions(model.encode({}, 1), [["is it red?"]])
        memory = pipeline.with_questions(pipeline.encode(image=photo), [["is it red?"]])
        tokens = torch.tensor([[[*pipeline.prompt_tokens("is it red?"), *model.tokenizer.encode("yes")]]])
        sharp, dull = (model.decoder(tokens, m)[0, 0].log_softmax(-1) for m in (memory, blind))
    at = [(1 + i, token) for i, token in enumerate(model.tokenizer.encode("yes"))]
    bits = sum(float(sharp[i, t] - dull[i, t]) for i, t in at) / math.log(2)
    assert found.words[0].gain == pytest.approx(bits, abs=1e-4)


def test_order_of_the_sources_changes_no_map(photo):
    model = randomize_parameters(tiny_model({"image": IMAGE, "text": TEXT})).eval()
    pipeline = Pipeline(model)
    image, text = pipeline.encode(image=photo), pipeline.encode(text="two dogs")
    one, other = (pipeline.look(cat(*pair), text="a dog") for pair in ((image, text), (text, image)))
    torch.testing.assert_close(one.attention[..., :64], other.attention[..., -64:], atol=1e-5, rtol=1e-4)


def test_it_is_saved_as_a_picture_as_numbers_and_as_arrays(model, photo, tmp_path):
    found = Pipeline(model).look(photo, text="a dog")
    with Image.open(found.save(tmp_path / "sub" / "where.png")) as sheet:
        assert sheet.width > 3 * 240 and sheet.height > 200
    facts = json.loads(found.save(tmp_path / "where.json").read_text())
    assert [word["word"] for word in facts["words"]] == ["a", "dog"]
    maps = torch.tensor(facts["words"][1]["maps"]["image"])
    assert maps.shape == (8, 8)
    torch.testing.assert_close(maps.flatten(), found.map("dog"), atol=1e-5, rtol=0)
    arrays = load_file(found.save(tmp_path / "where.safetensors"))
    assert torch.equal(arrays["attention"], found.attention) and torch.equal(arrays["weighted"], found.weighted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sub", "where.json", "where.safetensors"]


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda found, folder: found.save(folder / "where.gif"), "give such a name"),
        (lambda found, folder: found.save(folder / "where.png" / "x.png"), "cannot be written"),
        (lambda found, folder: found.map("cat"), "has no word 'cat'"),
        (lambda found, folder: found.map(2), "has no word 2; it has 2"),
        (lambda found, folder: found.map(0, layer=2), "layer 2 is not there; the model has layers 0 to 1"),
        (lambda found, folder: found.map(0, head=-1), "head -1 is not there; the model has heads 0 to 3"),
        (
            lambda found, folder: found.heat(0, 8, 8, source="sound"),
            "source sound does not lie on a grid; those that",
        ),
        (lambda found, folder: found.save(folder / "a.webp", words="cat"), "has no word 'cat'"),
        (lambda found, folder: found.save(folder / "a.json", layer=9), "layer 9 is not there"),
        (lambda found, folder: found.save(folder / "a\0.png"), "cannot be written: embedded null byte"),
        (lambda found, folder: render_look(found, [0] * 500), "more than 16,000 pixels long; choose fewer words"),
        (lambda found, folder: found.map(True), "has no word True"),
    ],
)
def test_what_is_not_there_is_told_in_one_sentence(model, photo, tmp_path, ask, sentence):
    (tmp_path / "where.png").write_bytes(b"old")
    found = Pipeline(model).look(photo, text="a dog")
    with pytest.raises(MmxError, match=sentence):
        ask(found, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["where.png"], "nothing half-written stays"


def test_two_pictures_of_one_source_are_kept_apart(model, photo, tmp_path):
    pipeline = Pipeline(model)
    other = photo.rotate(90, expand=True)
    both = cat(pipeline.encode(image=photo), pipeline.encode(image=other))
    found = pipeline.look(both, text="a dog")
    assert [place.source_name for place in found.views] == ["image 1", "image 2"]
    shares = found.shares()
    torch.testing.assert_close(shares["image 1"] + shares["image 2"], torch.ones(2))
    assert not torch.equal(found.heatmap(0, 8, 8, source="image 1"), found.heatmap(0, 8, 8, source="image 2"))
    assert sorted(found.to_dict()["words"][0]["maps"]) == sorted(found.to_dict()["sources"]) == ["image 1", "image 2"]
    assert found.views[0].picture is None, "which of the two it would be nobody says"


def test_what_a_word_could_not_see_yet_is_no_part_of_its_width():
    model = randomize_parameters(tiny_model({"text": TEXT}, wait_k=1)).eval()
    found = Pipeline(model).look({"text": "two dogs run over the snow"}, text="zwei hunde")
    opened = found.visible.sum(-1).tolist()
    assert opened[0] < opened[1] < found.visible.shape[1]
    wide = torch.tensor(found.to_dict()["words"][1]["relative_entropy"])
    for layer, head in product(range(2), range(4)):
        weights = found.attention[1, layer, head]
        expected = -(weights * weights.clamp(min=1e-30).log2()).sum() / math.log2(opened[1])
        assert wide[layer, head] == pytest.approx(float(expected), abs=1e-4)


def test_where_nothing_is_handed_over_the_map_is_zero_and_both_is_the_other_part(model, photo):
    found = Pipeline(model).look(photo, text="a dog", method="both")
    still = replace(found, relevance=-found.relevance.abs())
    torch.testing.assert_close(still.map("dog"), replace(found, method="weighted").map("dog"))
    assert replace(still, method="relevance").map("dog").eq(0).all()
    assert render_look(replace(still, method="relevance"), [0]).width > 200


def test_words_are_found_whatever_signs_stand_round_them_and_wherever_they_are(model, photo, tmp_path):
    found = Pipeline(model).look(photo, text='a "red" dog, a (big) dog !')
    assert found.indices("red") == [1] and found.indices("dog.") == [2, 5] and found.indices("big") == [4]
    assert found.indices("!") == [6]
    with Image.open(found.save(tmp_path / "dogs.png", words="dog")) as sheet:
        assert sheet.width == 3 * 256 + 16, "the picture, and the word at both of its places"


def test_a_kind_of_map_that_is_none_and_a_text_that_is_none(model, photo):
    with pytest.raises(MmxError, match="by was given 'magic'; expected one of weighted, attention, relevance, both"):
        Pipeline(model).look(photo, text="a", method="magic")
    with pytest.raises(MmxError, match="text is a int"):
        Pipeline(model).look(photo, text=5)


def test_letters_of_any_script_and_pictures_of_any_shape_are_drawn(model):
    pipeline = Pipeline(model)
    for size in ((1, 1), (3000, 1), (1, 3000)):
        found = pipeline.look(Image.new("RGB", size, (9, 99, 9)), text="a 红色 🙂 مرحبا " + "very " * 15)
        sheet = render_look(found, range(4))
        assert sheet.width == 5 * 256 + 16 if size != (1, 3000) else sheet.width >= 640
        assert sheet.height > 24


def test_a_text_of_no_words_is_no_error(model, photo, tmp_path):
    found = Pipeline(model).look(photo, text="")
    assert found.words == () and found.attention.shape[0] == 0
    assert found.to_dict()["words"] == []
    found.save(tmp_path / "where.png")


def test_heat_grows_lighter_and_the_peak_is_where_the_map_is():
    scale = colors(torch.linspace(0, 1, 50))
    lightness = scale @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (lightness.diff() > 0).all()
    heat = torch.zeros(40, 60)
    heat[10:14, 50:54] = 1.0
    drawn = torch.frombuffer(
        bytearray(overlay_heatmap(Image.new("RGB", (60, 40), (90, 90, 90)), heat).tobytes()), dtype=torch.uint8
    )
    brightness = drawn.view(40, 60, 3).float().sum(-1)
    assert brightness[12, 52] > 2 * brightness[30, 10]
    assert brightness[12, 52] == brightness.max()


def test_look_takes_what_a_decoder_looked_at(model, photo):
    """The pieces under Pipeline.look, for programs that decode by themselves."""
    pipeline = Pipeline(model)
    memory = pipeline.encode(image=photo)
    said = model.tokenizer.encode("dogs")
    found = look_at_text(
        model, memory, pipeline.prompt_tokens(None), said, None, source_views(model, memory, {"image": photo})
    )
    torch.testing.assert_close(found.weighted, pipeline.look(photo, text="dogs").weighted)
