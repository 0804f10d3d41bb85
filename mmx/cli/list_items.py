"""The items of a list: JSON lines, a table, or a data set of Hugging Face datasets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmx.cli.input_item import InputItem, display_name, result_fields
from mmx.errors import MmxError
from mmx.io.files import StoredBytes, read_stored
from mmx.io.results_file import ID_FIELDS, RESULT_FIELDS

if TYPE_CHECKING:
    from mmx.data.json_fields import RecordLocation
    from mmx.data.records import Record
    from mmx.inference.pipeline import Pipeline

TEXT_MODALITIES = ("image", "audio", "text")  # modalities whose inputs are paths, or the text itself
LIST_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
MAX_EMBEDDED_BYTES = 512 * 2**20  # of one input; its decoder has a limit of its own


def is_list_file(path: str) -> bool:
    """Return whether a file name is that of JSON lines or a table."""
    return path.lower().endswith(LIST_SUFFIXES)


def _is_json_lines(path: str) -> bool:
    return path.lower().endswith(".jsonl")


def is_dataset(path: str) -> bool:
    """Return whether an argument is hf:NAME:SPLIT, or a folder of `Dataset.save_to_disk`."""
    from mmx.data.hf_datasets import is_dataset_name, is_saved_dataset

    return (is_dataset_name(path) and not os.path.exists(path)) or is_saved_dataset(Path(path))


def list_items(path: str, pipeline: Pipeline) -> Iterator[InputItem]:
    """Yield an item for each record of a list; a wrong record is an error of its own.

    A list that cannot be read at all, or not to its end, is an error after the items before.
    """
    try:
        for record in _records(path):
            yield _list_item(record, pipeline)
    except OSError as error:
        message = f"list {path!r} cannot be read: {error.strerror}; check the path."
        yield InputItem({"input": path}, path, MmxError(message, code="input.unreadable", path=path))
    except MmxError as error:
        yield InputItem({"input": path}, path, error)


def count_list_items(path: str) -> int | None:
    """Return about how many records a list has; None for a data set, which would have to be loaded."""
    from mmx.data.parquet import count_parquet_rows, is_parquet

    if is_dataset(path):
        return None
    if is_parquet(path):
        return count_parquet_rows(path)
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip()) - (not _is_json_lines(path))


def _records(path: str) -> Iterator[Record]:
    from mmx.data.hf_datasets import stream_dataset
    from mmx.data.record_files import read_records

    if is_dataset(path):
        return stream_dataset(path)
    return _lines(path) if _is_json_lines(path) else read_records(path)


def _lines(path: str) -> Iterator[Record]:
    from mmx.data.json_fields import RecordLocation, numbered_lines, parse_line
    from mmx.data.records import Record
    from mmx.errors import DataError

    for number, text in numbered_lines(Path(path)):
        location = RecordLocation(path, number)
        try:
            yield Record(location, parse_line(location, text))
        except DataError as error:
            yield Record(location, error)


def _list_item(record: Record, pipeline: Pipeline) -> InputItem:
    """The row keeps the fields of the record, apart from questions, reference texts and earlier results."""
    from mmx.data.manifest import TASK_FIELDS, image_as_source
    from mmx.data.records import valid_fields

    location = record.location
    try:
        fields = valid_fields(record)
        if not _is_json_lines(location.path):
            fields = image_as_source(fields)
        inputs = _record_inputs(location, fields, pipeline)
        loaded = {name: _loaded(raw) for name, raw in inputs.items()}
    except MmxError as error:
        return InputItem({"input": str(location)}, str(location), error)
    written = {name: str(raw) if isinstance(raw, StoredBytes) else raw for name, raw in inputs.items()}
    dropped = (TASK_FIELDS - set(ID_FIELDS)) | result_fields(pipeline) | inputs.keys()
    kept = {key: value for key, value in fields.items() if key not in dropped and not isinstance(value, StoredBytes)}
    return InputItem({**written, **kept}, display_name(written), loaded)


def _loaded(raw: object) -> object:
    return read_stored(raw, MAX_EMBEDDED_BYTES) if isinstance(raw, StoredBytes) else raw


def _record_inputs(location: RecordLocation, fields: Mapping[str, object], pipeline: Pipeline) -> dict[str, object]:
    """Return the inputs of a record; paths are relative to the folder of its file. Raises MmxError."""
    from mmx.data.examples import unknown_sources
    from mmx.data.json_fields import resolve_path
    from mmx.data.manifest import TASK_FIELDS

    encoders = pipeline.model.encoders
    inputs = {name: raw for name, raw in fields.items() if name in encoders and raw is not None}
    if not inputs:
        unknown = fields.keys() - TASK_FIELDS - RESULT_FIELDS
        raise unknown_sources(str(location), unknown, encoders, path=location.path, line=location.line)
    base = Path() if is_dataset(location.path) else Path(location.path).parent
    for name, raw in inputs.items():
        modality = encoders[name].modality
        if raw == "" or (modality in TEXT_MODALITIES and not isinstance(raw, str | StoredBytes)):
            expected = "a text" if modality == "text" else "the path of a file"
            message = f"has {name!r}: {json.dumps(raw)[:60]}; expected {expected}, correct the line."
            raise location.error("field_type", message, key=name, expected=expected)
        if isinstance(raw, str) and modality != "text":
            inputs[name] = resolve_path(raw, base)
    return inputs
