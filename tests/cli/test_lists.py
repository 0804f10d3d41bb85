"""Tables, archives and data sets as inputs of `mmx caption`, `mmx ask` and `mmx eval`: rows, errors, resuming."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from cli_cases import Mmx, read_rows
from PIL import Image


@pytest.fixture(autouse=True)
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def image_bytes(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), (40 * shade, 0, 255 - shade)).save(buffer, "PNG")
    return buffer.getvalue()


def write_csv(folder: Path, count: int) -> Path:
    lines = ["image,shade,caption"]
    for number in range(count):
        (folder / f"{number}.png").write_bytes(image_bytes(number))
        lines.append(f"{number}.png,{number},a reference")
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parquet(folder: Path, count: int) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    images = [{"bytes": image_bytes(number), "path": "x.png"} for number in range(count)]
    table = pyarrow.table({"image": images, "shade": [str(number) for number in range(count)]})
    parquet.write_table(table, folder / "list.parquet")
    return folder / "list.parquet"


def write_saved(folder: Path, count: int) -> Path:
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    datasets.disable_progress_bars()
    images = [{"bytes": image_bytes(number), "path": None} for number in range(count)]
    features = datasets.Features({"image": datasets.Image(), "shade": datasets.Value("string")})
    rows = {"image": images, "shade": [str(number) for number in range(count)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def write_tar(folder: Path, count: int) -> Path:
    path = folder / "list.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            record = json.dumps({"question": f"what is {number}?", "answer": "red", "caption": "a reference"})
            for name, data in ((f"{number}.png", image_bytes(number)), (f"{number}.json", record.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


WRITERS = {"csv": write_csv, "parquet": write_parquet, "saved": write_saved, "tar": write_tar}


@pytest.mark.parametrize("form", WRITERS)
def test_captions_of_a_list_are_those_of_the_files_and_are_resumed(
    mmx: Mmx, model: Path, tmp_path: Path, form: str
) -> None:
    write_csv(tmp_path, 5)
    files = mmx("caption", *(tmp_path / f"{number}.png" for number in range(5)), "--model", model, "--json")
    path = WRITERS[form](tmp_path, 5)
    out = tmp_path / "out.jsonl"
    command = ("caption", path, "--model", model, "--out", out, "--batch-size", 2)
    assert mmx(*command).code == 0
    whole = out.read_text()
    rows = read_rows(out)
    assert [row["caption"] for row in rows] == [row["caption"] for row in files.rows]
    if form == "csv":
        assert rows[2]["image"] == str(tmp_path / "2.png")
    else:
        assert rows[2]["image"] == (f"{path}/2.png" if form == "tar" else f"{path}:3")
    if form != "tar":
        assert [row["shade"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert "reference" not in whole
    out.write_text("".join(whole.splitlines(keepends=True)[:2]))  # as after a stop
    assert mmx(*command).code == 0
    assert out.read_text() == whole


@pytest.mark.parametrize("form", ["csv", "parquet", "tar"])
def test_questions_of_a_list(mmx: Mmx, model: Path, tmp_path: Path, form: str) -> None:
    if form == "csv":
        write_csv(tmp_path, 2)
        path = tmp_path / "questions.csv"
        path.write_text("image,question,id\n0.png,what is 0?,x\n1.png,what is 1?,y\n")
    elif form == "tar":
        path = write_tar(tmp_path, 2)
    else:
        pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
        import pyarrow
        from pyarrow import parquet

        path = tmp_path / "questions.parquet"
        images = [{"bytes": image_bytes(number), "path": None} for number in range(2)]
        table = pyarrow.table({"image": images, "question": ["what is 0?", "what is 1?"], "answer": ["x", "y"]})
        parquet.write_table(table, path)
    ran = mmx("ask", "--data", path, "--model", model, "--json")
    assert ran.code == 0
    names = {"csv": ["0.png", "1.png"], "tar": [f"{path}/0.png", f"{path}/1.png"]}
    assert [row["image"] for row in ran.rows] == names.get(form, [f"{path}:1", f"{path}:2"])
    assert [row["question"] for row in ran.rows] == ["what is 0?", "what is 1?"]


def test_wrong_rows_are_errors_of_their_own(mmx: Mmx, model: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path, 2)
    path.write_bytes(b'image,n\n0.png,1\n0.png\n"0.png" x,1\n0.png,\xff\n,2\nabsent.png,3\n1.png,4\n')
    ran = mmx("caption", path, "--model", model, "--json")
    assert ran.code == 1
    assert ["error" in row for row in ran.rows] == [False, True, True, True, True, True, False]
    assert len(ran.errors) == 5
    for row, line in zip(ran.rows[1:5], (3, 4, 5, 6), strict=True):
        assert row["error"].startswith(f"{path}:{line} ")


@pytest.mark.parametrize("name", ["LIST.CSV", "LIST.JSONL"])
def test_suffixes_in_capitals(mmx: Mmx, model: Path, tmp_path: Path, name: str) -> None:
    write_csv(tmp_path, 1).unlink()
    lines = {"LIST.CSV": "image,caption\n0.png,a dog\n", "LIST.JSONL": '{"image": "0.png", "caption": "a dog"}\n'}
    path = tmp_path / name
    path.write_text(lines[name])
    ran = mmx("caption", path, "--model", model, "--json")
    assert (ran.code, [row["image"] for row in ran.rows]) == (0, [str(tmp_path / "0.png")])
    assert mmx("eval", model, "--data", path).code == 0


def test_a_half_archive_and_a_half_table(mmx: Mmx, model: Path, tmp_path: Path) -> None:
    path = write_tar(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:2600])
    ran = mmx("caption", path, "--model", model, "--json")
    assert (ran.code, ["error" in row for row in ran.rows]) == (1, [False, True])
    path = write_parquet(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-30])
    ran = mmx("caption", path, tmp_path / "list.tar", "--model", model, "--json")
    assert (ran.code, ["error" in row for row in ran.rows]) == (1, [True, False, True])


@pytest.mark.parametrize("form", ["csv", "tar"])
def test_evaluation_of_a_list(mmx: Mmx, model: Path, tmp_path: Path, form: str) -> None:
    path = WRITERS[form](tmp_path, 3)
    ran = mmx("eval", model, "--data", path, "--json")
    assert ran.code == 0
    assert ran.err == "" or "captions" in ran.out
