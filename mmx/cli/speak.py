"""The commands that speak: caption and ask."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mmx.cli.inputs import (
    Inputs,
    at_least_one,
    count,
    display_name,
    find_source,
    input_items,
    inputs_in,
    refuse_empty,
    refuse_inputs,
    spelled,
)
from mmx.cli.options import (
    BatchOption,
    BeamsOption,
    BoxOption,
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    JsonOption,
    ModelOption,
    OutOption,
    OverwriteOption,
    QuietOption,
    RetryOption,
    ShardOption,
    TokensOption,
    exit_with_status,
    load_pipeline,
    parse_shard,
    run_options,
)
from mmx.cli.rows import caption_rows, remaining
from mmx.errors import MmxError
from mmx.io.console import Row, column, count_for, one_line, open_results, progress_bar, result_row, write_rows
from mmx.io.results_file import IDS, row_id

if TYPE_CHECKING:
    from mmx.inference.pipeline import Pipeline
    from mmx.memory import Box

AlsoOption = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="SOURCE=INPUT", help="Another source to look at beside it, as audio=b.wav."),
]


def caption(
    photos: Annotated[
        list[str], typer.Argument(metavar="PHOTO", help="Pictures, folders, 'patterns/**/*.jpg', lists, tar files.")
    ],
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchOption = 16,
    beams: BeamsOption = None,
    max_tokens: TokensOption = None,
    guidance: GuidanceOption = None,
    shard: ShardOption = None,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    retry_errors: RetryOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what is in each picture: path, tab, caption.

    Other inputs as well, where the model has a source that reads them: a sound's path is heard, and "text=Guten Tag"
    is what a translator's source `text` reads.

    A list is JSON lines with an image (or another source) each; a tar file holds pictures. Type the same command again
    after a stop, and --out goes on with what is missing; "--out -" prints the lines.

    A row is known by its inputs and all that its list says of it; where that is an id, by the inputs and the id. Rows
    of errors are kept as well, and tried again with --retry-errors.
    """
    refuse_empty(photos)
    part, (out, as_json) = parse_shard(shard), parse_out(out, as_json)
    pipeline = load_pipeline(model, device, dtype)
    options = {"num_beams": beams, "max_new_tokens": max_tokens, "guidance_scale": guidance}
    made = run_options("caption", model, dtype, pipeline.generation_config(options))
    refuse_inputs(out, (raw for photo in photos for raw in inputs_in(photo, pipeline)))
    inputs, sources = at_least_one(input_items(photos, pipeline, out)), tuple(pipeline.model.encoders)
    with (
        open_results(out, made, sources, overwrite, retry_errors) as journal,
        progress_bar(None, is_quiet(quiet, out)) as bar,
    ):
        count_for(bar, lambda: count(photos, pipeline, part[1], out))
        todo = remaining(inputs, part, lambda item: row_id(item.fields, sources), journal, bar)
        rows = caption_rows(todo, pipeline, batch_size, options)
        well = write_rows(
            rows, bar, journal, as_json, lambda row: f"{column(row.name)}\t{one_line(row.fields['caption'])}"
        )
    exit_with_status(well)


def ask(
    photo: Annotated[str | None, typer.Argument(metavar="PHOTO", help="The picture.")] = None,
    questions: Annotated[list[str] | None, typer.Argument(metavar="QUESTION", help="What to ask about it.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="JSON lines with image and question, instead.")
    ] = None,
    box: BoxOption = None,
    also: AlsoOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchOption = 16,
    beams: BeamsOption = None,
    max_tokens: TokensOption = None,
    guidance: GuidanceOption = None,
    shard: ShardOption = None,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    retry_errors: RetryOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer questions about a picture, or those of a file.

    Every picture is encoded once for all of its questions; the answers come in the order asked. Instead of a picture,
    any input that a source of the model accepts. With --shard, all questions about a picture are in one part.

    In the file of --out a row is known by its inputs, question and box, and by the id or question_id of its line. Rows
    of errors are kept as well, and tried again with --retry-errors; "--out -" prints the lines.
    """
    part, region, (out, as_json) = parse_shard(shard), parse_box(box), parse_out(out, as_json)
    told = _told(photo, questions or [], data, region, parse_also(also or []))
    if region is not None:
        from mmx.memory import check_box

        check_box(region)
    pipeline = load_pipeline(model, device, dtype)
    options = {"num_beams": beams, "max_new_tokens": max_tokens, "guidance_scale": guidance}
    made = run_options("ask", model, dtype, pipeline.generation_config(options), box=region and list(region))
    every, sources = [_asking(item, pipeline) for item in told], tuple(pipeline.model.encoders)
    refuse_inputs(out, {data, *(raw for item in every for raw in item.inputs.values() if isinstance(raw, str))})
    with (
        open_results(out, made, sources, overwrite, retry_errors) as journal,
        progress_bar(None, is_quiet(quiet, out)) as bar,
    ):
        count_for(bar, lambda: len(every) // part[1])
        todo = list(remaining(every, part, lambda item: item.name, journal, bar))
        found = pipeline.answers([(item.inputs, item.question, item.box) for item in todo], batch_size, **options)
        rows = (result_row(item.fields, item.name, "answer", said) for item, said in zip(todo, found, strict=True))
        well = write_rows(rows, bar, journal, as_json, _answer_line(every))
    exit_with_status(well)


# ---- pieces ----------------------------------------------------------------------------------------------------


class QuestionRequest(NamedTuple):
    """A question: its inputs as written, and with paths found; what else its line says, to be kept; the region."""

    written: Inputs
    found: Inputs
    question: str
    box: Box | None
    fields: Mapping[str, Any]


class PreparedQuestion(NamedTuple):
    """A question to a model: what its row begins with, what a person calls the input, and what is asked."""

    fields: dict[str, Any]
    name: str
    inputs: Inputs
    question: str
    box: Box | None


def parse_out(out: Path | None, as_json: bool) -> tuple[Path | None, bool]:
    """The file, and whether lines of JSON are printed: "-" is stdout, with the lines that a file would get."""
    return (None, True) if out == Path("-") else (out, as_json)


def is_quiet(quiet: bool, out: Path | None) -> bool:
    """A bar has no place among lines on the same terminal."""
    return quiet or (out is None and sys.stdout.isatty())


def _told(
    photo: str | None, questions: Sequence[str], data: Path | None, box: Box | None, also: Mapping[str, str]
) -> list[QuestionRequest]:
    """What is asked, on the command line or in a file."""
    if (data is None) == (photo is None):
        raise MmxError('ask needs a picture and a question, or --data FILE; type: mmx ask photo.jpg "what is this?"')
    if data is not None:
        if also:
            raise MmxError("--also goes with a picture; in the lines of --data, name each source beside the image.")
        from mmx.data.formats import read_questions
        from mmx.data.json_fields import read_lines

        lines = ({name: line[name] for name in IDS if name in line} for _, line in read_lines(data))
        return [
            QuestionRequest(written, found, str(turn.question), turn.box or box, {**kept, **_own_box(turn.box)})
            for (written, found, turn), kept in zip(read_questions(data), lines, strict=True)
        ]
    refuse_empty([photo or ""])
    if not questions:
        raise MmxError(f'ask was given {photo} and no question; type: mmx ask {photo} "what is this?"')
    inputs = {"": spelled(photo or ""), **also}
    return [QuestionRequest(inputs, inputs, question, box, {}) for question in questions]


def _own_box(box: Box | None) -> dict[str, Any]:
    return {} if box is None else {"box": list(box)}


def _asking(told: QuestionRequest, pipeline: Pipeline) -> PreparedQuestion:
    """A question with its inputs by source; what else its line says is kept in its row."""
    known = pipeline.model.encoders
    kept = {name: raw for name, raw in told.written.items() if name not in known}
    if "" in kept or len(kept) == len(told.written):
        kept = {}  # typed as inputs, or nothing else is one: the model says which sources it has
    written = by_source({name: raw for name, raw in told.written.items() if name not in kept}, pipeline)
    found = by_source({name: raw for name, raw in told.found.items() if name not in kept}, pipeline)
    facts = {**written, **kept, **told.fields}
    box = {"box": facts.pop("box")} if "box" in told.fields else {}
    return PreparedQuestion(
        {**facts, "question": told.question, **box}, display_name(written), found, told.question, told.box
    )


def _answer_line(asked: Sequence[PreparedQuestion]) -> Callable[[Row], str]:
    """How an answer is printed: after its question and its input, where there are several."""
    many, several = len({item.name for item in asked}) > 1, len(asked) > 1

    def line(row: Row) -> str:
        parts = [row.name] * many + [row.fields["question"]] * several
        return "\t".join([*map(column, parts), one_line(row.fields["answer"])])

    return line


def by_source(inputs: Inputs, pipeline: Pipeline) -> Inputs:
    """The inputs with the source found of the one that came without a name."""
    found = {name or find_source(raw, pipeline): raw for name, raw in inputs.items()}
    if len(found) < len(inputs):
        taken = find_source(inputs[""], pipeline)
        raise MmxError(f"--also names {taken}, which {inputs['']} is for already; give another source.")
    return found


def parse_also(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, raw) in zip(texts, pairs):
        if not (name and equals and raw):
            raise MmxError(f"--also was given {text!r}; expected a source and its input, such as audio=b.wav.")
    names = [name for name, *_ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise MmxError(f"--also names {twice} more than once; a source takes one input.")
    return {name: raw for name, _, raw in pairs}


def parse_box(text: str | None) -> Box | None:
    if text is None:
        return None
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError as error:
        raise MmxError(f"--box was given {text!r}; expected four numbers in 0..1, such as 0.1,0.2,0.5,0.6.") from error
    return x0, y0, x1, y1
