"""Lists of records by the name of their file: CSV, TSV, parquet and tar archives of samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmx.data.hf_datasets import is_dataset_name, is_saved_dataset, read_dataset
from mmx.data.json_fields import RecordLocation
from mmx.data.parquet import is_parquet, read_parquet
from mmx.data.records import Record
from mmx.data.tables import is_table, read_table
from mmx.data.webdataset import read_webdataset
from mmx.io.tar import is_tar


def is_record_list(path: str) -> bool:
    """Return whether a path names a table, an archive of samples or a data set of Hugging Face datasets."""
    by_name = is_table(path) or is_parquet(path) or is_tar(path) or is_dataset_name(path)
    return by_name or is_saved_dataset(Path(path))


def read_records(path: Path | str) -> Iterator[Record]:
    """Yield the records of a list. Raises DataError if it cannot be read at all."""
    name = str(path)
    if is_dataset_name(name) or is_saved_dataset(Path(name)):
        yield from read_dataset(name)
        return
    try:
        if is_table(name):
            yield from read_table(Path(name))
        elif is_parquet(name):
            yield from read_parquet(Path(name))
        else:
            yield from read_webdataset(Path(name))
    except OSError as error:
        message = f"cannot be read: {error.strerror}; check the path and its permissions."
        raise RecordLocation(name).error("unreadable", message) from None
