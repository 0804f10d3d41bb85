"""Tables of result rows, read again by other programs' readers."""

import csv
import json
import sys

import pytest

from mmx.errors import MmxError
from mmx.io.results_file import row_line
from mmx.io.tables import check_parquet, write_table

ROWS = [
    {"image": "a,b.jpg", "caption": 'a "cat"\nand, é', "score": -0.5, "id": 3, "ok": True},
    {"image": "c\t.jpg", "error": "no"},
    {"image": "caf\udce9.jpg", "id": 2**70, "caption": "", "score": None, "box": [0, 0.5, {"a": "é"}], "ok": False},
    {"image": "d.jpg", "question": "why?", "answer": "so", "score": 1, "mixed": "x"},
    {"image": "e.jpg", "mixed": 5, "\udce9": "odd"},
]


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes("".join(map(row_line, ROWS)).encode(errors="backslashreplace"))
    return path


def test_a_csv_file_has_all_rows_and_columns(results, tmp_path):
    write_table(tmp_path / "c.csv", "csv", results, ["image"])
    with open(tmp_path / "c.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["image", "caption", "score", "id", "ok", "error", "box", "question", "answer", "mixed", "\\udce9"]
    assert list(rows[0]) == columns
    assert rows[0]["caption"] == ROWS[0]["caption"]
    assert (rows[0]["score"], rows[0]["id"], rows[0]["ok"], rows[0]["error"]) == ("-0.5", "3", "true", "")
    assert rows[2]["image"] == "caf\\udce9.jpg"
    assert json.loads(rows[2]["box"]) == ROWS[2]["box"]
    assert [row["error"] for row in rows] == ["", "no", "", "", ""]


def test_a_parquet_file_has_all_rows_with_types(results, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("mmx.io.tables._ROW_GROUP", 2)
    write_table(tmp_path / "c.parquet", "parquet", results, ["image"])
    table = parquet.read_table(tmp_path / "c.parquet")
    types = {field.name: str(field.type) for field in table.schema}
    assert (types["caption"], types["score"], types["ok"], types["mixed"]) == ("string", "double", "bool", "string")
    assert types["id"] == "string", "one number has more than 64 bits"
    rows = table.to_pylist()
    assert [row["score"] for row in rows] == [-0.5, None, None, 1.0, None]
    assert [row["id"] for row in rows] == ["3", None, str(2**70), None, None]
    assert [row["mixed"] for row in rows] == [None, None, None, "x", "5"]
    assert rows[2]["image"] == "caf\\udce9.jpg"
    assert json.loads(rows[2]["box"]) == ROWS[2]["box"]
    assert rows[4]["\\udce9"] == "odd"


def test_a_text_file_has_a_line_for_each_result(results, tmp_path):
    write_table(tmp_path / "c.txt", "txt", results, ["image"])
    lines = (tmp_path / "c.txt").read_text(encoding="utf-8").split("\n")
    assert lines == ['a,b.jpg\ta "cat" and, é', "caf\\udce9.jpg\t", "d.jpg\twhy?\tso", "e.jpg", ""]


@pytest.mark.parametrize("kind", ["csv", "parquet", "txt"])
def test_no_rows_make_a_table_without_rows(tmp_path, kind):
    (tmp_path / "c.jsonl").touch()
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    write_table(tmp_path / "out", kind, tmp_path / "c.jsonl", ["image"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "out"]


def test_parquet_without_pyarrow_is_an_error_with_a_code(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MmxError) as caught:
        check_parquet()
    assert caught.value.code == "parquet.not_installed"
