"""The commands caption, ask, eval, encoders, scenes and train: output, errors, files and exit codes."""

import json
import os
import resource
import subprocess
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from cli_cases import OK, draw, read_rows, run_in_process, write_jsonl
from image_cases import encode, frames, image_modes, malformed, one_row, palette, png, rotated
from PIL import Image

import mmx as package
from mmx.config.schema import GenerationConfig, SourceConfig
from mmx.errors import one_line
from mmx.inference.pipeline import Pipeline
from mmx.models.checkpoint import save_model
from mmx.testing import tiny_model

# ---- caption ---------------------------------------------------------------------------------------------------


def test_caption_prints_path_tab_caption_in_the_order_given(mmx, model, images) -> None:
    paths = [images[3], images[0], images[3]]
    ran = mmx("caption", *paths, "--model", model)
    assert (ran.code, ran.err) == (0, "")
    assert [line.split("\t")[0] for line in ran.lines] == list(map(str, paths))
    assert all(line.count("\t") == 1 for line in ran.lines)
    assert ran.lines[0] == ran.lines[2]


def test_caption_searches_folders_and_captions_an_image_once(mmx, model, images) -> None:
    folder = images[0].parent
    draw(folder / "deep" / "er" / "z.png", 9)
    (folder / "notes.txt").write_text("not an image")
    ran = mmx("caption", folder, folder / "deep", "--model", model)
    names = [str(Path(line.split("\t")[0]).relative_to(folder)) for line in ran.lines]
    assert (ran.code, names) == (0, ["0.png", "1.png", "2.png", "3.png", "4.png", "deep/er/z.png"])


def test_caption_json_has_the_captions_of_plain_lines(mmx, model, images) -> None:
    plain = mmx("caption", *images, "--model", model)
    ran = mmx("caption", *images, "--model", model, "--json")
    assert [list(row) for row in ran.rows] == [["image", "caption", "score"]] * 5
    assert [f"{row['image']}\t{one_line(row['caption'])}" for row in ran.rows] == plain.lines
    assert all(row["score"] < 0 for row in ran.rows)
    assert [row["caption"] for row in ran.rows] == [package.load(model).caption(image) for image in images]
    assert not torch.is_inference_mode_enabled()


def test_batch_size_and_beams_do_not_change_the_order(mmx, model, images) -> None:
    ran = mmx("caption", *images, "--model", model, "--json")
    assert mmx("caption", *images, "--model", model, "--json", "--batch-size", 2).rows == ran.rows
    beams = mmx("caption", *images, "--model", model, "--json", "--num-beams", 3, "--max-new-tokens", 3)
    assert [row["image"] for row in beams.rows] == list(map(str, images))
    assert all(len(row["caption"]) <= 3 for row in beams.rows)


def test_out_has_the_lines_that_json_prints(mmx, model, images, tmp_path) -> None:
    out = tmp_path / "new" / "captions.jsonl"
    assert mmx("caption", *images, "--model", model, "--out", out).outputs == OK
    assert out.read_text(encoding="utf-8") == mmx("caption", *images, "--model", model, "--json").out
    assert sorted(os.listdir(out.parent)) == ["captions.jsonl", "captions.jsonl.run.json"]


def test_out_through_a_link_continues_the_file_that_it_points_to(mmx, model, images, tmp_path) -> None:
    target = tmp_path / "target.jsonl"
    link = tmp_path / "link.jsonl"
    target.write_text("old")
    link.symlink_to(target)
    words = ("caption", images[0], "--model", model, "--out", link)
    assert mmx(*words).refused().code == "results.unknown_run"
    assert target.read_text() == "old"
    assert mmx(*words, "--overwrite").code == 0
    assert mmx("caption", images[1], *words[2:]).code == 0
    assert link.is_symlink()
    assert [row["image"] for row in read_rows(target)] == list(map(str, images[:2]))


def test_out_may_be_a_device_which_is_not_replaced(mmx, model, images) -> None:
    assert mmx("caption", images[0], "--model", model, "--out", "/dev/null").outputs == OK
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", [".", "images", "images/0.png/x.jsonl", "n" * 300])
def test_an_out_that_cannot_be_written_is_named(mmx, model, images, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    error = mmx("caption", images[0], "--model", model, "--out", name).refused()
    assert (error.code, error.details) == ("output.not_writable", {"path": name})


def test_a_full_disk_leaves_whole_lines_and_the_next_run_continues(mmx, model, tmp_path) -> None:
    images = [draw(tmp_path / "many" / f"{number:02}.png", number) for number in range(40)]
    out = tmp_path / "out" / "captions.jsonl"
    words = ("caption", tmp_path / "many", "--model", model, "--out", out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))  # bytes: not all of the lines fit
    try:
        ran = mmx(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.refused().code == "output.not_writable"
    before = out.read_text()
    assert 0 < len(read_rows(out)) < 40
    assert mmx(*words).outputs == OK
    assert out.read_text().startswith(before)
    assert [row["image"] for row in read_rows(out)] == list(map(str, images))
    assert sorted(os.listdir(out.parent)) == ["captions.jsonl", "captions.jsonl.run.json"]


@pytest.mark.parametrize("rows", [0, 2])
def test_an_older_file_is_kept_until_the_first_row_is_written(mmx, model, images, tmp_path, monkeypatch, rows) -> None:
    out = tmp_path / "out" / "captions.jsonl"
    captions = Pipeline.captions

    def interrupted(self, *args, **options):
        yield from islice(captions(self, *args, **options), rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "captions", interrupted)
    out.parent.mkdir()
    out.write_text("older\n")
    words = ("caption", *images, "--model", model, "--out", out)
    assert mmx(*words).refused().code == "results.unknown_run"
    assert out.read_text() == "older\n"
    assert mmx(*words, "--overwrite").outputs == (130, "", "")
    if rows:
        assert sorted(os.listdir(out.parent)) == ["captions.jsonl", "captions.jsonl.run.json"]
        assert [row["image"] for row in read_rows(out)] == list(map(str, images[:2]))
    else:
        assert os.listdir(out.parent) == ["captions.jsonl"]
        assert out.read_text() == "older\n"


def test_undecodable_file_names_are_printed_escaped_and_kept_in_rows(mmx, model, tmp_path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xf0\x9f\x90\x95.png")
    draw(Path(odd), 1)
    assert mmx("caption", odd, "--model", model, "--out", tmp_path / "o.jsonl").outputs == OK
    assert read_rows(tmp_path / "o.jsonl")[0]["image"] == odd
    assert "caf\\udce9" in mmx("caption", odd, "--model", model).out


def test_more_tokens_than_the_model_has_positions_for_are_limited(mmx, model, images) -> None:
    ran = mmx("caption", images[0], "--model", model, "--max-new-tokens", 100_000)
    assert (ran.code, ran.err, len(ran.lines)) == (0, "", 1)


# ---- unreadable images -----------------------------------------------------------------------------------------

BAD: dict[str, Callable[[], bytes]] = {
    "text.png": lambda: b"not an image",
    "truncated.png": lambda: encode(Image.effect_noise((64, 64), 50), "PNG")[:-300],
    "zero bytes.jpg": lambda: b"",
    "bomb.png": lambda: png(20_000, 20_000),
}
GOOD: dict[str, Callable[[], bytes]] = {
    "one pixel.png": lambda: encode(one_row("RGB", (7, 8, 9)), "PNG"),
    "cmyk.tiff": lambda: encode(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF"),
    "16 bit.png": lambda: encode(Image.new("I;16", (9, 9), 40_000), "PNG"),
    "palette and alpha.png": lambda: encode(palette((255, 0, 0), (0, 0, 255)), "PNG", transparency=b"\x00\x80"),
    "animated.gif": lambda: frames("GIF"),
    "rotated.png": lambda: rotated(6),
}


def test_each_unreadable_image_is_one_line_and_the_rest_is_captioned(mmx, model, tmp_path) -> None:
    folder = tmp_path / "mixed"
    (folder / "empty").mkdir(parents=True)
    for name, make in {**BAD, **GOOD}.items():
        (folder / name).write_bytes(make())
    pairs = zip([*BAD, "missing.png"], [*GOOD][:5], strict=True)
    mixed = [folder / name for pair in pairs for name in pair]
    ran = mmx("caption", *mixed, folder / "empty", folder / "rotated.png", "--model", model)
    assert ran.code == 1
    assert [Path(line.split("\t")[0]).name for line in ran.lines] == [*GOOD]
    assert len(ran.errors) == 6
    assert all(len(line) <= 300 and "Traceback" not in line for line in ran.errors)
    for name in ("empty", *BAD, "missing.png"):
        assert sum(f"{name}'" in line for line in ran.errors) == 1


def test_exif_orientation_is_applied(mmx, model, tmp_path) -> None:
    for orientation in (1, 6):
        (tmp_path / f"{orientation}.png").write_bytes(rotated(orientation))
    ran = mmx("caption", tmp_path / "1.png", tmp_path / "6.png", "--model", model, "--json")
    assert ran.rows[0]["score"] == ran.rows[1]["score"]


@pytest.mark.slow
def test_libraries_print_nothing_about_damaged_images(model, tmp_path) -> None:
    """In a process of its own, because C libraries write to the file descriptor of stderr."""
    modes = {name: make() for name, (make, _) in image_modes().items()}
    bad = {name: data for name, (data, _) in malformed().items() if len(data) < 10_000}
    files = {name: data for name, data in (modes | bad).items() if isinstance(data, bytes)}
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    ran = run_in_process(["caption", tmp_path, "--model", model, "--json"], stdout=subprocess.PIPE)
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert (ran.returncode, len(rows)) == (1, len(files))
    assert {Path(row["image"]).stem for row in rows if "error" in row} == set(bad)
    assert ran.stderr.splitlines() == [row["error"] for row in rows if "error" in row]


def test_a_folder_without_images_is_wrong_usage(mmx, model, tmp_path) -> None:
    error = mmx("caption", tmp_path, "--model", model).refused()
    assert (error.code, error.details) == ("input.nothing_found", {"path": str(tmp_path)})


# ---- ask -------------------------------------------------------------------------------------------------------


def test_one_answer_is_printed_alone_and_several_after_their_questions(mmx, model, images) -> None:
    one = mmx("ask", images[0], "what is this?", "--model", model)
    several = mmx("ask", images[0], "what is this?", "where?", "--model", model)
    assert (one.code, one.err, len(one.lines)) == (0, "", 1)
    assert [line.split("\t")[0] for line in several.lines] == ["what is this?", "where?"]
    assert several.lines[0] == f"what is this?\t{one.lines[0]}"
    rows = mmx("ask", images[0], "what is this?", "--model", model, "--json").rows
    assert list(rows[0]) == ["image", "question", "answer", "score", "probability"]
    assert one_line(rows[0]["answer"]) == one.lines[0]


def test_each_image_of_a_file_is_encoded_once_and_the_order_is_kept(mmx, model, images, monkeypatch) -> None:
    order = [2, 0, 2, 1, 0, 2]
    requests = [{"image": f"{image}.png", "question": f"number {n}?"} for n, image in enumerate(order)]
    data = write_jsonl(images[0].parent / "questions.jsonl", *requests)
    encoded: list[int] = []
    encode_prepared = Pipeline.encode_prepared
    monkeypatch.setattr(Pipeline, "encode_prepared", lambda self, p: encoded.append(len(p)) or encode_prepared(self, p))
    out = data.with_name("answers.jsonl")
    assert mmx("ask", "--data", data, "--model", model, "--out", out, "--batch-size", 2).outputs == OK
    rows = read_rows(out)
    assert [{key: row[key] for key in ("image", "question")} for row in rows] == requests
    assert encoded == [2, 1]
    for row in rows[:3]:
        single = mmx("ask", data.with_name(row["image"]), row["question"], "--model", model, "--json").rows[0]
        assert (single["answer"], single["score"]) == (row["answer"], pytest.approx(row["score"], abs=1e-3))
    assert [line.count("\t") for line in mmx("ask", "--data", data, "--model", model).lines] == [2] * 6


def test_the_error_of_an_image_is_printed_once_for_all_its_questions(mmx, model, images) -> None:
    rows = [{"image": name, "question": q} for q in ("a?", "b?", "c?") for name in ("gone.png", "0.png")]
    data = write_jsonl(images[0].parent / "questions.jsonl", *rows)
    ran = mmx("ask", "--data", data, "--model", model, "--json")
    assert ran.code == 1
    assert len(ran.errors) == 1
    assert "gone.png" in ran.err
    assert ["error" in row for row in ran.rows] == [True, False] * 3


@pytest.mark.parametrize(
    ("rows", "code", "line"),
    [
        ([{"image": "a.png", "question": "a?"}, {"image": "a.png"}], "data.no_question", 2),
        ([{"question": "a?"}], "data.no_input", 1),
        ([{"image": ["a.png"], "question": "a?"}], "data.field_type", 1),
        ([{"image": "a.png", "question": "a?"}, ["a.png", "b?"]], "data.not_json", 2),
        ([{"image": "a.png", "question": "a?"}, {"image": "a.png", "question": " ？"}], "input.empty_question", 2),
        ([], "data.no_questions", None),
    ],
)
def test_a_wrong_line_of_questions_is_named_before_the_model_is_loaded(mmx, tmp_path, rows, code, line) -> None:
    data = write_jsonl(tmp_path / "questions.jsonl", *rows)
    error = mmx("ask", "--data", data, "--model", "nowhere").refused()
    assert (error.code, error.details["path"], error.details.get("line")) == (code, str(data), line)


@pytest.mark.parametrize("question", ["", "  ", "??", "？"])
def test_an_empty_question_is_refused_before_the_model_is_loaded(mmx, images, question) -> None:
    for words in ([question], ["what?", question]):
        assert mmx("ask", images[0], *words, "--model", "nowhere").refused().code == "input.empty_question"


def test_an_empty_question_of_look_is_refused(mmx, model, images) -> None:
    out = images[0].with_name("look.png")
    error = mmx("look", images[0], "--question", " ?", "--model", model, "--out", out).refused()
    assert error.code == "input.empty_question"


def test_a_box_restricts_the_question_to_a_region(mmx, model, images) -> None:
    words = ("ask", images[0], "what?", "--model", model, "--json")
    whole_image = mmx(*words)
    region = mmx(*words, "--box", "0,0,0.4,0.4")
    assert (region.code, region.err) == (0, "")
    assert region.rows[0]["score"] != whole_image.rows[0]["score"]


@pytest.mark.parametrize("box", ["", "1,2,3", "a,b,c,d", "0,0,1,1,1"])
def test_a_box_that_is_not_four_numbers_is_refused(mmx, images, box) -> None:
    assert mmx("ask", images[0], "what?", "--model", "nowhere", f"--box={box}").refused().code == "option.box"


@pytest.mark.parametrize("box", ["0.5,0.5,0.1,0.9", "0,0,7,1", "nan,0,1,1", "-1,0,1,1"])
def test_a_box_outside_of_the_image_is_refused(mmx, images, box) -> None:
    assert mmx("ask", images[0], "what?", "--model", "nowhere", f"--box={box}").refused().code == "memory.box"


# ---- eval ------------------------------------------------------------------------------------------------------


def test_eval_prints_and_writes_metrics_and_predictions(mmx, model, tmp_path) -> None:
    words = ("eval", model, "--data", "scenes", "num_examples=12", "seed=3", "--max-new-tokens", 3)
    ran = mmx(*words, "--out-dir", tmp_path / "results")
    written = [tmp_path / "results" / name for name in ("metrics.json", "predictions.jsonl")]
    assert (ran.code, ran.err) == (0, "".join(f"{path} was written.\n" for path in written))
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["captions"] == 12
    assert {line.rsplit("  ", 1)[0].strip() for line in ran.lines} == set(metrics)
    assert f"{metrics['loss']:.4f}" in ran.out
    predictions = read_rows(tmp_path / "results" / "predictions.jsonl")
    assert len(predictions) == metrics["captions"] + metrics["questions"]
    assert json.loads(mmx(*words, "--out-dir", tmp_path / "results", "--json").out) == metrics


def test_eval_writes_nothing_unasked(mmx, model, tmp_path, monkeypatch) -> None:
    """Results of an earlier evaluation in the current folder are kept."""
    folder = tmp_path / "current"
    folder.mkdir()
    for name in ("metrics.json", "predictions.jsonl", "maps.json"):
        (folder / name).write_text("earlier")
    monkeypatch.chdir(folder)
    words = ("eval", model, "--data", "scenes", "num_examples=2")
    for options in (("--max-new-tokens", 3), ("--max-new-tokens", 3, "--json"), ("--maps",)):
        ran = mmx(*words, *options)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        ("metrics.json", "predictions.jsonl", "maps.json"), "earlier"
    )


def test_eval_writes_maps_into_the_folder_of_out_dir(mmx, model, tmp_path) -> None:
    ran = mmx("eval", model, "--data", "scenes", "num_examples=2", "--maps", "--json", "--out-dir", tmp_path / "maps")
    assert (ran.code, ran.err) == (0, f"{tmp_path / 'maps' / 'maps.json'} was written.\n")
    assert json.loads((tmp_path / "maps" / "maps.json").read_text()) == json.loads(ran.out)


def test_an_empty_out_dir_is_not_the_current_folder(mmx, model) -> None:
    assert mmx("eval", model, "--data", "scenes", "--out-dir", "").refused().code == "option.out_dir"


def test_eval_counts_captions_that_are_not_in_the_training_data(mmx, model, images, tmp_path) -> None:
    def write_data(name: str, **task: object) -> Path:
        return write_jsonl(tmp_path / name, *({"image": str(image), **task} for image in images))

    def evaluate(*words: object):
        data = write_data("val.jsonl", captions=["a bird"])
        return mmx("eval", model, "--data", data, "--out-dir", tmp_path, "--json", *words)

    assert "novel" not in evaluate().rows[0]
    generated = [row["prediction"] for row in read_rows(tmp_path / "predictions.jsonl")]
    for limit in ((), ("max_examples=3",)):  # limits what is evaluated, not the training data
        count = 3 if limit else len(generated)
        for captions in (["a bird"], ["a bird", f"{generated[-1]}."]):
            train = write_data("train.jsonl", captions=captions)
            expected = sum(text not in captions and f"{text}." not in captions for text in generated[:count])
            assert evaluate(*limit, "--novelty-against", f"path={train}").rows[0]["novel"] == expected
    questions = write_data("questions.jsonl", question="is it?", answer="no")
    error = evaluate("--novelty-against", f"path={questions}").refused()
    assert error.code == "data.nothing_selected"


def test_eval_scores_one_caption_a_line_as_the_karpathy_form(mmx, model, images, tmp_path) -> None:
    folder = images[0].parent
    lines = []
    records = []
    for i, image in enumerate(images):
        captions = [f"a {word} {i}" for word in ("red dot", "blue dot", "line")]
        prefixes = ("", "./", f"{folder}/")
        for number, (caption, prefix) in enumerate(zip(captions, prefixes, strict=True)):
            lines.append({"image": f"{prefix}{image.name}", "caption": caption, "width": number, "author": caption})
        records.append({"filename": image.name, "sentences": [{"raw": caption} for caption in captions]})
    data = write_jsonl(folder / "list.jsonl", *lines)
    karpathy = folder / "dataset.json"
    karpathy.write_text(json.dumps({"images": records}))
    words = ("--out-dir", tmp_path, "--json", "--data")
    (expected,) = mmx("eval", model, *words, karpathy).rows
    (metrics,) = mmx("eval", model, *words, data).rows
    assert metrics == expected
    assert metrics["captions"] == len(images)


def test_records_that_do_not_join_are_named_and_eval_exits_with_1(mmx, model, images, tmp_path) -> None:
    document = {
        "images": [{"id": number, "file_name": image.name} for number, image in enumerate(images)],
        "annotations": [{"image_id": str(number), "caption": "a dot"} for number in range(len(images))],
    }
    data = images[0].parent / "c.json"
    words = ("eval", model, "--data", data, "--json", "--quiet")
    data.write_text(json.dumps(document))
    ran = mmx(*words)
    assert (ran.code, ran.err, ran.rows[0]["captions"]) == (0, "", len(images))
    document["annotations"][3]["image_id"] = 77
    data.write_text(json.dumps(document))
    ran = mmx(*words)
    assert (ran.code, ran.rows[0]["captions"]) == (1, len(images) - 1)
    assert ran.errors == [
        f"{data}: 1 record skipped, because the image has no caption: image 3",
        f"{data}: 1 record skipped, because no image has its image_id: annotation 3",
    ]
    config = tmp_path / "run.yaml"
    config.write_text(f"init: {model}\ntrain: [{{path: {data}}}]\noutput_dir: {tmp_path / 'run'}\n")
    trained = mmx("train", config, "training.max_steps=1", "--quiet")
    assert (trained.code, trained.errors) == (0, ran.errors)


@pytest.mark.parametrize("command", ["ask", "eval", "train"])
def test_a_misspelt_source_is_refused_with_its_line(mmx, model, images, tmp_path, command) -> None:
    fields = {"question": "a?", "answer": "b"}
    data = write_jsonl(
        images[0].parent / "list.jsonl",
        {"image": "0.png", "width": 3, "split": "val", **fields},
        {"image_path": "1.png", **fields},
    )
    config = tmp_path / "run.yaml"
    config.write_text(f"init: {model}\ntrain: [{{path: {data}}}]\noutput_dir: {tmp_path / 'run'}\n")
    words = {"ask": ("--data", data, "--model", model), "eval": (model, "--data", data), "train": (config,)}
    error = mmx(command, *words[command]).refused()
    assert (error.code, error.details["path"], error.details["line"]) == ("data.unknown_source", str(data), 2)
    assert (error.details["unknown"], error.details["known"]) == (["image_path"], ["image"])


def test_a_misspelt_source_is_an_error_row_of_captions(mmx, model, images) -> None:
    data = write_jsonl(images[0].parent / "list.jsonl", {"image": "0.png", "width": 3}, {"image_path": "1.png"})
    ran = mmx("caption", data, "--model", model, "--json")
    assert (ran.code, ["error" in row for row in ran.rows]) == (1, [False, True])
    assert ran.errors[0].startswith(f"{data}:2 ")
    assert "'image_path'" in ran.errors[0]
    write_jsonl(data, {"image_path": "1.png"})
    error = mmx("caption", data, "--model", model).refused()
    assert (error.code, error.details["unknown"]) == ("data.unknown_source", ["image_path"])


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["tasks=[ask]", "--novelty-against", "seed=1"], "--novelty-against"),
        (["--maps", "--novelty-against", "seed=1"], "--novelty-against"),
        (["--maps", "--information"], "--information"),
        (["--maps", "--num-beams", "2"], "--num-beams"),
        (["--maps", "--max-new-tokens", "2"], "--max-new-tokens"),
    ],
)
def test_eval_refuses_options_that_have_no_effect(mmx, model, tmp_path, words, option) -> None:
    words = ["eval", model, "--data", "scenes", "num_examples=2", *words, "--out-dir", tmp_path / "results"]
    error = mmx(*words).refused()
    assert (error.code, error.details["option"]) == ("option.unused", option)
    assert not (tmp_path / "results").exists()


def test_eval_refuses_novelty_for_data_with_questions_only(mmx, model, images, tmp_path) -> None:
    line = {"image": str(images[0]), "question": "is it?", "answer": "no"}
    data = write_jsonl(tmp_path / "questions.jsonl", line)
    error = mmx("eval", model, "--data", data, "--novelty-against", "split=train", "--out-dir", tmp_path).refused()
    assert (error.code, error.details["option"]) == ("option.unused", "--novelty-against")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["mun_examples=20"], "config.unknown_key"),
        (["num_examples=few"], "config.type"),
        (["num_examples"], "config.override"),
        (["path=/nowhere"], "data.missing"),
    ],
)
def test_wrong_options_of_the_data_are_refused(mmx, model, words, code) -> None:
    assert mmx("eval", model, "--data", "scenes", *words).refused().code == code


def test_maps_need_scenes(mmx, model) -> None:
    assert mmx("eval", model, "--data", "a.jsonl", "--maps").refused().code == "eval.maps_data"


# ---- encoders, scenes, train -----------------------------------------------------------------------------------


def test_encoders_lists_built_in_encoders(mmx) -> None:
    ran = mmx("encoders")
    assert (ran.code, ran.err) == (0, "")
    assert "mmx.encoders.image:ImageEncoder" in ran.out
    assert "backbone=" in ran.out
    rows = {row["name"]: row for row in mmx("encoders", "--json").rows}
    assert {"image", "text"} <= set(rows)
    assert (rows["image"]["modality"], rows["image"]["problem"]) == ("image", None)


def test_scenes_writes_a_folder_that_other_commands_read(mmx, model, tmp_path) -> None:
    folder = tmp_path / "scenes"
    assert mmx("scenes", folder, "-n", 3, "--seed", 4, "--size", 48).outputs == (0, f"{folder}\n", "")
    assert mmx("scenes", folder).refused().code == "data.folder_in_use"
    assert len(mmx("caption", folder, "--model", model).lines) == 3
    questions = read_rows(folder / "questions.jsonl")
    ran = mmx("ask", "--data", folder / "questions.jsonl", "--model", model, "--json", "--max-new-tokens", 3)
    assert [row["question"] for row in ran.rows] == [row["question"] for row in questions]
    words = ("eval", model, "--data", folder / "captions.jsonl", "--out-dir", tmp_path, "--max-new-tokens", 3)
    assert mmx(*words).code == 0


TRAIN = """\
model:
  sources:
    image: {encoder: imagge}
train:
  - {path: scenes, num_examples: 4}
"""


def test_training_with_an_unknown_encoder(mmx, tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(TRAIN)
    error = mmx("train", config, f"output_dir={tmp_path / 'run'}").refused()
    assert (error.code, error.details["encoder"]) == ("encoder.unknown", "imagge")


def test_all_problems_of_a_configuration_are_reported(mmx, tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(TRAIN.replace("num_examples", "mun_examples"))
    ran = mmx("train", config, "training.max_stesp=3")
    assert (ran.code, ran.out, len(ran.errors)) == (2, "", 3)
    assert ran.error.code == "config.several_problems"
    assert ran.errors[0].startswith(f"mmx: {config}: 2 problems")
    assert ran.errors[1].startswith(f"{config}:5: ")


# ---- other sources, and plugins --------------------------------------------------------------------------------

SOUND_ENCODER = """
from mmx.testing import ToyEncoder
class Sound(ToyEncoder):
    modality = "audio"
    def prepare(self, raw):
        return super().prepare([float(word) for word in open(raw).read().split()])
    def accepts(self, path):
        return path.endswith(".snd")
    def samples(self):
        return []
"""


@pytest.fixture
def image_audio_model(tmp_path, monkeypatch, image_source) -> Path:
    """A model with an image and an audio source; the audio encoder is a file in the working directory."""
    (tmp_path / "sound_encoder.py").write_text(SOUND_ENCODER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sources = {"image": image_source, "audio": SourceConfig(encoder="sound_encoder:Sound")}
    return save_model(tmp_path / "model", tiny_model(sources), None, GenerationConfig(max_new_tokens=4))


def test_files_go_to_the_source_that_accepts_them_and_sources_combine(mmx, image_audio_model, tmp_path) -> None:
    draw(tmp_path / "in" / "a.png", 3)
    for name, numbers in (("b.snd", "1 2 3"), ("c.snd", "-4 0.5")):
        (tmp_path / "in" / name).write_text(numbers)
    found = mmx("caption", "in", "--model", image_audio_model, "--json")
    assert (found.code, found.err) == (0, "")
    assert [{k: v for k, v in row.items() if k in ("image", "audio")} for row in found.rows] == [
        {"image": "in/a.png"},
        {"audio": "in/b.snd"},
        {"audio": "in/c.snd"},
    ]
    both = mmx("ask", "in/a.png", "what?", "--source", "audio=in/b.snd", "--model", image_audio_model, "--json")
    assert (both.code, list(both.rows[0])) == (0, ["image", "audio", "question", "answer", "score", "probability"])
    rows = [
        {"image": "a.png", "audio": "b.snd", "question": "what?"},
        {"audio": "c.snd", "question": "what?"},
        {"image": "a.png", "question": "what?", "box": [0, 0, 0.5, 0.5]},
    ]
    data = write_jsonl(tmp_path / "in" / "questions.jsonl", *rows)
    answered = mmx("ask", "--data", data, "--model", image_audio_model, "--json")
    assert (answered.code, answered.err) == (0, "")
    assert answered.rows[0]["answer"] == both.rows[0]["answer"]
    single = mmx("ask", "in/a.png", "what?", "--box", "0,0,0.5,0.5", "--model", image_audio_model, "--json")
    assert single.rows[0]["score"] == pytest.approx(answered.rows[2]["score"], abs=1e-3)


@pytest.mark.parametrize(
    ("sources", "code"),
    [
        (["audio"], "option.source"),
        (["=b.snd"], "option.source"),
        (["audio=b.snd", "audio=c.snd"], "option.source_twice"),
        (["image=b.png"], "option.source_twice"),
    ],
)
def test_wrong_values_of_source_are_refused(mmx, image_audio_model, tmp_path, sources, code) -> None:
    options = [f"--source={source}" for source in sources]
    ran = mmx("ask", draw(tmp_path / "a.png", 3), "what?", *options, "--model", image_audio_model)
    assert ran.refused().code == code


def test_an_unknown_source_is_refused(mmx, image_audio_model, tmp_path) -> None:
    ran = mmx("ask", draw(tmp_path / "a.png", 3), "what?", "--source", "sound=b.snd", "--model", image_audio_model)
    assert (ran.out, len(ran.errors)) == ("", 1)
    assert ran.code in (1, 2)
    assert "'sound'" in ran.err


def test_encoders_check_reports_each_check_and_fails_with_one(mmx, image_audio_model, tmp_path) -> None:
    for name, numbers in (("b.snd", "1 2 3"), ("c.snd", "-4 0.5"), ("d.snd", "1"), ("e.snd", "nan")):
        (tmp_path / name).write_text(numbers)
    samples = [f"--sample={name}.snd" for name in "bcd"]
    words = ("encoders", "check", "sound_encoder:Sound")
    ran = mmx(*words, "features=4", "--only", "mask", "--only", "finite", *samples)
    assert (ran.code, ran.lines, ran.err) == (0, ["passed   finite", "passed   mask"], "")
    ran = mmx(*words, "--only", "finite", *samples, "--sample=e.snd", "--json")
    assert (ran.code, ran.rows[0]["status"]) == (1, "failed")
    assert all(ran.rows[0][field] for field in ("message", "reason", "remedy"))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["imagge"], "encoder.unknown"),
        (["image", "sise=3"], "config.unknown_key"),
    ],
)
def test_a_check_of_an_unknown_encoder_or_option(mmx, words, code) -> None:
    assert mmx("encoders", "check", *words).refused().code == code


@pytest.mark.parametrize("words", [["mmx.testing:ToyEncoder"], ["image", "--only", "oder"]])
def test_a_check_without_samples_or_of_an_unknown_name(mmx, words) -> None:
    assert isinstance(mmx("encoders", "check", *words).refused(), package.MmxError)


# ---- checkpoints that do not fit -------------------------------------------------------------------------------


def test_a_checkpoint_of_another_shape(mmx, model, images, tmp_path, image_source) -> None:
    other = save_model(tmp_path / "other", tiny_model({"image": image_source}, hidden_size=64))
    (other / "config.yaml").write_bytes((model / "config.yaml").read_bytes())
    error = mmx("caption", images[0], "--model", other).refused()
    assert error.code.startswith("checkpoint.")


def test_a_model_without_an_image_source(mmx, images, tmp_path) -> None:
    numbers = save_model(tmp_path / "numbers", tiny_model())
    ran = mmx("caption", images[0], "--model", numbers)
    assert (ran.code, ran.out, len(ran.errors)) == (1, "", 1)
    assert "ToyEncoder" in ran.err


def test_a_checkpoint_whose_encoder_is_not_installed(mmx, images, tmp_path, image_source) -> None:
    other = save_model(tmp_path / "other", tiny_model({"image": image_source}))
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("encoder: image", "encoder: imagge"))
    assert mmx("caption", images[0], "--model", other).refused().code == "encoder.unknown"
