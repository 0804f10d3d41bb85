"""The actions of the demo, without a page: functions of a Pipeline and a session, which is a frozen value.

A session is the image of one user with its memory, which is encoded once, and what was generated for it. Functions
return a new session or values to display, and keep no state. Their inputs are values that the page sends, of any type;
everything that is wrong with them raises an MmxError. Words and layers are counted from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, get_args

from PIL import Image

from mmx.boxes import Box
from mmx.demo.region import display_copy
from mmx.encoders.registry import EncoderDescription
from mmx.errors import MmxError, one_line
from mmx.inference.outputs import RankedAnswer
from mmx.inference.pipeline import Pipeline
from mmx.interpret.look import Look, MapMethod
from mmx.interpret.render import format_gain, overlay_heatmap
from mmx.io.files import ReadFailure, read_file
from mmx.io.images import MAX_BYTES, load_image
from mmx.memory import Memory
from mmx.models.source import find_source
from mmx.text.prompts import empty_question_error, is_empty_question

if TYPE_CHECKING:
    from mmx.inference.options import DecodingOptions

MAX_TURNS = 50  # of a conversation; older ones are dropped
MAX_CANDIDATES = 32
MAX_CAPTIONS = 8
MAX_BEAMS = 10
MAX_NEW_TOKENS = 256
MAX_TEXT_LENGTH = 1000  # characters of a question, or of all candidate answers
_MAX_INDEX = 10**6

Cell = str | float


@dataclass(frozen=True)
class DemoText:
    """A generated text: the answer to a question about a box, or a caption, then with further captions, best first.

    An answer has a probability, see `GeneratedText.probability`.
    """

    text: str
    question: str | None = None
    box: Box | None = None
    alternatives: tuple[str, ...] = ()
    probability: float | None = None


@dataclass(frozen=True)
class ChatTurn:
    """An answer with its question, and how many seconds it took."""

    answer: DemoText
    seconds: float


@dataclass(frozen=True)
class Session:
    """The image of one user.

    Attributes:
        path: of the upload, in a folder that is named by its content.
        image: a small copy to draw on.
        memory: of one row.
        seconds: how long encoding took.
        current: the text that was generated last.
        turns: the conversation.
        look: the attention maps of `current`, once they are computed.
        caption: the last caption, whose words the page shows.
    """

    path: str
    image: Image.Image
    memory: Memory
    seconds: float
    current: DemoText | None = None
    turns: tuple[ChatTurn, ...] = ()
    look: Look | None = None
    caption: DemoText | None = None


@dataclass(frozen=True)
class CaptionOptions:
    """Decoding options as a page sends them. max_new_tokens: None for the default of the model."""

    num_beams: object = 1
    num_captions: object = 1
    temperature: object = 1.0
    guidance_scale: object = 1.0
    max_new_tokens: object = None


class CaptionUpdate(NamedTuple):
    """The captions so far, best first, and the session with the best of them."""

    session: Session
    captions: list[str]


class WordHeatmap(NamedTuple):
    """The image with the attention map of a word over it, and a sentence about the word."""

    image: Image.Image
    sentence: str


class WordTable(NamedTuple):
    """Column names, and a row for each word of a text."""

    headers: list[str]
    rows: list[list[Cell]]


# ---- captions and questions ------------------------------------------------------------------------------------


def open_image(pipeline: Pipeline, session: Session | None, path: object) -> Session:
    """Return the session of an uploaded image: the given one if it is the same image, else a new one.

    Raises:
        MmxError: there is no image, or it cannot be read.
    """
    if not isinstance(path, str) or not path:
        raise MmxError("no image was given; upload one, or select an example.", code="demo.no_image")
    if session is not None and session.path == path:
        return session
    image = _read_upload(path)
    started = perf_counter()
    memory = pipeline.encode_prepared([pipeline.prepare({image_source(pipeline): image})])
    seconds = perf_counter() - started
    return Session(path, display_copy(image), memory, seconds)


def image_source(pipeline: Pipeline) -> str:
    """Return the source that reads images. Raises MmxError if there is none, or several."""
    return find_source(pipeline.model.encoders, "image.png")


def caption(pipeline: Pipeline, session: Session, options: CaptionOptions) -> Iterator[CaptionUpdate]:
    """Yield captions as they are generated.

    A single caption without beams is yielded after each token; several are yielded once: samples if the temperature is
    above 0, else the best beams.

    Raises:
        MmxError: an option is out of range, or contradicts another.
    """
    count = _whole_number(options.num_captions, "captions", MAX_CAPTIONS)
    decoding = _decoding_options(options, count)
    if decoding["num_beams"] == 1 and count == 1:
        text = None
        for text in pipeline.stream(session.memory, **decoding):
            yield CaptionUpdate(_with_caption(session, [text]), [text])
        if text is None:  # an empty caption
            yield CaptionUpdate(_with_caption(session, [""]), [""])
        return
    generated = pipeline.generate(session.memory, num_return_sequences=count, **decoding)
    texts = [result.text for result in generated]
    yield CaptionUpdate(_with_caption(session, texts), texts)


def ask(pipeline: Pipeline, session: Session, question: object, box: Box | None = None) -> Session:
    """Return the session with one more turn. Raises MmxError."""
    text = _question(question)
    started = perf_counter()
    answer = pipeline.generate(session.memory, text, box, num_return_sequences=1)[0]
    generated = DemoText(answer.text, text, box, probability=answer.probability)
    turn = ChatTurn(generated, perf_counter() - started)
    return replace(_with_current(session, turn.answer), turns=(*session.turns, turn)[-MAX_TURNS:])


def rank(
    pipeline: Pipeline, session: Session, question: object, candidates: object, box: Box | None = None
) -> list[RankedAnswer]:
    """Return candidate answers, typed with commas between them, by their probability. Raises MmxError."""
    text = _question(question)
    parts = [part.strip() for part in _text(candidates, "answers, separated by commas").split(",")]
    answers = list(dict.fromkeys(part for part in parts if part))
    if not 1 <= len(answers) <= MAX_CANDIDATES:
        message = f"{len(answers)} answers were given; type 1 to {MAX_CANDIDATES}, separated by commas."
        raise MmxError(message, code="demo.num_candidates", given=len(answers))
    return pipeline.rank(session.memory, text, answers, box)


def select_caption(session: Session) -> Session:
    """Return the session with its caption as current text, even if a question was asked since then."""
    return session if session.current is session.caption else replace(session, current=session.caption, look=None)


def clear_chat(session: Session) -> Session:
    """Return the session without its conversation."""
    return replace(session, turns=())


# ---- attention maps --------------------------------------------------------------------------------------------


def look(pipeline: Pipeline, session: Session, method: object = "both") -> Session:
    """Return the session with the attention maps of its current text, computed once for each method. MmxError."""
    checked = _map_method(method)
    current = session.current
    if current is None:
        message = "there is no text for this image yet; caption it or ask a question first."
        raise MmxError(message, code="demo.no_text_yet")
    if session.look is not None and session.look.method == checked:
        return session
    maps = pipeline.look(
        session.memory,
        current.question,
        current.box,
        text=current.text,
        method=checked,
        original={image_source(pipeline): session.image},
    )
    return replace(session, look=maps)


def word_heatmap(session: Session, word: object, layer: object = None, head: object = None) -> WordHeatmap:
    """Return the attention map of one word over the image. word: the word, or its index. Raises MmxError."""
    maps = _computed_maps(session)
    index = maps.index(word if isinstance(word, str) else _whole_number(word, "the index of the word", _MAX_INDEX, 0))
    heatmap = maps.heatmap(
        index, session.image.height, session.image.width, _selected(layer, "layer"), _selected(head, "head")
    )
    selected = maps.words[index]
    sentence = f"{one_line(selected.text)}: {format_gain(selected)}"
    return WordHeatmap(overlay_heatmap(session.image, heatmap), sentence)


def word_table(session: Session, layer: object = None, head: object = None) -> WordTable:
    """Return a row for each word: probability, information gain in bits, attention entropy in each layer, shares.

    The entropy is the mean over heads as a fraction of its maximum: 0 one slot, 1 a uniform average. Shares of the
    attention on each source are given if there are several sources. Raises MmxError.
    """
    maps = _computed_maps(session)
    shares = maps.shares(_selected(layer, "layer"), _selected(head, "head"))
    if len(shares) < 2:
        shares = {}
    entropies = maps.entropies().mean(-1)  # [W, L]
    headers = ["word", "probability", "gain (bits)"]
    headers += [f"entropy {number}" for number in range(entropies.shape[1])]
    headers += [f"share of {name}" for name in shares]
    rows: list[list[Cell]] = []
    for index, word in enumerate(maps.words):
        numbers = [exp(word.logprob), word.gain, *entropies[index].tolist()]
        numbers += [float(share[index]) for share in shares.values()]
        rows.append([one_line(word.text), *(round(number, 3) + 0.0 for number in numbers)])  # + 0.0: no minus zero
    return WordTable(headers, rows)


def encoder_rows(encoders: Sequence[EncoderDescription]) -> list[dict[str, str]]:
    """Return name, modality, package, address, options and problem of each encoder, each on one line."""
    rows = []
    for encoder in encoders:
        entry = encoder.entry
        fields = {
            "name": entry.name,
            "modality": encoder.modality or "",
            "package": f"{entry.package} {entry.version}".strip(),
            "address": entry.address,
            "options": ", ".join(f"{key}={value}" for key, value in (encoder.options or {}).items()),
            "problem": encoder.problem or "",
        }
        rows.append({name: one_line(value) for name, value in fields.items()})
    return rows


# ---- helpers ---------------------------------------------------------------------------------------------------


def _read_upload(path: str) -> Image.Image:
    """Read an upload as bytes, so that no message names its path on the server. Raises MmxError."""
    try:
        return load_image(read_file(path, MAX_BYTES))
    except ReadFailure:
        message = "the image is no longer on the server; upload it again."
        raise MmxError(message, code="demo.upload_gone") from None


def _decoding_options(options: CaptionOptions, count: int) -> DecodingOptions:
    num_beams = _whole_number(options.num_beams, "beams", MAX_BEAMS)
    temperature = _number(options.temperature, "temperature")
    do_sample = num_beams == 1 and count > 1 and temperature > 0
    if count > num_beams and not do_sample:
        message = f"{count} captions were requested; use a temperature above 0 with 1 beam, or {count} beams."
        raise MmxError(message, code="demo.num_captions", given=count)
    max_new_tokens = options.max_new_tokens
    return {
        "num_beams": num_beams,
        "do_sample": do_sample,
        "temperature": temperature if do_sample else None,
        "guidance_scale": _number(options.guidance_scale, "guidance scale"),
        "max_new_tokens": None if max_new_tokens is None else _whole_number(max_new_tokens, "length", MAX_NEW_TOKENS),
    }


def _with_caption(session: Session, texts: Sequence[str]) -> Session:
    generated = DemoText(texts[0], alternatives=tuple(texts[1:]))
    return replace(_with_current(session, generated), caption=generated)


def _with_current(session: Session, generated: DemoText) -> Session:
    return replace(session, current=generated, look=None)


def _computed_maps(session: Session) -> Look:
    if session.look is None:
        message = "there are no attention maps yet; caption the image or ask a question first."
        raise MmxError(message, code="demo.no_maps_yet")
    return session.look


def _map_method(method: object) -> MapMethod:
    known: tuple[MapMethod, ...] = get_args(MapMethod)
    for name in known:
        if name == method:
            return name
    message = f"the method is {_short(method)}; expected one of {', '.join(known)}."
    raise MmxError(message, code="demo.method")


def _question(value: object) -> str:
    if not isinstance(value, str) or is_empty_question(value):
        raise empty_question_error()
    return _text(value, "a question")


def _text(value: object, expected: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise MmxError(f"no text was given; expected {expected}.", code="demo.no_text")
    if len(value) > MAX_TEXT_LENGTH:
        message = f"a text of {len(value):,} characters was given; expected at most {MAX_TEXT_LENGTH:,}; shorten it."
        raise MmxError(message, code="demo.text_too_long", length=len(value))
    return value.strip()


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        message = f"{name} is {_short(value)}; expected a number in 0..100."
        raise MmxError(message, code="demo.number", option=name)
    return float(value)


def _whole_number(value: object, name: str, maximum: int, minimum: int = 1) -> int:
    """Return an integer, which pages sometimes send as a float such as 2.0. Raises MmxError."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
    if not minimum <= number <= maximum or number != int(number):
        message = f"{name} is {_short(value)}; expected a whole number in {minimum}..{maximum}."
        raise MmxError(message, code="demo.number", option=name)
    return int(number)


def _selected(value: object, name: str) -> int | None:
    """Return a layer or a head; None, and the value -1 of the page, are all of them."""
    return None if value is None or value == -1 else _whole_number(value, name, _MAX_INDEX, 0)


def _short(value: object) -> str:
    return repr(str(value)[:40])
