"""The commands that speak: caption and ask."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmx.cli.options import (
    BatchOption,
    BeamsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OutOption,
    QuietOption,
    TokensOption,
    leave,
    load_pipeline,
)
from mmx.errors import MmxError
from mmx.output import deliver, one_line, result_row

if TYPE_CHECKING:
    from mmx.memory import Box
    from mmx.pipeline import Pipeline

AlsoOption = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="SOURCE=INPUT", help="Another source to look at beside it, as audio=b.wav."),
]


def caption(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO", help="Pictures, or folders to be walked.")],
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchOption = 16,
    beams: BeamsOption = None,
    max_tokens: TokensOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what is in each picture: path, tab, caption.

    Other inputs as well, where the model has a source that reads them: a sound's path is heard, and "text=Guten Tag"
    is what a translator's source `text` reads.
    """
    pipeline = load_pipeline(model, device, dtype)
    typed = [photo for photo in photos if _named(photo, pipeline)]
    files = [Path(photo) for photo in photos if photo not in typed]
    paths, refused = _find_inputs(files, pipeline) if files else ([], [])
    strange = [path for path in paths if pipeline.model.encoder(_source(path, pipeline)).modality == "text"]
    refused += [(path, MmxError(f"{path!r} is no text; type it with its source, as text=...")) for path in strange]
    paths = [path for path in paths if path not in strange]
    given = [*(_named(text, pipeline) for text in typed), *({_source(path, pipeline): path} for path in paths)]
    said = pipeline.captions(given, batch_size, num_beams=beams, max_new_tokens=max_tokens)
    unread = (({_source(path, pipeline): path}, error) for path, error in refused)
    rows = (result_row(dict(inputs), _name(inputs), "caption", text) for inputs, text in chain(unread, said))
    total = len(refused) + len(given)
    leave(deliver(rows, total, out, as_json, quiet, lambda row: f"{row.name}\t{one_line(row.facts['caption'])}"))


def ask(
    photo: Annotated[Path | None, typer.Argument(metavar="PHOTO", help="The picture.")] = None,
    questions: Annotated[list[str] | None, typer.Argument(metavar="QUESTION", help="What to ask about it.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="JSON lines with image and question, instead.")
    ] = None,
    box: Annotated[
        str | None, typer.Option("--box", metavar="X0,Y0,X1,Y1", help="Look only there; 0..1 from the top left.")
    ] = None,
    also: AlsoOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchOption = 16,
    beams: BeamsOption = None,
    max_tokens: TokensOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer questions about a picture, or those of a file.

    Every picture is encoded once for all of its questions; the answers come in the order asked. Instead of a picture,
    any input that a source of the model accepts.
    """
    told = _told(photo, questions or [], data, _parse_box(box), _parse_also(also or []))
    if box is not None:
        from mmx.memory import check_box

        check_box(_parse_box(box))
    pipeline = load_pipeline(model, device, dtype)
    asked = [(_by_source(inputs, pipeline), question, region) for _, inputs, question, region in told]
    found = pipeline.answers(asked, batch_size, num_beams=beams, max_new_tokens=max_tokens)
    rows = (
        result_row({**_by_source(written, pipeline), "question": question}, _name(written), "answer", said)
        for (written, _, question, _), said in zip(told, found, strict=True)
    )
    many = len({_name(written) for written, *_ in told}) > 1
    several = len(told) > 1

    def line(row: Any) -> str:
        parts = [row.name] * many + [row.facts["question"]] * several + [one_line(row.facts["answer"])]
        return "\t".join(parts)

    leave(deliver(rows, len(told), out, as_json, quiet, line))


# ---- pieces ----------------------------------------------------------------------------------------------------

Inputs = Mapping[str, Any]  # raw inputs by source name; "" is one whose source the model must find
Told = tuple[Inputs, Inputs, str, "Box | None"]  # as written, with paths found, the question, the region


def _named(text: str, pipeline: Pipeline) -> Inputs | None:
    """An input typed with the name of its source, as text=...; None for a path."""
    name, _, raw = text.partition("=")
    return {name: raw} if raw and name in pipeline.model.encoders and not os.path.exists(text) else None


def _find_inputs(photos: Sequence[Path], pipeline: Pipeline) -> tuple[list[str], list[tuple[str, MmxError]]]:
    """The files among files and folders that a source reads; and the folders that give none, each with the reason."""
    from mmx.files import find_files

    kept, refused = [], []
    for photo in photos:
        try:
            if find_files([photo], pipeline.accepts):
                kept.append(photo)
            else:
                reason = f"{str(photo)!r}: no pictures are in this folder; check the path."
                refused.append((str(photo), MmxError(reason)))
        except MmxError as error:
            refused.append((str(photo), error))
    if not kept:
        raise refused[0][1]
    # Together, for a picture found twice counts once.
    return [str(path) for path in find_files(kept, pipeline.accepts)], refused


def _told(
    photo: Path | None, questions: Sequence[str], data: Path | None, box: Box | None, also: Mapping[str, str]
) -> list[Told]:
    """What is asked, on the command line or in a file."""
    if (data is None) == (photo is None):
        raise MmxError('ask needs a picture and a question, or --data FILE; type: mmx ask photo.jpg "what is this?"')
    if data is not None:
        if also:
            raise MmxError("--also goes with a picture; in the lines of --data, name each source beside the image.")
        from mmx.data.formats import read_asked

        return [(written, found, str(turn.question), turn.box or box) for written, found, turn in read_asked(data)]
    if not questions:
        raise MmxError(f'ask was given {photo} and no question; type: mmx ask {photo} "what is this?"')
    inputs = {"": str(photo), **also}
    return [(inputs, inputs, question, box) for question in questions]


def _by_source(inputs: Inputs, pipeline: Pipeline) -> Inputs:
    """The inputs with the source found of the one that came without a name."""
    found = {name or _source(raw, pipeline): raw for name, raw in inputs.items()}
    if len(found) < len(inputs):
        taken = _source(inputs[""], pipeline)
        raise MmxError(f"--also names {taken}, which {inputs['']} is for already; give another source.")
    return found


def _source(path: str, pipeline: Pipeline) -> str:
    from mmx.sources import source_of

    return source_of(pipeline.model.encoders, path)


def _name(inputs: Inputs) -> str:
    return " + ".join(str(raw) for raw in inputs.values())


def _parse_also(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, raw) in zip(texts, pairs):
        if not (name and equals and raw):
            raise MmxError(f"--also was given {text!r}; expected a source and its input, such as audio=b.wav.")
    names = [name for name, *_ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise MmxError(f"--also names {twice} more than once; a source takes one input.")
    return {name: raw for name, _, raw in pairs}


def _parse_box(text: str | None) -> Box | None:
    if text is None:
        return None
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError as error:
        raise MmxError(f"--box was given {text!r}; expected four numbers in 0..1, such as 0.1,0.2,0.5,0.6.") from error
    return x0, y0, x1, y1
