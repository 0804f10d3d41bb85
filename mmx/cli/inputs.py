"""The arguments of a command as a stream of inputs: files, folders, patterns, manifests, tar archives, texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mmx.cli.input_item import InputItem, Inputs, display_name
from mmx.cli.list_items import count_list_items, is_dataset, is_list_file, list_items
from mmx.errors import MmxError
from mmx.io.files import UNREAD_SUFFIXES, find_files, is_pattern
from mmx.io.results_file import hash_id, output_files
from mmx.io.tar import is_tar, read_tar

if TYPE_CHECKING:
    from mmx.inference.pipeline import Pipeline

MAX_NAMED = 5  # files that one message names


def input_items(names: Sequence[str], pipeline: Pipeline, outputs: Sequence[Path] = ()) -> Iterator[InputItem]:
    """Yield the inputs that the arguments of a command stand for, in order.

    Folders are searched for what the model reads; patterns also for lists and archives. A file that a search finds
    again is skipped, and so are `outputs`, the files of --out. Images or audio in formats that are not read are an
    error after the other files of a folder, a pattern or an archive.
    """
    for entry in _expand(names, pipeline, outputs):
        if isinstance(entry, InputItem):
            yield entry
        elif _is_manifest(entry, pipeline):
            yield from _or_error(list_items(entry, pipeline), entry, "this list has no lines")
        elif _is_archive(entry, pipeline):
            yield from _or_error(_archive_items(entry, pipeline), entry, "this tar file has no images")
        else:
            yield _file_item(entry, pipeline)


def require_input(items: Iterable[InputItem]) -> Iterator[InputItem]:
    """Return the same items. Raises the first error if none of them is an input: then there is nothing to do."""
    rest = iter(items)
    refused: list[InputItem] = []
    for item in rest:
        if item.unreadable or not isinstance(item.inputs, MmxError):
            return chain(refused, [item], rest)
        refused.append(item)
    for item in refused:
        if isinstance(item.inputs, MmxError):
            raise item.inputs
    raise MmxError("no input was given.", code="input.none")


def count_inputs(names: Sequence[str], pipeline: Pipeline, num_shards: int, outputs: Sequence[Path]) -> int | None:
    """Return about how many inputs a shard has; None for archives and data sets, which would have to be read."""
    total = 0
    for entry in _expand(names, pipeline, outputs):
        if isinstance(entry, InputItem):
            total += 1
        elif _is_archive(entry, pipeline):
            return None
        elif _is_manifest(entry, pipeline):
            num_lines = count_list_items(entry)
            if num_lines is None:
                return None
            total += num_lines
        else:
            total += 1
    return total // num_shards


def check_names(names: Sequence[str]) -> None:
    """Raise MmxError for an empty argument: an unset shell variable must not stand for the current folder."""
    if not all(names):
        message = "an input was given as '', which is not a path; type . for the current folder."
        raise MmxError(message, code="input.empty_name")


def check_not_overwritten(outputs: Iterable[Path], inputs: Iterable[object]) -> None:
    """Raise MmxError if results would be written over one of the inputs. Values that are not paths are ignored."""
    results = [file for out in outputs for file in output_files(out)]
    for raw in inputs:
        if isinstance(raw, str | os.PathLike) and _is_one_of(raw, results):
            path = os.fspath(raw)
            message = f"--out would overwrite the input {path}; choose another --out."
            raise MmxError(message, code="output.is_input", path=path)


def raw_inputs(name: str, pipeline: Pipeline) -> list[object]:
    """Return the path in an argument, or the input after the name of its source."""
    named = parse_named_input(name, pipeline)
    return [name] if named is None else list(named.values())


def parse_named_input(name: str, pipeline: Pipeline) -> Inputs | None:
    """Parse an argument such as text=Hello, with the name of a source; None for a path."""
    source, _, raw = name.partition("=")
    return {source: raw} if raw and source in pipeline.model.encoders and not os.path.exists(name) else None


def normalize_path(path: str) -> str:
    """Return a path without "./" and double slashes; a URL as it is."""
    from mmx.data.json_fields import is_url

    return path if is_url(path) and not os.path.exists(path) else str(Path(path))


def by_source(inputs: Inputs, pipeline: Pipeline) -> dict[str, object]:
    """Return inputs by source name; the source of one without a name is found. Raises MmxError."""
    named = {name: raw for name, raw in inputs.items() if name}
    if "" in inputs:
        source = _find_source(str(inputs[""]), pipeline)
        if source in named:
            message = f"--source names {source}, which is the source of {inputs['']}; name another source."
            raise MmxError(message, code="option.source_twice", source=source)
        named = {source: inputs[""], **named}
    return named


# ---- arguments -------------------------------------------------------------------------------------------------


def _expand(names: Sequence[str], pipeline: Pipeline, outputs: Sequence[Path]) -> Iterator[InputItem | str]:
    """Yield the paths that arguments stand for; an input that is not a path is an item already."""
    from mmx.data.json_fields import is_url

    results = [file for out in outputs for file in output_files(out)]
    found_paths: set[int] = set()
    for name in names:
        inputs = parse_named_input(name, pipeline)
        if inputs is not None:
            yield InputItem(dict(inputs), display_name(inputs), inputs)
        elif is_dataset(name):
            yield name
        elif os.path.isdir(name) or (is_pattern(name) and not is_url(name)):
            yield from _search(name, pipeline, results, found_paths)
        else:
            yield normalize_path(name)


def _search(name: str, pipeline: Pipeline, results: Sequence[Path], found_paths: set[int]) -> Iterator[InputItem | str]:
    """Yield the files that a folder or a pattern stands for, apart from those found before."""
    by_pattern = is_pattern(name)
    unread = _UnreadFiles(pipeline, found_paths)
    is_empty = True
    for path in find_files([name], partial(_is_searched, pipeline, by_pattern, results, unread)):
        is_empty = False
        if isinstance(path, MmxError):
            yield _error_item(name, path, pipeline)
        elif _is_new(str(path), found_paths):
            yield str(path)
    if unread.count:
        yield unread.item(name)
    elif is_empty and not unread.found_again:
        problem = "no images match this pattern" if by_pattern else "no images are in this folder"
        yield _error_item(name, _nothing_found(name, problem), pipeline)


def _is_new(path: str, found_paths: set[int]) -> bool:
    """Whether a path was not found before; afterwards it was."""
    number = hash_id(os.path.abspath(path))
    is_new = number not in found_paths
    found_paths.add(number)
    return is_new


def _is_searched(
    pipeline: Pipeline, by_pattern: bool, results: Sequence[Path], unread: _UnreadFiles, path: str
) -> bool:
    accepted = unread.accepts(path)
    if by_pattern and not accepted:
        accepted = _is_manifest(path, pipeline) or _is_archive(path, pipeline)
    return accepted and not _is_one_of(path, results)


class _UnreadFiles:
    """The images or audio files of a search that no source reads because of their format.

    Attributes:
        count: how many there are, apart from those found before.
        names: the first few of them.
        found_again: whether there are some that were found before.
    """

    def __init__(self, pipeline: Pipeline, found_paths: set[int]) -> None:
        self.count = 0
        self.names: list[str] = []
        self.found_again = False
        self._pipeline = pipeline
        self._found_paths = found_paths
        modalities = {encoder.modality for encoder in pipeline.model.encoders.values()}
        self._suffixes = frozenset[str]().union(*(UNREAD_SUFFIXES.get(modality, ()) for modality in modalities))

    def accepts(self, path: str) -> bool:
        """Return whether a source reads files of this name. If not, count those of a known format."""
        if self._pipeline.accepts(path):
            return True
        if Path(path).suffix.lower() in self._suffixes:
            if not _is_new(path, self._found_paths):
                self.found_again = True
                return False
            self.count += 1
            if len(self.names) < MAX_NAMED:
                self.names.append(path)
        return False

    def item(self, where: str) -> InputItem:
        """Return the error of the files in a folder, a pattern or an archive."""
        files = "1 file has a format" if self.count == 1 else f"{self.count:,} files have formats"
        more = f" and {self.count - MAX_NAMED:,} more" if self.count > MAX_NAMED else ""
        error = MmxError(
            f"{where!r}: {files} that mmx does not read: {', '.join(self.names)}{more}; convert images to JPEG or PNG, "
            "audio to FLAC or WAV.",
            code="input.unread_format",
            path=where,
            count=self.count,
            files=self.names,
        )
        return _error_item(where, error, self._pipeline)._replace(unreadable=True)


def _is_one_of(path: str | os.PathLike[str], files: Sequence[Path]) -> bool:
    """Whether a path leads to one of some files, also through links. The files need not exist."""
    try:
        for file in files:
            if os.path.samefile(path, file) if os.path.exists(file) else os.path.realpath(path) == str(file):
                return True
    except (OSError, ValueError):  # no such file, or not a valid name
        pass
    return False


def _is_manifest(path: str, pipeline: Pipeline) -> bool:
    return is_dataset(path) or (is_list_file(path) and os.path.isfile(path) and not pipeline.accepts(path))


def _is_archive(path: str, pipeline: Pipeline) -> bool:
    return is_tar(path) and os.path.isfile(path) and not pipeline.accepts(path)


def _nothing_found(path: str, problem: str) -> MmxError:
    return MmxError(f"{path!r}: {problem}; check the path.", code="input.nothing_found", path=path)


def _or_error(items: Iterator[InputItem], path: str, problem: str) -> Iterator[InputItem]:
    """Yield the same items, or an error if there are none."""
    yield next(items, InputItem({"input": path}, path, _nothing_found(path, problem)))
    yield from items


def _error_item(path: str, error: MmxError, pipeline: Pipeline) -> InputItem:
    return InputItem(_file_item(path, pipeline).fields, path, error)


# ---- items -----------------------------------------------------------------------------------------------------


def _find_source(path: str, pipeline: Pipeline) -> str:
    from mmx.models.source import find_source

    return find_source(pipeline.model.encoders, path)


def _file_item(path: str, pipeline: Pipeline) -> InputItem:
    try:
        source = _find_source(path, pipeline)
    except MmxError as error:
        return InputItem({"input": path}, path, error)
    if pipeline.model.encoder(source).modality == "text":
        message = f"{path!r} is a path, and the model reads texts; type the text with its source, as text=..."
        return InputItem({source: path}, path, MmxError(message, code="input.not_text", path=path), unreadable=True)
    return InputItem({source: path}, path, {source: path})


def _archive_items(path: str, pipeline: Pipeline) -> Iterator[InputItem]:
    """Yield an item for each member that a source reads, as bytes; its name is that of the archive and the member."""
    from mmx.io import audio, images

    has_audio = any(encoder.modality == "audio" for encoder in pipeline.model.encoders.values())
    unread = _UnreadFiles(pipeline, set())
    for member in read_tar(path, unread.accepts, audio.MAX_BYTES if has_audio else images.MAX_BYTES):
        item = _file_item(f"{path}/{member.name}" if member.name else path, pipeline)
        if isinstance(member.data, MmxError):
            yield item._replace(inputs=member.data)
        elif isinstance(item.inputs, MmxError):
            yield item
        else:
            yield item._replace(inputs=dict.fromkeys(item.fields, member.data))
    if unread.count:
        yield unread.item(path)
