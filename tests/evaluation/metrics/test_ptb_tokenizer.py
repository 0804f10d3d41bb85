"""The caption tokenizer against the output of Stanford's PTBTokenizer 3.4.1 in pycocoevalcap 1.2.

`golden/tokens.json` holds sentences made for this test and their tokens; `golden/make_golden.py` made it. Of 20,000
captions of Flickr8k it holds only a digest of the tokens of each hundred; the captions are read from a Karpathy
`dataset_flickr8k.json` whose path is in MMX_FLICKR8K.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from mmx.evaluation.metrics.ptb_tokenizer import ptb_tokens

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "tokens.json"
FLICKR8K = "MMX_FLICKR8K"

# Known differences, for rare sequences without spaces. A test fails if one of them disappears.
KNOWN_DIFFERENCES = {
    "gonna's": "gonna 's",
    "wouldn'tve": "would n'tve",
    "a rock-d'ye": "a rock-d'ye",
    "red;d'ye": "red ;d ye",
    "etc.a": "etc. a",
    "The—www.example.org": "the —www.example.org",
}


def golden_lines():
    return json.loads(GOLDEN.read_text())


def digests(lines):
    blocks = ("\n".join(lines[start : start + 100]) for start in range(0, len(lines), 100))
    return [hashlib.sha256(block.encode()).hexdigest()[:16] for block in blocks]


def flickr8k_captions(path):
    images = json.loads(Path(path).read_text())["images"]
    return [sentence["raw"] for image in images for sentence in image["sentences"]][:20_000]


@pytest.mark.parametrize("kind", ["written", "generated"])
def test_lines_equal_the_reference(kind):
    lines = golden_lines()[kind]
    assert len(lines) >= {"written": 250, "generated": 1_000}[kind]
    different = [
        (line, ptb_tokens(line), tokens.split()) for line, tokens in lines if ptb_tokens(line) != tokens.split()
    ]
    assert different == []


def test_twenty_thousand_flickr8k_captions_equal_the_reference():
    if not os.environ.get(FLICKR8K):
        pytest.skip(f"{FLICKR8K} does not name a dataset_flickr8k.json; its captions are not in the repository")
    ours = digests([" ".join(ptb_tokens(caption)) for caption in flickr8k_captions(os.environ[FLICKR8K])])
    golden = golden_lines()["flickr8k"]
    assert len(golden) == 200
    assert [index for index, digest in enumerate(golden) if digest != ours[index]] == []


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog, isn't it?", "a man 's dog is n't it"),
        ("We can't; they'll", "we ca n't they 'll"),
        ("the boys' bikes", "the boys bikes"),
        ('"Stop", said the sign.', "stop said the sign"),
        ("“Don’t”, it said", "do n't it said"),
        ("a (small) dog [x]", "a -lrb- small -rrb- dog -lsb- x -rsb-"),
        ("t-shirt -- black-and-white - old", "t-shirt black-and-white old"),
        ("1,000 dogs at 10:30 for $5.50", "1,000 dogs at 10:30 for $ 5.50"),
        ("Mr. Smith of Washington D.C.", "mr. smith of washington d.c."),
        ("They cannot wait...", "they can not wait"),
        ("wow!!!", "wow !!!"),
        ("rock 'n' roll at 5 o'clock", "rock 'n' roll at 5 o'clock"),
        ("", ""),
        (" \n\t ", ""),
        (". , ! ? ; : - -- ... ' \" `", ""),
    ],
)
def test_rules(caption, tokens):
    assert ptb_tokens(caption) == tokens.split()


@pytest.mark.parametrize("caption", sorted(KNOWN_DIFFERENCES))
def test_known_differences_are_still_differences(caption):
    assert ptb_tokens(caption) != KNOWN_DIFFERENCES[caption].split()


@pytest.mark.parametrize(
    "text", ["<a" * 3_000, "a-" * 3_000, "1,1." * 1_500, "'" * 6_000, "a.b@" * 1_500, "n't" * 2_000]
)
def test_unusual_text_takes_linear_time(text):
    start = time.perf_counter()
    ptb_tokens(text)
    assert time.perf_counter() - start < 1  # some milliseconds; with catastrophic backtracking minutes
