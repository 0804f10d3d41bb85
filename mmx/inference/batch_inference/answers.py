"""Answers to many questions: those about one content together, each content encoded once, the answers in order.

Alphabet: B rows (pictures), K streams (questions about each).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from mmx.config.schema import GenerationConfig
from mmx.encoders.contract import PreparedInput
from mmx.errors import MmxError
from mmx.inference.batch_inference.dedup import group_keys, mention
from mmx.inference.batch_inference.out_of_memory import AdaptiveBatchSize
from mmx.inference.batch_inference.prefetch import batched, prefetcher
from mmx.inference.outputs import GeneratedText, PreparedOrError, Question, TextGenerator, prepare_or_error
from mmx.memory import Memory, check_box

# Pictures x questions x (prompt + answer) x beams that are held at a time. In the cache of a decoder of 12 layers and
# width 768 in float32 that is 1.2 GB; 16 pictures with 16 short questions each are 11,000 and stay in one piece.
MOST_TOKENS = 16_384

Places = Sequence[int]  # of questions about the same content
Found = dict[int, GeneratedText | MmxError]  # by place


class StreamIndex(NamedTuple):
    """One stream: a row of the memory, and the place of the question that it is asked."""

    row: int
    place: int


class Work(NamedTuple):
    """What stays the same over a call: who speaks, what is asked, the tokens of each prompt, how words are chosen, and
    how many rows are encoded, and pairs answered, at a time."""

    speaker: TextGenerator
    questions: Sequence[Question]
    prompts: dict[int, int]
    options: GenerationConfig
    rows: AdaptiveBatchSize
    pairs: AdaptiveBatchSize


def answers(
    speaker: TextGenerator, questions: Sequence[Question], batch_size: int, options: GenerationConfig
) -> Iterator[GeneratedText | MmxError]:
    """See Pipeline.answers."""
    found, prompts = _checked(speaker, questions)
    work = Work(speaker, questions, prompts, options, AdaptiveBatchSize(), AdaptiveBatchSize())

    def prepare(places: Places) -> PreparedOrError:
        return prepare_or_error(speaker, questions[places[0]].image)

    due = 0
    with prefetcher(speaker.model.device) as ahead:
        batches = ahead(prepare, batched(_groups(work), batch_size))
        nothing: tuple[Sequence[Places], list[PreparedOrError]] = ([], [])
        for groups, prepared in chain(batches, [nothing]):  # the last: errors that no picture is for
            found |= _answered(work, list(zip(prepared, groups, strict=True)))
            while due in found:
                yield found.pop(due)
                due += 1


def _checked(speaker: TextGenerator, questions: Sequence[Question]) -> tuple[Found, dict[int, int]]:
    """What cannot be asked, and the length of what can, by place."""
    wrong: Found = {}
    prompts: dict[int, int] = {}
    for place, item in enumerate(questions):
        try:
            check_box(item.box)
            prompts[place] = len(speaker.prompt_tokens(item.question))
        except MmxError as error:
            wrong[place] = error
    return wrong, prompts


def _groups(work: Work) -> list[list[int]]:
    """The places of the questions about each content, in the order in which the contents are first met."""
    images = [work.questions[place].image for place in work.prompts]
    keys = group_keys(work.speaker, images)
    places: dict[Hashable, list[int]] = {}
    for place, image in zip(work.prompts, images, strict=True):
        places.setdefault(keys[mention(image)], []).append(place)
    return list(places.values())


def _answered(work: Work, prepared: Sequence[tuple[PreparedOrError, Places]]) -> Found:
    """By their places, the answers of some groups of questions about the same content each, in one batch."""
    found: Found = {}
    good: list[tuple[dict[str, PreparedInput], Places]] = []
    for item, places in prepared:
        if isinstance(item, MmxError):
            found |= {place: _reason(work, place, places[0], item) for place in places}
        else:
            good.append((item, places))

    def answer(groups: Sequence[tuple[dict[str, PreparedInput], Places]]) -> list[Found]:
        memory = work.speaker.encode_prepared([item for item, _ in groups])
        return _spoken(work, memory, [places for _, places in groups])

    for (_, places), done in zip(good, work.rows.run(good, answer), strict=True):
        found |= dict.fromkeys(places, done) if isinstance(done, MmxError) else done
    return found


def _reason(work: Work, place: int, first: int, error: MmxError) -> MmxError:
    """Why an input cannot be read, under its own name where it is the twin of the one that was tried."""
    image = work.questions[place].image
    if mention(image) == mention(work.questions[first].image):
        return error
    own = prepare_or_error(work.speaker, image)
    return own if isinstance(own, MmxError) else error


def _spoken(work: Work, memory: Memory, groups: Sequence[Places]) -> list[Found]:
    """The answers to the questions of each group, over a memory of as many rows."""
    found: list[Found] = [{} for _ in groups]

    def say(pairs: Sequence[StreamIndex]) -> list[GeneratedText]:
        return _say(work, memory, pairs)

    for pairs in _pieces(work, groups):
        for pair, said in zip(pairs, work.pairs.run(pairs, say), strict=True):
            found[pair.row][pair.place] = said
    return found


def _pieces(work: Work, groups: Sequence[Places]) -> Iterator[list[StreamIndex]]:
    """Stretches of pairs, as many questions of each row as MOST_TOKENS allow, those of lower rows first."""
    longest = max(work.prompts[place] for places in groups for place in places) + work.options.max_new_tokens
    beams = max(work.options.num_beams, work.options.num_return_sequences)
    streams = max(1, MOST_TOKENS // (longest * beams))
    left = dict(enumerate(groups))
    while left:
        rows = list(left)[:streams]
        each = max(1, streams // len(rows))
        yield [StreamIndex(row, place) for row in rows for place in left[row][:each]]
        left |= {row: left[row][each:] for row in rows}
        left = {row: places for row, places in left.items() if places}


def _say(work: Work, memory: Memory, pairs: Sequence[StreamIndex]) -> list[GeneratedText]:
    """The answers of some pairs, all at once: their rows of the memory, each with its questions."""
    asked: dict[int, list[int]] = {}
    for pair in pairs:
        asked.setdefault(pair.row, []).append(pair.place)
    part = memory if len(asked) == memory.batch_size else memory.select(list(asked))
    rows = [[work.questions[place] for place in places] for places in asked.values()]
    texts = work.speaker.generate(
        part, [[q.question for q in row] for row in rows], work.options, [[q.box for q in row] for row in rows]
    )
    said = {
        place: text[0]
        for places, row in zip(asked.values(), texts, strict=True)
        for place, text in zip(places, row, strict=True)
    }
    return [said[pair.place] for pair in pairs]
