"""mmx look as a person uses it: the lines it prints, the picture it writes, what it refuses."""

import json
import re

import pytest
from PIL import Image
from safetensors.torch import load_file

from mmx.config.schema import SourceConfig
from mmx.models.checkpoint import save_model
from mmx.testing import tiny_model


def test_look_says_the_caption_a_line_a_word_and_where_the_picture_is(mmx, model, photos, tmp_path) -> None:
    out = tmp_path / "where.png"
    ran = mmx("look", photos[0], "--model", model, "--text", "a dog runs", "--out", out)
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines[0] == "a dog runs"
    assert ran.lines[1].split() == ["word", "p", "bits", "spread"]
    assert [line.split()[0] for line in ran.lines[2:5]] == ["a", "dog", "runs"]
    for line in ran.lines[2:5]:
        probability, _, spread = map(float, line.split()[1:])
        assert 0 <= probability <= 1 and 0 <= spread <= 1
    assert ran.lines[5:] == [str(out)]
    with Image.open(out) as sheet:
        assert sheet.width == 4 * (240 + 16) + 16, "what was looked at, and three words"


def test_what_is_said_is_what_caption_says(mmx, model, photos, tmp_path) -> None:
    looked = mmx("look", photos[1], "--model", model, "--beams", 2, "--out", tmp_path / "a.json")
    said = mmx("caption", photos[1], "--model", model, "--beams", 2)
    assert looked.lines[0] == said.lines[0].split("\t")[1]


def test_json_holds_every_number_and_out_takes_numbers_and_arrays(mmx, model, photos, tmp_path) -> None:
    words = ("look", photos[0], "--ask", "is it red?", "--text", "yes it is", "--model", model)
    ran = mmx(*words, "--json", "--out", tmp_path / "a.json")
    facts = json.loads(ran.out)
    assert facts.pop("out") == str(tmp_path / "a.json")
    assert facts == json.loads((tmp_path / "a.json").read_text())
    assert (facts["question"], facts["text"], facts["by"]) == ("is it red?", "yes it is", "weighted")
    layers, heads = 2, 4
    for word in facts["words"]:
        assert len(word["entropy"]) == layers and len(word["entropy"][0]) == heads
        assert sum(map(sum, word["maps"]["image"])) == pytest.approx(1.0, abs=1e-3)
    mmx(*words, "--out", tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["attention"].shape == (3, layers, heads, 16)


def test_one_word_one_layer_one_head(mmx, model, photos, tmp_path) -> None:
    words = ("look", photos[0], "--text", "a dog", "--model", model, "--word", "dog", "--out")
    sizes = []
    for number, more in enumerate([(), ("--layer", 1), ("--layer", 1, "--head", 3), ("--method", "relevance")]):
        out = tmp_path / f"{number}.png"
        assert mmx(*words, out, *more).code == 0
        with Image.open(out) as sheet:
            sizes.append(sheet.size)
    assert len(set(sizes)) == 1, "the picture and one word, however they are looked at"
    assert len({(tmp_path / f"{n}.png").read_bytes() for n in range(4)}) == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--word", "cat"), r"has no word 'cat'"),
        (("--layer", 2), r"layer 2 is not there; the model has layers 0 to 1"),
        (("--head", 9), r"head 9 is not there; the model has heads 0 to 3"),
        (("--method", "magic"), r"--by was given 'magic'; expected one of weighted, attention, relevance, both"),
        (("--box", "0.5"), r"--box was given '0.5'"),
        (("--box", "0.5,0.5,0.1,0.1"), r"is no region"),
        (("--also", "audio=b.wav"), r"no source 'audio'"),
    ],
)
def test_what_is_not_there_is_told_and_nothing_is_written(mmx, model, photos, tmp_path, words, sentence) -> None:
    out = tmp_path / "where.png"
    ran = mmx("look", photos[0], "--text", "a dog", "--model", model, "--out", out, *words)
    assert re.search(sentence, ran.refused())
    assert not out.exists()


def test_files_that_are_no_picture_or_cannot_be_written(mmx, model, photos, tmp_path) -> None:
    assert "there is no such file" in mmx("look", tmp_path / "no.png", "--model", model).refused()
    words = ("look", photos[0], "--text", "a", "--model", model, "--out")
    assert "give such a name" in mmx(*words, tmp_path / "where.txt").refused()
    (tmp_path / "file").write_text("old")
    assert "cannot be written" in mmx(*words, tmp_path / "file" / "where.png").refused()


def test_a_text_is_looked_at_token_by_token(mmx, tmp_path) -> None:
    source = SourceConfig(
        encoder="text", options={"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_position_embeddings": 64}
    )
    folder = save_model(tmp_path / "question_encoder", tiny_model({"text": source}))
    ran = mmx("look", "text=two dogs", "--text", "zwei hunde", "--model", folder, "--out", tmp_path / "a.png", "--json")
    facts = json.loads(ran.out)
    labels = facts["sources"]["text"]["labels"]
    assert labels[-1] == "end" and "".join(labels[:-1]) == "twodogs"
    assert [len(word["maps"]["text"]) for word in facts["words"]] == [len(labels)] * 2
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.height > 80
