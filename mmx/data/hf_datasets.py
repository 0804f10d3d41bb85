"""Data sets of the library Hugging Face datasets: `hf:NAME:SPLIT`, or a folder of `Dataset.save_to_disk`.

NAME is a public name or a local folder. Columns are the fields of a manifest line. The library is in the extra
`datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mmx.data.json_fields import RecordLocation
from mmx.data.parquet import import_extra, row_fields
from mmx.data.records import Record
from mmx.errors import DataError, MmxError, one_line_error, suggest
from mmx.io.files import StoredBytes, read_file

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    Loaded: TypeAlias = Dataset | DatasetDict | IterableDataset | IterableDatasetDict

PREFIX = "hf:"
_SAVED_FILES = ("state.json", "dataset_dict.json")  # of one data set, and of one for each split


class DatasetName(NamedTuple):
    """What `hf:NAME:CONFIG:SPLIT` names; CONFIG and SPLIT may be left out."""

    name: str
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class DatasetImage(StoredBytes):
    """An image in a row of a map-style data set."""

    name: str
    dataset: Dataset = field(compare=False, repr=False)
    column: str
    row: int

    def load(self, max_bytes: int) -> bytes:
        """Return the bytes, or those of the file that the row names. Raises ReadFailure."""
        cell = self.dataset[self.row][self.column]
        data = cell["bytes"] if isinstance(cell, Mapping) else cell
        return read_file(str(cell["path"]), max_bytes) if data is None else bytes(data[: max_bytes + 1])


def is_dataset_name(path: str) -> bool:
    """Return whether a path is of the form hf:NAME:SPLIT."""
    return path.startswith(PREFIX)


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return any((folder / name).is_file() for name in _SAVED_FILES)


def parse_dataset_name(path: str, split: str | None = None) -> DatasetName:
    """Parse hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, or a folder of `save_to_disk`.

    Args:
        split: the split if it is given apart from the name.

    Raises:
        DataError: the form is another one, or both name a split.
    """
    parts = path.removeprefix(PREFIX).split(":") if is_dataset_name(path) else [path]
    if not 1 <= len(parts) <= 3 or not all(parts):
        message = f"{path!r} is not the name of a data set; expected hf:NAME:SPLIT, such as hf:nlphuji/flickr30k:test."
        raise DataError(message, code="data.dataset_name", path=path)
    named = DatasetName(parts[0], parts[1] if len(parts) == 3 else None, parts[-1] if len(parts) > 1 else None)
    if split is not None and named.split not in (None, split):
        message = f"{path} names split {named.split!r}, and `split` is {split!r}; leave one of them out."
        raise DataError(message, code="data.two_splits", path=path, split=split)
    return named._replace(split=split or named.split)


def read_dataset(path: str, split: str | None = None) -> Iterator[Record]:
    """Yield the rows of a map-style data set; images are read when they are needed. Raises DataError."""
    named = parse_dataset_name(path, split)
    dataset = _undecoded(_load(named, path, streaming=False))
    images = _media_columns(dataset)
    texts = dataset.remove_columns(images)
    for number in range(len(dataset)):
        name = f"{path}:{number + 1}"
        row = row_fields(texts[number], name) if texts.column_names else {}
        for column in images:
            row[column] = DatasetImage(name, dataset, column, number)
        yield Record(RecordLocation(path, record=f"row {number + 1}"), row)


def stream_dataset(path: str) -> Iterator[Record]:
    """Yield the rows of a data set in order, without a download of all of it. Raises DataError."""
    dataset = _undecoded(_load(parse_dataset_name(path), path, streaming=True))
    try:
        for number, row in enumerate(dataset, 1):
            yield Record(RecordLocation(path, record=f"row {number}"), row_fields(row, f"{path}:{number}"))
    except MmxError:
        raise
    except Exception as error:  # noqa: BLE001 - network, file formats and decoders raise many types
        raise _cannot_load(path, error) from None


def _load(named: DatasetName, path: str, streaming: bool) -> Loaded:
    datasets = import_extra("datasets", "datasets", path)
    folder = Path(named.name).expanduser()
    try:
        if is_saved_dataset(folder):
            loaded: Loaded = datasets.load_from_disk(str(folder))
        else:
            source = str(folder) if folder.is_dir() else named.name
            loaded = datasets.load_dataset(source, named.config, streaming=streaming)
    except Exception as error:  # noqa: BLE001 - network, file formats and the Hub raise many types
        raise _cannot_load(path, error) from None
    return _select_split(loaded, named, path)


def _select_split(loaded: Loaded, named: DatasetName, path: str) -> Loaded:
    if not isinstance(loaded, Mapping):
        if named.split is not None and str(loaded.split) != named.split:
            raise _unknown_split(path, named.split, [str(loaded.split)] if loaded.split else [])
        return loaded
    splits = sorted(map(str, loaded))
    if named.split is None and len(splits) == 1:
        return loaded[splits[0]]
    if named.split not in loaded:
        raise _unknown_split(path, named.split, splits)
    return loaded[named.split]


def _undecoded(dataset: Loaded) -> Loaded:
    """Return a data set whose images and audio stay bytes: mmx decodes them behind its own limits."""
    for column, feature in (dataset.features or {}).items():
        if type(feature).__name__ in ("Image", "Audio"):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    return dataset


def _media_columns(dataset: Dataset) -> list[str]:
    return [name for name, feature in dataset.features.items() if type(feature).__name__ in ("Image", "Audio")]


def _unknown_split(path: str, split: str | None, splits: list[str]) -> DataError:
    hint = suggest(split, splits) if split is not None else f"it has {', '.join(splits)}; type hf:NAME:{splits[0]}."
    if not splits:
        hint = f"it has no splits; leave out {split!r}."
    given = "no split was named" if split is None else f"there is no split {split!r}"
    return DataError(f"{path}: {given}; {hint}", code="data.unknown_split", path=path, split=split, known=splits)


def _cannot_load(path: str, error: BaseException) -> DataError:
    message = f"{path} cannot be loaded: {one_line_error(error)}; check the name, the split and the network."
    return DataError(message, code="data.hf_dataset", path=path)
