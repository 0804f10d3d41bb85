"""What a person names is many things: pictures, folders, patterns, manifests, shards, texts. One stream of inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmx.errors import MmxError
from mmx.io.results_file import files_of

if TYPE_CHECKING:
    from mmx.inference.pipeline import Pipeline

WRITTEN = ("image", "audio", "text")  # modalities whose inputs are written as texts: paths, or the text itself
Inputs = Mapping[str, Any]  # raw inputs by source name; "" is one whose source the model must find


class InputItem(NamedTuple):
    """An input: the facts that its row begins with, what a person calls it, and what is read, or why it is not.
    failed: it is one input that cannot be read, beside which others could be, and no wrong usage."""

    fields: dict[str, Any]
    name: str
    inputs: Inputs | MmxError
    failed: bool = False


def input_items(photos: Sequence[str], pipeline: Pipeline, out: Path | None = None) -> Iterator[InputItem]:
    """The inputs that the words of a command stand for, in order, each when it is due. What folders and patterns have
    of the files of `out` is passed over: a run reads no results of its own."""
    for place in _places(photos, pipeline, out):
        if isinstance(place, InputItem):
            yield place
        elif _is_manifest(place, pipeline):
            yield from _some(_lines(place, pipeline), place, "no lines are in this list")
        elif _is_shard(place, pipeline):
            yield from _some(_members(place, pipeline), place, "no pictures are in this tar file")
        else:
            yield _file(place, pipeline)


def at_least_one(inputs: Iterable[InputItem]) -> Iterator[InputItem]:
    """The same inputs. Raises the first reason where none of them is an input: then there is nothing to be done."""
    following = iter(inputs)
    refused: list[InputItem] = []
    for item in following:
        if item.failed or not isinstance(item.inputs, MmxError):
            return chain(refused, [item], following)
        refused.append(item)
    raise next((item.inputs for item in refused if isinstance(item.inputs, MmxError)), MmxError("nothing was given."))


def count(photos: Sequence[str], pipeline: Pipeline, shards: int = 1, out: Path | None = None) -> int | None:
    """About how many inputs one of so many shards has; None where that takes reading them all, as in a tar file."""
    total = 0
    for place in _places(photos, pipeline, out):
        if isinstance(place, str) and _is_shard(place, pipeline):
            return None
        if isinstance(place, str) and _is_manifest(place, pipeline):
            with open(place, "rb") as file:
                total += sum(1 for line in file if line.strip())
        else:
            total += 1
    return total // shards


def refuse_empty(photos: Sequence[str]) -> None:
    """Raise MmxError for a word of no letters: a variable that is not set shall not stand for the current folder."""
    if not all(photos):
        raise MmxError("an input was given as '', which names nothing; expected a path, type . for this folder.")


def refuse_inputs(out: Path | None, inputs: Iterable[Any]) -> None:
    """Raise MmxError where results would be written over one of the inputs (paths; what else there is counts not)."""
    own = files_of(out)
    for raw in inputs:
        if isinstance(raw, str | os.PathLike) and _is_one_of(raw, own):
            raise MmxError(f"--out {out} would be written over {os.fspath(raw)}, an input; choose another --out.")


def inputs_in(photo: str, pipeline: Pipeline) -> list[Any]:
    """What a word of a command names: itself, or the input behind the name of its source."""
    typed = inputs_named(photo, pipeline)
    return [photo] if typed is None else list(typed.values())


def inputs_named(text: str, pipeline: Pipeline) -> Inputs | None:
    """An input typed with the name of its source, as text=...; None for a path."""
    name, _, raw = text.partition("=")
    return {name: raw} if raw and name in pipeline.model.encoders and not os.path.exists(text) else None


def spelled(path: str) -> str:
    """A path as rows have it, without "./" and doubled slashes; an address as it was typed."""
    from mmx.data.json_fields import is_url

    return path if is_url(path) and not os.path.exists(path) else str(Path(path))


def display_name(inputs: Inputs) -> str:
    """What a person calls inputs: their paths, or what else was typed."""
    return " + ".join(str(raw) for raw in inputs.values())


def find_source(path: str, pipeline: Pipeline) -> str:
    """The source that a path is for. Raises MmxError where it could be several."""
    from mmx.models.source import find_source

    return find_source(pipeline.model.encoders, path)


# ---- pieces ----------------------------------------------------------------------------------------------------


def _places(photos: Sequence[str], pipeline: Pipeline, out: Path | None) -> Iterator[InputItem | str]:
    """The paths that words stand for, folders walked and patterns matched; what is no path is an input already."""
    from mmx.data.json_fields import is_url
    from mmx.io.files import find_files, is_pattern

    walked: list[str] = []
    own = files_of(out)
    for photo in photos:
        typed = inputs_named(photo, pipeline)
        if typed is not None:
            yield InputItem(dict(typed), display_name(typed), typed)
            continue
        if is_url(photo) and not os.path.exists(photo):
            yield photo
            continue
        earlier, empty = list(walked), True
        # A pattern finds in a folder that was walked what the walk had no eye for: lists and shards.
        by_pattern = is_pattern(photo)
        wanted = partial(_is_wanted, pipeline, tuple(walked) if by_pattern else None, own)
        for found in find_files([photo], wanted, [] if by_pattern else walked):
            empty = False
            yield _refused(photo, found, pipeline) if isinstance(found, MmxError) else str(found)
        if empty and not _are_related(photo, earlier):
            where = "match this pattern" if by_pattern else "are in this folder"
            yield _refused(photo, MmxError(f"{photo!r}: no pictures {where}; check the path."), pipeline)


def _is_wanted(pipeline: Pipeline, walked: tuple[str, ...] | None, own: Sequence[Path], path: str) -> bool:
    """A folder is walked for what the model reads; a pattern (given what was `walked` before it) may mean lists and
    shards as well."""
    from mmx.io.files import is_under

    if walked is None or not (_is_manifest(path, pipeline) or _is_shard(path, pipeline)):
        found_before = walked is not None and is_under(Path(path).parent, walked)
        return pipeline.accepts(path) and not found_before and not _is_one_of(path, own)
    return not _is_one_of(path, own)


def _is_one_of(path: str | os.PathLike[str], own: Sequence[Path]) -> bool:
    """Whether a path is that of one of these files, through links or under another name; they need not be there yet."""
    try:
        return any(
            os.path.samefile(path, file) if os.path.exists(file) else os.path.realpath(path) == str(file)
            for file in own
        )
    except (OSError, ValueError):  # no such file, or no name of one
        return False


def _are_related(photo: str, walked: Sequence[str]) -> bool:
    """Whether a folder lies in one that was walked before, or the other way round: then its files were found there."""
    place = os.path.abspath(photo)
    return any(os.path.commonpath([place, other]) in (place, other) for other in walked)


def _is_manifest(path: str, pipeline: Pipeline) -> bool:
    return path.endswith(".jsonl") and os.path.isfile(path) and not pipeline.accepts(path)


def _is_shard(path: str, pipeline: Pipeline) -> bool:
    from mmx.io.tar import is_tar

    return is_tar(path) and os.path.isfile(path) and not pipeline.accepts(path)


def _file(path: str, pipeline: Pipeline) -> InputItem:
    """A file for the source that reads it; a source of texts has no files."""
    try:
        source = find_source(path, pipeline)
    except MmxError as error:
        return InputItem({"input": path}, path, error)
    if pipeline.model.encoder(source).modality == "text":
        told = MmxError(f"{path!r} is no text; type it with its source, as text=...")
        return InputItem({source: path}, path, told, failed=True)
    return InputItem({source: path}, path, {source: path})


def _refused(path: str, error: MmxError, pipeline: Pipeline) -> InputItem:
    return InputItem(_file(path, pipeline).fields, path, error)


def _some(inputs: Iterator[InputItem], path: str, nothing: str) -> Iterator[InputItem]:
    """The same inputs, or why there are none."""
    first = next(inputs, InputItem({"input": path}, path, MmxError(f"{path!r}: {nothing}; check the path.")))
    yield first
    yield from inputs


def _lines(path: str, pipeline: Pipeline) -> Iterator[InputItem]:
    """The inputs of a manifest, JSON lines as `mmx.data.json_fields` reads them; a wrong line is an error of its own."""
    try:
        base = Path(path).parent
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield _line(f"{path}:{number}", text, base, pipeline)
    except OSError as error:
        yield InputItem(
            {"input": path}, path, MmxError(f"list {path!r} cannot be read: {error.strerror}; check the path.")
        )


def _line(where: str, text: str, base: Path, pipeline: Pipeline) -> InputItem:
    """The sources of a line, with paths from the manifest's folder; the rest is kept, but not what is asked."""
    from mmx.data.formats import TURN_FIELDS
    from mmx.data.json_fields import parse_line
    from mmx.io.results_file import IDS, RESULTS

    try:
        line = parse_line(where, text)
        inputs = _sources(where, line, base, pipeline)
    except MmxError as error:
        return InputItem({"input": where}, where, error)
    left_out = (TURN_FIELDS - set(IDS)) | RESULTS | inputs.keys()
    return InputItem(
        {**inputs, **{key: value for key, value in line.items() if key not in left_out}}, display_name(inputs), inputs
    )


def _sources(where: str, line: Mapping[str, Any], base: Path, pipeline: Pipeline) -> dict[str, Any]:
    """The inputs of a line, with paths from the manifest's folder. Raises MmxError, naming where, for what is none."""
    from mmx.data.json_fields import resolve_path

    encoders = pipeline.model.encoders
    sources = {name: raw for name, raw in line.items() if name in encoders and raw is not None}
    if not sources:
        some = next(iter(encoders))
        raise MmxError(f"{where} names no input; expected a field of the model's sources, such as {some!r}.")
    for name, raw in sources.items():
        modality = encoders[name].modality
        if raw == "" or (modality in WRITTEN and not isinstance(raw, str)):
            expected = "a text" if modality == "text" else "the path of a file"
            raise MmxError(f"{where} has {name!r}: {json.dumps(raw)[:60]}; expected {expected}, mend the line.")
        if isinstance(raw, str) and modality != "text":
            sources[name] = resolve_path(raw, base)
    return sources


def _members(path: str, pipeline: Pipeline) -> Iterator[InputItem]:
    """The members of a shard that a source reads, as bytes under the name of shard and member. What is too large for
    its source, the source's own door refuses."""
    from mmx.io import audio, images
    from mmx.io.tar import read_tar

    heard = any(encoder.modality == "audio" for encoder in pipeline.model.encoders.values())
    for member in read_tar(path, pipeline.accepts, audio.MAX_BYTES if heard else images.MAX_BYTES):
        name = f"{path}/{member.name}" if member.name else path
        found = _file(name, pipeline)
        if isinstance(member.data, bytes) and not isinstance(found.inputs, MmxError):
            yield found._replace(inputs=dict.fromkeys(found.fields, member.data))
        else:
            yield found._replace(inputs=found.inputs if isinstance(member.data, bytes) else member.data)
