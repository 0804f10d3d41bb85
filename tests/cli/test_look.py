"""`mmx look`: the lines it prints, the files it writes, and what it refuses."""

import json

import pytest
from PIL import Image
from safetensors.torch import load_file

from mmx.config.schema import SourceConfig
from mmx.models.checkpoint import save_model
from mmx.testing import tiny_model


def test_look_prints_the_text_a_line_a_word_and_the_file(mmx, model, images, tmp_path) -> None:
    out = tmp_path / "where.png"
    ran = mmx("look", images[0], "--model", model, "--text", "a dog runs", "--out", out)
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines[0] == "a dog runs"
    assert ran.lines[1].split() == ["word", "p", "bits", "entropy"]
    assert [line.split()[0] for line in ran.lines[2:5]] == ["a", "dog", "runs"]
    for line in ran.lines[2:5]:
        probability, _, entropy = map(float, line.split()[1:])
        assert 0 <= probability <= 1 and 0 <= entropy <= 1
    assert ran.lines[5:] == [str(out)]
    with Image.open(out) as image:
        assert image.width == 4 * (240 + 16) + 16, "the input and three words"


def test_the_text_is_that_of_caption(mmx, model, images, tmp_path) -> None:
    looked = mmx("look", images[1], "--model", model, "--num-beams", 2, "--out", tmp_path / "a.json")
    captioned = mmx("caption", images[1], "--model", model, "--num-beams", 2)
    assert looked.lines[0] == captioned.lines[0].split("\t")[1]


def test_json_has_every_number_and_out_takes_numbers_and_arrays(mmx, model, images, tmp_path) -> None:
    words = ("look", images[0], "--question", "is it red?", "--text", "yes it is", "--model", model)
    ran = mmx(*words, "--json", "--out", tmp_path / "a.json")
    printed = json.loads(ran.out)
    assert printed.pop("out") == str(tmp_path / "a.json")
    assert printed == json.loads((tmp_path / "a.json").read_text())
    assert (printed["question"], printed["text"], printed["method"]) == ("is it red?", "yes it is", "weighted")
    num_layers = 2
    num_heads = 4
    for word in printed["words"]:
        assert len(word["entropy"]) == num_layers and len(word["entropy"][0]) == num_heads
        assert sum(map(sum, word["maps"]["image"])) == pytest.approx(1.0, abs=1e-3)
    mmx(*words, "--out", tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["attention"].shape == (3, num_layers, num_heads, 16)


def test_one_word_one_layer_one_head(mmx, model, images, tmp_path) -> None:
    words = ("look", images[0], "--text", "a dog", "--model", model, "--word", "dog", "--out")
    selections = [(), ("--layer", 1), ("--layer", 1, "--head", 3), ("--method", "relevance")]
    sizes = []
    for number, selection in enumerate(selections):
        out = tmp_path / f"{number}.png"
        assert mmx(*words, out, *selection).code == 0
        with Image.open(out) as image:
            sizes.append(image.size)
    assert len(set(sizes)) == 1, "the input and one word"
    assert len({(tmp_path / f"{n}.png").read_bytes() for n in range(4)}) == 4


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--word", "cat"), "look.word"),
        (("--layer", 2), "look.layer"),
        (("--head", 9), "look.head"),
        (("--box", "0.5"), "option.box"),
        (("--box", "0.5,0.5,0.1,0.1"), "memory.box"),
        (("--source", "image=b.png"), "option.source_twice"),
    ],
)
def test_wrong_options_write_nothing(mmx, model, images, tmp_path, words, code) -> None:
    out = tmp_path / "where.png"
    ran = mmx("look", images[0], "--text", "a dog", "--model", model, "--out", out, *words)
    assert ran.refused().code == code
    assert not out.exists()


def test_an_unknown_source_is_refused(mmx, model, images, tmp_path) -> None:
    ran = mmx("look", images[0], "--text", "a dog", "--model", model, "--source", "audio=b.wav")
    ran.refused()
    assert "'audio'" in ran.err


def test_a_missing_image_and_a_file_that_cannot_be_written(mmx, model, images, tmp_path) -> None:
    ran = mmx("look", tmp_path / "no.png", "--model", model)
    assert (ran.code, len(ran.errors), ran.error.code) == (1, 1, "image.missing"), "as in caption"
    words = ("look", images[0], "--text", "a", "--model", model, "--out")
    assert mmx(*words, tmp_path / "where.txt").refused().code == "look.suffix"
    (tmp_path / "file").write_text("old")
    assert mmx(*words, tmp_path / "file" / "where.png").refused().code == "look.write"


def test_maps_of_a_text_have_its_tokens_as_labels(mmx, tmp_path) -> None:
    options = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_position_embeddings": 64}
    source = SourceConfig(encoder="text", options=options)
    folder = save_model(tmp_path / "model", tiny_model({"text": source}))
    out = tmp_path / "a.png"
    ran = mmx("look", "text=two dogs", "--text", "zwei hunde", "--model", folder, "--out", out, "--json")
    printed = json.loads(ran.out)
    labels = printed["sources"]["text"]["labels"]
    assert labels[-1] == "end" and "".join(labels[:-1]) == "twodogs"
    assert [len(word["maps"]["text"]) for word in printed["words"]] == [len(labels)] * 2
    with Image.open(out) as image:
        assert image.height > 80
