"""The command `mmx ask`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from mmx.cli.generation_options import (
    AppendOption,
    AvoidOption,
    IncludeOption,
    LengthPenaltyOption,
    NumReturnSequencesOption,
    PrependOption,
    RepetitionPenaltyOption,
    SeedOption,
    StartOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    parse_words,
)
from mmx.cli.input_item import Inputs, display_name
from mmx.cli.inputs import by_source, check_names, check_not_overwritten, normalize_path
from mmx.cli.options import (
    BatchSizeOption,
    BoxOption,
    DeviceOption,
    DtypeOption,
    GuidanceScaleOption,
    JsonOption,
    MaxNewTokensOption,
    ModelOption,
    NumBeamsOption,
    OutOption,
    OverwriteOption,
    QuietOption,
    RetryErrorsOption,
    ShardOption,
    SourceOption,
    exit_with_status,
    load_pipeline,
    parse_box,
    parse_shard,
    parse_sources,
    run_config,
)
from mmx.cli.output_target import FormatOption, OutputTarget
from mmx.cli.rows import BatchRun, OutputOptions, Row, result_row
from mmx.cli.templates import RowTexts, TextTemplates
from mmx.errors import MmxError, one_line

if TYPE_CHECKING:
    from mmx.boxes import Box
    from mmx.data.manifest import ManifestQuestion
    from mmx.inference.options import GenerationOptions
    from mmx.inference.pipeline import Pipeline


def ask(
    image: Annotated[str | None, typer.Argument(metavar="IMAGE", help="The image.")] = None,
    questions: Annotated[list[str] | None, typer.Argument(metavar="QUESTION", help="Questions about it.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="JSON lines, a table or a tar file of questions.")
    ] = None,
    box: BoxOption = None,
    source: SourceOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = 16,
    num_beams: NumBeamsOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    num_return_sequences: NumReturnSequencesOption = None,
    length_penalty: LengthPenaltyOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    start: StartOption = None,
    prepend: PrependOption = None,
    append: AppendOption = None,
    avoid: AvoidOption = None,
    include: IncludeOption = None,
    guidance_scale: GuidanceScaleOption = None,
    shard: ShardOption = None,
    out: OutOption = None,
    row_format: FormatOption = None,
    overwrite: OverwriteOption = False,
    retry_errors: RetryErrorsOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer questions about an image, or those of a file.

    Every image is encoded once for all of its questions; answers come in the order of the questions. Instead of an
    image, any input that a source of the model reads can be given. With --shard, all questions about an image are in
    the same part.

    In the file of --out a row is identified by its inputs, question and box, and by the id or question_id of its line.
    Error rows are kept too, and processed again with --retry-errors; "--out -" prints JSON lines.
    """
    templates = TextTemplates.parse(start, prepend, append)
    target = OutputTarget.parse(out, row_format)
    output = OutputOptions.parse(target, as_json, overwrite, retry_errors, quiet, parse_shard(shard))
    region = parse_box(box)
    requests = _read_requests(image, questions or [], data, parse_sources(source))
    pipeline = load_pipeline(model, device, dtype)
    options: GenerationOptions = {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "num_return_sequences": num_return_sequences,
        "length_penalty": length_penalty,
        "repetition_penalty": repetition_penalty,
        "start": start,
        "avoid": parse_words(avoid),
        "include": parse_words(include),
        "guidance_scale": guidance_scale,
    }
    config = run_config("ask", model, dtype, pipeline.generation_config(options), pipeline.folder)
    items = [_question_item(request, region, pipeline) for request in requests]
    check_not_overwritten(output.files, [data, *(raw for item in items for raw in item.inputs.values())])
    run = BatchRun(
        items=items,
        sources=tuple(pipeline.model.encoders),
        config={**config, **templates.config(), "box": region and list(region)},
        shard_key=lambda item: item.name,
        process=lambda remaining: _answer_rows(remaining, pipeline, batch_size, options, templates),
        format_line=_line_format(items),
        count=lambda: len(items) // output.shard[1],
    )
    exit_with_status(run.write(output))


class _QuestionItem(NamedTuple):
    """A question: the fields with which its row starts, what messages call its input, and what the model is given."""

    fields: dict[str, object]
    name: str
    inputs: Inputs
    question: str
    box: Box | None


def _read_requests(
    image: str | None, questions: Sequence[str], data: Path | None, sources: Mapping[str, str]
) -> list[ManifestQuestion]:
    """Return the questions of the command line or of a file, before the model is loaded. Raises MmxError."""
    from mmx.data.examples import TextTask
    from mmx.data.manifest import ManifestQuestion, read_questions
    from mmx.text.prompts import empty_question_error, is_empty_question

    if (data is None) == (image is None):
        message = 'ask needs an image and a question, or --data FILE; type: mmx ask photo.jpg "what is this?"'
        raise MmxError(message, code="ask.arguments")
    if data is not None:
        if sources:
            message = "--source was given with --data; name each source in the lines of the file, next to the image."
            raise MmxError(message, code="ask.source_with_data")
        return read_questions(data)
    check_names([image or ""])
    if not questions:
        message = f'ask was given {image} and no question; type: mmx ask {image} "what is this?"'
        raise MmxError(message, code="ask.no_question")
    if any(is_empty_question(question) for question in questions):
        raise empty_question_error()
    inputs = {"": normalize_path(image or ""), **sources}
    return [ManifestQuestion(inputs, inputs, TextTask((), question), {}) for question in questions]


def _question_item(request: ManifestQuestion, region: Box | None, pipeline: Pipeline) -> _QuestionItem:
    """Find the sources of the inputs. Other fields of the line are kept in its row. region: that of --box.

    Raises MmxError for a line without an input for any of them.
    """
    from mmx.data.examples import unknown_sources

    encoders = pipeline.model.encoders
    location = request.location
    others: Set[str] = set() if location is None else request.written.keys() - encoders.keys()
    if location is not None and len(others) == len(request.written):
        raise unknown_sources(str(location), others, encoders, path=location.path, line=location.line)
    written = by_source({name: raw for name, raw in request.written.items() if name not in others}, pipeline)
    resolved = by_source({name: raw for name, raw in request.sources.items() if name not in others}, pipeline)
    kept = {name: raw for name, raw in request.written.items() if name in others}
    question = str(request.task.question)
    fields = {**written, **kept, **request.ids, "question": question}
    if request.task.box is not None:
        fields["box"] = list(request.task.box)
    return _QuestionItem(fields, display_name(written), resolved, question, request.task.box or region)


def _answer_rows(
    items: Iterable[_QuestionItem],
    pipeline: Pipeline,
    batch_size: int,
    options: GenerationOptions,
    templates: TextTemplates,
) -> Iterator[Row]:
    """Yield the row of each question, in order."""
    from mmx.inference.outputs import Question

    items = list(items)
    rendered = [_render(item, templates) for item in items]
    questions = []
    for item, texts in zip(items, rendered, strict=True):
        if isinstance(texts, RowTexts):
            start = texts.start if templates.start.parts else None
            questions.append(Question(item.inputs, item.question, item.box, start))
    answers = pipeline.answers(questions, batch_size, **options)
    for item, texts in zip(items, rendered, strict=True):
        answer = texts if isinstance(texts, MmxError) else texts.add_to(next(answers))
        yield result_row(item.fields, item.name, "answer", answer)


def _render(item: _QuestionItem, templates: TextTemplates) -> RowTexts | MmxError:
    """The texts around the answer, or the error of a question without a field that they need."""
    try:
        return templates.render(item.fields, item.inputs)
    except MmxError as error:
        return MmxError(f"{item.name}: {error}", code=error.code, **error.details)


def _line_format(items: Sequence[_QuestionItem]) -> Callable[[Row], str]:
    """An answer is printed after its input and its question if there are several of them."""
    with_name = len({item.name for item in items}) > 1
    with_question = len(items) > 1

    def format_line(row: Row) -> str:
        columns = [row.name] if with_name else []
        if with_question:
            columns.append(str(row.fields["question"]))
        columns.append(str(row.fields["answer"]))
        return "\t".join(one_line(column) for column in columns)

    return format_line
