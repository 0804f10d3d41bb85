"""How people ask the questions of `mmx.data.derived_questions`: several wordings for each form of a question.

The wordings of `HELD_BACK` are never drawn for `wordings: seen`; they measure whether a model understands a question or
only knows its wording. Slots such as {thing} are filled with the slots of the question. The first wording of `SEEN` is
the one of `wordings: first`.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Literal

Wordings = Literal["first", "seen", "held_back"]

NO_MARK = 0.2  # fraction of the questions that are drawn without a question mark
CAPITALIZED = 0.2  # with a capital letter at the beginning
UPPER_CASE = 0.03  # in capital letters


def _parse_table(table: str) -> dict[str, tuple[str, ...]]:
    """Parse lines of the form "form: wording | wording"; a form may have several lines."""
    wordings: dict[str, tuple[str, ...]] = {}
    for line in table.strip().splitlines():
        form, _, texts = line.strip().partition(": ")
        wordings[form] = wordings.get(form, ()) + tuple(text.strip() for text in texts.split("|"))
    return wordings


SEEN = _parse_table("""
    color: what color {be} the {thing}? | what colour {be} the {thing}? | which color {be} the {thing}?
    color: what is the color of the {thing}? | what's the color of the {thing}? | what color {do} the {thing} have?
    color: the {thing} {be} what color? | tell me the color of the {thing} | color of the {thing}?
    count: how many {things} are there? | how many {things} are in the picture? | how many {things} can you see?
    count: how many {things} do you see? | how many {things}? | what is the number of {things}? | count the {things}
    count: how many {things} are in this photo? | how many {things} are shown?
    animal: what animal is this? | which animal is this? | what kind of animal is this? | what is this animal?
    animal: what animal is in the picture? | what animal do you see? | what animal is it? | what animal is that?
    animal: which animal can you see? | name the animal
    subject_person: who is this? | who is in the picture? | who do you see? | what is in the picture? | who is it?
    subject_person: who is shown here? | what do you see? | what is shown? | who can you see in the photo?
    subject_animal: what is this? | what is in the picture? | what do you see? | what is shown? | what is it?
    subject_animal: what can you see in the photo? | what is shown here? | what's this?
    action: what is the {subject} doing? | what's the {subject} doing? | what does the {subject} do?
    action: what is the {subject} doing in the picture? | what is the {subject} doing here?
    action: the {subject} is doing what? | what activity is the {subject} doing? | what is the {subject} busy with?
    object: what is the {subject} {verb}? | what's the {subject} {verb}? | the {subject} is {verb} what?
    object: what is the {subject} {verb} in the picture? | what thing is the {subject} {verb}?
    object: what is the {subject} {verb} here? | which thing is the {subject} {verb}?
    place: where is this? | where was this photo taken? | what place is this? | where are we? | what is the place?
    place: where is this picture taken? | where does this take place? | where is it? | in what place is this?
    place_subject: where is this? | where is the {subject}? | where's the {subject}? | what place is the {subject} in?
    place_subject: where is the {subject} in the photo? | where is the {subject} in this picture?
    place_subject: where was this photo taken?
    place_group: where is this? | where are they? | where are the {subject}? | where are the {subject} in the photo?
    place_group: what place are they in? | where are they in this picture? | where was this photo taken?
    exists: is there {article}{thing}? | is there {article}{thing} in the picture? | can you see {article}{thing}?
    exists: do you see {article}{thing}? | is there any {thing}? | does the picture show {article}{thing}?
    exists: is there {article}{thing} here? | do you see any {thing}?
    verify_color: {be} the {thing} {color}? | {be} the {thing} {color} in the picture? | {do} the {thing} look {color}?
    verify_color: is the color of the {thing} {color}? | would you call the {thing} {color}? | the {thing} {be} {color}?
    verify_action: is the {subject} {action}? | is the {subject} {action} in the picture? | the {subject} is {action}?
    verify_action: is the {subject} {action} here? | do you see the {subject} {action}?
    verify_action: can you see the {subject} {action}?
    verify_setting: is it {setting}? | is this {setting}? | are we {setting}? | was this photo taken {setting}?
    verify_setting: is the picture taken {setting}? | does this take place {setting}?
    verify_place: is it {place}? | is this {place}? | are we {place}? | was this photo taken {place}?
    verify_place: is the picture taken {place}? | does this take place {place}?
""")

HELD_BACK = _parse_table("""
    color: can you tell me what color the {thing} {be}? | what color would you say the {thing} {be}?
    color: which colour do you see on the {thing}?
    count: what number of {things} is in the image? | how many {things} appear here? | can you count the {things}?
    animal: what sort of animal is this? | can you tell which animal that is? | what type of animal is shown?
    subject_person: who is in this image? | who appears in the picture? | can you tell who is here?
    subject_animal: what is in this image? | what appears in the picture? | can you tell what is here?
    action: can you tell me what the {subject} is doing? | what is the {subject} up to?
    action: what is happening with the {subject}?
    object: can you tell me what the {subject} is {verb}? | what exactly is the {subject} {verb}?
    object: what do you see the {subject} {verb}?
    place: where did this happen? | what kind of place is it? | can you tell me where this is?
    place_subject: can you tell me where the {subject} is? | at what place is the {subject}?
    place_subject: in what kind of place is the {subject}?
    place_group: can you tell me where they are? | at what place are they? | in what kind of place are the {subject}?
    exists: does this photo have {article}{thing}? | would you say there is {article}{thing}?
    exists: any {thing} in this image?
    verify_color: would you say the {thing} {be} {color}? | can you tell me if the {thing} {be} {color}?
    verify_action: would you say the {subject} is {action}? | can you tell me if the {subject} is {action}?
    verify_setting: would you say this is {setting}? | can you tell me if they are {setting}?
    verify_place: would you say this is {place}? | can you tell me if it is {place}?
""")


def word_question(form: str, slots: Mapping[str, str], wordings: Wordings, key: str) -> str:
    """Return a question in one of its wordings; the key decides which one, and about capitals and the question mark.

    Args:
        form: a key of SEEN.
        slots: values of the slots of the wordings.
        wordings: the set to draw from; `first` always gives the first wording of SEEN as it stands in the table.
        key: equal keys give equal wordings.
    """
    if wordings == "first":
        return SEEN[form][0].format_map(slots)
    rng = Random(key)
    texts = SEEN[form] if wordings == "seen" else HELD_BACK[form]
    question = rng.choice(texts).format_map(slots)
    if rng.random() < NO_MARK:
        question = question.rstrip("?")
    letters = rng.random()
    if letters < UPPER_CASE:
        return question.upper()
    return question[0].upper() + question[1:] if letters < UPPER_CASE + CAPITALIZED else question
