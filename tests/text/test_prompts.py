"""Prompts and normalization of texts."""

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

properties = settings(max_examples=50, deadline=None)


def test_prompts():
    assert caption_prompt() == (BOS, CAPTION)
    assert question_prompt(" what  is this ") == (BOS, QUESTION, "what is this?", ANSWER)
    assert answer_prompt() == (BOS, ANSWER)
    assert len({token.text for token in SPECIAL_TOKENS}) == len(SPECIAL_TOKENS) == 6


@pytest.mark.parametrize(
    ("question", "expected"),
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
def test_normalize_question(question, expected):
    assert normalize_question(question) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog , a cat .", "a dog, a cat."),
        ("the dog 's ball", "the dog's ball"),
        ("it is n't here !", "it isn't here!"),
        (" a   dog\n", "a dog"),
        ("", ""),
        (" . ", "."),
    ],
)
def test_normalize_whitespace(text, expected):
    assert normalize_whitespace(text) == expected


def test_normalize_caption():
    assert normalize_caption("A Dog runs , fast . ") == "a dog runs, fast"
    assert normalize_caption("...") == ""


@properties
@given(st.text(max_size=40))
def test_normalizing_a_question_is_idempotent(text):
    normalized = normalize_question(text)
    assert normalize_question(normalized) == normalized
    assert normalized.endswith("?")
    assert normalized == normalized.strip()


@properties
@given(st.text(" .,a'sn?t\n", max_size=30))
def test_normalized_whitespace_is_single_and_never_at_the_ends(text):
    normalized = normalize_whitespace(text)
    assert "  " not in normalized
    assert normalized == normalized.strip()
    assert normalized.replace(" ", "") == "".join(text.split())


def test_prompts_do_not_import_torch():
    code = "import sys, mmx.text.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
