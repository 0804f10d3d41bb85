"""What the events of the page and the endpoints of its API give back: raw inputs in, values of components out.

Inputs come as they were sent (see `page`): a picture is a dict with its `path`, numbers and texts are as typed, so that
whatever is wrong with them is told by one sentence of ours. Every error leaves as one line, without a trace.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache, wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from mmx.demo import actions
from mmx.demo.actions import Session
from mmx.demo.region import WHOLE, box_between, box_of, framed
from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline
from mmx.io.console import one_line

Outputs = tuple[Any, ...]
Box4 = tuple[Any, Any, Any, Any]
UNFORESEEN = "Something went wrong that nobody foresaw; the server's log has it. Try another picture or question."


def report_errors(event: Callable[..., Any]) -> Callable[..., Any]:
    """The event, whose errors are told on the page in one line."""

    @wraps(event)
    def calm(*given: Any) -> Any:
        try:
            return event(*given)
        except Exception as error:
            raise _as_told(error) from None

    return calm


def report_stream_errors(event: Callable[..., Iterator[Outputs]]) -> Callable[..., Iterator[Outputs]]:
    """`told` for an event that gives back several times."""

    @wraps(event)
    def calm(*given: Any) -> Iterator[Outputs]:
        try:
            yield from event(*given)
        except Exception as error:
            raise _as_told(error) from None

    return calm


def _as_told(error: Exception) -> gr.Error:
    if isinstance(error, MmxError):
        sentence = one_line(str(error)).replace("<", "‹").replace(">", "›")  # the page reads it as HTML
        return gr.Error(sentence, title="That did not work", print_exception=False)
    traceback.print_exception(error, file=sys.stderr)
    return gr.Error(UNFORESEEN, title="That did not work", print_exception=False)


class Events:
    """The events over one model. The visitor's session goes in and comes out; nothing is kept here."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def open(self, picture: Any, session: Session | None) -> Outputs:
        """(picture, session) -> session, what is known of the picture, the part, the conversation."""
        if picture is None:
            return None, "", None, []
        session = self._opened(picture, session)
        return session, _encoded(session), session.picture, messages(session)

    def caption(
        self, picture: Any, beams: Any, samples: Any, temperature: Any, guidance: Any, tokens: Any, session: Any
    ) -> Iterator[Outputs]:
        """-> caption, all captions one a line, session; again and again while the caption grows."""
        session = self._opened(picture, session)
        for after, texts in actions.caption(self.pipeline, session, beams, samples, temperature, guidance, tokens):
            yield texts[0], "\n".join(map(one_line, texts)), after

    def caption_at_once(self, picture: Any, *given: Any) -> Iterator[Outputs]:
        """`caption` of a picture that has just come; nothing where it has gone."""
        yield from [("", "", None)] if picture is None else self.caption(picture, *given)

    def ask(self, picture: Any, question: Any, x0: Any, y0: Any, x1: Any, y1: Any, session: Any) -> Outputs:
        """-> answer, seconds, session."""
        session = actions.ask(self.pipeline, self._opened(picture, session), question, box_of(x0, y0, x1, y1))
        return session.turns[-1].answer.text, round(session.turns[-1].seconds, 4), session

    def rank(
        self, picture: Any, question: Any, offered: Any, x0: Any, y0: Any, x1: Any, y1: Any, session: Any
    ) -> Outputs:
        """-> rows of answer and probability, session."""
        session = self._opened(picture, session)
        found = actions.rank(self.pipeline, session, question, offered, box_of(x0, y0, x1, y1))
        return [[one.answer, round(one.probability, 4)] for one in found], session

    def look(self, picture: Any, kind: Any, layer: Any, head: Any, session: Any) -> Outputs:
        """-> the text that was looked into, a table of its words, session."""
        session = actions.look(self.pipeline, self._opened(picture, session), kind)
        headers, rows = actions.word_table(session, layer, head)
        return _headline(session), {"headers": headers, "data": rows}, session

    def look_if_said(self, picture: Any, kind: Any, layer: Any, head: Any, session: Any) -> Outputs:
        """`look`, where there is something to look into."""
        if picture is None or session is None or session.current is None:
            return "Caption a picture or ask about it first.", None, session
        return self.look(picture, kind, layer, head, session)

    def plain_word(self, picture: Any, word: Any, session: Any) -> Outputs:
        """`word` of the map that a caption is shown with, whatever was asked since then."""
        session = self._opened(picture, session)
        heat, sentence, looked = self.word(picture, word, "both", None, None, actions.select_caption(session))
        return heat, sentence, looked if looked.current is session.current else session

    def word(self, picture: Any, word: Any, kind: Any, layer: Any, head: Any, session: Any) -> Outputs:
        """-> the heat of a word over the picture, a sentence about the word, session."""
        session = actions.look(self.pipeline, self._opened(picture, session), kind)
        return *actions.word_heatmap(session, word, layer, head), session

    def settle(self, session: Session | None) -> Outputs:
        """Once a caption is whole -> session that looked, the box of all captions (shown where there are several), the
        words with the one chosen that looking saved most of, that word's heat and sentence."""
        if session is None or session.caption is None:
            return session, gr.Textbox(visible=False), no_words(), None, ""
        every = gr.Textbox(visible=bool(session.caption.alternatives))
        looked = actions.look(self.pipeline, actions.select_caption(session))
        after = looked if looked.current is session.current else session
        gains = [word.gain for word in looked.look.words] if looked.look else []
        if not gains:
            return after, every, no_words(), None, "Nothing was said."
        best = gains.index(max(gains))
        heat, sentence = actions.word_heatmap(looked, best)
        return after, every, gr.Radio(choices=choices(looked), value=best), heat, sentence

    def corner(self, numbers: Box4, first: Any, point: tuple[float, float], session: Any) -> Outputs:
        """A click on the picture -> the four numbers, the first corner of a box that is not whole yet, the part."""
        if session is None:
            raise MmxError("there is no picture to point at; drop one on the page first.")
        x, y = (min(1.0, max(0.0, place / side)) for place, side in zip(point, session.picture.size))
        if first is None:
            return *numbers, (x, y), framed(session.picture, None, (x, y))
        box = box_between(first, (x, y))
        return *(round(part, 3) for part in box), None, framed(session.picture, box)

    def _opened(self, picture: Any, session: Session | None) -> Session:
        path = picture.get("path") if isinstance(picture, dict) else picture
        return actions.open_image(self.pipeline, session, _uploaded(path) if isinstance(path, str) else path)


def _uploaded(path: str) -> str:
    """The path, if it lies among what was uploaded. Whoever speaks to the API by hand could name any file of the
    server, and gradio looks at what it opens by itself alone."""
    try:
        if Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            return path
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise MmxError("this picture was not uploaded here; drop one on the page, or send it by the client's handle_file.")


def part(x0: Any, y0: Any, x1: Any, y1: Any, session: Session | None) -> Outputs:
    """The picture with the box of the four numbers, and no corner waiting for its partner."""
    if session is None:
        return None, None
    return framed(session.picture, box_of(x0, y0, x1, y1)), None


def forget(session: Session | None) -> Session | None:
    """The session without its conversation."""
    return None if session is None else actions.clear_chat(session)


def whole(session: Session | None) -> Outputs:
    """The four numbers of the whole picture, no first corner, the picture without a box."""
    return *WHOLE, None, None if session is None else session.picture


def cleared() -> Outputs:
    """Where a picture could not be read, nothing of the one before: session, what is known of it, the part, the
    conversation; caption, all captions, words, heat, sentence."""
    return None, "", None, [], "", gr.Textbox(visible=False), no_words(), None, ""


def no_words() -> gr.Radio:
    """Nothing to choose from."""
    return gr.Radio(choices=[], value=None)


def choices(session: Session | None) -> list[tuple[str, int]]:
    """The words of the last text, to choose one from: (word, its place)."""
    if session is None or session.look is None:
        return []
    return [(one_line(word.text), place) for place, word in enumerate(session.look.words)]


def messages(session: Session | None) -> list[dict[str, str]]:
    """The conversation, with the part that each question was about and the time of each answer; the page reads it as
    HTML, and would leave out what looks like a tag."""
    told: list[dict[str, str]] = []
    for turn in session.turns if session else ():
        box = turn.answer.box
        about = "" if box is None else " [" + ", ".join(f"{side:.2f}" for side in box) + "]"
        told.append({"role": "user", "content": escape(f"{turn.answer.question}{about}")})
        told.append({"role": "assistant", "content": escape(f"{turn.answer.text}  ({1000 * turn.seconds:.0f} ms)")})
    return told


def look_shown(session: Session | None) -> Outputs:
    """The words to choose from, no heat yet, and the bars."""
    return gr.Radio(choices=choices(session), value=None), None, "", *bars(session)


def bars(session: Session | None) -> Outputs:
    """What a table says, as bars: the bits saved by each word, and how wide it looked, the mean over the layers."""
    from pandas import DataFrame  # type: ignore[import-untyped]

    if session is None or session.look is None or not session.look.words:
        return None, None
    headers, rows = actions.word_table(session)
    layers = [place for place, header in enumerate(headers) if header.startswith("spread")]
    names = [f"{place} {row[0]}" for place, row in enumerate(rows, 1)]  # a text may say a word twice
    bits = [row[2] for row in rows]
    spread = [sum(row[at] for at in layers) / len(layers) for row in rows]
    ends = [min(0.0, *bits), max(0.1, *bits)]  # the bar of a single word would have no scale
    saved = DataFrame({"word": names, "bits": bits})
    return gr.BarPlot(saved, y_lim=ends, sort=names), gr.BarPlot(
        DataFrame({"word": names, "spread": spread}), sort=names
    )


@cache
def encoders() -> list[dict[str, str]]:
    """The survey of all encoders; once, for it starts a process that imports every plugin."""
    from mmx.encoders.discovery import discover_encoders

    return actions.encoder_rows(discover_encoders())


def encoder_table(rows: list[dict[str, str]] | None) -> str:
    """The survey as HTML; every cell says what it is, for a narrow page shows them below each other."""
    rows = rows or []
    names = list(rows[0]) if rows else []
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    lines = ["".join(f"<td data-name='{name}'>{escape(row[name])}</td>" for name in names) for row in rows]
    return (
        f"<table class='survey'><thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(lines)}</tr></tbody></table>"
    )


def _encoded(session: Session) -> str:
    slots = session.memory.num_slots
    return f"Encoded once, in {1000 * session.seconds:.0f} ms: {slots} slots that every question looks at."


def _headline(session: Session) -> str:
    spoken = session.current
    if spoken is None:
        return ""
    return one_line(spoken.text if spoken.question is None else f"{spoken.question} {spoken.text}")
