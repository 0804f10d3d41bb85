"""Prompts and questions."""

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
    is_empty_question,
    normalize_question,
    question_prompt,
)

properties = settings(max_examples=50, deadline=None)


def test_prompts():
    assert caption_prompt() == (BOS, CAPTION)
    assert question_prompt(" what is this ") == (BOS, QUESTION, "what is this?", ANSWER)
    assert answer_prompt() == (BOS, ANSWER)
    assert len({token.text for token in SPECIAL_TOKENS}) == len(SPECIAL_TOKENS) == 6


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("what is this", "what is this?"),
        ("what is this?", "what is this?"),
        ("  what is this ?? ", "what is this?"),
        ("What color ??", "What color?"),
        ("name it.", "name it?"),
        ("why? because.", "why? because?"),
        ("Is U.S.A. written  twice", "Is U.S.A. written twice?"),
        ("which line:\n1. a\n2. b\n", "which line: 1. a 2. b?"),
        ("¿Qué es esto?", "¿Qué es esto?"),
        ("¿Qué es esto", "¿Qué es esto?"),
        ("这是什么？", "这是什么？"),
        ("这是什么？?", "这是什么？"),
        ("ما هذا؟", "ما هذا؟"),
        ("τι είναι αυτό\u037e", "τι είναι αυτό\u037e"),
        ("τι είναι αυτό;", "τι είναι αυτό;"),
        ("what is a;", "what is a;?"),
        ("Ի՞նչ է սա", "Ի՞նչ է սա"),
        ("ይህ ምንድን ነው፧", "ይህ ምንድን ነው፧"),
        ("really⁇", "really⁇"),
        ("really⁈", "really⁈"),
        ("really‽", "really‽"),
        ("is it so⸮", "is it so⸮"),
        ("", "?"),
        ("???", "?"),
    ],
)
def test_normalize_question(question, expected):
    assert normalize_question(question) == expected


@pytest.mark.parametrize("question", ["", " ", "\n\t", "?", " ?? ", "...", "¿?", "？", "\u3000؟", "⁇"])
def test_a_question_without_words_is_empty(question):
    assert is_empty_question(question)


@pytest.mark.parametrize("question", ["a", "这", "1?", "!", "¿Qué"])
def test_a_question_with_words_is_not_empty(question):
    assert not is_empty_question(question)


@properties
@given(st.text(max_size=40))
def test_normalizing_a_question_is_idempotent(text):
    normalized = normalize_question(text)
    assert normalize_question(normalized) == normalized
    assert normalized == normalized.strip()
    kept = normalized.removesuffix("?")
    assert kept in " ".join(text.split())


def test_prompts_do_not_import_torch():
    code = "import sys, mmx.text.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
