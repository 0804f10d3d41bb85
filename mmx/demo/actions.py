"""What the demo does, without a page: pure functions over a Pipeline and a session, a frozen value.

A session is one visitor's picture with its memory, encoded once, and what was said of it. Each function returns the
next session or what is to be shown; none keeps anything. Words and layers are counted from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp
from time import perf_counter
from typing import Any, get_args

from PIL import Image

from mmx.demo.region import to_draw_on
from mmx.encoders.registry import EncoderDescription
from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline, RankedAnswer
from mmx.interpret.look import Look, MapMethod
from mmx.interpret.render import format_gain, overlay_heatmap
from mmx.io.console import one_line
from mmx.io.files import ReadFailure, read_file
from mmx.io.images import MAX_BYTES, load_image
from mmx.memory import Box, Memory
from mmx.models.source import find_source

MOST_TURNS = 50  # of a conversation; older ones are forgotten
MOST_OFFERED, MOST_SAMPLES, MOST_BEAMS, MOST_TOKENS = 32, 8, 10, 256  # what one visitor may ask for at a time
LONGEST_TEXT = 1000  # characters of what is typed


@dataclass(frozen=True)
class DemoText:
    """A text that was said, and to what: a question (None: a caption), about a part (None: everywhere). others: further
    captions, the best first."""

    text: str
    question: str | None = None
    box: Box | None = None
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatTurn:
    """A question, its answer, and the seconds that it took."""

    answer: DemoText
    seconds: float


@dataclass(frozen=True)
class Session:
    """One visitor's picture. path: of the upload, whose folder is named by its content; picture: a small copy to draw
    on; memory: of one row; seconds: what encoding took; spoken, look: the last text, and what it looked at; caption:
    the last text that answers nothing, whose words stand beside it on the page."""

    path: str
    picture: Image.Image
    memory: Memory
    seconds: float
    current: DemoText | None = None
    turns: tuple[ChatTurn, ...] = ()
    look: Look | None = None
    caption: DemoText | None = None


def open_image(pipeline: Pipeline, session: Session | None, path: Any) -> Session:
    """The session of an uploaded picture: the one there is, or a new one. Raises MmxError for what is no picture."""
    if not isinstance(path, str) or not path:
        raise MmxError("no picture was given; drop one on the page, or pick an example.")
    if session is not None and session.path == path:
        return session
    picture = _read(path)
    started = perf_counter()
    memory = pipeline.encode_prepared([pipeline.prepare({image_source(pipeline): picture})])
    seconds = perf_counter() - started
    return Session(path, to_draw_on(picture), memory, seconds)


def image_source(pipeline: Pipeline) -> str:
    """The source that reads pictures. Raises MmxError where there is none, or several."""
    return find_source(pipeline.model.encoders, "picture.png")


def caption(
    pipeline: Pipeline,
    session: Session,
    beams: Any = 1,
    samples: Any = 1,
    temperature: Any = 1.0,
    guidance: Any = 1.0,
    tokens: Any = None,
) -> Iterator[tuple[Session, list[str]]]:
    """The captions as they grow, best first, each time with the session that remembers the best of them.

    One caption of one beam grows token by token; several come whole: samples of a temperature, or the best beams.
    Raises MmxError for options that are out of range or contradict each other.
    """
    count = _whole(samples, "samples", MOST_SAMPLES)
    width = _whole(beams, "beams", MOST_BEAMS)
    most = None if tokens is None else _whole(tokens, "longest caption", MOST_TOKENS)
    heat = _number(temperature, "temperature")
    drawn = width == 1 and count > 1 and heat > 0
    if count > max(width, 1 + MOST_SAMPLES * drawn):
        raise MmxError(f"{count} captions were asked for; set a temperature above 0 with 1 beam, or {count} beams.")
    chosen: dict[str, Any] = {
        "num_beams": width,
        "do_sample": drawn,
        "temperature": heat if drawn else None,
        "guidance_scale": _number(guidance, "guidance"),
        "max_new_tokens": most,
    }
    if width == 1 and count == 1:
        text = ""
        for text in pipeline.stream(session.memory, **chosen):
            yield _captioned(session, text), [text]
        if not text:
            yield _captioned(session, text), [text]
        return
    texts = pipeline.caption(session.memory, num_return_sequences=count, **chosen)
    yield _captioned(session, *texts), list(texts)


def ask(pipeline: Pipeline, session: Session, question: Any, box: Box | None = None) -> Session:
    """The session with one more turn: the question, its answer, the time it took."""
    text = _text(question, "a question, such as: what is this?")
    started = perf_counter()
    answer = pipeline.ask(session.memory, text, box)
    turn = ChatTurn(DemoText(answer, text, box), perf_counter() - started)
    return replace(_saying(session, turn.answer), turns=(*session.turns, turn)[-MOST_TURNS:])


def rank(
    pipeline: Pipeline, session: Session, question: Any, offered: Any, box: Box | None = None
) -> list[RankedAnswer]:
    """Offered answers, typed with commas between them, by their probability among each other."""
    text = _text(question, "a question, such as: what is this?")
    parts = [part.strip() for part in _text(offered, "answers with commas between them").split(",")]
    answers = list(dict.fromkeys(part for part in parts if part))
    if not 1 <= len(answers) <= MOST_OFFERED:
        raise MmxError(f"{len(answers)} answers were offered; type 1 to {MOST_OFFERED} with commas between them.")
    return pipeline.rank(session.memory, text, answers, box)


def select_caption(session: Session) -> Session:
    """The session as it was when it last captioned: what was asked since then is not what its words belong to."""
    return session if session.current is session.caption else replace(session, current=session.caption, look=None)


def look(pipeline: Pipeline, session: Session, kind: Any = "both") -> Session:
    """The session with what the words of its last text looked at; computed once for each kind of map."""
    if kind not in get_args(MapMethod):
        raise MmxError(f"the kind of map is {str(kind)[:40]!r}; expected one of {', '.join(get_args(MapMethod))}.")
    spoken = session.current
    if spoken is None:
        raise MmxError("nothing was said of this picture yet; caption it or ask a question first.")
    if session.look is not None and session.look.method == kind:
        return session
    seen = {image_source(pipeline): session.picture}
    look = pipeline.look(session.memory, spoken.question, spoken.box, text=spoken.text, method=kind, picture=seen)
    return replace(session, look=look)


def word_heatmap(session: Session, word: Any, layer: Any = None, head: Any = None) -> tuple[Image.Image, str]:
    """The picture under the heat of one word of a session that looked, and a sentence about the word."""
    look = _look(session)
    number = look.index(word if isinstance(word, str) else _whole(word, "the word's place", 10**6, 0))
    heat = look.heatmap(
        number, session.picture.height, session.picture.width, _part(layer, "layer"), _part(head, "head")
    )
    said = look.words[number]
    return overlay_heatmap(session.picture, heat), f"{one_line(said.text)}: {format_gain(said)} of its surprise"


def word_table(session: Session, layer: Any = None, head: Any = None) -> tuple[list[str], list[list[Any]]]:
    """Headers and a row a word: its probability, the bits saved by looking, how wide it looked in each layer (the mean
    of its heads' relative entropy: 0 one slot, 1 the plain average), and, of several sources, the share of each."""
    look = _look(session)
    shares = look.shares(_part(layer, "layer"), _part(head, "head"))
    sources = list(shares) if len(shares) > 1 else []
    layers = range(look.attention.shape[1])
    rows: list[list[Any]] = []
    spread = look.entropies()
    for index, word in enumerate(look.words):
        facts = [
            exp(word.logprob),
            word.gain,
            *spread[index].mean(-1).tolist(),
            *(float(shares[name][index]) for name in sources),
        ]
        rows.append([one_line(word.text), *(round(fact, 3) + 0.0 for fact in facts)])
    named = [f"spread {layer}" for layer in layers]
    return ["word", "probability", "bits saved", *named, *(f"share of {name}" for name in sources)], rows


def clear_chat(session: Session) -> Session:
    """The session without its conversation."""
    return replace(session, turns=())


def encoder_rows(found: Sequence[EncoderDescription]) -> list[dict[str, str]]:
    """For each encoder its name, modality, package, address, options and problem, as one line each."""
    rows = []
    for one in found:
        entry = one.entry
        options = ", ".join(f"{key}={value}" for key, value in (one.options or {}).items())
        facts = {
            "name": entry.name, "modality": one.modality, "package": f"{entry.package} {entry.version}".strip(),
            "address": entry.address, "options": options, "problem": one.problem,
        }  # fmt: skip
        rows.append({name: one_line(str(fact or "")) for name, fact in facts.items()})
    return rows


def _read(path: str) -> Image.Image:
    """By its bytes: what is told of a picture that cannot be read must not name a place on the server. Raises MmxError;
    also for what is no regular file, which might be read for ever."""
    try:
        return load_image(read_file(path, MAX_BYTES))
    except ReadFailure:
        raise MmxError("the picture is no longer on the server; upload it again.") from None


def _captioned(session: Session, text: str, *others: str) -> Session:
    spoken = DemoText(text, alternatives=others)
    return replace(_saying(session, spoken), caption=spoken)


def _saying(session: Session, spoken: DemoText) -> Session:
    return replace(session, current=spoken, look=None)


def _look(session: Session) -> Look:
    if session.look is None:
        raise MmxError("nothing was looked at yet; caption the picture or ask a question first.")
    return session.look


def _text(given: Any, expected: str) -> str:
    if not isinstance(given, str) or not given.strip():
        raise MmxError(f"nothing was typed; expected {expected}.")
    if len(given) > LONGEST_TEXT:
        raise MmxError(f"{len(given):,} characters were typed; expected at most {LONGEST_TEXT:,}; say it more shortly.")
    return given.strip()


def _number(given: Any, name: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 100:
        raise MmxError(f"{name} is {str(given)[:40]!r}; expected a number in 0..100.")
    return float(given)


def _whole(given: Any, name: str, most: int, least: int = 1) -> int:
    if not _is_whole(given) or not least <= given <= most:
        raise MmxError(f"{name} is {str(given)[:40]!r}; expected a whole number in {least}..{most}.")
    return int(given)


def _is_whole(given: Any) -> bool:
    """A page sends 2 as 2.0 now and then."""
    return isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < 1e9 and given == int(given)


def _part(given: Any, name: str) -> int | None:
    """A layer or a head; None (and -1, which a page can hold) is all of them."""
    return None if given is None or given == -1 else _whole(given, name, 10**6, 0)
