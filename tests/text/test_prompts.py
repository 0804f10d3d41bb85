"""Prompts and the tidying of texts: by hand, and that tidying twice is tidying once."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.text.prompts import (
    ANSWER,
    BOS,
    CAPTION,
    QUESTION,
    SPECIAL_TOKENS,
    answer_prompt,
    caption_prompt,
    normalize_caption,
    normalize_question,
    normalize_whitespace,
    question_prompt,
)

EFFORT = settings(max_examples=50, deadline=None)


def test_the_three_prompts():
    assert caption_prompt() == (BOS, CAPTION)
    assert question_prompt(" what  is this ") == (BOS, QUESTION, "what is this?", ANSWER)
    assert answer_prompt() == (BOS, ANSWER)
    assert len({mark.text for mark in SPECIAL_TOKENS}) == len(SPECIAL_TOKENS) == 6


@pytest.mark.parametrize(
    ("given_", "tidy"),
    [
        ("what is this", "what is this?"),
        ("what is this?", "what is this?"),
        ("  what\nis\tthis ?? ", "what is this?"),
        ("name it.", "name it?"),
        ("why? because.", "why? because?"),
        ("", "?"),
        ("???", "?"),
    ],
)
def test_questions_are_spelt_one_way(given_, tidy):
    assert normalize_question(given_) == tidy


@pytest.mark.parametrize(
    ("given_", "tidy"),
    [
        ("a dog , a cat .", "a dog, a cat."),
        ("the dog 's ball", "the dog's ball"),
        ("it is n't here !", "it isn't here!"),
        (" a   dog\n", "a dog"),
        ("", ""),
        (" . ", "."),
    ],
)
def test_decoded_text_is_written_as_people_write(given_, tidy):
    assert normalize_whitespace(given_) == tidy


def test_captions_as_targets():
    assert normalize_caption("A Dog runs , fast . ") == "a dog runs, fast"
    assert normalize_caption("...") == ""


@EFFORT
@given(st.text(max_size=40))
def test_tidying_a_question_twice_is_tidying_it_once(text):
    once = normalize_question(text)
    assert normalize_question(once) == once
    assert once.endswith("?")
    assert once == once.strip()


@EFFORT
@given(st.text(" .,a'sn?t\n", max_size=30))
def test_tidied_text_has_single_spaces_and_none_at_its_ends(text):
    once = normalize_whitespace(text)
    assert "  " not in once
    assert once == once.strip()
    assert once.replace(" ", "") == "".join(text.split())


def test_prompts_need_no_torch():
    code = "import sys, mmx.text.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
