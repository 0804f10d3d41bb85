"""The command `mmx caption`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import tee
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
from mmx.cli.input_item import InputItem, result_fields
from mmx.cli.inputs import (
    check_names,
    check_not_overwritten,
    count_inputs,
    input_items,
    raw_inputs,
    require_input,
)
from mmx.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    GuidanceScaleOption,
    JsonOption,
    LanguageOption,
    MaxNewTokensOption,
    ModelOption,
    NumBeamsOption,
    OutOption,
    OverwriteOption,
    QuietOption,
    RetryErrorsOption,
    ShardOption,
    TaskOption,
    exit_with_status,
    load_pipeline,
    parse_shard,
    parse_task,
    run_config,
)
from mmx.cli.output_target import FormatOption, OutputTarget
from mmx.cli.rows import BatchRun, OutputOptions, Row, result_row
from mmx.cli.sidecars import (
    ExistingOption,
    SidecarOption,
    XmpOption,
    captioned_files,
    check_existing,
    parse_existing,
    parse_sidecars,
)
from mmx.cli.templates import RowTexts, TextTemplates
from mmx.errors import MmxError, one_line
from mmx.io.results_file import row_id

if TYPE_CHECKING:
    from mmx.inference.options import GenerationOptions
    from mmx.inference.pipeline import Pipeline


def caption(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Images, folders, 'patterns/**/*.jpg', lists, tar files."),
    ],
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
    language: LanguageOption = None,
    task: TaskOption = None,
    shard: ShardOption = None,
    out: OutOption = None,
    row_format: FormatOption = None,
    sidecar: SidecarOption = None,
    xmp: XmpOption = False,
    existing: ExistingOption = "skip",
    overwrite: OverwriteOption = False,
    retry_errors: RetryErrorsOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Caption images: path, tab, caption.

    If the model has other sources, their inputs can be given too: the path of an audio file, or "text=Guten Tag" for
    the source `text` of a translation model. Audio that is longer than the model reads (30 seconds) is transcribed in
    windows.

    A list is JSON lines, CSV, TSV or parquet with an image (or another source) each, or hf:NAME:SPLIT of Hugging Face
    datasets; a tar file has images. With --out, type the same command again after a stop to process what is missing;
    "--out -" prints JSON lines.

    With --sidecar or --xmp, captions are written next to the images. Images that have them are skipped, so a stopped
    run is continued by the same command, with or without --out. With --out FILE.tar, one tar file is copied with a
    caption after each image.

    A row is identified by its inputs and the other fields of its list; with an id by the inputs and the id. Error rows
    are kept too, and processed again with --retry-errors.
    """
    check_names(images)
    templates = TextTemplates.parse(start, prepend, append)
    target = OutputTarget.parse(out, row_format, with_tar=True)
    suffixes = parse_sidecars(sidecar, xmp)
    policy = parse_existing(existing)
    check_existing(target, suffixes, policy)
    output = OutputOptions.parse(target, as_json, overwrite, retry_errors, quiet, parse_shard(shard))
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
        "language": language,
        "task": parse_task(task),
    }
    pipeline = load_pipeline(model, device, dtype)
    generation = pipeline.generation_config(options)
    config = {**run_config("caption", model, dtype, generation, pipeline.folder), **templates.config()}
    check_not_overwritten(output.files, (raw for name in images for raw in raw_inputs(name, pipeline)))
    sources = tuple(pipeline.model.encoders)
    results = result_fields(pipeline)
    run = BatchRun(
        items=require_input(input_items(images, pipeline, output.files)),
        sources=sources,
        config={**config, "sidecars": suffixes, "existing": policy},
        shard_key=lambda item: row_id(item.fields, sources, results),
        process=lambda items: _caption_rows(items, pipeline, batch_size, options, templates),
        format_line=lambda row: f"{one_line(row.name)}\t{one_line(str(row.fields['caption']))}",
        count=lambda: count_inputs(images, pipeline, output.shard[1], output.files),
        result_fields=results,
        files=captioned_files(target, suffixes, policy, images, pipeline),
    )
    exit_with_status(run.write(output))


class _StartedItem(NamedTuple):
    """An item with the texts around that of its row."""

    item: InputItem
    texts: RowTexts


def _caption_rows(
    items: Iterable[InputItem],
    pipeline: Pipeline,
    batch_size: int,
    options: GenerationOptions,
    templates: TextTemplates,
) -> Iterator[Row]:
    """Yield the row of each item, in order."""
    started, copies, others = tee((_started(item, templates) for item in items), 3)
    starts = (other.texts.start for other in others) if templates.start.parts else None
    results = pipeline.captions((copy.item.inputs for copy in copies), batch_size, starts, **options)
    for (_, result), (item, texts) in zip(results, started):
        if isinstance(result, MmxError) and _has_bytes(item):  # members of an archive, which have no name of their own
            result = MmxError(f"{item.name!r}: {result}", code=result.code, **result.details)
        yield result_row(item.fields, item.name, "caption", texts.add_to(result))


def _started(item: InputItem, templates: TextTemplates) -> _StartedItem:
    """Render the texts of an item; one without a field that they need is an error."""
    if isinstance(item.inputs, MmxError):
        return _StartedItem(item, RowTexts())
    try:
        return _StartedItem(item, templates.render(item.fields, item.inputs))
    except MmxError as error:
        named = MmxError(f"{item.name}: {error}", code=error.code, **error.details)
        return _StartedItem(item._replace(inputs=named), RowTexts())


def _has_bytes(item: InputItem) -> bool:
    return not isinstance(item.inputs, MmxError) and any(isinstance(raw, bytes) for raw in item.inputs.values())
