"""CSV and TSV lists: cells, several captions, renamed columns, and every refusal with its line."""

from pathlib import Path

import pytest

from mmx.config.schema import DataConfig
from mmx.data.examples import Example, TextTask
from mmx.data.formats import read_examples
from mmx.data.manifest import read_questions
from mmx.errors import DataError

SOURCES = ("image",)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def read(path: Path, **fields: object) -> list[Example]:
    return list(read_examples(DataConfig(path=str(path), **fields), sources=SOURCES))


def read_error(path: Path, **fields: object) -> DataError:
    with pytest.raises(DataError) as error:
        read(path, **fields)
    assert "\n" not in str(error.value)
    return error.value


def test_rows_of_one_image_are_one_example(tmp_path: Path) -> None:
    path = write(
        tmp_path / "list.csv", 'image,caption,width\na.jpg,"a dog, ""small""",3\n\na.jpg,"two\nlines",\nb.jpg,c,4'
    )
    first, second = read(path)
    assert first.sources == {"image": str(tmp_path / "a.jpg")}
    assert first.tasks == (TextTask(('a dog, "small"', "two\nlines")),)
    assert (first.origin, second.origin) == (f"{path}:2", f"{path}:6")


def test_lists_numbered_captions_and_questions(tmp_path: Path) -> None:
    head = "image\tcaption_1\tcaption_0\tquestion\tanswers\tbox"
    path = write(
        tmp_path / "list.tsv", f'{head}\na.jpg\tone\tzero\twhat?\t["x","y"]\t"[0, 0, 0.5, 1]"\nb.jpg\t\tz\t\t\t\n'
    )
    first, second = read(path)
    question = TextTask(("x", "y"), "what?", None, (0.0, 0.0, 0.5, 1.0))
    assert first.tasks == (TextTask(("zero", "one")), question)
    assert second.tasks == (TextTask(("z",)),)


def test_texts_in_brackets_are_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "list.csv", 'image,captions\na.jpg,[laughs] a dog\nb.jpg,"[""a"", ""b""]"\n')
    assert [example.tasks[0].targets for example in read(path)] == [("[laughs] a dog",), ("a", "b")]


def test_metadata_csv_of_an_image_folder(tmp_path: Path) -> None:
    write(tmp_path / "metadata.csv", "file_name,text\na.jpg,a dog\n")
    (example,) = read(tmp_path)
    assert (example.sources, example.tasks) == ({"image": str(tmp_path / "a.jpg")}, (TextTask(("a dog",)),))
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.jpg", "text": "a cat"}\n')
    assert read_error(tmp_path).code == "data.two_lists"


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_columns_are_renamed(tmp_path: Path, name: str) -> None:
    rows = "img,description\na.jpg,a dog\n" if name.endswith("csv") else '{"img": "a.jpg", "description": "a dog"}\n'
    path = write(tmp_path / name, rows)
    (example,) = read(path, columns={"image": "img", "caption": "description"})
    assert (example.sources, example.tasks) == ({"image": str(tmp_path / "a.jpg")}, (TextTask(("a dog",)),))
    error = read_error(path, columns={"image": "img", "caption": "text"})
    assert (error.code, error.details["key"]) == ("data.missing_column", "text")
    assert error.details["line"] == (2 if name.endswith("csv") else 1)


def test_columns_of_a_format_without_them_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", "")
    write(tmp_path / "a.txt", "a dog")
    assert read_error(tmp_path, columns={"caption": "text"}).code == "data.no_columns"


@pytest.mark.parametrize(
    "text, code, line",
    [
        ("", "data.no_header", 1),
        ("image;caption\na.jpg;x\n", "data.delimiter", 1),
        ("image,,caption\n", "data.column_name", 1),
        ("image,image\n", "data.repeated_key", 1),
        ("image,caption\na.jpg,x,y\n", "data.row_length", 2),
        ("image,caption\na.jpg\n", "data.row_length", 2),
        ('image,caption\na.jpg,x\nb.jpg,"x" y\n', "data.damaged_row", 3),
        ('image,caption\na.jpg,x\nb.jpg,"x\n\n', "data.damaged_row", 3),
        ("image,caption\na.jpg,x\0y\n", "data.not_utf8", 2),
        ("image,caption\na.jpg,\n", "data.no_task", 2),
        ("image,captions\na.jpg,\"['a', 'b']\"\n", "data.field_type", 2),
        ("image,question,box\na.jpg,x,1 2 3 4\n", "data.field_type", 2),
        ("picture,caption\na.jpg,x\n", "data.unknown_source", 2),
        ("image,captoin\na.jpg,x\n", "data.misspelt_field", 2),
        ("image,caption\n", "data.no_texts", None),
        ("image,captions,caption_1\na.jpg,x,y\n", "data.two_columns", 2),
    ],
)
def test_refusals(tmp_path: Path, text: str, code: str, line: int | None) -> None:
    error = read_error(write(tmp_path / "list.csv", text))
    assert (error.code, error.details.get("line")) == (code, line)


def test_questions_of_a_table(tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", "image,question,question_id\na.jpg,what?,7\n")
    (question,) = read_questions(path)
    assert (question.task.question, question.ids) == ("what?", {"question_id": "7"})
    assert question.sources == {"image": str(tmp_path / "a.jpg")}
