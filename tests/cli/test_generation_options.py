"""Options of text generation: `mmx caption` and `mmx ask` do what Python does with options of the same names."""

import json

import pytest

import mmx as package
from mmx.errors import ConfigError, one_line

OPTIONS = [
    {"temperature": 1.7},
    {"temperature": 1.7, "seed": 3},
    {"top_p": 0.9, "temperature": 2.0},
    {"top_k": 5},
    {"num_beams": 3, "length_penalty": 2.5},
    {"repetition_penalty": 3.0},
]


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_mean_the_same_as_in_python(mmx, model, images, options):
    pipeline = package.load(model)
    caption = pipeline.generate(str(images[0]), **options)[0]
    (row,) = mmx("caption", images[0], "--model", model, "--json", *flags(options)).rows
    assert (row["caption"], row["score"]) == (caption.text, round(caption.score, 4))
    answer = pipeline.generate(str(images[0]), "what?", **options)[0]
    (row,) = mmx("ask", images[0], "what?", "--model", model, "--json", *flags(options)).rows
    assert (row["answer"], row["score"]) == (answer.text, round(answer.score, 4))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"temperature": 2.0, "seed": 5}])
def test_rows_carry_all_texts_best_first(mmx, model, images, options):
    options = {**options, "num_return_sequences": 3}
    texts = package.load(model).generate(str(images[0]), **options)
    (row,) = mmx("caption", images[0], "--model", model, "--json", *flags(options)).rows
    assert row["captions"] == [text.text for text in texts]
    assert row["scores"] == [round(text.score, 4) for text in texts]
    assert (row["caption"], row["score"]) == (row["captions"][0], row["scores"][0])
    (row,) = mmx("ask", images[0], "what?", "--model", model, "--json", *flags(options)).rows
    assert len(row["answers"]) == len(row["scores"]) == 3
    assert row["answer"] == row["answers"][0]
    printed = mmx("caption", images[0], "--model", model, *flags(options)).lines
    assert [line.split("\t")[1].strip() for line in printed] == [one_line(text.text).strip() for text in texts]


def test_one_text_has_no_list(mmx, model, images):
    (row,) = mmx("caption", images[0], "--model", model, "--json").rows
    assert not row.keys() & {"captions", "scores"}


def test_a_run_with_several_texts_is_continued(mmx, model, images, tmp_path):
    out = tmp_path / "rows.jsonl"
    words = ["caption", *images, "--model", model, "--num-beams", 2, "--num-return-sequences", 2, "--out", out]
    assert mmx(*words).code == 0
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:2]) + "\n")
    assert mmx(*words).code == 0
    assert out.read_text().splitlines() == lines
    assert all(len(json.loads(line)["captions"]) == 2 for line in lines)


def test_too_few_beams_are_refused(mmx, model, images):
    error = mmx("caption", images[0], "--model", model, "--num-return-sequences", 2).refused()
    assert isinstance(error, ConfigError)


def test_words_to_avoid_and_to_include(mmx, model, images):
    words = ["--avoid", "red, hot dog", "--include", "cat,orange|white", "--num-beams", 4, "--max-new-tokens", 20]
    options = {"avoid": ["red", "hot dog"], "include": ["cat", "orange|white"], "num_beams": 4, "max_new_tokens": 20}
    expected = package.load(model).generate(str(images[0]), **options)[0]
    (row,) = mmx("caption", images[0], "--model", model, "--json", *words).rows
    assert (row["caption"], row["score"]) == (expected.text, round(expected.score, 4))
    assert "cat" in row["caption"].lower()
    assert "unmet" not in row
    (row,) = mmx("ask", images[0], "what?", "--model", model, "--json", *words).rows
    assert "cat" in row["answer"].lower()


def test_unmet_words_are_in_the_row(mmx, model, images, tmp_path):
    words = ["--include", "a longer phrase than fits|another one that is long,", "--model", model]
    assert isinstance(mmx("caption", images[0], *words).refused(), ConfigError), "an empty word"
    words[1] = words[1].rstrip(",")
    out = tmp_path / "rows.jsonl"
    for _ in range(2):
        assert mmx("caption", images[0], *words, "--out", out).code == 0
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["unmet"] == [words[1]]
