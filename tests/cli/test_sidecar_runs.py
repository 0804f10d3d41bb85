"""Captions next to images and in tar archives, tables of rows: killed and continued, two processes, bad input."""

import csv
import json
import os
import random
import sys
import tarfile
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
from batch_cases import FakeGenerator, as_file, write_texts
from cli_cases import OK, read_rows, write_jsonl
from killed_runs import run_and_kill, start_run, wait_for

from mmx.inference.outputs import GeneratedText
from mmx.io import atomic, sidecars, xmp


class CountingGenerator(FakeGenerator):
    """A generator whose text is another one each time, so that a text that was generated again is noticed."""

    def generate_batch(self, memory, questions, options, boxes=(), starts=()):
        super().generate_batch(memory, questions, options, boxes, starts)
        return [[[GeneratedText(f"{text} of {os.getpid()} {next(self.numbers)}", -0.5, ())]] for text in memory]

    numbers = count()


def patch_model(monkeypatch, generator):
    for command in ("caption", "ask"):
        monkeypatch.setattr(sys.modules[f"mmx.cli.{command}"], "load_pipeline", lambda *args: generator)
    return generator


@pytest.fixture
def fake(monkeypatch) -> FakeGenerator:
    return patch_model(monkeypatch, FakeGenerator())


@pytest.fixture
def counting(monkeypatch) -> CountingGenerator:
    """Files are not flushed: a killed process leaves what it has written, only a power failure does not."""
    monkeypatch.setattr(atomic, "_flush_file", lambda path: None)
    return patch_model(monkeypatch, CountingGenerator(seconds=0.0005))


@pytest.fixture
def written(monkeypatch, tmp_path):
    """Returns a function that counts how often each sidecar was written, by all processes."""
    log = tmp_path / "log"
    write = sidecars.atomic_write_bytes

    def write_and_log(path, content):
        write(path, content)
        with log.open("a") as file:
            file.write(f"{path}\n")

    monkeypatch.setattr(sidecars, "atomic_write_bytes", write_and_log)
    return lambda: Counter(log.read_text().splitlines() if log.exists() else [])


def texts_of(folder: Path, suffix: str = ".txt") -> dict[str, str]:
    """Texts by stem. What killed processes were writing under a hidden name is no sidecar."""
    return {path.stem: path.read_text() for path in sorted(folder.glob(f"[!.]*{suffix}"))}


def write_images(folder: Path, number: int) -> list[str]:
    names = [f"{n:05}" for n in range(number)]
    write_texts(folder, {f"{name}.jpg": f"image {name}" for name in names})
    return names


# ---- killed, and started again ---------------------------------------------------------------------------------


def kill_some_times(words, file, line_length, number, kills) -> None:
    """Kill the program when a file, which has a line for each image, has grown by some lines."""
    generator = random.Random(0)
    step = max(1, number // (kills + 2))
    for _ in range(kills):
        more = generator.randint(1, step) * line_length
        assert run_and_kill(
            words, lambda: file.stat().st_size if file.exists() else 0, more, generator.uniform(0, 0.003)
        )


def check_whole(text: str, name: str) -> None:
    """A text is that of its image, and not a part of it."""
    assert text.startswith(f"image {name} of ") and text.split(" ")[-1].isdecimal(), text


def check_killed_folder(mmx, written, folder, number, kills) -> None:
    names = write_images(folder, number)
    words = ["caption", str(folder), "--sidecar", ".txt", "--quiet", "--batch-size", "8"]
    log = folder.parent / "log"
    kill_some_times(words, log, len(f"{folder}/00000.txt\n"), number, kills)
    assert 0 < len(texts_of(folder)) < number
    before = texts_of(folder)
    assert mmx(*words).code == 0
    texts = texts_of(folder)
    assert list(texts) == names
    for name, text in texts.items():
        check_whole(text, name)
    assert before.items() <= texts.items(), "what was there stays"
    assert set(written().values()) == {1}, "each once"


def check_killed_appending(mmx, folder, number, kills, out) -> None:
    names = write_images(folder, number)
    for name in names:
        (folder / f"{name}.txt").write_text("old")
    words = ["caption", str(folder), "--sidecar", "txt", "--existing", "append", "--out", str(out), "--batch-size", "8"]
    kill_some_times(words, out, len(str(folder)) + 80, number, kills)
    assert mmx(*words).outputs == OK
    captions = {Path(row["image"]).stem: row["caption"] for row in read_rows(out)}
    assert len(read_rows(out)) == number
    assert list(captions) == names
    assert texts_of(folder) == {name: f"old\n{caption}" for name, caption in captions.items()}, "each once"
    assert mmx(*words).outputs == OK
    assert sorted(path.name for path in out.parent.glob("c.jsonl*")) == ["c.jsonl", "c.jsonl.run.json"]


def test_after_three_kills_each_sidecar_is_written_once(mmx, counting, written, tmp_path) -> None:
    check_killed_folder(mmx, written, tmp_path / "in", 80, 3)


def test_after_three_kills_each_line_is_appended_once(mmx, counting, tmp_path) -> None:
    check_killed_appending(mmx, tmp_path / "in", 80, 3, tmp_path / "c.jsonl")


@pytest.mark.slow
def test_after_twenty_kills_each_of_ten_thousand_sidecars_is_written_once(mmx, counting, written, tmp_path) -> None:
    counting.seconds = 0
    check_killed_folder(mmx, written, tmp_path / "in", 10_000, 20)


@pytest.mark.slow
def test_after_twenty_kills_each_of_ten_thousand_lines_is_appended_once(mmx, counting, tmp_path) -> None:
    counting.seconds = 0
    check_killed_appending(mmx, tmp_path / "in", 10_000, 20, tmp_path / "c.jsonl")


def check_two_processes(written, folder, number) -> None:
    names = write_images(folder, number)
    words = ["caption", str(folder), "--sidecar", ".txt", "--quiet", "--batch-size", "4"]
    children = [start_run(words), start_run(words)]
    assert [wait_for(child) for child in children] == [0, 0]
    texts = texts_of(folder)
    assert list(texts) == names
    for name, text in texts.items():
        check_whole(text, name)
    assert set(written().values()) == {1}, "each once"
    assert len(written()) == number


@pytest.mark.parametrize("number", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_two_processes_over_one_folder_write_each_sidecar_once(counting, written, tmp_path, number) -> None:
    check_two_processes(written, tmp_path / "in", number)


def test_two_processes_that_append_lose_no_line(counting, tmp_path) -> None:
    names = write_images(tmp_path / "in", 40)
    words = ["caption", str(tmp_path / "in"), "--sidecar", ".txt", "--existing", "append", "--batch-size", "4"]
    children = [start_run([*words, "--out", str(tmp_path / f"{n}.jsonl")]) for n in range(2)]
    assert [wait_for(child) for child in children] == [0, 0]
    texts = texts_of(tmp_path / "in")
    assert list(texts) == names
    for n in range(2):
        for row in read_rows(tmp_path / f"{n}.jsonl"):
            assert row["caption"] in texts[Path(row["image"]).stem].splitlines()
    assert {len(text.splitlines()) for text in texts.values()} == {2}


# ---- options ---------------------------------------------------------------------------------------------------


def test_sidecars_of_every_kind_and_the_printed_lines(mmx, fake, tmp_path) -> None:
    paths = write_texts(tmp_path / "in", {"a.jpg": "a cat", "x/a.png": "a dog"})
    ran = mmx("caption", tmp_path / "in", "--sidecar", ".txt", "--sidecar", "json", "--xmp")
    assert ran.outputs == (0, f"{paths[0]}\ta cat\n{paths[1]}\ta dog\n", "")
    assert (tmp_path / "in" / "a.txt").read_text() == "a cat"
    assert json.loads((tmp_path / "in" / "x" / "a.json").read_text()) == {"caption": "a dog", "score": -0.5}
    assert xmp.read_description((tmp_path / "in" / "a.xmp").read_bytes()) == "a cat"
    fake.decoded.clear()
    ran = mmx("caption", tmp_path / "in", "--sidecar", ".txt", "--json")
    assert (ran.code, ran.out, len(ran.errors), fake.decoded) == (0, "", 1, []), "nothing is captioned again"
    ran = mmx("caption", tmp_path / "in", "--sidecar", ".txt", "--existing", "overwrite", "--json")
    assert len(ran.rows) == 2


def test_a_file_without_sidecars_is_not_continued_with_them(mmx, fake, tmp_path) -> None:
    [image] = write_texts(tmp_path / "in", {"a.jpg": "a"})
    words = ("caption", image, "--out", tmp_path / "c.jsonl")
    assert mmx(*words).outputs == OK
    error = mmx(*words, "--sidecar", ".txt").refused()
    assert (error.code, error.details["differences"]) == ("results.other_run", ["sidecars"])
    run_file = tmp_path / "c.jsonl.run.json"
    run = json.loads(run_file.read_text())
    earlier = json.dumps({name: value for name, value in run.items() if name not in ("sidecars", "existing")})
    run_file.write_text(earlier)
    assert mmx(*words).outputs == OK, "a file of an earlier version"
    run_file.write_text(earlier)
    assert mmx(*words, "--sidecar", ".txt").refused().code == "results.other_run"
    assert mmx(*words, "--sidecar", ".txt", "--overwrite").outputs == OK
    assert texts_of(tmp_path / "in") == {"a": "a"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--sidecar", ".jpg"], "option.sidecar"),
        (["--sidecar", ".txt", "--existing", "replace"], "option.existing"),
        (["--existing", "overwrite"], "option.needs_sidecar"),
        (["--sidecar", ".txt", "--existing", "append"], "option.needs_out"),
        (["--xmp", "--existing", "prepend", "--out", "-"], "option.needs_out"),
        (["--format", "xlsx", "--out", "c"], "option.format"),
        (["--format", "csv"], "option.needs_out"),
        (["--format", "csv", "--out", "-"], "option.needs_out"),
        (["--out", "c.tar"], "option.tar_input"),
        (["--format", "tar", "--out", "c.tar.gz"], "output.compressed_tar"),
    ],
)
def test_options_that_do_not_fit_are_refused(mmx, fake, tmp_path, monkeypatch, words, code) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path, {"a.jpg": "a"})
    assert mmx("caption", "a.jpg", *words).refused().code == code
    assert os.listdir(tmp_path) == ["a.jpg"]


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_out", [False, True])
def test_bad_sidecars_are_one_line_each_and_the_rest_goes_on(mmx, fake, tmp_path, with_out) -> None:
    folder = tmp_path / "in"
    contents = {"a.jpg": "a", "b.jpg": "b\0", "c.jpg": "c", "d.jpg": "d", "d.png": "e", "f.jpg": "bad", "x/a.jpg": "x"}
    paths = write_texts(folder, contents)
    (folder / "c.txt").write_text("mine")
    (folder / "c.txt").chmod(0o444)
    archive = tmp_path / "s.tar"
    write_archive(archive, {"t.jpg": b"t"})
    output = ("--out", tmp_path / "c.jsonl") if with_out else ("--json",)
    ran = mmx("caption", folder, archive, "--sidecar", ".txt", "--existing", "overwrite", *output)
    rows = read_rows(tmp_path / "c.jsonl") if with_out else ran.rows
    assert ran.code == 1
    bad = [paths[1], paths[2], paths[4], paths[5], f"{archive}/t.jpg"]
    assert [row["image"] for row in rows if "error" in row] == bad
    assert all("caption" not in row and "score" not in row for row in rows if "error" in row)
    assert ran.errors == [row["error"] for row in rows if "error" in row]
    assert texts_of(folder) == {"a": "a", "c": "mine", "d": "d"}
    assert texts_of(folder / "x") == {"a": "x"}
    if with_out:
        (folder / "c.txt").chmod(0o644)
        ran = mmx("caption", folder, archive, "--sidecar", ".txt", "--existing", "overwrite", *output, "--retry-errors")
        assert len(ran.errors) == 4
        assert texts_of(folder)["c"] == "c"


def test_control_characters_are_refused_for_xmp_only(mmx, fake, tmp_path) -> None:
    write_texts(tmp_path / "in", {"a.jpg": "a\x1bb", "b.jpg": "b"})
    assert mmx("caption", tmp_path / "in", "--xmp", "--sidecar", ".json").code == 1
    assert sorted(os.listdir(tmp_path / "in")) == ["a.jpg", "b.jpg", "b.json", "b.xmp"]
    assert mmx("caption", tmp_path / "in", "--sidecar", ".txt").code == 0


# ---- tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [[], ["--format", "csv"]])
def test_a_csv_file_is_made_of_the_rows_and_continued(mmx, fake, tmp_path, flag) -> None:
    folder = tmp_path / "in"
    paths = write_texts(folder, {"a,b.jpg": 'a "cat"', "b.jpg": "bad", "c.jpg": "c\0"})
    out = tmp_path / ("c" if flag else "c.csv")
    words = ("caption", folder, "--out", out, *flag)
    assert mmx(*words).code == 1
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["caption"], bool(row["error"])) for row in rows] == [
        (paths[0], 'a "cat"', False),
        (paths[1], "", True),
        (paths[2], "", True),
    ]
    first = out.read_bytes()
    out.unlink()
    assert mmx(*words).code == 1
    assert out.read_bytes() == first, "made again of the same rows"
    write_texts(folder, {"b.jpg": "b", "d.jpg": "d"})
    assert mmx(*words, "--retry-errors").code == 1
    assert [row["caption"] for row in csv.DictReader(out.read_text(encoding="utf-8").splitlines())][:1] == ['a "cat"']
    assert out.read_text(encoding="utf-8").count("\n") == 5


def test_a_file_that_was_not_made_of_rows_is_not_replaced(mmx, fake, tmp_path) -> None:
    [image] = write_texts(tmp_path / "in", {"a.jpg": "a"})
    out = tmp_path / "mine.csv"
    out.write_text("mine")
    assert mmx("caption", image, "--out", out).refused().code == "output.exists"
    assert out.read_text() == "mine"
    assert mmx("caption", image, "--out", out, "--overwrite").outputs == OK
    assert out.read_text().startswith("image,")
    data = write_jsonl(tmp_path / "list.csv.jsonl", {"image": "in/a.jpg"})
    assert mmx("caption", data, "--out", tmp_path / "list.csv").refused().code == "output.is_input"
    out = tmp_path / "in" / "a.jpg"
    assert mmx("caption", image, "--out", out, "--format", "csv", "--overwrite").refused().code == "output.is_input"


def test_answers_as_text_and_parquet(mmx, fake, tmp_path) -> None:
    [image] = write_texts(tmp_path / "in", {"a.jpg": "a"})
    assert mmx("ask", image, "x?", "y?", "--out", tmp_path / "a.txt", "--format", "txt").outputs == OK
    assert (tmp_path / "a.txt").read_text() == f"{image}\tx?\ta x?\n{image}\ty?\ta y?\n"
    parquet = pytest.importorskip("pyarrow.parquet")
    assert mmx("ask", image, "x?", "--out", tmp_path / "a.parquet").outputs == OK
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert rows == read_rows(tmp_path / "a.parquet.jsonl")
    assert mmx("ask", image, "x?", "--out", "a.tar", "--format", "tar").refused().code == "option.format"
    assert mmx("ask", image, "x?", "--out", tmp_path / "a.tar").refused().code == "option.format"
    assert not (tmp_path / "a.tar").exists()


# ---- archives --------------------------------------------------------------------------------------------------


def write_archive(path: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            file, info.size = as_file(content)
            archive.addfile(info, file)


def read_archive(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}


def test_captions_are_added_to_an_archive(mmx, fake, tmp_path) -> None:
    contents = {
        "a.jpg": b"a",
        "a.json": b"{}",
        "b.jpg": b"bad",
        "c.txt": b"old",
        "c.jpg": b"c",
        "x/a.jpg": b"x",
        "a.2.png": b"2",
    }
    write_archive(tmp_path / "s.tar", contents)
    out = tmp_path / "new.tar"
    words = ("caption", tmp_path / "s.tar", "--out", out)
    ran = mmx(*words)
    assert (ran.code, len(ran.errors)) == (1, 3), "two error rows, and how many were skipped"
    assert read_archive(out) == {**contents, "a.txt": b"a", "x/a.txt": b"x"}
    assert [Path(row["image"]).name for row in read_rows(tmp_path / "new.tar.jsonl")] == [
        "a.jpg",
        "b.jpg",
        "a.jpg",
        "a.2.png",
    ]
    first = out.read_bytes()
    fake.decoded.clear()
    assert mmx(*words).code == 1
    assert (out.read_bytes(), fake.decoded) == (first, [])
    options = ("--sidecar", ".caption", "--sidecar", ".json", "--existing", "overwrite", "--overwrite")
    assert mmx(*words, *options).code == 1
    written = read_archive(out)
    assert list(written) == [
        "a.jpg", "a.caption", "a.json", "b.jpg", "c.txt", "c.jpg", "c.caption", "c.json", "x/a.jpg", "x/a.caption",
        "x/a.json", "a.2.png",
    ]  # fmt: skip
    assert json.loads(written["a.json"]) == {"caption": "a", "score": -0.5}


def test_a_half_archive_is_refused_before_anything_is_captioned(mmx, fake, tmp_path) -> None:
    write_archive(tmp_path / "s.tar", {"a.jpg": b"a" * 5000, "b.jpg": b"b" * 5000})
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:9000])
    assert mmx("caption", tmp_path / "s.tar", "--out", tmp_path / "new.tar").refused().code == "tar.damaged"
    assert os.listdir(tmp_path) == ["s.tar"]
    assert fake.decoded == []
