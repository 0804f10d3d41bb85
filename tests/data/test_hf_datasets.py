"""Parquet files and Hugging Face datasets: embedded images, paths, splits, streams, and what cannot be read."""

import datetime
import io
import pickle
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmx.config.schema import DataConfig
from mmx.data.examples import Example
from mmx.data.formats import read_examples
from mmx.data.hf_datasets import DatasetName, parse_dataset_name, stream_dataset
from mmx.data.manifest import read_questions
from mmx.data.records import valid_fields
from mmx.errors import DataError
from mmx.io.images import load_image

SOURCES = ("image",)


def image_bytes(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def embedded(*shades: int) -> list[object]:
    return [{"bytes": image_bytes(shade), "path": "image.png"} for shade in shades]


def read(path: object, **fields: object) -> list[Example]:
    return list(read_examples(DataConfig(path=str(path), **fields), sources=SOURCES))


def read_error(path: object, **fields: object) -> DataError:
    with pytest.raises(DataError) as error:
        read(path, **fields)
    assert "\n" not in str(error.value)
    return error.value


def shades(examples: list[Example]) -> list[int]:
    return [load_image(example.sources["image"]).getpixel((0, 0))[0] for example in examples]


# ---- parquet -----------------------------------------------------------------------------------------------------


def test_embedded_images_with_equal_names_stay_apart(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"image": embedded(1, 2), "caption": ["a", ["b"][0]]})
    examples = read(path)
    assert shades(examples) == [1, 2]
    assert [example.tasks[0].targets for example in examples] == [("a",), ("b",)]
    assert [example.id for example in examples] == [f"{path}:1", f"{path}:2"]
    assert examples[1].origin == f"{path}, row 2"
    assert shades(pickle.loads(pickle.dumps(examples))) == [1, 2]  # a data worker may be another process


def test_paths_lists_and_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(9))
    columns = {
        "image": ["a.png", "a.png"],
        "captions": [["a", "b"], ["c"]],
        "taken": [datetime.datetime(2020, 1, 1), None],
        "score": [float("nan"), 1.0],
        "box": [None, None],
    }
    (example,) = read(write_parquet(tmp_path / "a.parquet", columns))
    assert (shades([example]), example.tasks[0].targets) == ([9], ("a", "b", "c"))


def test_parquet_of_another_schema(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"img": embedded(1), "description": ["a"]})
    error = read_error(path)
    assert (error.code, error.details["record"]) == ("data.no_task", "row 1")
    assert read_error(path, columns={"caption": "text"}).code == "data.missing_column"
    assert shades(read(path, columns={"image": "img", "caption": "description"})) == [1]


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"image": embedded(1), "caption": ["a"]})
    path.write_bytes(path.read_bytes()[:-20])
    assert read_error(path).code == "data.damaged_parquet"


def test_questions_of_a_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"image": embedded(1, 2), "question": ["what?", "where?"]})
    questions = read_questions(path)
    assert [question.written for question in questions] == [{"image": f"{path}:1"}, {"image": f"{path}:2"}]
    assert load_image(questions[1].sources["image"]).getpixel((0, 0)) == (2, 0, 0)


@pytest.mark.parametrize("module, name", [("pyarrow.parquet", "a.parquet"), ("datasets", "hf:some/name:train")])
def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    error = read_error(name if name.startswith("hf:") else tmp_path / name)
    assert (error.code, error.details["package"]) == ("data.missing_package", module.split(".")[0])


# ---- Hugging Face datasets ---------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    library.disable_progress_bars()
    return library


def build(datasets, *numbers: int):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": embedded(*numbers), "caption": [f"caption {number}" for number in numbers]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_saved_data_set_is_read_in_any_order(datasets, tmp_path: Path) -> None:
    build(datasets, 5, 6).save_to_disk(str(tmp_path / "saved"))
    examples = read(tmp_path / "saved")
    assert shades(examples[::-1]) == [6, 5]
    assert [example.tasks[0].targets for example in examples] == [("caption 5",), ("caption 6",)]
    assert shades(pickle.loads(pickle.dumps(examples))) == [5, 6]


def test_splits(datasets, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    parts = {"train": build(datasets, 1, 2), "test": build(datasets, 3)}
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    assert shades(read(folder, split="test")) == [3]
    assert shades(read(f"hf:{folder}:train")) == [1, 2]
    assert read_error(folder).details["known"] == ["test", "train"]
    assert read_error(f"hf:{folder}:tset").code == "data.unknown_split"
    assert read_error(f"hf:{folder}:train", split="test").code == "data.two_splits"
    build(datasets, 1).save_to_disk(str(tmp_path / "one"))
    assert read_error(f"hf:{tmp_path / 'one'}:train").details["known"] == []
    assert read_error(f"hf:{tmp_path / 'absent'}:train").code == "data.hf_dataset"


def test_a_local_folder_of_parquet_files_as_map_and_as_stream(datasets, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    write_parquet(folder / "train-0.parquet", {"image": embedded(7, 8), "caption": ["a", "b"]})
    name = f"hf:{folder}:train"
    assert shades(read(name)) == [7, 8]
    fields = [valid_fields(record) for record in stream_dataset(name)]
    assert [str(row["image"]) for row in fields] == [f"{name}:1", f"{name}:2"]
    assert [load_image(row["image"]).getpixel((0, 0))[0] for row in fields] == [7, 8]


def test_names() -> None:
    assert parse_dataset_name("hf:a/b") == DatasetName("a/b")
    assert parse_dataset_name("hf:a/b:test") == DatasetName("a/b", None, "test")
    assert parse_dataset_name("hf:a/b:c:test") == DatasetName("a/b", "c", "test")
    for wrong in ("hf:", "hf:a::test", "hf:a:b:c:d"):
        with pytest.raises(DataError) as error:
            parse_dataset_name(wrong)
        assert error.value.code == "data.dataset_name"
