"""Captions and answers for many inputs: stopped and continued, sharded, from lists, patterns and archives."""

import codecs
import json
import math
import os
import random
import sys
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from batch_cases import FakeGenerator, as_file, write_texts
from cli_cases import OK, draw, read_rows, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killed_runs import run_and_kill

from mmx.cli import app as cli
from mmx.cli.rows import remaining_items
from mmx.inference.pipeline import Pipeline


@pytest.fixture
def fake(monkeypatch) -> FakeGenerator:
    """The program with a fast fake model."""
    generator = FakeGenerator()
    for command in ("caption", "ask"):
        monkeypatch.setattr(sys.modules[f"mmx.cli.{command}"], "load_pipeline", lambda *args: generator)
    return generator


def image_names(ran) -> list[str]:
    return [row["image"] for row in ran.rows]


# ---- killed, and started again ---------------------------------------------------------------------------------


def count_lines(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def check_kills(mmx, tmp_path, count: int, kills: int) -> None:
    """Caption a list of texts, of which number 7 is bad; kill some times, then run to the end."""
    rows = [{"text": "bad" if n == 7 else f"text {n}", "id": n} for n in range(count)]
    data = write_jsonl(tmp_path / "list.jsonl", *rows)
    out = tmp_path / "c.jsonl"
    generator = random.Random(0)
    words = ["caption", str(data), "--out", str(out), "--batch-size", "8"]
    step = count // (kills + 2)
    for _ in range(kills):
        assert run_and_kill(words, lambda: count_lines(out), generator.randint(1, step), generator.uniform(0, 0.003))
    assert 0 < out.read_bytes().count(b"\n") < count
    assert mmx(*words).code == 1
    written = read_rows(out)
    assert [row["id"] for row in written] == list(range(count)), "each once, in order"
    assert [row["caption"] for row in written if "error" not in row] == [f"text {n}" for n in range(count) if n != 7]
    assert sorted(os.listdir(tmp_path)) == ["c.jsonl", "c.jsonl.run.json", "list.jsonl"]


def test_after_three_kills_every_id_is_there_once(mmx, fake, tmp_path) -> None:
    fake.seconds = 0.001
    check_kills(mmx, tmp_path, 60, 3)


@pytest.mark.slow
def test_after_twenty_kills_every_id_of_twenty_thousand_is_there_once(mmx, fake, tmp_path) -> None:
    fake.seconds = 0.0001
    check_kills(mmx, tmp_path, 20_000, 20)


def test_a_stopped_run_continues_with_what_is_missing(mmx, model, images, tmp_path, monkeypatch) -> None:
    out = tmp_path / "c.jsonl"
    captions = Pipeline.captions

    def interrupted(self, *args, **options):
        yield from islice(captions(self, *args, **options), 2)
        raise KeyboardInterrupt

    words = ("caption", *images, "--model", model, "--out", out, "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "captions", interrupted)
        assert mmx(*words).outputs == (130, "", "")
    assert len(read_rows(out)) == 2
    encoded: list[int] = []
    encode = Pipeline.encode_prepared
    monkeypatch.setattr(Pipeline, "encode_prepared", lambda self, p: encoded.append(len(p)) or encode(self, p))
    assert mmx(*words).outputs == OK
    assert encoded == [2, 1]
    before = out.read_bytes()
    assert mmx(*words).outputs == OK
    assert (encoded, out.read_bytes()) == ([2, 1], before)
    uninterrupted = mmx("caption", *images, "--model", model, "--json").rows
    for row, expected in zip(read_rows(out), uninterrupted, strict=True):
        assert row == {**expected, "score": pytest.approx(expected["score"], abs=2e-4)}, "in other batches"


def test_two_runs_give_equal_files(mmx, model, images, tmp_path) -> None:
    for name in ("a", "b"):
        assert mmx("caption", *images, "--model", model, "--out", tmp_path / name).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_of_other_options_or_another_command_is_not_continued(mmx, model, images, tmp_path) -> None:
    out = tmp_path / "c.jsonl"
    words = ("caption", images[0], "--model", model, "--out", out)
    assert mmx(*words).code == 0
    before = out.read_bytes()
    error = mmx(*words, "--num-beams", 3).refused()
    assert (error.code, error.details["differences"]) == ("results.other_run", ["num_beams"])
    error = mmx("ask", images[0], "what?", "--model", model, "--out", out).refused()
    assert (error.code, error.details["differences"]) == ("results.other_run", ["command"])
    assert mmx("caption", tmp_path / "images" / "*.gif", "--model", model, "--out", out, "--overwrite").code == 2
    assert out.read_bytes() == before
    assert mmx(*words, "--num-beams", 3, "--overwrite").code == 0
    assert len(read_rows(out)) == 1
    assert json.loads((tmp_path / "c.jsonl.run.json").read_text())["options"]["num_beams"] == 3


def test_a_file_of_other_weights_in_the_same_folder_is_not_continued(mmx, fake, tmp_path) -> None:
    """For a published model, whose folder has no hash of its weights."""
    weights = tmp_path / "m" / "model.safetensors"
    weights.parent.mkdir()
    [image] = write_texts(tmp_path / "in", {"a.jpg": "a"})
    words = ("caption", image, "--model", weights.parent, "--out", tmp_path / "c.jsonl")
    weights.write_bytes(b"one")
    assert mmx(*words).code == mmx(*words).code == 0
    weights.write_bytes(b"two")
    assert mmx(*words).refused().details["differences"] == ["weights"]


def test_different_errors_of_one_image_are_both_printed(mmx, fake, tmp_path) -> None:
    [image] = write_texts(tmp_path, {"a.jpg": "a"})
    assert len(mmx("ask", image, "why?", "x" * 70 + "?", "--box", "0,0,1,1").errors) == 1
    [bad] = write_texts(tmp_path, {"b.jpg": "bad"})
    assert len(mmx("ask", bad, "why?", "how?", "x" * 70).errors) == 2


def test_error_rows_are_processed_again_on_request(mmx, fake, tmp_path) -> None:
    paths = write_texts(tmp_path / "in", {"a.jpg": "a", "b.jpg": "bad", "c.jpg": "c"})
    out = tmp_path / "c.jsonl"
    words = ("caption", tmp_path / "in", "--out", out)
    first = mmx(*words)
    assert (first.code, len(first.errors)) == (1, 1)
    again = mmx(*words)
    assert (again.code, again.out, len(again.errors)) == (1, "", 1)
    assert again.err.startswith(f"{out}: one row is an error of an earlier run; --retry-errors ")
    Path(paths[1]).write_text("b")
    assert mmx(*words, "--retry-errors").outputs == OK
    expected = list(zip([paths[0], paths[2], paths[1]], "acb"))
    assert [(row["image"], row["caption"]) for row in read_rows(out)] == expected


@pytest.mark.parametrize("flag", ["--overwrite", "--retry-errors"])
def test_options_of_a_file_need_a_file(mmx, fake, tmp_path, flag) -> None:
    write_texts(tmp_path, {"a.jpg": "a"})
    error = mmx("caption", tmp_path, flag).refused()
    assert (error.code, error.details) == ("option.needs_out", {"option": flag})


# ---- equal ids -------------------------------------------------------------------------------------------------


def test_equal_ids_of_different_images_are_different_rows(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path, {f"{name}.jpg": name for name in "abcde"})
    one = write_jsonl(tmp_path / "1.jsonl", {"image": "a.jpg", "id": 0}, {"image": "b.jpg", "id": 1})
    two = write_jsonl(tmp_path / "2.jsonl", {"image": "c.jpg", "id": 0}, {"image": "d.jpg", "id": 1})
    out = tmp_path / "out" / "c.jsonl"
    assert mmx("caption", one, two, one, "--out", out).code == 0
    assert [(row["id"], row["caption"]) for row in read_rows(out)] == [(0, "a"), (1, "b"), (0, "c"), (1, "d")]
    write_jsonl(one, {"image": "e.jpg", "id": 0}, {"image": "b.jpg", "id": 1, "author": "new"})
    assert mmx("caption", one, two, "--out", out).code == 0
    assert [(row["id"], row["caption"]) for row in read_rows(out)[4:]] == [(0, "e")]


def test_equal_ids_of_questions_about_different_images_are_different_rows(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "b"})
    lines = [{"image": f"{name}.jpg", "question": "x?", "id": 5} for name in "aba"]
    data = write_jsonl(tmp_path / "q.jsonl", *lines)
    out = tmp_path / "answers.jsonl"
    assert mmx("ask", "--data", data, "--out", out).code == 0
    assert [row["answer"] for row in read_rows(out)] == ["a x?", "b x?"]


# ---- results among the inputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["a.jpg", "s.tar", "l.jsonl", "link.jpg", "image=a.jpg", "hard.jpg"])
def test_an_input_is_not_overwritten(mmx, fake, tmp_path, monkeypatch, name, flag) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "b"})
    write_archive(tmp_path / "s.tar", {"c.jpg": "c"})
    write_jsonl(tmp_path / "l.jsonl", {"image": "a.jpg"})
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "hard.jpg").hardlink_to("a.jpg")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    out = "./a.jpg" if name in ("link.jpg", "hard.jpg") else name.removeprefix("image=")
    error = mmx("caption", "b.jpg", name, "--out", out, *flag).refused()
    assert (error.code, error.details) == ("output.is_input", {"path": name.removeprefix("image=")})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_questions_and_their_images_are_not_overwritten(mmx, fake, tmp_path, monkeypatch, flag) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path, {"a.jpg": "a"})
    write_jsonl(tmp_path / "q.run.json", {"image": "a.jpg", "question": "x?"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for out, path in (("q.run.json", "q.run.json"), ("q", "q.run.json"), ("a.jpg", "a.jpg")):
        error = mmx("ask", "--data", "q.run.json", "--out", out, *flag).refused()
        assert (error.code, error.details) == ("output.is_input", {"path": path})
    assert mmx("ask", "a.jpg", "x?", "--out", "a.jpg", *flag).refused().code == "output.is_input"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_table_in_a_searched_folder_is_not_read(mmx, fake, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path, {"a.jpg": "a"})
    for _ in range(2):
        assert mmx("caption", "*.jpg", "--out", "b.jpg", "--format", "csv").outputs == OK
        assert [row["image"] for row in read_rows(Path("b.jpg.jsonl"))] == ["a.jpg"]


@pytest.mark.parametrize("name", ["in/*", "in/**", "in"])
def test_results_in_a_searched_folder_are_not_read(mmx, fake, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "in", {"a.jpg": "a", "b.jpg": "b"})
    for out in ("in/c.jsonl", "in/d.jpg"):
        for _ in range(2):
            assert mmx("caption", name, "--out", out).outputs == OK
            assert [row["image"] for row in read_rows(Path(out))] == ["in/a.jpg", "in/b.jpg"]
        Path(out).unlink()


# ---- pipes -----------------------------------------------------------------------------------------------------


def test_out_may_be_a_pipe_of_the_shell(mmx, fake, tmp_path) -> None:
    paths = write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "b"})
    reader, writer = os.pipe()
    try:
        assert mmx("caption", *paths, "--out", f"/dev/fd/{writer}").outputs == OK
        assert os.read(reader, 4096).decode() == mmx("caption", *paths, "--json").out
    finally:
        os.close(reader)
    assert mmx("caption", *paths, "--out", f"/dev/fd/{writer}").outputs == (1, "", ""), "the reader closed the pipe"
    os.close(writer)


def test_out_may_be_stdout(mmx, fake, tmp_path) -> None:
    path = write_texts(tmp_path, {"a.jpg": "a"})[0]
    assert mmx("caption", path, "--out", "-").outputs == mmx("caption", path, "--json").outputs
    assert mmx("ask", path, "x?", "--out", "-").outputs == mmx("ask", path, "x?", "--json").outputs
    assert mmx("caption", path, "--out", "-", "--overwrite").refused().code == "option.needs_out"


def test_a_score_that_is_not_finite_is_null(mmx, fake, tmp_path) -> None:
    path = write_texts(tmp_path, {"a.jpg": "a"})[0]
    generate_batch = fake.generate_batch

    def without_score(*args):
        texts = generate_batch(*args)
        return [[[replace(text, score=math.nan) for text in stream] for stream in row] for row in texts]

    fake.generate_batch = without_score
    assert mmx("caption", path, "--json").rows == [{"image": path, "caption": "a", "score": None}]


# ---- unusual names ---------------------------------------------------------------------------------------------


def test_control_characters_do_not_break_lines_or_reach_the_terminal(mmx, fake, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = "x\ny\t\x1b[2J\x9b.jpg"
    paths = write_texts(Path(), {odd: "a", "b.jpg": "b"})
    archive = write_archive(tmp_path / "s.tar", {odd: "c"})
    printed = "x y ?[2J?.jpg"
    assert mmx("caption", odd, archive).out == f"{printed}\ta\n{archive}/{printed}\tc\n"
    data = write_jsonl(tmp_path / "q.jsonl", *({"image": path, "question": "w\x1b?\nz"} for path in paths))
    assert mmx("ask", "--data", data).out == f"{printed}\tw?? z\ta w?? z\nb.jpg\tw?? z\tb w?? z\n"
    ran = mmx("caption", odd, "--json")
    assert ran.rows[0]["image"] == odd
    assert ran.out.strip().isprintable()


@pytest.mark.parametrize("words", [["caption", ""], ["caption", "a.jpg", ""], ["ask", "", "x?"]])
def test_an_empty_name_is_not_the_current_folder(mmx, fake, tmp_path, monkeypatch, words) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path, {"a.jpg": "a"})
    assert mmx(*words).refused().code == "input.empty_name"


@pytest.mark.parametrize("url", ["http://a.b/c.jpg", "https://a.b/c.jpg?x=*"])
def test_a_url_keeps_its_spelling_and_is_not_downloaded(mmx, fake, tmp_path, url) -> None:
    path = write_texts(tmp_path, {"a.jpg": "a"})[0]
    data = write_jsonl(tmp_path / "l.jsonl", {"image": url}, {"image": "a.jpg"})
    questions = write_jsonl(tmp_path / "q.jsonl", {"image": url, "question": "x?"})
    for words in (["caption", url, path], ["caption", data], ["ask", url, "x?"], ["ask", "--data", questions]):
        row = mmx(*words, "--json").rows[0]
        assert row["image" if "image" in row else "input"] == url
        assert url in row["error"]


# ---- unreadable inputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_one_in_twenty_is_unreadable_and_the_rest_is_captioned_in_order(mmx, model, tmp_path, count) -> None:
    paths = [draw(tmp_path / "in" / f"{n:04}.png", n % 50) for n in range(count)]
    bad = random.Random(0).sample(range(count), count // 20)
    for number in bad:
        paths[number].write_bytes(b"not an image %d" % number)
    out = tmp_path / "c.jsonl"
    ran = mmx("caption", tmp_path / "in", "--model", model, "--out", out)
    rows = read_rows(out)
    assert ran.code == 1
    assert [row["image"] for row in rows] == list(map(str, paths))
    assert [n for n, row in enumerate(rows) if "error" in row] == sorted(bad)
    assert sum("caption" in row for row in rows) == count - count // 20
    assert ran.errors == [row["error"] for row in rows if "error" in row]


# ---- shards ----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 7), st.sets(st.text("abc/é", min_size=1, max_size=5), max_size=20))
def test_shards_are_disjoint_and_complete(count, names) -> None:
    items = [SimpleNamespace(fields={"image": name}) for name in sorted(names)]
    shards = []
    for index in range(count):
        selected = remaining_items(items, (index, count), lambda item: item.fields["image"], None, None)
        shards.append([item.fields["image"] for item in selected])
    assert sorted(name for shard in shards for name in shard) == sorted(names)
    assert all(shard == sorted(shard) for shard in shards), "in order"


def test_shards_of_folders_archives_and_questions(mmx, fake, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # the shard of a name depends on all of it
    paths = write_texts(Path("in"), {f"{n:02}.jpg": f"text {n}" for n in range(40)})
    archive = write_archive(Path("s.tar"), {f"{n:02}.jpg": f"packed {n}" for n in range(40)})
    shards = [mmx("caption", "in", archive, "--json", "--shard", f"{i}/3") for i in range(3)]
    expected = [*paths, *(f"{archive}/{n:02}.jpg" for n in range(40))]
    assert all(10 < len(shard.rows) < 40 for shard in shards)
    assert sorted(name for shard in shards for name in image_names(shard)) == sorted(expected)
    questions = [{"image": f"in/{n:02}.jpg", "question": question} for question in "ab" for n in range(9)]
    data = write_jsonl(tmp_path / "q.jsonl", *questions)
    first, second = (image_names(mmx("ask", "--data", data, "--json", "--shard", f"{i}/2")) for i in range(2))
    assert len(first) + len(second) == 18
    assert set(first).isdisjoint(second), "all questions about an image are in one shard"


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "a/b", "1/0", "1/3/4"])
def test_a_wrong_shard_is_refused(mmx, text) -> None:
    assert mmx("caption", "a.png", f"--shard={text}").refused().code == "option.shard"


# ---- patterns, lists and archives ------------------------------------------------------------------------------


def write_archive(path: Path, contents: dict[str, str | bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            file, info.size = as_file(content.encode() if isinstance(content, str) else content)
            archive.addfile(info, file)
    return str(path)


def test_a_quoted_pattern_is_expanded_in_order(mmx, fake, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "in", {name: name for name in ("b.jpg", "a/c.jpg", "a/d.txt", "a/e/f.jpg", ".g/h.jpg")})
    assert image_names(mmx("caption", "in/**/*.jpg", "--json")) == ["in/a/c.jpg", "in/a/e/f.jpg", "in/b.jpg"]
    assert image_names(mmx("caption", "in/?/*", "--json")) == ["in/a/c.jpg", "in/a/e/f.jpg"]
    error = mmx("caption", "in/*.png", "--json").refused()
    assert (error.code, error.details) == ("input.nothing_found", {"path": "in/*.png"})
    write_texts(tmp_path, {"x[1].jpg": "itself"})
    assert image_names(mmx("caption", "x[1].jpg", "--json")) == ["x[1].jpg"]


def test_a_list_has_paths_relative_to_its_folder_and_fields_that_are_kept(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path / "in", {"a.jpg": "a", "b.jpg": "b"})
    data = tmp_path / "in" / "list.jsonl"
    lines = [
        {"image": "a.jpg", "id": 7, "captions": ["x"], "author": "me", "score": 3},
        "not JSON",
        {"author": "me"},
        {"image": "gone.jpg", "id": 8},
        {"image": "b.jpg"},
        {"image": 5},
        {"image": ""},
        '{"image": "b.jpg", "score2": NaN}',
        {"text": ["b"], "id": 9},
    ]
    data.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n\n" for line in lines))
    data.write_bytes(codecs.BOM_UTF8 + data.read_bytes())
    ran = mmx("caption", data, "--json")
    assert ran.code == 1
    assert ran.rows[0] == {
        "image": str(tmp_path / "in" / "a.jpg"),
        "id": 7,
        "author": "me",
        "caption": "a",
        "score": -0.5,
    }
    assert (ran.rows[3]["id"], "error" in ran.rows[3]) == (8, True)
    assert ran.rows[4]["caption"] == "b"
    for index, number in ((1, 3), (2, 5), (5, 11), (6, 13), (7, 15), (8, 17)):
        assert ran.rows[index]["error"].startswith(f"{data}:{number} has " if index > 4 else f"{data}:{number} ")
    data.write_text("\n")
    assert mmx("caption", data).refused().code == "input.nothing_found"
    data.write_text("nothing\n")
    error = mmx("caption", data).refused()
    assert (error.code, error.details["line"]) == ("data.not_json", 1)


def test_a_line_of_a_list_that_is_not_utf8_is_an_error_row(mmx, model, images) -> None:
    data = images[0].parent / "latin-1.jsonl"
    data.write_bytes(b'{"image": "0.png"}\n{"image": "1.png", "author": "Andr\xe9"}\n{"image": "2.png"}\n')
    ran = mmx("caption", data, "--model", model, "--json")
    assert ran.code == 1
    assert ["error" in row for row in ran.rows] == [False, True, False]
    assert ran.rows[1] == {"input": f"{data}:2", "error": ran.errors[0]}
    assert ran.errors[0].startswith(f"{data}:2 is not UTF-8: byte 0xe9 at byte offset 34 ")


def test_members_of_an_archive_are_captioned_and_bad_ones_are_error_rows(mmx, model, tmp_path) -> None:
    image = draw(tmp_path / "a.png", 3).read_bytes()
    contents = {"0.png": image, "0.json": b"{}", "1.png": b"no", "../2.png": b"", "3.png": image}
    path = write_archive(tmp_path / "s.tar.gz", contents, "w:gz")
    empty = write_archive(tmp_path / "e.tar", {"a.txt": "not an image"})
    error = mmx("caption", empty, "--model", model).refused()
    assert (error.code, error.details) == ("input.nothing_found", {"path": empty})
    ran = mmx("caption", path, "--model", model, "--json")
    first, bad, outside, copy = ran.rows
    assert (ran.code, image_names(ran)) == (1, [f"{path}/{name}" for name in ("0.png", "1.png", "../2.png", "3.png")])
    assert bad["error"].startswith(f"'{path}/1.png': image data of 2 bytes: ")
    assert outside["error"].startswith(f"'{path}/../2.png': ")
    single = mmx("caption", tmp_path / "a.png", "--model", model, "--json").rows[0]
    for row in (first, copy):
        assert (row["caption"], row["score"]) == (single["caption"], single["score"])


def test_a_pattern_may_match_lists_and_archives(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path, {"a.jpg": "a", "l.jsonl": json.dumps({"text": "b"}), "notes.txt": "no"})
    write_archive(tmp_path / "s.tar", {"c.jpg": "c"})
    assert [row["caption"] for row in mmx("caption", tmp_path / "*", "--json").rows] == ["a", "b", "c"]


def test_a_pattern_matches_lists_and_archives_in_a_searched_folder(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "b", "l.jsonl": json.dumps({"text": "l"})})
    write_archive(tmp_path / "s.tar", {"c.jpg": "c"})
    for pattern, added in (("*.tar", ["c"]), ("*", ["l", "c"]), ("*.jpg", [])):
        ran = mmx("caption", tmp_path, tmp_path / pattern, "--json")
        assert (ran.code, [row["caption"] for row in ran.rows]) == (0, ["a", "b", *added])


def write_odd_images(folder: Path) -> None:
    """One image next to two whose formats are not read, a file of another kind, and a hidden one."""
    write_texts(folder, {"a.jpg": "a", "b.CR2": "b", "deep/c.jxl": "c", "notes.txt": "d", ".hidden.cr2": "e"})


def test_images_in_a_folder_that_are_not_read_are_named(mmx, fake, tmp_path) -> None:
    folder = tmp_path / "in"
    write_odd_images(folder)
    for words in ([folder], [folder / "**/*"], [folder, folder], [folder, folder / "deep", folder / "*"]):
        ran = mmx("caption", *words)
        assert (ran.code, ran.lines) == (1, [f"{folder / 'a.jpg'}\ta"])
        assert len(ran.err.splitlines()) == 1
        assert "2 files" in ran.err
        assert str(folder / "b.CR2") in ran.err
        assert str(folder / "deep" / "c.jxl") in ran.err
        assert "notes" not in ran.err
        assert "hidden" not in ran.err
    assert mmx("caption", folder / "*.jpg").code == 0, "other files are not asked for"
    assert mmx("caption", folder / "deep").outputs[:2] == (1, "")


def test_images_that_are_not_read_are_an_error_row(mmx, fake, tmp_path) -> None:
    write_odd_images(tmp_path / "in")
    out = tmp_path / "out.jsonl"
    for options in ((), (), ("--retry-errors",)):
        assert mmx("caption", tmp_path / "in", "--out", out, *options).code == 1
        assert [row["image"] for row in read_rows(out)] == [str(tmp_path / "in" / "a.jpg"), str(tmp_path / "in")]
        assert "error" in read_rows(out)[1]
    for name in ("b.CR2", "deep/c.jxl"):
        (tmp_path / "in" / name).unlink()
    assert mmx("caption", tmp_path / "in", "--out", out, "--retry-errors").code == 0
    assert [row["caption"] for row in read_rows(out)] == ["a"]


def test_only_the_first_few_images_that_are_not_read_are_named(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path / "in", {f"{number:03}.cr2": "x" for number in range(300)})
    ran = mmx("caption", tmp_path / "in")
    assert ran.outputs[:2] == (1, "")
    assert "300 files" in ran.err
    assert "295 more" in ran.err
    assert ran.err.count(".cr2") == 5


def test_images_in_an_archive_that_are_not_read_are_named(mmx, fake, tmp_path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name in ("a.jpg", "b.cr2", "c.txt"):
            info = tarfile.TarInfo(name)
            content, info.size = as_file(name.encode())
            archive.addfile(info, content)
    ran = mmx("caption", tmp_path / "in.tar")
    assert (ran.code, len(ran.lines)) == (1, 1)
    assert "1 file has" in ran.err
    assert "b.cr2" in ran.err


def test_files_of_a_folder_are_captioned_once(mmx, fake, tmp_path) -> None:
    paths = write_texts(tmp_path / "in", {"a.jpg": "a", "b/c.jpg": "c"})
    for folders in (["in", "in/b"], ["in", "in"], ["in/b", "in"], ["in", "in/../in"], ["in/*.jpg", "in"]):
        ran = mmx("caption", *(tmp_path / folder for folder in folders), "--json")
        assert (ran.code, sorted(image_names(ran))) == (0, sorted(paths))


def test_rows_are_written_before_later_inputs_are_read(mmx, fake, tmp_path) -> None:
    data = write_jsonl(tmp_path / "list.jsonl", *({"text": f"text {n}"} for n in range(100)))
    out = tmp_path / "c.jsonl"
    sizes: list[int] = []
    prepare = fake.prepare
    fake.prepare = lambda image: sizes.append(out.stat().st_size) or prepare(image)
    assert mmx("caption", data, "--out", out, "--batch-size", 5).code == 0
    assert sizes[:5] == [0] * 5
    assert len(set(sizes)) == 20, "each batch is written before the next but one is prepared"


# ---- questions -------------------------------------------------------------------------------------------------


def test_questions_continue_where_they_stopped_and_keep_their_ids(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "bad"})
    out = tmp_path / "answers.jsonl"
    questions = [
        {"image": "a.jpg", "question": "x?", "question_id": 5, "split": "val"},
        {"image": "b.jpg", "question": "x?", "id": "six"},
        {"image": "a.jpg", "question": "x?", "box": [0, 0, 0.5, 0.5]},
        {"image": "a.jpg", "question": "x?"},
    ]
    data = write_jsonl(tmp_path / "q.jsonl", *questions)
    assert mmx("ask", "--data", data, "--out", out).code == 1
    rows = read_rows(out)
    for row, question in zip(rows, questions, strict=True):
        assert {key: row[key] for key in question} == question
    write_jsonl(out, *rows[:2])
    with out.open("a") as file:
        file.write('{"image": "a.jpg", "quest')
    fake.decoded.clear()
    assert mmx("ask", "--data", data, "--out", out).code == 1
    assert read_rows(out) == rows
    assert fake.decoded == [(1, 2)], "the two that were missing"


# ---- progress --------------------------------------------------------------------------------------------------


def test_the_progress_bar_shows_rate_and_remaining_time(tmp_path, fake, monkeypatch, capsys) -> None:
    fake.seconds = 0.03
    write_texts(tmp_path / "in", {f"{n}.jpg": f"text {n}" for n in range(20)})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    words = ["caption", f"{tmp_path}/in", "--out", f"{tmp_path}/c", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["mmx", *words])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert "/s]" in shown
    assert "<" in shown
