"""CLIPScore and RefCLIPScore of a tiny random CLIP, against the formulas on the outputs of transformers' CLIPModel."""

import pytest
import torch
from clip_cases import write_clip
from hf_cases import folder
from PIL import Image
from torch.nn.functional import cosine_similarity

from mmx.errors import CheckpointError, DataError
from mmx.evaluation.clip_score import clip_score
from mmx.evaluation.joining import ScoredText
from mmx.hub.clip import load_clip


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def texts(tmp_path):
    found = []
    for number in range(6):
        color = ["black", "white", "red", "green", "blue", "yellow"][number]
        image = str(tmp_path / f"{number}.png")
        Image.new("RGB", (40, 30), color).save(image)
        targets = ("a dog runs on the beach", "the cat sits")[: 1 + number % 2]
        prediction = ["a dog", "what is it?", "", "the mat", "a beach " * 30, "it sleeps"][number]
        found.append(ScoredText(number, number, image, None, prediction, targets, {"image": image}))
    return found


def cosines_of_transformers(clip_folder, texts):
    """Cosines of each caption with its image, and the largest with a reference, one text at a time."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    length = model.config.text_config.max_position_embeddings

    def encode(sentence):
        batch = tokenizer([f"A photo depicts {sentence}"], truncation=True, max_length=length, return_tensors="pt")
        return model.text_projection(model.text_model(**batch).pooler_output)[0]

    pairs = []
    with torch.no_grad():
        for text in texts:
            pixels = processor(Image.open(text.id).convert("RGB"), return_tensors="pt")["pixel_values"]
            image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
            caption = encode(text.prediction)
            similarities = [cosine_similarity(caption, encode(target), dim=0).item() for target in text.targets]
            pairs.append((cosine_similarity(image, caption, dim=0).item(), max(similarities)))
    return pairs


@pytest.mark.parametrize(("sign", "batch_size"), [(1, 1), (1, 4), (-1, 4)])
def test_scores_follow_the_formulas(tmp_path, texts, sign, batch_size):
    clip_folder = write_clip(tmp_path / "clip", sign)
    expected = cosines_of_transformers(clip_folder, texts)
    assert all(image * sign > 0.001 for image, _ in expected), "both signs are tested"
    result = clip_score(texts, load_clip(str(clip_folder)), batch_size)
    scores, with_references = result.metrics
    assert (scores.name, with_references.name, result.problems) == ("CLIPScore", "RefCLIPScore", [])
    for index, (image, reference) in enumerate(expected):
        first = 2.5 * max(image, 0)
        second = max(reference, 0)
        harmonic = 2 * first * second / (first + second) if first + second else 0
        assert scores.statistics[index, 0] == pytest.approx(first, abs=1e-5)
        assert with_references.statistics[index, 0] == pytest.approx(harmonic, abs=1e-5)


def test_images_that_cannot_be_read_are_named_and_left_out(clip_folder, texts, tmp_path):
    (tmp_path / "1.png").write_bytes(b"not an image")
    (tmp_path / "3.png").unlink()
    result = clip_score(texts, load_clip(str(clip_folder)), 2)
    assert len(result.problems) == 2
    assert [len(metric.examples) for metric in result.metrics] == [4, 4]
    assert result.metrics[0].examples.tolist() == [0, 2, 4, 5]
    with pytest.raises(DataError) as caught:
        clip_score(texts[1:2], load_clip(str(clip_folder)))
    assert caught.value.code == "clip_score.no_image"


def test_without_references_there_is_no_refclipscore(clip_folder, texts):
    bare = [ScoredText(t.reference, t.example, t.id, None, t.prediction, (), t.sources) for t in texts]
    result = clip_score(bare, load_clip(str(clip_folder)))
    assert [metric.name for metric in result.metrics] == ["CLIPScore"]


def test_folders_that_are_no_clip_are_refused(clip_folder, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_clip(str(folder("bert")))
    assert (caught.value.code, caught.value.details["given"]) == ("clip.model_type", "bert")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((clip_folder / file).read_bytes())
    with pytest.raises(CheckpointError) as caught:
        load_clip(str(tmp_path))
    assert caught.value.code == "hub.file_missing"
