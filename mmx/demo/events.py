"""The events of the page and the endpoints of its API: raw values of components in, values of components out.

An image is sent as a dict with its `path`, numbers and texts as they were typed; every problem with them is one message
on the page, without a traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache, wraps
from html import escape
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import gradio as gr
from gradio.utils import get_upload_folder

from mmx.demo import actions
from mmx.demo.actions import CaptionOptions, Session
from mmx.demo.region import WHOLE_IMAGE, Point, box_from_corners, box_from_numbers, draw_region
from mmx.errors import MmxError, one_line
from mmx.inference.pipeline import Pipeline

P = ParamSpec("P")
R = TypeVar("R")
Outputs = tuple[object, ...]
RegionNumbers = tuple[object, object, object, object]

ERROR_TITLE = "Error"
UNEXPECTED_ERROR = "An unexpected error occurred; see the server's log. Try another image or question."


def report_errors(event: Callable[P, R]) -> Callable[P, R]:
    """Wrap an event: exceptions become a message on the page."""

    @wraps(event)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return event(*args, **kwargs)
        except Exception as error:
            raise _as_gradio_error(error) from None

    return wrapper


def report_stream_errors(event: Callable[P, Iterator[R]]) -> Callable[P, Iterator[R]]:
    """Like `report_errors`, for an event that yields several times."""

    @wraps(event)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        try:
            yield from event(*args, **kwargs)
        except Exception as error:
            raise _as_gradio_error(error) from None

    return wrapper


def _as_gradio_error(error: Exception) -> gr.Error:
    if isinstance(error, MmxError):
        message = one_line(str(error)).replace("<", "‹").replace(">", "›")  # the page reads it as HTML
        return gr.Error(message, title=ERROR_TITLE, print_exception=False)
    traceback.print_exception(error, file=sys.stderr)
    return gr.Error(UNEXPECTED_ERROR, title=ERROR_TITLE, print_exception=False)


class Events:
    """The events that need the model. A user's session is an input and an output; nothing is kept here."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def open(self, image: object, session: Session | None) -> Outputs:
        """Encode an uploaded image. Returns session, a note about the image, the region image, the conversation."""
        if image is None:
            return None, "", None, []
        session = self._open(image, session)
        return session, _encoding_note(session), session.image, messages(session)

    def caption(
        self,
        image: object,
        num_beams: object,
        num_captions: object,
        temperature: object,
        guidance_scale: object,
        max_new_tokens: object,
        session: Session | None,
    ) -> Iterator[Outputs]:
        """Yield caption, all captions one a line, session, as they are generated."""
        session = self._open(image, session)
        options = CaptionOptions(num_beams, num_captions, temperature, guidance_scale, max_new_tokens)
        for update in actions.caption(self.pipeline, session, options):
            yield update.captions[0], "\n".join(map(one_line, update.captions)), update.session

    def caption_upload(
        self,
        image: object,
        num_beams: object,
        num_captions: object,
        temperature: object,
        guidance_scale: object,
        max_new_tokens: object,
        session: Session | None,
    ) -> Iterator[Outputs]:
        """`caption` of an image that was just uploaded; empty values if it was removed."""
        if image is None:
            yield "", "", None
        else:
            yield from self.caption(
                image, num_beams, num_captions, temperature, guidance_scale, max_new_tokens, session
            )

    def ask(
        self,
        image: object,
        question: object,
        x0: object,
        y0: object,
        x1: object,
        y1: object,
        session: Session | None,
    ) -> Outputs:
        """Return answer, seconds, session."""
        box = box_from_numbers(x0, y0, x1, y1)
        session = actions.ask(self.pipeline, self._open(image, session), question, box)
        turn = session.turns[-1]
        return turn.answer.text, round(turn.seconds, 4), session

    def rank(
        self,
        image: object,
        question: object,
        candidates: object,
        x0: object,
        y0: object,
        x1: object,
        y1: object,
        session: Session | None,
    ) -> Outputs:
        """Return rows of answer and probability, session."""
        session = self._open(image, session)
        ranked = actions.rank(self.pipeline, session, question, candidates, box_from_numbers(x0, y0, x1, y1))
        return [[answer.answer, round(answer.probability, 4)] for answer in ranked], session

    def look(self, image: object, method: object, layer: object, head: object, session: Session | None) -> Outputs:
        """Return the text whose maps are shown, a table of its words, session."""
        session = actions.look(self.pipeline, self._open(image, session), method)
        table = actions.word_table(session, layer, head)
        return _title(session), {"headers": table.headers, "data": table.rows}, session

    def look_if_text(
        self, image: object, method: object, layer: object, head: object, session: Session | None
    ) -> Outputs:
        """`look`, if there is a text."""
        if image is None or session is None or session.current is None:
            return "Caption an image or ask a question first.", None, session
        return self.look(image, method, layer, head, session)

    def caption_word(self, image: object, word: object, session: Session | None) -> Outputs:
        """Return the map of a word of the caption, even if a question was asked since then; see `word`."""
        session = self._open(image, session)
        looked = actions.look(self.pipeline, actions.select_caption(session))
        heatmap = actions.word_heatmap(looked, word)
        return heatmap.image, heatmap.sentence, _keep_current(session, looked)

    def word(
        self, image: object, word: object, method: object, layer: object, head: object, session: Session | None
    ) -> Outputs:
        """Return the map of a word over the image, a sentence about the word, session."""
        session = actions.look(self.pipeline, self._open(image, session), method)
        heatmap = actions.word_heatmap(session, word, layer, head)
        return heatmap.image, heatmap.sentence, session

    def show_caption_words(self, session: Session | None) -> Outputs:
        """Compute the maps of a complete caption.

        Returns session, the box of all captions (visible if there are several), the words with the one of the largest
        information gain selected, the map of that word, a sentence about it.
        """
        if session is None or session.caption is None:
            return session, gr.Textbox(visible=False), no_words(), None, ""
        all_captions = gr.Textbox(visible=bool(session.caption.alternatives))
        looked = actions.look(self.pipeline, actions.select_caption(session))
        after = _keep_current(session, looked)
        gains = [word.gain for word in looked.look.words] if looked.look else []
        if not gains:
            return after, all_captions, no_words(), None, "The caption is empty."
        best = gains.index(max(gains))
        heatmap = actions.word_heatmap(looked, best)
        words = gr.Radio(choices=word_choices(looked), value=best)
        return after, all_captions, words, heatmap.image, heatmap.sentence

    def _open(self, image: object, session: Session | None) -> Session:
        path = image.get("path") if isinstance(image, dict) else image
        return actions.open_image(self.pipeline, session, _check_uploaded(path) if isinstance(path, str) else path)


def _keep_current(session: Session, looked: Session) -> Session:
    """The session with computed maps, unless they are of another text than the current one."""
    return looked if looked.current is session.current else session


def _check_uploaded(path: str) -> str:
    """Return the path of an upload. Raises MmxError for other files of the server, which an API client could name.

    Gradio checks only the files that it opens itself.
    """
    try:
        if Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            return path
    except (OSError, ValueError):  # not a valid file name
        pass
    message = "this image was not uploaded here; upload one, or send it with handle_file of gradio_client."
    raise MmxError(message, code="demo.not_uploaded")


# ---- the region of a question ----------------------------------------------------------------------------------


class RegionUpdate(NamedTuple):
    """The four numbers, the first corner of an unfinished box, the image with the region."""

    x0: object
    y0: object
    x1: object
    y1: object
    corner: Point | None
    image: object


def click_region(
    numbers: RegionNumbers, corner: Point | None, pixel: tuple[float, float], session: Session | None
) -> RegionUpdate:
    """Handle a click on the region image: the first corner of a box, or the second, which completes it."""
    if session is None:
        raise MmxError("there is no image; upload one first.", code="demo.no_image")
    x, y = (min(1.0, max(0.0, position / side)) for position, side in zip(pixel, session.image.size))
    if corner is None:
        return RegionUpdate(*numbers, (x, y), draw_region(session.image, corner=(x, y)))
    box = box_from_corners(corner, (x, y))
    x0, y0, x1, y1 = (round(edge, 3) for edge in box)
    return RegionUpdate(x0, y0, x1, y1, None, draw_region(session.image, box))


def show_region(x0: object, y0: object, x1: object, y1: object, session: Session | None) -> Outputs:
    """Return the image with the box of the four numbers, and no unfinished corner."""
    if session is None:
        return None, None
    return draw_region(session.image, box_from_numbers(x0, y0, x1, y1)), None


def select_whole_image(session: Session | None) -> RegionUpdate:
    """Return the numbers of the whole image, and the image without a box."""
    return RegionUpdate(*WHOLE_IMAGE, None, None if session is None else session.image)


# ---- what components show --------------------------------------------------------------------------------------


def clear_chat(session: Session | None) -> Session | None:
    """Return the session without its conversation."""
    return None if session is None else actions.clear_chat(session)


def clear_page() -> Outputs:
    """Clear everything about the previous image, if a new one cannot be read.

    Returns session, note, region image, conversation; caption, all captions, words, map, sentence.
    """
    return None, "", None, [], "", gr.Textbox(visible=False), no_words(), None, ""


def no_words() -> gr.Radio:
    """Return no choices of words."""
    return gr.Radio(choices=[], value=None)


def word_choices(session: Session | None) -> list[tuple[str, int]]:
    """Return the words of the current text with their indices."""
    if session is None or session.look is None:
        return []
    return [(one_line(word.text), index) for index, word in enumerate(session.look.words)]


def messages(session: Session | None) -> list[dict[str, str]]:
    """Return the conversation, with the box of each question and the probability and time of each answer.

    The page reads messages as HTML, therefore they are escaped.
    """
    chat: list[dict[str, str]] = []
    for turn in session.turns if session else ():
        question = turn.answer.question or ""
        if turn.answer.box is not None:
            question += " [" + ", ".join(f"{edge:.2f}" for edge in turn.answer.box) + "]"
        details = f"{1000 * turn.seconds:.0f} ms"
        if turn.answer.probability is not None:
            details = f"{turn.answer.probability:.0%}, {details}"
        answer = f"{turn.answer.text}  ({details})"
        chat.append({"role": "user", "content": escape(question)})
        chat.append({"role": "assistant", "content": escape(answer)})
    return chat


def show_words(session: Session | None) -> Outputs:
    """Return the words to select from, no map, no sentence, and the two bar plots."""
    return gr.Radio(choices=word_choices(session), value=None), None, "", *bar_plots(session)


def bar_plots(session: Session | None) -> Outputs:
    """Return a bar plot of the information gain of each word, and one of its attention entropy over all layers."""
    from pandas import DataFrame  # type: ignore[import-untyped]

    if session is None or session.look is None or not session.look.words:
        return None, None
    words = session.look.words
    names = [f"{number} {one_line(word.text)}" for number, word in enumerate(words, 1)]  # unique for repeated words
    bits = [word.gain for word in words]
    entropies = session.look.entropies().mean((1, 2)).tolist()
    limits: list[float | None] = [min(0.0, *bits), max(0.1, *bits)]  # a single bar would have no scale
    gains = gr.BarPlot(DataFrame({"word": names, "bits": bits}), y_lim=limits, sort=names)
    return gains, gr.BarPlot(DataFrame({"word": names, "entropy": entropies}), sort=names)


@cache
def encoders() -> list[dict[str, str]]:
    """Return all encoders. Cached, because it starts a process that imports every plugin."""
    from mmx.encoders.discovery import discover_encoders

    return actions.encoder_rows(discover_encoders())


def encoder_table(rows: list[dict[str, str]] | None) -> str:
    """Return the encoders as HTML; each cell has its name, because a narrow page shows cells below each other."""
    names = list(rows[0]) if rows else []
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    body = ""
    for row in rows or []:
        cells = "".join(f"<td data-name='{name}'>{escape(row[name])}</td>" for name in names)
        body += f"<tr>{cells}</tr>"
    return f"<table class='encoders'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _encoding_note(session: Session) -> str:
    slots = session.memory.num_slots
    return f"Encoded once in {1000 * session.seconds:.0f} ms; every question uses the same {slots} slots."


def _title(session: Session) -> str:
    current = session.current
    if current is None:
        return ""
    return one_line(current.text if current.question is None else f"{current.question} {current.text}")
