"""Results files: whole lines, each row once, however the process ends."""

import json
import os
from pathlib import Path

import pytest

from mmx.errors import MmxError
from mmx.io.results_file import (
    hash_id,
    is_stream,
    open_results_file,
    output_files,
    row_id,
    row_line,
)

RUN = {"command": "caption", "model": "m", "weights": "abc", "options": {"num_beams": 1, "top_k": 0}}
SOURCES = ("image", "text")


def row(number, **fields):
    return {"image": f"{number}.jpg", **(fields or {"caption": f"é {number}"})}


def write(out, rows, run=RUN, **options):
    """Write the rows that are new, and return them."""
    with open_results_file(out, run, SOURCES, **options) as results:
        new = [item for item in rows if results.add_id(item)]
        for item in new:
            results.write(item)
    return new


def rows_of(out):
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_rows_in_the_file_are_not_new(tmp_path):
    out = tmp_path / "new" / "c.jsonl"
    first = [row(n) for n in range(5)]
    assert write(out, [*first, first[2]]) == first
    assert write(out, [*first, row(9)]) == [row(9)]
    assert rows_of(out) == [*first, row(9)]
    assert json.loads((out.parent / "c.jsonl.run.json").read_text()) == RUN
    assert sorted(os.listdir(out.parent)) == ["c.jsonl", "c.jsonl.run.json"]


@pytest.mark.parametrize("torn", ['{"image": "2.jpg", "capt', '{"image": "2.jpg", "caption": "x"}', "\0" * 3_000_000])
def test_a_torn_last_line_is_cut_off_and_written_again(tmp_path, torn):
    out = tmp_path / "c.jsonl"
    write(out, [row(0), row(1)])
    with out.open("a") as file:
        file.write(torn)
    assert write(out, [row(n) for n in range(3)]) == [row(2)]
    assert rows_of(out) == [row(0), row(1), row(2)]


def test_a_file_of_one_torn_line_starts_again(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0)])
    out.write_text('{"im')
    assert write(out, [row(0)]) == [row(0)] == rows_of(out)


def test_a_line_that_is_not_an_object_is_named(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0)])
    out.write_text("\0\0\n" + out.read_text())
    with pytest.raises(MmxError) as caught:
        write(out, [])
    assert (caught.value.code, caught.value.details) == ("results.line", {"path": str(out), "line": 1})


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({"options": {"num_beams": 3, "top_k": 0}}, ["num_beams"]),
        ({"command": "ask"}, ["command"]),
        ({"weights": "xyz"}, ["weights"]),
        ({"model": "n", "weights": None}, ["model", "weights"]),
    ],
)
def test_another_model_or_other_options_are_refused(tmp_path, change, differences):
    out = tmp_path / "c.jsonl"
    write(out, [row(0)])
    before = out.read_bytes()
    with pytest.raises(MmxError) as caught:
        write(out, [row(1)], {**RUN, **change})
    assert caught.value.code == "results.other_run"
    assert caught.value.details == {"path": str(out), "differences": differences}
    assert out.read_bytes() == before


def test_equal_weights_under_another_name_and_new_options_are_accepted(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0)])
    write(out, [row(1)], {**RUN, "model": "elsewhere/m", "options": {**RUN["options"], "later": 1}})
    assert rows_of(out) == [row(0), row(1)]


def test_a_file_without_a_run_file_is_refused_unless_it_is_empty(tmp_path):
    out = tmp_path / "c.jsonl"
    out.touch()
    write(out, [row(0)])
    (tmp_path / "c.jsonl.run.json").unlink()
    with pytest.raises(MmxError) as caught:
        write(out, [row(1)])
    assert (caught.value.code, caught.value.details) == ("results.unknown_run", {"path": str(out)})
    assert write(out, [row(1)], overwrite=True) == [row(1)] == rows_of(out)
    assert write(out, [row(1), row(2)]) == [row(2)]


def test_overwriting_keeps_the_older_file_until_there_is_a_row(tmp_path):
    out, other = tmp_path / "c.jsonl", {**RUN, "model": "n", "weights": "z"}
    write(out, [row(0)])
    write(out, [], other, overwrite=True)
    assert rows_of(out) == [row(0)], "no row was written"
    with open_results_file(out, other, SOURCES, overwrite=True) as results:
        assert rows_of(out) == [row(0)]
        results.write(row(7))
        assert rows_of(out) == [row(7)]
        results.write(row(8))
    assert rows_of(out) == [row(7), row(8)]
    assert sorted(os.listdir(tmp_path)) == ["c.jsonl", "c.jsonl.run.json"]
    assert write(out, [row(8), row(9)], other) == [row(9)]


def test_error_rows_are_kept_unless_they_are_retried(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0), row(1, error="no"), row(2), row(3, error="no")])
    with open_results_file(out, RUN, SOURCES) as results:
        assert results.num_errors == 2
        assert not results.add_id(row(1))
    assert write(out, [row(n) for n in range(4)], retry_errors=True) == [row(1), row(3)]
    assert rows_of(out) == [row(0), row(2), row(1), row(3)]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    import resource

    out, limits = tmp_path / "c.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    write(out, [row(0)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (out.stat().st_size + 200, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(out, [row(n, caption="x" * 50) for n in range(9)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = len(rows_of(out))
    assert 1 < kept < 5
    assert len(write(out, [row(n) for n in range(9)])) == 9 - kept


def test_two_runs_at_once_are_refused(tmp_path):
    out = tmp_path / "c.jsonl"
    with (
        open_results_file(out, RUN, SOURCES),
        pytest.raises(MmxError) as caught,
        open_results_file(out, RUN, SOURCES),
    ):
        pass
    assert caught.value.code == "results.locked"


def test_a_file_that_is_replaced_between_opening_and_locking_is_opened_again(tmp_path, monkeypatch):
    import fcntl

    out, real, locked = tmp_path / "c.jsonl", fcntl.flock, []
    write(out, [row(0), row(1, error="no")])

    def replaced_by_another_run(file, how):
        locked.append(file)
        if len(locked) == 1:
            (tmp_path / "new").write_text(json.dumps(row(5)) + "\n")
            os.replace(tmp_path / "new", out)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", replaced_by_another_run)
    assert write(out, [row(5), row(9)]) == [row(9)]
    assert len(locked) == 2
    assert rows_of(out) == [row(5), row(9)], "what is appended to the older file would be lost"


def test_a_byte_order_mark_and_blank_lines_are_skipped(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0), row(1, error="no")])
    first, second = out.read_text(encoding="utf-8").splitlines()
    out.write_text(f"\ufeff{first}\n\n  \r\n{second}\n\n", encoding="utf-8")
    assert write(out, [row(0), row(1), row(2)]) == [row(2)]
    assert write(out, [row(n) for n in range(3)], retry_errors=True) == [row(1)]
    assert rows_of(out) == [row(0), row(2), row(1)]


def test_an_empty_object_is_not_a_row(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0)])
    out.write_text(out.read_text(encoding="utf-8") + "{}\n", encoding="utf-8")
    with pytest.raises(MmxError) as caught:
        write(out, [])
    assert (caught.value.code, caught.value.details) == ("results.line", {"path": str(out), "line": 2})


def test_a_pipe_behind_a_link_is_a_stream_without_a_run_file(tmp_path):
    reader, writer = os.pipe()
    path = Path(f"/dev/fd/{writer}")
    try:
        assert is_stream(path) and output_files(path) == ()
        assert write(path, [row(0), row(0)]) == [row(0), row(0)], "every row is written"
        assert os.read(reader, 4096).decode() == 2 * row_line(row(0))
    finally:
        os.close(reader)
        os.close(writer)
    assert not is_stream(tmp_path) and not is_stream(tmp_path / "gone")
    assert output_files(tmp_path / "c") == (tmp_path / "c", tmp_path / "c.run.json")


def test_lines_are_strict_json_without_control_characters():
    odd = {"image": "a\x1b[2J\x7f\x9b2J\x85\u2028é\n.jpg"}
    line = row_line(odd)
    assert line == '{"image": "a\\u001b[2J\\u007f\\u009b2J\\u0085\\u2028é\\n.jpg"}\n'
    assert json.loads(line) == odd
    with pytest.raises(ValueError, match="JSON"):
        row_line({"score": float("nan")})


def test_rows_are_identified_by_inputs_id_and_question():
    same = [
        ({"image": "a"}, {"image": "a", "caption": "x", "score": 1}),
        ({"id": 1, "image": "a"}, {"id": 1, "image": "a", "x": 2}),
        ({"id": 0, "image": "a", "text": None}, {"image": "a", "id": 0, "caption": "x"}),
    ]
    other = [
        ({"id": 1, "question": "a"}, {"id": 1, "question": "b"}),
        ({"image": "a"}, {"image": "a", "box": [0, 1]}),
        ({"id": 0, "image": "a"}, {"id": 0, "image": "b"}),
        ({"id": 0, "image": "a"}, {"id": 0, "text": "a"}),
        ({"id": 0, "input": "a"}, {"id": 0, "input": "b"}),
        ({"image": "a"}, {"image": "a", "id": 1}),
    ]
    assert all(row_id(a, SOURCES) == row_id(b, SOURCES) for a, b in same)
    assert all(row_id(a, SOURCES) != row_id(b, SOURCES) for a, b in other)
    odd = {"image": os.fsdecode(b"caf\xe9")}
    assert hash_id(row_id(odd, SOURCES)) == hash_id(row_id(json.loads(json.dumps(odd, ensure_ascii=False)), SOURCES))
