"""Sidecars: what is written next to an image, and what is never written over."""

import json
import os
from pathlib import Path

import pytest

from mmx.errors import DataError
from mmx.io import xmp
from mmx.io.pending_row import PendingRow
from mmx.io.results_file import open_results_file
from mmx.io.sidecars import EXISTING, Sidecars

RUN = {"command": "caption"}


def is_image(name):
    return name.lower().endswith((".jpg", ".png"))


def write_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("image")


def write(folder, name, text, suffixes=(".txt",), existing="skip", **options):
    """Write the sidecars of an image; return the names of those that were written."""
    with Sidecars(suffixes, existing, is_image, **options).changes(folder / name, text, {"score": -0.5}) as changes:
        for change in changes:
            change.apply()
    return [change.path.name for change in changes]


def refused(folder, name, text="new", **options):
    with pytest.raises(DataError) as caught:
        write(folder, name, text, **options)
    return caught.value.code


def test_each_kind_of_sidecar_is_written(tmp_path):
    write_files(tmp_path, "a.b.jpg")
    suffixes = (".txt", ".caption", ".json", ".xmp")
    assert write(tmp_path, "a.b.jpg", "é 犬", suffixes) == ["a.b.txt", "a.b.caption", "a.b.json", "a.b.xmp"]
    assert (tmp_path / "a.b.txt").read_bytes() == (tmp_path / "a.b.caption").read_bytes() == "é 犬".encode()
    assert json.loads((tmp_path / "a.b.json").read_bytes()) == {"caption": "é 犬", "score": -0.5}
    assert xmp.read_description((tmp_path / "a.b.xmp").read_bytes()) == "é 犬"
    assert len(os.listdir(tmp_path)) == 5
    assert write(tmp_path, "a.b.jpg", "other", suffixes) == []


@pytest.mark.parametrize(
    ("existing", "expected"),
    [("skip", "old\r\n"), ("overwrite", "new"), ("append", "old\nnew"), ("prepend", "new\nold")],
)
def test_an_existing_text_is_kept_replaced_or_extended(tmp_path, existing, expected):
    write_files(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"old\r\n")
    (tmp_path / "a.json").write_text('{"width": 5, "caption": "old", "tags": ["é"]}')
    (tmp_path / "a.xmp").write_bytes(xmp.set_description(None, "old"))
    suffixes = (".txt", ".json", ".xmp")
    assert len(write(tmp_path, "a.jpg", "new", suffixes, existing)) == (0 if existing == "skip" else 3)
    assert (tmp_path / "a.txt").read_bytes().decode() == expected
    document = json.loads((tmp_path / "a.json").read_bytes())
    assert (document["caption"], document["width"], document["tags"]) == (expected.rstrip(), 5, ["é"])
    assert xmp.read_description((tmp_path / "a.xmp").read_bytes()) == expected.rstrip()
    assert write(tmp_path, "a.jpg", "new", suffixes, existing) == [], "a line is not added again"


def test_which_images_are_done(tmp_path):
    write_files(tmp_path, "a.jpg", "b.jpg", "c.jpg", "c.png")
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.json").write_text('{"width": 5}')
    (tmp_path / "a.xmp").write_bytes(xmp.set_description(None, "a").replace(b"description", b"other"))
    (tmp_path / "c.txt").touch()

    def done(name, *suffixes, existing="skip"):
        return Sidecars(suffixes, existing, is_image).are_done(tmp_path / name)

    assert done("a.jpg", ".txt")
    assert not any(done("a.jpg", ".txt", existing=existing) for existing in EXISTING[1:])
    assert not done("b.jpg", ".txt")
    assert not done("a.jpg", ".txt", ".json"), "a file of other fields"
    assert not done("a.jpg", ".xmp")
    assert (done("c.jpg", ".txt"), done("c.png", ".txt")) == (True, False)
    (tmp_path / "b.json").write_text("damaged")
    assert not done("b.jpg", ".json")
    (tmp_path / "b.txt").mkdir()
    assert not done("b.jpg", ".txt"), "a folder is no text"
    with_results = Sidecars((".txt",), "skip", is_image, reserved=[tmp_path / "a.txt"])
    assert not with_results.are_done(tmp_path / "a.jpg"), "the file of --out is no text"
    assert not Sidecars((".txt",), "skip", is_image).are_done(Path("s.tar/a\0.jpg"))


def test_an_image_that_would_share_a_sidecar_is_refused_in_every_order(tmp_path):
    write_files(tmp_path, "a.jpg", "a.png", "x/a.png", "A.jpg", "a.b.png")
    assert refused(tmp_path, "a.png") == "sidecar.shared"
    for name in ("a.jpg", "x/a.png", "A.jpg", "a.b.png"):
        assert write(tmp_path, name, name) == [f"{Path(name).stem}.txt"]
    assert (tmp_path / "a.txt").read_text() == "a.jpg"
    assert (tmp_path / "x" / "a.txt").read_text() == "x/a.png"


def test_names_that_differ_in_case_share_a_sidecar_if_the_disk_ignores_case(tmp_path, monkeypatch):
    write_files(tmp_path, "A.jpg", "a.png")
    if (tmp_path / "a.jpg").exists():
        assert refused(tmp_path, "a.png") == "sidecar.shared"
        return
    assert write(tmp_path, "a.png", "new") == ["a.txt"]
    (tmp_path / "a.txt").unlink()
    exists = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: exists(path) or Path(path).name == "a.JPG")
    assert refused(tmp_path, "a.png") == "sidecar.shared"
    assert write(tmp_path, "A.jpg", "new") == ["A.txt"]


@pytest.mark.parametrize("existing", EXISTING[1:])
def test_a_sidecar_that_may_not_be_written_stays(tmp_path, existing):
    write_files(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    (tmp_path / "a.txt").write_text("mine")
    (tmp_path / "a.txt").chmod(0o444)
    assert refused(tmp_path, "a.jpg", existing=existing) == "sidecar.not_writable"
    assert (tmp_path / "a.txt").read_text() == "mine"
    (tmp_path / "b.txt").mkdir()
    assert refused(tmp_path, "b.jpg", existing=existing) == "sidecar.not_a_file"
    (tmp_path / "c.json").write_text("[]")
    assert refused(tmp_path, "c.jpg", suffixes=(".json",), existing=existing) == "sidecar.not_json"
    (tmp_path / "c.xmp").write_text("<damaged")
    assert refused(tmp_path, "c.jpg", suffixes=(".xmp",), existing=existing) == "xmp.damaged"
    assert refused(tmp_path, "d.jpg", reserved=[tmp_path / "d.txt"]) == "sidecar.is_output"
    (tmp_path / "e.txt").write_bytes(b"\xe9")
    if existing == "overwrite":
        assert write(tmp_path, "e.jpg", "new", existing=existing) == ["e.txt"]
    else:
        assert refused(tmp_path, "e.jpg", existing=existing) == "sidecar.not_utf8"
    assert refused(tmp_path, "s.tar/a.jpg") == "sidecar.no_file"


def test_permissions_and_links_are_kept(tmp_path):
    write_files(tmp_path, "a.jpg")
    (tmp_path / "elsewhere.txt").write_text("old")
    (tmp_path / "elsewhere.txt").chmod(0o640)
    (tmp_path / "a.txt").symlink_to("elsewhere.txt")
    write(tmp_path, "a.jpg", "new", existing="overwrite")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "elsewhere.txt").read_text() == "new"
    assert (tmp_path / "elsewhere.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a.jpg").read_text() == "image"


def test_what_killed_processes_left_is_removed(tmp_path):
    write_files(tmp_path, "a.jpg", ".a.999999999.tmp.txt", ".a.1.tmp.txt", ".a.tmp.txt", ".b.999999999.tmp.txt")
    for name in os.listdir(tmp_path):
        if not name.startswith(".b"):
            os.utime(tmp_path / name, (0, 0))
    write(tmp_path, "a.jpg", "new")
    kept = [".a.1.tmp.txt", ".a.tmp.txt", ".b.999999999.tmp.txt", "a.jpg", "a.txt"]
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


# ---- the row that was being written ----------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [0, 1, 2, 3])
def test_a_noted_row_is_completed_once(tmp_path, applied):
    """A process is killed after the note, after each of two sidecars, and after the row."""
    out = tmp_path / "c.jsonl"
    write_files(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_text("old")
    row = {"image": str(tmp_path / "a.jpg"), "caption": "new"}
    sidecars = Sidecars((".txt", ".json"), "append", is_image)
    with open_results_file(out, RUN, ["image"]) as results:
        with sidecars.changes(tmp_path / "a.jpg", "new", {}) as changes:
            PendingRow(results, out).note(tmp_path / "a.jpg", row, changes)
            for change in changes[:applied]:
                change.apply()
        if applied == 3:
            results.write(row)
    for _ in range(2):
        with open_results_file(out, RUN, ["image"]) as results:
            PendingRow(results, out).complete()
            assert not results.add_id(row)
    assert (tmp_path / "a.txt").read_text() == "old\nnew"
    assert json.loads((tmp_path / "a.json").read_text()) == {"caption": "new"}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [row]
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.json", "a.txt", "c.jsonl", "c.jsonl.run.json"]


@pytest.mark.parametrize("note", [None, "", "\n", "{\n", "[]\n", '{"row": {}}\n'])
def test_without_a_whole_note_nothing_is_completed(tmp_path, note):
    out = tmp_path / "c.jsonl"
    if note is not None:
        (tmp_path / "c.jsonl.pending").write_text(note)
    with open_results_file(out, RUN, ["image"]) as results:
        PendingRow(results, out).complete()
    assert out.read_text() == ""
    assert sorted(os.listdir(tmp_path)) == ["c.jsonl", "c.jsonl.run.json"]


def test_a_note_that_was_cut_off_is_not_completed(tmp_path, monkeypatch):
    """Nor is the one before it, whose row was written."""
    monkeypatch.setattr("mmx.io.pending_row._MAX_BYTES", 300)
    out = tmp_path / "c.jsonl"
    write_files(tmp_path, *(f"{n}.jpg" for n in range(5)))
    rows = [{"image": str(tmp_path / f"{n}.jpg"), "caption": "new"} for n in range(5)]
    with open_results_file(out, RUN, ["image"]) as results:
        pending = PendingRow(results, out)
        for number, row in enumerate(rows):
            with Sidecars((".txt",), "skip", is_image).changes(tmp_path / f"{number}.jpg", "new", {}) as changes:
                pending.note(tmp_path / f"{number}.jpg", row, changes)
    notes = tmp_path / "c.jsonl.pending"
    assert notes.stat().st_size < 1000
    whole = notes.read_bytes()
    for content, written in ((whole[:-1], []), (whole, ["4.txt"])):
        notes.write_bytes(content)
        with open_results_file(out, RUN, ["image"]) as results:
            PendingRow(results, out).complete()
        assert [path.name for path in tmp_path.glob("*.txt")] == written
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows[4:]


def test_a_sidecar_that_somebody_changed_since_is_left(tmp_path):
    out = tmp_path / "c.jsonl"
    write_files(tmp_path, "a.jpg")
    row = {"image": str(tmp_path / "a.jpg"), "caption": "new"}
    with open_results_file(out, RUN, ["image"]) as results:
        with Sidecars((".txt",), "overwrite", is_image).changes(tmp_path / "a.jpg", "new", {}) as changes:
            PendingRow(results, out).note(tmp_path / "a.jpg", row, changes)
        (tmp_path / "a.txt").write_text("by hand")
        PendingRow(results, out).complete()
    assert (tmp_path / "a.txt").read_text() == "by hand"
