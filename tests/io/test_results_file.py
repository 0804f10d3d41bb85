"""A file of results: whole lines, each id once, whatever ends the process that writes it."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.errors import MmxError
from mmx.io.results_file import _FRESH, SeenIds, files_of, is_stream, number_of, open_results_file, row_id, row_line

MADE = {"command": "caption", "model": "m", "weights": "abc", "options": {"num_beams": 1, "top_k": 0}}
S = ("image", "text")


def row(number, **facts):
    return {"image": f"{number}.jpg", **(facts or {"caption": f"é {number}"})}


def write(out, rows, made=MADE, **options):
    """The rows that were not there yet."""
    with open_results_file(out, made, S, **options) as journal:
        fresh = [item for item in rows if journal.takes(item)]
        for item in fresh:
            journal.write(item)
    return fresh


def rows_of(out):
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_what_is_in_the_file_is_not_taken_again(tmp_path):
    out = tmp_path / "new" / "c.jsonl"
    first = [row(n) for n in range(5)]
    assert write(out, [*first, first[2]]) == first
    assert write(out, [*first, row(9)]) == [row(9)]
    assert rows_of(out) == [*first, row(9)]
    assert json.loads((out.parent / "c.jsonl.run.json").read_text()) == MADE
    assert sorted(os.listdir(out.parent)) == ["c.jsonl", "c.jsonl.run.json"]


@pytest.mark.parametrize("torn", ['{"image": "2.jpg", "capt', '{"image": "2.jpg", "caption": "x"}', "\0" * 3_000_000])
def test_a_torn_last_line_is_cut_off_and_said_again(tmp_path, torn):
    out = tmp_path / "c.jsonl"
    write(out, [row(0), row(1)])
    with out.open("a") as file:
        file.write(torn)
    assert write(out, [row(n) for n in range(3)]) == [row(2)]
    assert rows_of(out) == [row(0), row(1), row(2)]


def test_a_file_that_is_one_torn_line_begins_anew(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0)])
    out.write_text('{"im')
    assert write(out, [row(0)]) == [row(0)] == rows_of(out)


def test_a_line_that_is_no_row_is_named(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0)])
    out.write_text("\0\0\n" + out.read_text())
    with pytest.raises(MmxError, match=r"c.jsonl:1 is no JSON object; mend or delete the line, or choose"):
        write(out, [])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"options": {"num_beams": 3, "top_k": 0}},
            "was made with num_beams 1, and this run has num_beams 3; type --ov",
        ),
        ({"command": "ask"}, 'was made with command "caption", and this run has command "ask"; type --overwrite to'),
        ({"weights": "xyz"}, 'was made with weights "abc", and this run has weights "xyz"; type --overwrite'),
        ({"model": "n", "weights": None}, 'model "m"'),
    ],
)
def test_another_model_or_other_options_are_refused_in_one_sentence(tmp_path, change, sentence):
    out = tmp_path / "c.jsonl"
    write(out, [row(0)])
    before = out.read_bytes()
    with pytest.raises(MmxError) as caught:
        write(out, [row(1)], {**MADE, **change})
    assert sentence in str(caught.value)
    assert "choose another --out." in str(caught.value)
    assert out.read_bytes() == before


def test_the_same_weights_under_another_name_and_new_options_are_the_same(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0)])
    write(out, [row(1)], {**MADE, "model": "elsewhere/m", "options": {**MADE["options"], "later": 1}})
    assert rows_of(out) == [row(0), row(1)]


def test_a_file_of_unknown_origin_is_refused_but_an_empty_one_is_not(tmp_path):
    out = tmp_path / "c.jsonl"
    out.touch()
    write(out, [row(0)])
    (tmp_path / "c.jsonl.run.json").unlink()
    with pytest.raises(MmxError, match=r"is there already and no c.jsonl.run.json says what made it; type --overwrite"):
        write(out, [row(1)])
    assert write(out, [row(1)], overwrite=True) == [row(1)] == rows_of(out)
    assert write(out, [row(1), row(2)]) == [row(2)]


def test_overwriting_keeps_the_older_file_until_there_is_a_row(tmp_path):
    out, other = tmp_path / "c.jsonl", {**MADE, "model": "n", "weights": "z"}
    write(out, [row(0)])
    write(out, [], other, overwrite=True)
    assert rows_of(out) == [row(0)], "nothing came"
    with open_results_file(out, other, S, overwrite=True) as journal:
        assert rows_of(out) == [row(0)]
        journal.write(row(7))
        assert rows_of(out) == [row(7)]
        journal.write(row(8))
    assert rows_of(out) == [row(7), row(8)]
    assert sorted(os.listdir(tmp_path)) == ["c.jsonl", "c.jsonl.run.json"]
    assert write(out, [row(8), row(9)], other) == [row(9)]


def test_errors_count_as_done_unless_they_are_to_be_tried_again(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0), row(1, error="no"), row(2), row(3, error="no")])
    with open_results_file(out, MADE, S) as journal:
        assert journal.errors == 2
        assert not journal.takes(row(1))
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


def test_two_at_once_are_refused(tmp_path):
    out = tmp_path / "c.jsonl"
    with (
        open_results_file(out, MADE, S),
        pytest.raises(MmxError, match="by another process; wait for it"),
        open_results_file(out, MADE, S),
    ):
        pass


def test_a_file_that_is_replaced_between_opening_and_locking_is_opened_again(tmp_path, monkeypatch):
    import fcntl

    out, real, locked = tmp_path / "c.jsonl", fcntl.flock, []
    write(out, [row(0), row(1, error="no")])

    def another_run_was_faster(file, how):
        locked.append(file)
        if len(locked) == 1:
            (tmp_path / "new").write_text(json.dumps(row(5)) + "\n")
            os.replace(tmp_path / "new", out)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", another_run_was_faster)
    assert write(out, [row(5), row(9)]) == [row(9)]
    assert len(locked) == 2
    assert rows_of(out) == [row(5), row(9)], "what is appended to the older file would be lost"


def test_a_mark_at_the_start_and_blank_lines_are_passed_over(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0), row(1, error="no")])
    first, second = out.read_text(encoding="utf-8").splitlines()
    out.write_text(f"\ufeff{first}\n\n  \r\n{second}\n\n", encoding="utf-8")
    assert write(out, [row(0), row(1), row(2)]) == [row(2)]
    assert write(out, [row(n) for n in range(3)], retry_errors=True) == [row(1)]
    assert rows_of(out) == [row(0), row(2), row(1)]


def test_an_empty_object_is_no_row(tmp_path):
    out = tmp_path / "c.jsonl"
    write(out, [row(0)])
    out.write_text(out.read_text(encoding="utf-8") + "{}\n", encoding="utf-8")
    with pytest.raises(MmxError, match=r"c.jsonl:2 is an empty JSON object; mend or delete the line, or choose"):
        write(out, [])


def test_a_pipe_behind_a_link_is_a_stream_and_nothing_lies_beside_it(tmp_path):
    reader, writer = os.pipe()
    place = Path(f"/dev/fd/{writer}")
    try:
        assert is_stream(place) and files_of(place) == ()
        assert write(place, [row(0), row(0)]) == [row(0), row(0)], "none is remembered"
        assert os.read(reader, 4096).decode() == 2 * row_line(row(0))
    finally:
        os.close(reader)
        os.close(writer)
    assert not is_stream(tmp_path) and not is_stream(tmp_path / "gone")
    assert files_of(tmp_path / "c") == (tmp_path / "c", tmp_path / "c.run.json")


def test_a_line_moves_no_cursor_and_is_json_for_everybody():
    odd = {"image": "a\x1b[2J\x7f\x9b2J\x85\u2028é\n.jpg"}
    line = row_line(odd)
    assert line == '{"image": "a\\u001b[2J\\u007f\\u009b2J\\u0085\\u2028é\\n.jpg"}\n'
    assert json.loads(line) == odd
    with pytest.raises(ValueError, match="JSON"):
        row_line({"score": float("nan")})


def test_a_row_is_known_by_its_inputs_its_id_and_its_question():
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
    assert all(row_id(a, S) == row_id(b, S) for a, b in same)
    assert all(row_id(a, S) != row_id(b, S) for a, b in other)
    odd = {"image": os.fsdecode(b"caf\xe9")}
    assert number_of(row_id(odd, S)) == number_of(row_id(json.loads(json.dumps(odd, ensure_ascii=False)), S))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), unique=True), st.integers(0, 2**64 - 1))
def test_known_numbers_are_a_set(numbers, other):
    known = SeenIds()
    for number in numbers:
        assert number not in known
        known.add(number)
    assert all(number in known for number in numbers)
    assert (other in known) == (other in numbers)


def test_many_known_numbers_take_eight_bytes_each():
    known = SeenIds()
    numbers = [number_of(str(n)) for n in range(3 * _FRESH + 5)]
    for number in numbers:
        known.add(number)
    assert (len(known.sorted), known.sorted.itemsize, len(known.fresh)) == (3 * _FRESH, 8, 5)
    assert list(known.sorted) == sorted(numbers[: 3 * _FRESH])
    assert all(number in known for number in numbers)
