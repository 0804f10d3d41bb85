"""The command that shows where the decoder looked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from mmx.cli.inputs import inputs_named
from mmx.cli.options import BeamsOption, BoxOption, DeviceOption, JsonOption, ModelOption, TokensOption, load_pipeline
from mmx.cli.speak import AlsoOption, by_source, parse_also, parse_box
from mmx.errors import MmxError
from mmx.io.console import one_line

if TYPE_CHECKING:
    from mmx.interpret.look import Look


def look(
    photo: Annotated[str, typer.Argument(metavar="PHOTO", help="The picture, or another input of the model's.")],
    ask: Annotated[str | None, typer.Option("--ask", metavar="QUESTION", help="A question; else a caption.")] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="TEXT", help="Look for this text's words.")] = None,
    word: Annotated[list[str] | None, typer.Option("--word", metavar="WORD", help="Show this word alone.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", metavar="N", help="One looking layer, from 0.")] = None,
    head: Annotated[int | None, typer.Option("--head", metavar="N", help="One head, from 0.")] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method", metavar="KIND", help="weighted, attention, relevance (gradients), or both: the truest."
        ),
    ] = "weighted",
    box: BoxOption = None,
    also: AlsoOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    beams: BeamsOption = None,
    max_tokens: TokensOption = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="A picture (.png), numbers (.json), arrays (.safetensors).")
    ] = Path("where.png"),
    as_json: JsonOption = False,
) -> None:
    """Show where each word looked: a picture, and a line a word.

    Bits: what looking at the input saved of the word's surprise. Spread: the mean entropy of the attention, as a share
    of the largest there can be; 1 is the plain average of everything.
    """
    from mmx.interpret.look import MapMethod, check_suffix

    check_suffix(out)
    if method not in (known := get_args(MapMethod)):
        raise MmxError(f"--by was given {method!r}; expected one of {', '.join(known)}.")
    region, beside = parse_box(box), parse_also(also or [])
    pipeline = load_pipeline(model, device)
    inputs = {**(inputs_named(photo, pipeline) or {"": photo}), **beside}
    found = pipeline.look(
        by_source(inputs, pipeline), ask, region, text, method=method, num_beams=beams, max_new_tokens=max_tokens  # type: ignore[arg-type]
    )  # fmt: skip
    found.save(out, word, layer, head)
    if as_json:
        print(json.dumps({**found.to_dict(), "out": str(out)}, ensure_ascii=False))
        return
    print("\n".join([one_line(found.text), *_lines(found), str(out)]))


def _lines(look: Look) -> list[str]:
    """A line a word: its probability, the bits saved by looking, the spread, and the share of each source."""
    from math import exp

    shares = look.shares()
    sources = [f"{name:>10}" for name in shares] if len(shares) > 1 else []
    width = max([4, *(len(word.text) for word in look.words)])
    lines = [f"{'word':<{width}}  {'p':>5}  {'bits':>5}  {'spread':>6}{''.join(sources)}"]
    wide = look.entropies()
    for index, word in enumerate(look.words):
        spread = float(wide[index].mean())
        parts = [f"{float(shares[name][index]):>10.2f}" for name in shares] if sources else []
        bits = round(word.gain, 1) + 0.0  # no minus before a zero
        facts = f"{exp(word.logprob):5.2f}  {bits:5.1f}  {spread:6.2f}"
        lines.append(f"{one_line(word.text):<{width}}  {facts}{''.join(parts)}")
    return lines
