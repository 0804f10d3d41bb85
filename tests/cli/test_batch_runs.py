"""Captions and answers by the thousand, as a person orders them: stopped and gone on with, split, listed, packed."""

import codecs
import json
import math
import os
import random
import signal
import sys
import tarfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from batch_cases import FakeGenerator, as_file, write_texts
from cli_cases import draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmx.cli import app as cli
from mmx.cli import speak
from mmx.cli.rows import remaining
from mmx.inference.pipeline import Pipeline


@pytest.fixture
def fake(monkeypatch) -> FakeGenerator:
    """The program with a fast fake model."""
    speaker = FakeGenerator()
    monkeypatch.setattr(speak, "load_pipeline", lambda *given: speaker)
    return speaker


def rows_of(out: Path) -> list[dict]:
    text = out.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n"), "no torn line"
    return [json.loads(line) for line in text.splitlines()]


def images(ran) -> list[str]:
    return [row["image"] for row in ran.rows]


# ---- killed, and started again -----------------------------------------------------------------------------------


def killed(words: list[str], out: Path, lines: int, pause: float) -> bool:
    """Run the program in a process of its own and kill it once the file has grown by so many lines, and a little later.

    Returns whether it was killed; else it had come to its end. A fork, for that takes no second to begin.
    """
    before = out.read_bytes().count(b"\n") if out.exists() else 0
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.argv = ["mmx", *words]
            cli.main()
        except SystemExit as left:
            code = left.code or 0
        finally:
            os._exit(code)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if out.exists() and out.read_bytes().count(b"\n") >= before + lines:
            time.sleep(pause)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.WIFSIGNALED(status)
        time.sleep(0.001)
    return False


def many(tmp_path: Path, count: int) -> Path:
    """A manifest of texts, the 7th of which is bad."""
    path = tmp_path / "list.jsonl"
    rows = ({"text": "bad" if n == 7 else f"text {n}", "id": n} for n in range(count))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def check_kills(mmx, fake, tmp_path, count: int, kills: int) -> None:
    data, out, chance = many(tmp_path, count), tmp_path / "c.jsonl", random.Random(0)
    words = ["caption", str(data), "--out", str(out), "--batch-size", "8"]
    share = count // (kills + 2)
    done = [killed(words, out, chance.randint(1, share), chance.uniform(0, 0.003)) for _ in range(kills)]
    assert all(done)
    assert 0 < out.read_bytes().count(b"\n") < count
    ran = mmx(*words)
    assert ran.code == 1
    rows = rows_of(out)
    assert [row["id"] for row in rows] == list(range(count)), "each once, in order"
    assert [row["caption"] for row in rows if "error" not in row] == [f"text {n}" for n in range(count) if n != 7]
    assert sorted(os.listdir(tmp_path)) == ["c.jsonl", "c.jsonl.run.json", "list.jsonl"]


def test_killed_three_times_every_id_is_there_once(mmx, fake, tmp_path) -> None:
    fake.seconds = 0.001
    check_kills(mmx, fake, tmp_path, 60, 3)


@pytest.mark.slow
def test_killed_twenty_times_every_id_of_twenty_thousand_is_there_once(mmx, fake, tmp_path) -> None:
    fake.seconds = 0.0001
    check_kills(mmx, fake, tmp_path, 20_000, 20)


def test_a_stopped_run_says_only_what_is_missing(mmx, model, photos, tmp_path, monkeypatch) -> None:
    out, real = tmp_path / "c.jsonl", Pipeline.captions

    def interrupted(self, *given, **options):
        yield from islice(real(self, *given, **options), 2)
        raise KeyboardInterrupt

    words = ("caption", *photos, "--model", model, "--out", out, "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "captions", interrupted)
        assert mmx(*words) == (130, "", "")
    assert len(rows_of(out)) == 2
    encoded, encode = [], Pipeline.encode_prepared
    monkeypatch.setattr(Pipeline, "encode_prepared", lambda self, p: encoded.append(len(p)) or encode(self, p))
    assert mmx(*words) == (0, "", "")
    assert encoded == [2, 1]
    before = out.read_bytes()
    assert mmx(*words) == (0, "", "")
    assert (encoded, out.read_bytes()) == ([2, 1], before)
    for row, whole in zip(rows_of(out), mmx("caption", *photos, "--model", model, "--json").rows, strict=True):
        assert row == {**whole, "score": pytest.approx(whole["score"], abs=2e-4)}, "in other batches"


def test_the_same_seed_twice_gives_equal_captions(mmx, model, photos, tmp_path) -> None:
    for name in ("a", "b"):
        assert mmx("caption", *photos, "--model", model, "--out", tmp_path / name).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_options_and_another_command_are_refused(mmx, model, photos, tmp_path) -> None:
    out = tmp_path / "c.jsonl"
    words = ("caption", photos[0], "--model", model, "--out", out)
    assert mmx(*words).code == 0
    before = out.read_bytes()
    said = mmx(*words, "--beams", 3).refused()
    remedy = "type --overwrite to start anew, or choose another --out."
    assert said == f"{out} was made with num_beams 1, and this run has num_beams 3; {remedy}"
    assert 'command "ask"' in mmx("ask", photos[0], "what?", "--model", model, "--out", out).refused()
    assert mmx("caption", tmp_path / "photos" / "*.gif", "--model", model, "--out", out, "--overwrite").code == 2
    assert out.read_bytes() == before
    assert mmx(*words, "--beams", 3, "--overwrite").code == 0
    assert len(rows_of(out)) == 1
    assert json.loads((tmp_path / "c.jsonl.run.json").read_text())["options"]["num_beams"] == 3


def test_other_weights_under_the_same_name_are_refused(mmx, fake, tmp_path) -> None:
    """Of a published model, which states no hash of its own."""
    weights, [photo] = tmp_path / "m" / "model.safetensors", write_texts(tmp_path / "in", {"a.jpg": "a"})
    weights.parent.mkdir()
    words = ("caption", photo, "--model", weights.parent, "--out", tmp_path / "c.jsonl")
    weights.write_bytes(b"one")
    assert mmx(*words).code == mmx(*words).code == 0
    weights.write_bytes(b"two")
    assert "was made with weights" in mmx(*words).refused()


def test_two_things_wrong_with_one_picture_are_both_told(mmx, fake, tmp_path) -> None:
    [photo] = write_texts(tmp_path, {"a.jpg": "a"})
    ran = mmx("ask", photo, "why?", "x" * 70 + "?", "--box", "0,0,1,1")
    assert ran.errors == ["the question is too long."]
    [bad] = write_texts(tmp_path, {"b.jpg": "bad"})
    assert len(mmx("ask", bad, "why?", "how?", "x" * 70).errors) == 2


def test_errors_are_tried_again_when_that_is_asked_for(mmx, fake, tmp_path) -> None:
    paths, out = write_texts(tmp_path / "in", {"a.jpg": "a", "b.jpg": "bad", "c.jpg": "c"}), tmp_path / "c.jsonl"
    words = ("caption", tmp_path / "in", "--out", out)
    first = mmx(*words)
    assert (first.code, len(first.errors)) == (1, 1)
    again = mmx(*words)
    assert (again.code, again.out) == (1, "")
    assert again.errors == [f"{out}: one row is an error of an earlier run; --retry-errors tries again."]
    Path(paths[1]).write_text("b")
    assert mmx(*words, "--retry-errors") == (0, "", "")
    assert [(row["image"], row["caption"]) for row in rows_of(out)] == list(zip([paths[0], paths[2], paths[1]], "acb"))


@pytest.mark.parametrize("flag", ["--overwrite", "--retry-errors"])
def test_what_is_for_a_file_needs_one(mmx, fake, tmp_path, flag) -> None:
    write_texts(tmp_path, {"a.jpg": "a"})
    assert mmx("caption", tmp_path, flag).refused() == f"{flag} was given and no file; type {flag} --out FILE."


# ---- equal ids ---------------------------------------------------------------------------------------------------


def write_list(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_equal_ids_of_different_pictures_are_all_said_and_the_same_twice_is_one(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path, {f"{name}.jpg": name for name in "abcde"})
    one = write_list(tmp_path / "1.jsonl", {"image": "a.jpg", "id": 0}, {"image": "b.jpg", "id": 1})
    two = write_list(tmp_path / "2.jsonl", {"image": "c.jpg", "id": 0}, {"image": "d.jpg", "id": 1})
    out = tmp_path / "out" / "c.jsonl"
    assert mmx("caption", one, two, one, "--out", out).code == 0
    assert [(row["id"], row["caption"]) for row in rows_of(out)] == [(0, "a"), (1, "b"), (0, "c"), (1, "d")]
    write_list(one, {"image": "e.jpg", "id": 0}, {"image": "b.jpg", "id": 1, "author": "new"})
    assert mmx("caption", one, two, "--out", out).code == 0
    assert [(row["id"], row["caption"]) for row in rows_of(out)[4:]] == [(0, "e")]


def test_equal_ids_of_questions_about_different_pictures_are_all_answered(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "b"})
    lines = [{"image": f"{name}.jpg", "question": "x?", "id": 5} for name in "aba"]
    data, out = write_list(tmp_path / "q.jsonl", *lines), tmp_path / "answers.jsonl"
    assert mmx("ask", "--data", data, "--out", out).code == 0
    assert [row["answer"] for row in rows_of(out)] == ["a x?", "b x?"]


# ---- results among the inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["a.jpg", "s.tar", "l.jsonl", "link.jpg", "image=a.jpg", "hard.jpg"])
def test_an_input_is_not_written_over(mmx, fake, tmp_path, monkeypatch, name, flag) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "b"})
    write_shard(tmp_path / "s.tar", {"c.jpg": "c"})
    write_list(tmp_path / "l.jsonl", {"image": "a.jpg"})
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "hard.jpg").hardlink_to("a.jpg")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    out = "./a.jpg" if name in ("link.jpg", "hard.jpg") else name.removeprefix("image=")
    said = mmx("caption", "b.jpg", name, "--out", out, *flag).refused()
    shown = name.removeprefix("image=")
    assert said == f"--out {Path(out)} would be written over {shown}, an input; choose another --out."
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_questions_and_their_pictures_are_not_written_over(mmx, fake, tmp_path, monkeypatch, flag) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path, {"a.jpg": "a"})
    write_list(tmp_path / "q.run.json", {"image": "a.jpg", "question": "x?"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for out, over in (("q.run.json", "q.run.json"), ("q", "q.run.json"), ("a.jpg", "a.jpg")):
        said = mmx("ask", "--data", "q.run.json", "--out", out, *flag).refused()
        assert said == f"--out {out} would be written over {over}, an input; choose another --out."
    assert "over a.jpg, an input" in mmx("ask", "a.jpg", "x?", "--out", "a.jpg", *flag).refused()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("typed", ["pics/*", "pics/**", "pics"])
def test_results_among_what_a_pattern_finds_are_not_read(mmx, fake, tmp_path, monkeypatch, typed) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "pics", {"a.jpg": "a", "b.jpg": "b"})
    for out in ("pics/c.jsonl", "pics/d.jpg"):
        for _ in range(2):
            assert mmx("caption", typed, "--out", out) == (0, "", "")
            assert [row["image"] for row in rows_of(Path(out))] == ["pics/a.jpg", "pics/b.jpg"]
        Path(out).unlink()


# ---- pipes -------------------------------------------------------------------------------------------------------


def test_out_may_be_a_pipe_of_the_shell(mmx, fake, tmp_path) -> None:
    paths = write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "b"})
    reader, writer = os.pipe()
    try:
        assert mmx("caption", *paths, "--out", f"/dev/fd/{writer}") == (0, "", "")
        assert os.read(reader, 4096).decode() == mmx("caption", *paths, "--json").out
    finally:
        os.close(reader)
    assert mmx("caption", *paths, "--out", f"/dev/fd/{writer}") == (1, "", ""), "nobody reads on"
    os.close(writer)


def test_out_may_be_stdout(mmx, fake, tmp_path) -> None:
    path = write_texts(tmp_path, {"a.jpg": "a"})[0]
    assert mmx("caption", path, "--out", "-") == mmx("caption", path, "--json")
    assert mmx("ask", path, "x?", "--out", "-") == mmx("ask", path, "x?", "--json")
    assert mmx("caption", path, "--out", "-", "--overwrite").refused().startswith("--overwrite was given and no file")


def test_a_score_that_is_no_number_is_null(mmx, fake, tmp_path) -> None:
    path, real = write_texts(tmp_path, {"a.jpg": "a"})[0], fake.say
    fake.say = lambda *given: [[[replace(said, score=math.nan) for said in q] for q in r] for r in real(*given)]
    assert mmx("caption", path, "--json").rows == [{"image": path, "caption": "a", "score": None}]


# ---- odd names ---------------------------------------------------------------------------------------------------


def test_names_and_questions_do_not_break_a_line_or_reach_the_terminal(mmx, fake, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = "x\ny\t\x1b[2J\x9b.jpg"
    paths = write_texts(Path(), {odd: "a", "b.jpg": "b"})
    shard = write_shard(tmp_path / "s.tar", {odd: "c"})
    plain = "x y ?[2J?.jpg"
    ran = mmx("caption", odd, shard)
    assert ran.out == f"{plain}\ta\n{shard}/{plain}\tc\n"
    data = write_list(tmp_path / "q.jsonl", *({"image": path, "question": "w\x1b?\nz"} for path in paths))
    assert mmx("ask", "--data", data).out == f"{plain}\tw? z\ta w? z\nb.jpg\tw? z\tb w? z\n".replace("w?", "w??")
    ran = mmx("caption", odd, "--json")
    assert ran.rows[0]["image"] == odd
    assert ran.out.strip().isprintable()


@pytest.mark.parametrize("words", [["caption", ""], ["caption", "a.jpg", ""], ["ask", "", "x?"]])
def test_a_name_of_no_letters_is_not_the_current_folder(mmx, fake, tmp_path, monkeypatch, words) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path, {"a.jpg": "a"})
    said = "an input was given as '', which names nothing; expected a path, type . for this folder."
    assert mmx(*words).refused() == said


@pytest.mark.parametrize("address", ["http://a.b/c.jpg", "https://a.b/c.jpg?x=*"])
def test_an_address_keeps_its_spelling(mmx, fake, model, tmp_path, address) -> None:
    path = write_texts(tmp_path, {"a.jpg": "a"})[0]
    data = write_list(tmp_path / "l.jsonl", {"image": address}, {"image": "a.jpg"})
    asked = write_list(tmp_path / "q.jsonl", {"image": address, "question": "x?"})
    for words in (["caption", address, path], ["caption", data], ["ask", address, "x?"], ["ask", "--data", asked]):
        ran = mmx(*words, "--json")
        assert ran.rows[0]["image" if "image" in ran.rows[0] else "input"] == address
        assert address in ran.rows[0]["error"]


# ---- bad ones among many -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_one_in_twenty_is_bad_and_the_rest_is_said_in_order(mmx, model, tmp_path, count) -> None:
    paths = [draw(tmp_path / "in" / f"{n:04}.png", n % 50) for n in range(count)]
    bad = random.Random(0).sample(range(count), count // 20)
    for number in bad:
        paths[number].write_bytes(b"no picture %d" % number)
    out = tmp_path / "c.jsonl"
    ran = mmx("caption", tmp_path / "in", "--model", model, "--out", out)
    rows = rows_of(out)
    assert ran.code == 1
    assert [row["image"] for row in rows] == list(map(str, paths))
    assert [n for n, row in enumerate(rows) if "error" in row] == sorted(bad)
    assert sum("caption" in row for row in rows) == count - count // 20
    assert len(ran.errors) == len(bad)


# ---- parts -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 7), st.sets(st.text("abc/é", min_size=1, max_size=5), max_size=20))
def test_parts_are_disjoint_and_together_everything(count, names) -> None:
    items = [SimpleNamespace(facts={"image": name}) for name in sorted(names)]
    found = [list(remaining(items, (i, count), lambda item: item.facts["image"], None, None)) for i in range(count)]
    parts = [[item.facts["image"] for item in part] for part in found]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(part == [name for name in sorted(names) if name in part] for part in parts), "in order"


def test_parts_of_folders_shards_and_questions(mmx, fake, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # which part a name falls into depends on all of it: here it is always the same
    paths = write_texts(Path("in"), {f"{n:02}.jpg": f"text {n}" for n in range(40)})
    shard = write_shard(Path("s.tar"), {f"{n:02}.jpg": f"packed {n}" for n in range(40)})
    found = [mmx("caption", "in", shard, "--json", "--shard", f"{i}/3") for i in range(3)]
    expected = [*paths, *(f"{shard}/{n:02}.jpg" for n in range(40))]
    assert all(10 < len(ran.rows) < 40 for ran in found)
    assert sorted(name for ran in found for name in images(ran)) == sorted(expected)
    data = tmp_path / "q.jsonl"
    data.write_text(
        "".join(json.dumps({"image": f"in/{n:02}.jpg", "question": q}) + "\n" for q in "ab" for n in range(9))
    )
    parts = [images(mmx("ask", "--data", data, "--json", "--shard", f"{i}/2")) for i in range(2)]
    assert len(parts[0]) + len(parts[1]) == 18
    assert set(parts[0]).isdisjoint(parts[1]), "a picture is in one part with all of its questions"


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "a/b", "1/0", "1/3/4"])
def test_a_part_that_is_none_is_refused(mmx, text) -> None:
    assert mmx("caption", "a.png", f"--shard={text}").refused().startswith("--shard was given ")


# ---- patterns, lists and shards ----------------------------------------------------------------------------------


def write_shard(path: Path, contents: dict[str, str], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, text in contents.items():
            info = tarfile.TarInfo(name)
            file, info.size = as_file(text.encode())
            archive.addfile(info, file)
    return str(path)


def test_a_quoted_pattern_is_walked_in_order(mmx, fake, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "in", {name: name for name in ("b.jpg", "a/c.jpg", "a/d.txt", "a/e/f.jpg", ".g/h.jpg")})
    assert images(mmx("caption", "in/**/*.jpg", "--json")) == ["in/a/c.jpg", "in/a/e/f.jpg", "in/b.jpg"]
    assert images(mmx("caption", "in/?/*", "--json")) == ["in/a/c.jpg", "in/a/e/f.jpg"]
    said = mmx("caption", "in/*.png", "--json").refused()
    assert said == "'in/*.png': no pictures match this pattern; check the path."
    write_texts(tmp_path, {"x[1].jpg": "itself"})
    assert images(mmx("caption", "x[1].jpg", "--json")) == ["x[1].jpg"]


def test_a_list_names_pictures_from_its_folder_and_keeps_what_it_says(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path / "in", {"a.jpg": "a", "b.jpg": "b"})
    data = tmp_path / "in" / "list.jsonl"
    lines = [
        {"image": "a.jpg", "id": 7, "captions": ["x"], "author": "me", "score": 3},
        "no JSON",
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
    a, broken, empty, gone, b, *wrong = ran.rows
    assert ran.code == 1
    assert a == {"image": str(tmp_path / "in" / "a.jpg"), "id": 7, "author": "me", "caption": "a", "score": -0.5}
    assert broken["error"].startswith(f"{data}:3 is no JSON object")
    assert empty["error"].startswith(f"{data}:5 names no input; expected a field of the model's sources")
    assert (gone["id"], "error" in gone) == (8, True)
    assert b["caption"] == "b"
    assert [row["error"] for row in wrong] == [
        f"{data}:11 has 'image': 5; expected the path of a file, mend the line.",
        f"{data}:13 has 'image': \"\"; expected the path of a file, mend the line.",
        f"{data}:15 has a number that is not finite, such as NaN; write null, or leave it out.",
        f"{data}:17 has 'text': [\"b\"]; expected a text, mend the line.",
    ]
    data.write_text("\n")
    assert mmx("caption", data).refused() == f"{str(data)!r}: no lines are in this list; check the path."
    data.write_text("nothing\n")
    assert mmx("caption", data).refused().startswith(f"{data}:1 is no JSON object")


def test_shards_are_captioned_and_bad_members_are_rows(mmx, model, tmp_path) -> None:
    path = tmp_path / "s.tar.gz"
    picture = draw(tmp_path / "a.png", 3).read_bytes()
    with tarfile.open(path, "w:gz") as archive:
        for name, data in {
            "0.png": picture,
            "0.json": b"{}",
            "1.png": b"no",
            "../2.png": b"",
            "3.png": picture,
        }.items():
            info = tarfile.TarInfo(name)
            file, info.size = as_file(data)
            archive.addfile(info, file)
    empty = write_shard(tmp_path / "e.tar", {"a.txt": "no picture"})
    assert mmx("caption", empty, "--model", model).refused().startswith(f"{empty!r}: no pictures are in this tar file")
    ran = mmx("caption", path, "--model", model, "--json")
    first, bad, outside, twin = ran.rows
    assert (ran.code, images(ran)) == (1, [f"{path}/{name}" for name in ("0.png", "1.png", "../2.png", "3.png")])
    assert bad["error"].startswith(f"'{path}/1.png': a picture of 2 bytes: ")
    assert "leads out of its folder" in outside["error"]
    single = mmx("caption", tmp_path / "a.png", "--model", model, "--json").rows[0]
    assert (
        (first["caption"], first["score"]) == (twin["caption"], twin["score"]) == (single["caption"], single["score"])
    )


def test_what_is_listed_by_a_pattern_may_be_lists_and_shards(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path, {"a.jpg": "a", "l.jsonl": json.dumps({"text": "b"}), "notes.txt": "no"})
    write_shard(tmp_path / "s.tar", {"c.jpg": "c"})
    assert [row["caption"] for row in mmx("caption", tmp_path / "*", "--json").rows] == ["a", "b", "c"]


def test_a_pattern_finds_lists_and_shards_in_a_folder_that_was_walked(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "b", "l.jsonl": json.dumps({"text": "l"})})
    write_shard(tmp_path / "s.tar", {"c.jpg": "c"})
    for pattern, more in (("*.tar", ["c"]), ("*", ["l", "c"]), ("*.jpg", [])):
        ran = mmx("caption", tmp_path, tmp_path / pattern, "--json")
        assert (ran.code, [row["caption"] for row in ran.rows]) == (0, ["a", "b", *more])


def test_a_folder_that_was_walked_is_not_walked_again(mmx, fake, tmp_path) -> None:
    paths = write_texts(tmp_path / "in", {"a.jpg": "a", "b/c.jpg": "c"})
    for folders in (["in", "in/b"], ["in", "in"], ["in/b", "in"]):
        ran = mmx("caption", *(tmp_path / folder for folder in folders), "--json")
        assert (ran.code, sorted(images(ran))) == (0, sorted(paths))


def test_a_million_names_are_not_listed_before_the_first_caption(mmx, fake, tmp_path) -> None:
    data, out = tmp_path / "list.jsonl", tmp_path / "c.jsonl"
    taken, real = [], fake.prepare
    fake.prepare = lambda image: taken.append(out.stat().st_size) or real(image)
    data.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(100)))
    assert mmx("caption", data, "--out", out, "--batch-size", 5).code == 0
    assert taken[:5] == [0] * 5
    assert len(set(taken)) == 20, "each batch is written before the next but one is prepared"


# ---- questions ---------------------------------------------------------------------------------------------------


def test_questions_go_on_where_they_stopped_and_keep_their_ids(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path, {"a.jpg": "a", "b.jpg": "bad"})
    data, out = tmp_path / "q.jsonl", tmp_path / "answers.jsonl"
    asked = [
        {"image": "a.jpg", "question": "x?", "question_id": 5, "split": "val"},
        {"image": "b.jpg", "question": "x?", "id": "six"},
        {"image": "a.jpg", "question": "x?", "box": [0, 0, 0.5, 0.5]},
        {"image": "a.jpg", "question": "x?"},
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in asked))
    assert mmx("ask", "--data", data, "--out", out).code == 1
    rows = rows_of(out)
    assert [{key: row[key] for key in line} for row, line in zip(rows, asked, strict=True)] == asked
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]) + '{"image": "a.jpg", "quest')
    before = list(fake.said)
    assert mmx("ask", "--data", data, "--out", out).code == 1
    assert rows_of(out) == rows
    assert fake.said[len(before) :] == [(1, 2)], "the two that were missing"


# ---- progress ----------------------------------------------------------------------------------------------------


def test_progress_is_told_on_a_terminal_with_rate_and_time_left(tmp_path, fake, monkeypatch, capsys) -> None:
    fake.seconds = 0.03
    write_texts(tmp_path / "in", {f"{n}.jpg": f"text {n}" for n in range(20)})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        sys, "argv", ["mmx", "caption", f"{tmp_path}/in", "--out", f"{tmp_path}/c", "--batch-size", "2"]
    )
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert "/s]" in shown
    assert "<" in shown
