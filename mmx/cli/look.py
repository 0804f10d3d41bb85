"""The command `mmx look`."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from mmx.cli.inputs import by_source, parse_named_input
from mmx.cli.options import (
    BoxOption,
    DeviceOption,
    JsonOption,
    MaxNewTokensOption,
    ModelOption,
    NumBeamsOption,
    SourceOption,
    load_pipeline,
    parse_box,
    parse_sources,
)
from mmx.errors import MmxError, one_line

if TYPE_CHECKING:
    from mmx.interpret.look import Look, MapMethod

_METHOD_HELP = "Kind of map: weighted, attention, relevance (by gradients), or both (weighted and relevance)."


def look(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The image, or an input of another source.")],
    question: Annotated[
        str | None, typer.Option("--question", metavar="TEXT", help="A question. Default: a caption.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="TEXT", help="Show the maps of this text instead of generating one.")
    ] = None,
    word: Annotated[
        list[str] | None, typer.Option("--word", metavar="WORD", help="Show only this word. Repeatable.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", metavar="N", help="One cross-attention layer, counted from 0.")
    ] = None,
    head: Annotated[int | None, typer.Option("--head", metavar="N", help="One head, counted from 0.")] = None,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help=_METHOD_HELP)] = "weighted",
    box: BoxOption = None,
    source: SourceOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    num_beams: NumBeamsOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="An image (.png), numbers (.json), or arrays (.safetensors).")
    ] = Path("where.png"),
    as_json: JsonOption = False,
) -> None:
    """Show what the decoder attended to, word by word.

    Writes an image, and prints one line a word.

    p: the probability of the word. bits: the information gain of the input. entropy: the mean entropy of the attention
    as a fraction of its maximum; 1 is a uniform average over the input.
    """
    from mmx.interpret.look import check_suffix

    check_suffix(out)
    map_method = _parse_method(method)
    region = parse_box(box)
    other_sources = parse_sources(source)
    pipeline = load_pipeline(model, device)
    inputs = {**(parse_named_input(image, pipeline) or {"": image}), **other_sources}
    found = pipeline.look(
        by_source(inputs, pipeline),
        question,
        region,
        text=text,
        method=map_method,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )
    found.save(out, word, layer, head)
    if as_json:
        print(json.dumps({**found.to_dict(), "out": str(out)}, ensure_ascii=False))
    else:
        print("\n".join([one_line(found.text), *_word_lines(found), str(out)]))


def _parse_method(method: str) -> MapMethod:
    from mmx.interpret.look import MapMethod

    known: tuple[MapMethod, ...] = get_args(MapMethod)
    for name in known:
        if name == method:
            return name
    message = f"--method was given {method!r}; expected one of {', '.join(known)}."
    raise MmxError(message, code="option.method", given=method)


def _word_lines(look: Look) -> list[str]:
    """A line a word: its probability, its information gain, its entropy, and with several sources the share of each."""
    shares = look.shares()
    if len(shares) < 2:
        shares = {}
    width = max([4, *(len(word.text) for word in look.words)])
    sources = "".join(f"{name:>10}" for name in shares)
    lines = [f"{'word':<{width}}  {'p':>5}  {'bits':>5}  {'entropy':>7}{sources}"]
    entropies = look.entropies()
    for index, word in enumerate(look.words):
        bits = round(word.gain, 1) + 0.0  # no minus sign before zero
        entropy = float(entropies[index].mean())
        columns = "".join(f"{float(share[index]):>10.2f}" for share in shares.values())
        numbers = f"{exp(word.logprob):5.2f}  {bits:5.1f}  {entropy:7.2f}{columns}"
        lines.append(f"{one_line(word.text):<{width}}  {numbers}")
    return lines
