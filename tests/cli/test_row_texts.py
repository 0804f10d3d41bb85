"""--start, --prepend and --append, with fields of the row."""

import json

import pytest
from cli_cases import draw, read_rows, write_jsonl
from PIL import Image

import mmx as package
from mmx.cli.templates import Template
from mmx.errors import MmxError


def test_start_is_continued_by_the_model(mmx, model, images):
    expected = package.load(model).generate(str(images[0]), start="a photo of")[0]
    (row,) = mmx("caption", images[0], "--model", model, "--json", "--start", " a photo of ").rows
    assert row["caption"] == expected.text
    assert row["caption"].startswith("a photo of")
    assert row["score"] == round(expected.score, 4)
    (answer,) = mmx("ask", images[0], "what?", "--model", model, "--json", "--start", "it is").rows
    assert answer["answer"].startswith("it is")


def test_texts_around_are_not_seen_by_the_model(mmx, model, images):
    plain = mmx("caption", *images, "--model", model, "--json").rows
    around = mmx("caption", *images, "--model", model, "--json", "--prepend", "ohwx, ", "--append", " {{x}}").rows
    assert [row["caption"] for row in around] == [f"ohwx, {row['caption']} {{x}}" for row in plain]
    assert [row["score"] for row in around] == [row["score"] for row in plain]
    beams = ["--num-beams", 2, "--num-return-sequences", 2]
    (row,) = mmx("ask", images[0], "what?", "--model", model, "--json", "--prepend", "ohwx ", *beams).rows
    assert all(text.startswith("ohwx ") for text in row["answers"])


def test_start_differs_from_row_to_row(mmx, model, tmp_path):
    paths = [draw(tmp_path / folder / "a.png", 1) for folder in ("red", "blue")]  # the same bytes
    rows = mmx("caption", *paths, "--model", model, "--json", "--start", "{folder}: {stem}").rows
    assert [row["caption"][:7] for row in rows] == ["red: a" + rows[0]["caption"][6], "blue: a"]
    pipeline = package.load(model)
    assert rows[1]["caption"] == pipeline.caption(str(paths[1]), start="blue: a")


def test_fields_of_lists_and_missing_ones(mmx, model, images, tmp_path):
    lines = [{"image": str(path), "place": f"p{index}"} for index, path in enumerate(images[:3])]
    del lines[1]["place"]
    manifest = write_jsonl(tmp_path / "list.jsonl", *lines)
    out = tmp_path / "rows.jsonl"
    ran = mmx("caption", manifest, "--model", model, "--out", out, "--prepend", "{place}: ")
    assert ran.code == 1
    assert len(ran.errors) == 1
    rows = read_rows(out)
    assert [row.get("caption", "-")[:4] for row in rows] == ["p0: ", "-", "p2: "]
    assert "{place}" in rows[1]["error"]
    questions = write_jsonl(tmp_path / "questions.jsonl", *[{**line, "question": "what?"} for line in lines])
    ran = mmx("ask", "--data", questions, "--model", model, "--json", "--start", "{place}")
    assert ran.code == 1
    assert ["error" in row for row in ran.rows] == [False, True, False]
    assert ran.rows[2]["answer"].startswith("p2")


def test_exif_fields(mmx, model, tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2001:02:03 04:05:06"
    exif[0x010F] = "Maker\0"
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.jpg", exif=exif)
    template = "{exif:DateTimeOriginal} {exif:Make} "
    (row,) = mmx("caption", tmp_path / "a.jpg", "--model", model, "--json", "--prepend", template).rows
    assert row["caption"].startswith("2001:02:03 04:05:06 Maker ")
    ran = mmx("caption", tmp_path / "a.jpg", "--model", model, "--json", "--prepend", "{exif:Artist}")
    assert (ran.code, list(ran.rows[0])) == (1, ["image", "error"])


def test_other_texts_are_another_run(mmx, model, images, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert mmx("caption", images[0], "--model", model, "--out", out, "--prepend", "a ").code == 0
    error = mmx("caption", images[1], "--model", model, "--out", out, "--prepend", "b ").refused()
    assert error.code == "results.other_run"
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 1


@pytest.mark.parametrize("text", ["{", "}", "{}", "{folder:3}", "{exif}", "{name!r}"])
def test_wrong_templates_are_refused(mmx, model, images, text):
    assert mmx("caption", images[0], "--model", model, "--start", text).refused().code == "option.template"


def test_a_field_that_is_no_text_is_missing():
    template = Template.parse("{boxes}", "--start")
    with pytest.raises(MmxError) as error:
        template.render({"image": "a.jpg", "boxes": [1]}, {"image": "a.jpg"})
    assert error.value.code == "template.field"


def test_the_folder_of_a_relative_path_has_a_name(tmp_path, monkeypatch):
    folder = tmp_path / "sky"
    (folder / "below").mkdir(parents=True)
    template = Template.parse("{folder}", "--start")
    monkeypatch.chdir(folder)
    assert template.render({"image": "a.jpg"}, {"image": "a.jpg"}) == "sky"
    monkeypatch.chdir(folder / "below")
    assert template.render({"image": "../a.jpg"}, {"image": "../a.jpg"}) == "sky"


def test_members_of_archives_have_paths():
    template = Template.parse("{folder} {name} {n}", "--start")
    assert template.render({"image": "x.tar/sky/a.jpg", "n": 3}, {"image": b""}) == "sky a.jpg 3"
