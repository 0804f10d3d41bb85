"""The command line as a person uses it: what is printed, where errors go, what stays on disk, the exit code."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from cli_cases import alone, draw, seconds_of_children
from image_cases import encode, frames, handmade, meanings, palette, picture, png, turned
from PIL import Image

from mmx.cli import app as cli
from mmx.config.schema import GenerationConfig, SourceConfig
from mmx.inference.pipeline import Pipeline
from mmx.io.console import one_line
from mmx.models.checkpoint import save_model
from mmx.testing import tiny_model

COMMANDS = (
    "caption",
    "ask",
    "look",
    "demo",
    "import",
    "train",
    "eval",
    "new-encoder",
    "scenes",
    "bench",
    "study",
    "encoders",
)


# ---- caption ---------------------------------------------------------------------------------------------------


def test_caption_prints_path_tab_caption_in_the_order_given_and_nothing_else(mmx, model, photos) -> None:
    given = [photos[3], photos[0], photos[3]]
    ran = mmx("caption", *given, "--model", model)
    assert (ran.code, ran.err) == (0, "")
    assert [line.split("\t")[0] for line in ran.lines] == list(map(str, given))
    assert all(line.count("\t") == 1 for line in ran.lines)
    assert ran.lines[0] == ran.lines[2]


def test_caption_walks_folders_and_counts_a_picture_once(mmx, model, photos) -> None:
    folder = photos[0].parent
    draw(folder / "deep" / "er" / "z.png", 9)
    (folder / "notes.txt").write_text("no picture")
    ran = mmx("caption", folder, folder / "deep", "--model", model)
    names = [str(Path(line.split("\t")[0]).relative_to(folder)) for line in ran.lines]
    assert (ran.code, names) == (0, ["0.png", "1.png", "2.png", "3.png", "4.png", "deep/er/z.png"])


def test_caption_json_says_what_plain_lines_say(mmx, model, photos) -> None:
    plain = mmx("caption", *photos, "--model", model)
    ran = mmx("caption", *photos, "--model", model, "--json")
    assert [list(row) for row in ran.rows] == [["image", "caption", "score"]] * 5
    assert [f"{row['image']}\t{one_line(row['caption'])}" for row in ran.rows] == plain.lines
    assert all(row["score"] < 0 for row in ran.rows)


def test_batch_size_and_beams_change_the_work_and_not_the_order(mmx, model, photos) -> None:
    ran = mmx("caption", *photos, "--model", model, "--json")
    assert mmx("caption", *photos, "--model", model, "--json", "--batch-size", 2).rows == ran.rows
    wide = mmx("caption", *photos, "--model", model, "--json", "--beams", 3, "--max-tokens", 3)
    assert [row["image"] for row in wide.rows] == list(map(str, photos))
    assert all(len(row["caption"]) <= 3 for row in wide.rows)


def test_out_holds_the_lines_that_json_prints(mmx, model, photos, tmp_path) -> None:
    out = tmp_path / "new" / "captions.jsonl"
    ran = mmx("caption", *photos, "--model", model, "--out", out)
    assert ran == (0, "", "")
    assert out.read_text(encoding="utf-8") == mmx("caption", *photos, "--model", model, "--json").out
    assert sorted(os.listdir(out.parent)) == ["captions.jsonl", "captions.jsonl.run.json"]


def test_out_through_a_link_goes_on_with_what_it_points_at(mmx, model, photos, tmp_path) -> None:
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    real.write_text("old")
    link.symlink_to(real)
    words = ("caption", photos[0], "--model", model, "--out", link)
    said = mmx(*words).refused()
    assert said.startswith(f"{link} is there already and no real.jsonl.run.json says what made it; type --overwrite ")
    assert real.read_text() == "old"
    assert mmx(*words, "--overwrite").code == 0
    assert mmx("caption", photos[1], *words[2:]).code == 0
    assert link.is_symlink()
    assert [json.loads(line)["image"] for line in real.read_text().splitlines()] == list(map(str, photos[:2]))


def test_out_may_be_a_device_which_is_not_replaced(mmx, model, photos) -> None:
    assert mmx("caption", photos[0], "--model", model, "--out", "/dev/null") == (0, "", "")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", [".", "photos", "photos/0.png/x.jsonl", "n" * 300])
def test_an_out_that_cannot_be_written_is_told_and_named(mmx, model, photos, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    assert mmx("caption", photos[0], "--model", model, "--out", name).refused().startswith(f"{name} cannot be written")


def test_a_full_disk_leaves_whole_lines_and_the_next_run_goes_on(mmx, model, tmp_path) -> None:
    photos = [draw(tmp_path / "many" / f"{number:02}.png", number) for number in range(40)]
    out = tmp_path / "out" / "captions.jsonl"
    words = ("caption", tmp_path / "many", "--model", model, "--out", out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))  # bytes: not all of the lines fit
    try:
        ran = mmx(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.refused() == f"{out} cannot be written: File too large; choose another --out."
    text = out.read_text()
    assert (text.endswith("\n"), 0 < text.count("\n") < 40) == (True, True)
    assert mmx(*words) == (0, "", "")
    assert out.read_text().startswith(text)
    assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == list(map(str, photos))
    assert sorted(os.listdir(out.parent)) == ["captions.jsonl", "captions.jsonl.run.json"]


@pytest.mark.parametrize(("rows", "left"), [(0, "older\n"), (2, None)])
def test_an_interruption_leaves_the_older_file_until_there_is_a_row(
    mmx, model, photos, tmp_path, monkeypatch, rows, left
) -> None:
    out, real = tmp_path / "out" / "captions.jsonl", Pipeline.captions

    def interrupted(self, *given, **options):
        yield from islice(real(self, *given, **options), rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "captions", interrupted)
    out.parent.mkdir()
    out.write_text("older\n")
    words = ("caption", *photos, "--model", model, "--out", out)
    assert "type --overwrite to start anew" in mmx(*words).refused()
    assert out.read_text() == "older\n"
    assert mmx(*words, "--overwrite") == (130, "", "")
    assert sorted(os.listdir(out.parent)) == ["captions.jsonl", "captions.jsonl.run.json"][: 1 + (left is None)]
    if left is None:
        assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == list(map(str, photos[:2]))
    else:
        assert out.read_text() == left


def test_names_that_are_no_text_and_captions_beyond_ascii_are_printed(mmx, model, photos, tmp_path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xf0\x9f\x90\x95.png")
    draw(Path(odd), 1)
    ran = mmx("caption", odd, "--model", model, "--out", tmp_path / "o.jsonl")
    assert ran == (0, "", "")
    assert json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8"))["image"] == odd
    assert "caf\\udce9" in mmx("caption", odd, "--model", model).out


# ---- bad pictures among good -----------------------------------------------------------------------------------

BAD: dict[str, Callable[[], bytes]] = {
    "no picture.png": lambda: b"not a picture",
    "truncated.png": lambda: encode(Image.effect_noise((64, 64), 50), "PNG")[:-300],
    "zero bytes.jpg": lambda: b"",
    "bomb.png": lambda: png(20_000, 20_000),
}
GOOD: dict[str, Callable[[], bytes]] = {
    "one pixel.png": lambda: encode(picture("RGB", (7, 8, 9)), "PNG"),
    "cmyk.tiff": lambda: encode(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF"),
    "16 bit.png": lambda: encode(Image.new("I;16", (9, 9), 40_000), "PNG"),
    "palette and alpha.png": lambda: encode(palette((255, 0, 0), (0, 0, 255)), "PNG", transparency=b"\x00\x80"),
    "animated.gif": lambda: frames("GIF"),
    "rotated.png": lambda: turned(6),
}


def test_every_bad_picture_is_one_line_and_the_rest_goes_on(mmx, model, tmp_path) -> None:
    folder = tmp_path / "mixed"
    (folder / "empty").mkdir(parents=True)
    for name, make in {**BAD, **GOOD}.items():
        (folder / name).write_bytes(make())
    mixed = [folder / name for pair in zip([*BAD, "missing.png"], [*GOOD][:5], strict=True) for name in pair]
    ran = mmx("caption", *mixed, folder / "empty", folder / "rotated.png", "--model", model)
    assert ran.code == 1
    assert [Path(line.split("\t")[0]).name for line in ran.lines] == [*GOOD]
    assert len(ran.errors) == 6
    assert all(len(line) <= 300 and "Traceback" not in line for line in ran.errors)
    for name in ("empty", *BAD, "missing.png"):
        assert sum(f"{name}'" in line for line in ran.errors) == 1


def test_a_rotated_picture_is_captioned_as_it_stands(mmx, model, tmp_path) -> None:
    for orientation in (1, 6):
        (tmp_path / f"{orientation}.png").write_bytes(turned(orientation))
    ran = mmx("caption", tmp_path / "1.png", tmp_path / "6.png", "--model", model, "--json")
    assert ran.rows[0]["score"] == ran.rows[1]["score"]


def test_a_hundred_pictures_five_of_them_bad(mmx, model, tmp_path) -> None:
    folder, bad = tmp_path / "many", [0, 17, 18, 63, 99]
    paths = [draw(folder / f"{number:03}.png", number) for number in range(100)]
    for number, content in zip(
        bad, [b"", b"text", png(20_000, 20_000), paths[63].read_bytes()[:99], b"\0"], strict=True
    ):
        paths[number].write_bytes(content)
    out = tmp_path / "captions.jsonl"
    ran = mmx("caption", folder, "--model", model, "--out", out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert ran.code == 1
    assert [row["image"] for row in rows] == list(map(str, paths))
    assert [number for number, row in enumerate(rows) if "error" in row] == bad
    assert sum("caption" in row for row in rows) == 95
    assert ran.errors == [rows[number]["error"] for number in bad]


def test_no_library_says_anything_about_odd_pictures(model, tmp_path) -> None:
    """In a process of its own, for C libraries write to the descriptor of stderr, past Python."""
    cases = {name: make() for name, (make, _) in meanings().items()}
    bad = {name: data for name, (data, _) in handmade().items() if len(data) < 10_000}
    everything = {name: data for name, data in (cases | bad).items() if isinstance(data, bytes)}
    for name, data in everything.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    ran = alone(["caption", tmp_path, "--model", model, "--json"], stdout=subprocess.PIPE)
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert (ran.returncode, len(rows)) == (1, len(everything))
    assert {Path(row["image"]).stem for row in rows if "error" in row} == set(bad)
    assert ran.stderr.splitlines() == [row["error"] for row in rows if "error" in row]


def test_folders_without_pictures_alone_are_wrong_usage(mmx, tmp_path) -> None:
    assert mmx("caption", tmp_path).refused() == f"{str(tmp_path)!r}: no pictures are in this folder; check the path."


# ---- ask -------------------------------------------------------------------------------------------------------


def test_one_question_prints_its_answer_several_each_with_its_own(mmx, model, photos) -> None:
    one = mmx("ask", photos[0], "what is this?", "--model", model)
    several = mmx("ask", photos[0], "what is this?", "where?", "--model", model)
    assert (one.code, one.err, len(one.lines)) == (0, "", 1)
    assert [line.split("\t")[0] for line in several.lines] == ["what is this?", "where?"]
    assert several.lines[0] == f"what is this?\t{one.lines[0]}"
    rows = mmx("ask", photos[0], "what is this?", "--model", model, "--json").rows
    assert list(rows[0]) == ["image", "question", "answer", "score"]
    assert one_line(rows[0]["answer"]) == one.lines[0]


def ask_file(folder: Path, *rows: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_of_questions_encodes_each_picture_once_and_keeps_the_order(mmx, model, photos, monkeypatch) -> None:
    order = [2, 0, 2, 1, 0, 2]
    asked = [{"image": f"{image}.png", "question": f"number {n}?"} for n, image in enumerate(order)]
    data = ask_file(photos[0].parent, *asked)
    encoded, real = [], Pipeline.encode_prepared
    monkeypatch.setattr(Pipeline, "encode_prepared", lambda self, p: encoded.append(len(p)) or real(self, p))
    out = data.with_name("answers.jsonl")
    assert mmx("ask", "--data", data, "--model", model, "--out", out, "--batch-size", 2) == (0, "", "")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [{key: row[key] for key in ("image", "question")} for row in rows] == asked
    assert encoded == [2, 1]
    for row in rows[:3]:
        single = mmx("ask", data.with_name(row["image"]), row["question"], "--model", model, "--json").rows[0]
        assert (single["answer"], single["score"]) == (row["answer"], pytest.approx(row["score"], abs=1e-3))
    assert [line.count("\t") for line in mmx("ask", "--data", data, "--model", model).lines] == [2] * 6


def test_a_bad_picture_is_told_once_however_much_is_asked_about_it(mmx, model, photos) -> None:
    rows = [{"image": name, "question": q} for q in ("a?", "b?", "c?") for name in ("gone.png", "0.png")]
    ran = mmx("ask", "--data", ask_file(photos[0].parent, *rows), "--model", model, "--json")
    assert ran.code == 1
    assert len(ran.errors) == 1
    assert "gone.png" in ran.err
    assert ["error" in row for row in ran.rows] == [True, False] * 3


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"image": "a.png", "question": "a?"}, {"image": "a.png"}], ":2 has no 'question'; expected"),
        ([{"question": "a?"}], ":1 names no input; expected a field such as 'image'"),
        ([{"image": ["a.png"], "question": "a?"}], ":1 has 'image': [\"a.png\"]; expected a text"),
        ([{"image": "a.png", "question": "a?"}, ["a.png", "b?"]], ":2 is no JSON object; expected"),
        ([], " holds no questions; expected"),
    ],
)
def test_a_wrong_line_of_questions_is_named_before_any_work(mmx, tmp_path, rows, sentence) -> None:
    data = ask_file(tmp_path, *rows)
    assert mmx("ask", "--data", data, "--model", "nowhere").refused().startswith(f"{data}{sentence}")


def test_a_box_points_at_a_part(mmx, model, photos) -> None:
    words = ("ask", photos[0], "what?", "--model", model, "--json")
    everything, corner = mmx(*words), mmx(*words, "--box", "0,0,0.4,0.4")
    assert (corner.code, corner.err) == (0, "")
    assert corner.rows[0]["score"] != everything.rows[0]["score"]


@pytest.mark.parametrize(
    "box", ["", "1,2,3", "a,b,c,d", "0,0,1,1,1", "0.5,0.5,0.1,0.9", "0,0,7,1", "nan,0,1,1", "-1,0,1,1"]
)
def test_a_box_that_is_none_is_refused(mmx, model, photos, box) -> None:
    ran = mmx("ask", photos[0], "what?", "--model", model, f"--box={box}")
    assert "box" in ran.refused()


# ---- eval, encoders, scenes, train -----------------------------------------------------------------------------


def test_eval_prints_a_table_and_writes_what_it_found(mmx, model, tmp_path) -> None:
    words = ("eval", model, "--data", "scenes", "num_examples=20", "seed=3", "--max-tokens", 3)
    ran = mmx(*words, "--out", tmp_path / "found")
    assert (ran.code, ran.err) == (0, "")
    metrics = json.loads((tmp_path / "found" / "metrics.json").read_text())
    assert metrics["captions"] == 20
    assert {line.rsplit("  ", 1)[0].strip() for line in ran.lines} == set(metrics)
    assert f"{metrics['loss']:.4f}" in ran.out
    texts = [json.loads(line) for line in (tmp_path / "found" / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(texts) == metrics["captions"] + metrics["questions"]
    assert json.loads(mmx(*words, "--out", tmp_path / "found", "--json").out) == metrics


def test_eval_counts_captions_that_the_data_trained_on_has_not(mmx, model, photos, tmp_path) -> None:
    def told(name: str, **turn: object) -> Path:
        (tmp_path / name).write_text("".join(json.dumps({"image": str(photo), **turn}) + "\n" for photo in photos))
        return tmp_path / name

    def evaluated(*words: object):
        return mmx("eval", model, "--data", told("val.jsonl", captions=["a bird"]), "--out", tmp_path, "--json", *words)

    assert "novel" not in evaluated().rows[0]
    said = [json.loads(line)["said"] for line in (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    for limit in ((), ("max_examples=3",)):  # of what is measured, not of what is known
        count = 3 if limit else len(said)
        for captions in (["a bird"], ["a bird", f"{said[-1]}."]):
            known = told("train.jsonl", captions=captions)
            expected = sum(text not in captions and f"{text}." not in captions for text in said[:count])
            assert evaluated(*limit, "--known", f"path={known}").rows[0]["novel"] == expected
    asks = told("asks.jsonl", question="is it?", answer="no")
    assert f"{asks} holds no examples for the tasks caption" in evaluated("--known", f"path={asks}").refused()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cuont=20"], "command line: cuont=20: cuont is not a known key; did you mean 'count'?"),
        (["num_examples=few"], "command line: count=few: count is 'few', expected a whole number"),
        (["count"], "command line: count: expected key=value, as in training.max_steps=100"),
        (
            ["fraction=[1, 0]"],
            "command line: the configuration: part is [1.0, 0.0]; expected two fractions such as",
        ),
        (
            ["path=/nowhere"],
            "there is no data at /nowhere; expected a file or folder",
        ),
    ],
)
def test_wrong_facts_of_the_data_are_told(mmx, model, words, sentence) -> None:
    assert mmx("eval", model, "--data", "scenes", *words).refused().startswith(sentence)


def test_encoders_lists_the_built_in_ones(mmx) -> None:
    ran = mmx("encoders")
    assert (ran.code, ran.err) == (0, "")
    assert "mmx.encoders.image:ImageEncoder" in ran.out
    assert "backbone=" in ran.out
    rows = {row["name"]: row for row in mmx("encoders", "--json").rows}
    assert {"image", "text"} <= set(rows)
    assert (rows["image"]["modality"], rows["image"]["problem"]) == ("image", None)


def test_scenes_writes_a_folder_that_the_other_commands_read(mmx, model, tmp_path) -> None:
    folder = tmp_path / "scenes"
    assert mmx("scenes", folder, "-n", 3, "--seed", 4, "--size", 48) == (0, f"{folder}\n", "")
    assert "already exists" in mmx("scenes", folder).refused()
    assert len(mmx("caption", folder, "--model", model).lines) == 3
    asked = (folder / "questions.jsonl").read_text().splitlines()
    ran = mmx("ask", "--data", folder / "questions.jsonl", "--model", model, "--json", "--max-tokens", 3)
    assert [row["question"] for row in ran.rows] == [json.loads(line)["question"] for line in asked]
    assert mmx("eval", model, "--data", folder / "captions.jsonl", "--out", tmp_path, "--max-tokens", 3).code == 0


TRAIN = """\
model:
  sources:
    image: {encoder: imagge}
train:
  - {path: scenes, count: 4}
"""


def test_training_with_an_encoder_that_does_not_exist(mmx, tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(TRAIN)
    assert (
        mmx("train", config, f"output_dir={tmp_path / 'run'}").refused()
        == "there is no encoder 'imagge'; did you mean 'image'?"
    )


def test_several_problems_of_a_configuration_are_told_at_once(mmx, tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(TRAIN.replace("count", "cuont"))
    ran = mmx("train", config, "training.stesp=3")
    assert (ran.code, ran.out) == (2, "")
    assert ran.errors == [
        f"mmx: {config}: 2 problems",
        f"{config}:5: train.0.cuont is not a known key; did you mean 'count'?",
        "command line: training.stesp=3: training.stesp is not a known key; did you mean 'steps'?",
    ]


def test_an_unknown_key_is_told_at_once_and_without_torch(tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(TRAIN.replace("count", "cuont"))
    begun = seconds_of_children()
    ran = alone(["train", config], ["-X", "importtime"])
    assert seconds_of_children() - begun < 1
    imports, said = [
        [line for line in ran.stderr.splitlines() if line.startswith("import time") == own] for own in (1, 0)
    ]
    assert ran.returncode == 2
    assert said == [f"mmx: {config}:5: train.0.cuont is not a known key; did you mean 'count'?"]
    assert imported(ran.stderr.splitlines()).isdisjoint({"torch", "numpy", "timm", "transformers", "accelerate", "PIL"})


# ---- other sources, and plugins --------------------------------------------------------------------------------

EAR = """
from mmx.testing import ToyEncoder
class Ear(ToyEncoder):
    modality = "audio"
    def prepare(self, raw):
        return super().prepare([float(word) for word in open(raw).read().split()])
    def accepts(self, path):
        return path.endswith(".snd")
    def samples(self):
        return []
"""


@pytest.fixture
def two_senses(tmp_path, monkeypatch) -> Path:
    """A model that sees and hears, whose ear is a file in the working directory."""
    (tmp_path / "ear_of_mine.py").write_text(EAR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sources = {"image": _source(), "audio": SourceConfig(encoder="ear_of_mine:Ear")}
    return save_model(tmp_path / "model", tiny_model(sources), None, GenerationConfig(max_new_tokens=4))


def test_a_file_goes_to_the_source_that_accepts_it_and_others_stand_beside_it(mmx, two_senses, tmp_path) -> None:
    draw(tmp_path / "in" / "a.png", 3)
    for name, numbers in (("b.snd", "1 2 3"), ("c.snd", "-4 0.5")):
        (tmp_path / "in" / name).write_text(numbers)
    walked = mmx("caption", "in", "--model", two_senses, "--json")
    assert (walked.code, walked.err) == (0, "")
    assert [{k: v for k, v in row.items() if k in ("image", "audio")} for row in walked.rows] == [
        {"image": "in/a.png"},
        {"audio": "in/b.snd"},
        {"audio": "in/c.snd"},
    ]
    both = mmx("ask", "in/a.png", "what?", "--also", "audio=in/b.snd", "--model", two_senses, "--json")
    assert (both.code, list(both.rows[0])) == (0, ["image", "audio", "question", "answer", "score"])
    rows = [
        {"image": "a.png", "audio": "b.snd", "question": "what?"},
        {"audio": "c.snd", "question": "what?"},
        {"image": "a.png", "question": "what?", "box": [0, 0, 0.5, 0.5]},
    ]
    asked = mmx("ask", "--data", ask_file(tmp_path / "in", *rows), "--model", two_senses, "--json")
    assert (asked.code, asked.err) == (0, "")
    assert asked.rows[0]["answer"] == both.rows[0]["answer"]
    single = mmx("ask", "in/a.png", "what?", "--box", "0,0,0.5,0.5", "--model", two_senses, "--json")
    assert single.rows[0]["score"] == pytest.approx(asked.rows[2]["score"], abs=1e-3)


@pytest.mark.parametrize(
    ("also", "said"),
    [
        ("audio", "--also was given 'audio'; expected a source and its input, such as audio=b.wav."),
        ("=b.snd", "--also was given '=b.snd'; expected"),
        ("sound=b.snd", "the model has no source 'sound'; known: audio, image."),
        ("image=b.png", "--also names image, which "),
    ],
)
def test_another_source_that_is_none_is_refused(mmx, two_senses, tmp_path, also, said) -> None:
    ran = mmx("ask", draw(tmp_path / "a.png", 3), "what?", "--also", also, "--model", two_senses)
    assert ran.out == ""
    assert ran.err.removeprefix("mmx: ").startswith(said)
    assert ran.code in (1, 2)


def test_encoders_check_prints_each_promise_and_fails_with_one(mmx, two_senses, tmp_path) -> None:
    for name, numbers in (("b.snd", "1 2 3"), ("c.snd", "-4 0.5"), ("d.snd", "1"), ("e.snd", "nan")):
        (tmp_path / name).write_text(numbers)
    good = [f"--sample={name}.snd" for name in "bcd"]
    ran = mmx("encoders", "check", "ear_of_mine:Ear", "features=4", "--only", "mask", "--only", "finite", *good)
    assert (ran.code, ran.lines, ran.err) == (0, ["passed   finite", "passed   mask"], "")
    ran = mmx("encoders", "check", "ear_of_mine:Ear", "--only", "finite", *good, "--sample=e.snd", "--json")
    assert ran.code == 1
    assert (ran.rows[0]["status"], ran.rows[0]["said"]) == ("failed", "1 of 7 visible slots hold NaN or infinity")
    assert ran.rows[0]["remedy"].startswith("look for divisions by zero")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["imagge"], "there is no encoder 'imagge'; did you mean 'image'?"),
        (["image", "sise=3"], "command line: sise=3: sise is not a known key; did you mean 'size'?"),
        (["mmx.testing:ToyEncoder"], "the kit has 0 inputs for ToyEncoder of modality 'numbers'; give three or more"),
        (["image", "--only", "oder"], "there is no check 'oder'; did you mean 'order'?"),
        ([], "Missing argument 'NAME' (see mmx encoders check --help)"),
    ],
)
def test_a_check_of_what_is_not_there(mmx, words, said) -> None:
    assert mmx("encoders", "check", *words).refused().startswith(said)


# ---- wrong usage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["capton", "a.png"], "No such command 'capton'. Did you mean 'caption'? (see mmx --help)"),
        (["--foo"], "No such option: --foo (see mmx --help)"),
        (["caption"], "Missing argument 'PHOTO' (see mmx caption --help)"),
        (["caption", "a.png", "--foo"], "No such option: --foo"),
        (["caption", "a.png", "--beams", "0"], "Invalid value for '--beams'"),
        (["caption", "a.png", "--batch-size", "many"], "Invalid value for '--batch-size'"),
        (["caption", "a.png", "--out"], "Option '--out' requires an argument"),
        (["eval", "model"], "Missing option '--data'"),
        (["ask"], "ask needs a picture and a question, or --data FILE; type: mmx ask"),
        (["ask", "a.png"], "ask was given a.png and no question; type: mmx ask a.png"),
        (["ask", "a.png", "what?", "--data", "q.jsonl"], "ask needs a picture and a question, or --data FILE"),
        (["ask", "--data", "nowhere.jsonl"], "there is no file nowhere.jsonl; expected JSON lines"),
        (["caption", "a.png", "--model", "nowhere"], "'nowhere' is no folder here and could not be downloaded"),
        (["caption", "a.png", "--device", "gpu"], "device 'gpu' is not available here; try --device cpu."),
        (["caption", "a.png", "--device", "meta"], "device 'meta' is not available here; try --device cpu."),
        (["caption", "a.png", "--device", "cuda:99"], "device 'cuda:99' is not available here; try --device cpu."),
        (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file; check the path"),
        (["scenes", "/dev/null/scenes"], ""),
    ],
)
def test_wrong_usage_is_one_sentence(mmx, monkeypatch, tmp_path, words, sentence) -> None:
    monkeypatch.chdir(tmp_path)
    assert mmx(*words).refused().startswith(sentence)


def test_more_tokens_than_the_model_has_places_for_are_as_many_as_it_has(mmx, model, photos) -> None:
    ran = mmx("caption", photos[0], "--model", model, "--max-tokens", 100_000)
    assert (ran.code, ran.err, len(ran.lines)) == (0, "", 1)


def test_a_checkpoint_of_another_shape(mmx, model, photos, tmp_path) -> None:
    other = save_model(tmp_path / "other", tiny_model({"image": _source()}, width=64))
    (other / "config.yaml").write_bytes((model / "config.yaml").read_bytes())
    said = mmx("caption", photos[0], "--model", other).refused()
    assert said.startswith(f"{other / 'model.safetensors'} holds ")
    assert "expects" in said


def test_a_checkpoint_without_eyes(mmx, photos, tmp_path) -> None:
    blind = save_model(tmp_path / "blind", tiny_model())
    ran = mmx("caption", photos[0], "--model", blind)
    assert (ran.code, ran.out, len(ran.errors)) == (1, "", 1)
    assert ran.err.startswith("encoder ToyEncoder of source 'numbers' failed in prepare(str) with ")


def test_a_checkpoint_whose_encoder_is_not_installed(mmx, model, photos, tmp_path) -> None:
    other = save_model(tmp_path / "other", tiny_model({"image": _source()}))
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("encoder: image", "encoder: imagge"))
    said = mmx("caption", photos[0], "--model", other).refused()
    assert said == "there is no encoder 'imagge'; did you mean 'image'?"


def _source() -> SourceConfig:
    return SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})


@pytest.mark.parametrize("words", [("--traceback", "ask"), ("ask", "--traceback")])
def test_traceback_shows_where_and_the_sentence_stays_last(mmx, words) -> None:
    ran = mmx(*words)
    assert ran.code == 2
    assert ran.errors[0].startswith("Traceback")
    assert ran.errors[-1].startswith("mmx: ask needs a picture")


def test_an_error_that_nobody_foresaw_is_not_hidden(monkeypatch) -> None:
    monkeypatch.setattr("mmx.encoders.discovery.survey", lambda: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["mmx", "encoders"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


# ---- a process of its own --------------------------------------------------------------------------------------


def imported(lines: Sequence[str]) -> set[str]:
    """Top-level packages in what -X importtime writes."""
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time")}


@pytest.mark.parametrize("words", [[], ["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_is_whole_sentences(mmx, words) -> None:
    ran = mmx(*words)
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines[0].startswith(f"Usage: mmx {words[0] if len(words) > 1 else '[OPTIONS] COMMAND'}")
    assert all(len(line) <= 80 for line in ran.lines)
    if len(words) < 2:
        listed = ran.out.split("Commands:\n")[1].splitlines()
        assert [line.split()[0] for line in listed] == list(COMMANDS)
        assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_help_is_instant() -> None:
    begun = seconds_of_children()
    ran = alone(["--help"], ["-X", "importtime"], stdout=subprocess.PIPE)
    assert seconds_of_children() - begun < 0.5
    heavy = {"torch", "pydantic", "yaml", "numpy", "PIL", "timm", "transformers", "tqdm"}
    assert imported(ran.stderr.splitlines()).isdisjoint(heavy)


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ran = alone(["scenes", tmp_path / "s", "-n", "1"], stdout=writing)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_sentence(tmp_path) -> None:
    with open("/dev/full", "w") as full:
        ran = alone(["scenes", tmp_path / "s", "-n", "1"], stdout=full)
    assert ran.returncode == 2
    assert ran.stderr == "mmx: No space left on device; check the path, its permissions and the room on the disk.\n"


def test_the_model_that_is_asked_is_the_model_that_was_saved(mmx, model, photos) -> None:
    """The command line adds nothing to what Python says."""
    import mmx as package

    expected = [package.load(model).caption(str(photo)) for photo in photos]
    assert [row["caption"] for row in mmx("caption", *photos, "--model", model, "--json").rows] == expected
    assert not torch.is_inference_mode_enabled()
