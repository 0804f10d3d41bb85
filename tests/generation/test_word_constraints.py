"""Words to avoid and to include, against plain searches of the decoded texts, under every way of decoding."""

import random
import re

import pytest
import torch

from mmx.config.schema import GenerationConfig
from mmx.errors import ConfigError
from mmx.generation.phrases import PhraseMatcher, TextEnd, TokenTexts, fold
from mmx.inference.pipeline import Pipeline
from mmx.testing import tiny_model
from mmx.text.tokenizer import Tokenizer

INPUT = {"numbers": [1.0, 2.0]}
WORDS = [
    "a",
    "an",
    "the",
    "cat",
    "dog",
    "party",
    "art",
    "artist",
    "orange",
    "white",
    "hot",
    "dogs",
    "is",
    "on",
    "of",
    "in",
    "red",
    "box",
    "café",
    "straße",
    "naïve",
    "日本",
    "don't",
]
TEXTS = [" ".join(random.Random(seed).choices(WORDS, k=9)) for seed in range(60)]
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "seed": 3},
    "nucleus": {"do_sample": True, "top_p": 0.3, "top_k": 3},
    "beams": {"num_beams": 4},
}


def make_pipeline(vocab_size=340, seed=0, **decoder):
    tokenizer = Tokenizer.train(TEXTS, vocab_size)
    model = tiny_model(tokenizer=tokenizer, seed=seed, **decoder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "positions" not in name:
                weight.mul_(6.0)
    return Pipeline(model, GenerationConfig(max_new_tokens=14))


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="module")
def talkative():
    """A model that says the words of its vocabulary: tokens of single bytes have a low probability."""
    pipeline = make_pipeline(lm_head_bias=True, tie_word_embeddings=False)
    pieces = pipeline.model.tokenizer.pieces()
    with torch.no_grad():
        bias = pipeline.model.decoder.lm_head.bias.zero_()
        for token, piece in enumerate(pieces):
            if len(piece) < 2:
                bias[token] = -60.0
        bias[pipeline.model.tokenizer.eos_token_id] = 0.0
    return pipeline


def has_word(text, phrase):
    """The slow reference: a regular expression over the decoded text."""
    pattern = r"\s+".join(re.escape(part) for part in phrase.split())
    before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    after = r"(?!\w)" if re.search(r"\w$", phrase) else ""
    return re.search(f"{before}{pattern}{after}", text, re.IGNORECASE) is not None


def has_group(text, group):
    return any(has_word(text, word) for word in group.split("|"))


# ---- matching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phrase", ["art", "hot dog", "don't", "é", "straße", "a", "-art", "art-", "日本", "dog hot dog"]
)
def test_matching_token_by_token_equals_a_search_of_the_text(phrase):
    alphabet = [
        "a",
        "art",
        " ",
        "p",
        "y",
        "-",
        "'",
        "hot",
        "dog",
        " hot",
        " dog",
        "don",
        "t",
        "é",
        "stra",
        "ß",
        "e",
        "日本",
        "É",
    ]
    pieces = [item.encode() for item in alphabet] + [b"\xe6", b"\x97\xa5", b"\xc3", b"\xa9", b""]
    matcher = PhraseMatcher([phrase], TokenTexts(pieces))
    generator = random.Random(0)
    for _ in range(300):
        tokens = generator.choices(range(len(pieces)), k=generator.randint(1, 9))
        end = TextEnd()
        seen = False
        for position, token in enumerate(tokens):
            text_before = b"".join(pieces[item] for item in tokens[:position]).decode("utf-8", "replace")
            mask = matcher.completing_tokens(end, frozenset([0]), or_at_end=False)
            end, whole = matcher.advance(end, pieces[token])
            assert bool(mask[token]) == bool(whole), (text_before, pieces[token])
            seen = seen or bool(whole)
        data = b"".join(pieces[item] for item in tokens)
        text = (data.removesuffix(end.incomplete) if end.incomplete else data).decode("utf-8", "replace")
        found = seen or bool(matcher.at_end(end))
        assert found == matcher.contains(text, 0) == has_word(text, phrase), text


def test_completing_tokens_at_the_end_of_a_token():
    pieces = [b" art", b"ist", b" party", b" p", b"art", b"y", b".", b""]
    matcher = PhraseMatcher(["art"], TokenTexts(pieces))

    def completing(text, or_at_end):
        end, _ = matcher.advance(TextEnd(), text.encode())
        mask = matcher.completing_tokens(end, frozenset([0]), or_at_end)
        return {pieces[token] for token in mask.nonzero()[:, 0].tolist()}

    assert completing("an", True) == {b" art"}
    assert completing("an", False) == set()
    assert completing("an ", True) == {b" art", b"art"}
    assert completing("a p", True) == {b" art"}, "party"
    assert completing("an art", False) == {b" art", b" party", b" p", b"."}


def test_fold():
    assert fold("A  Hot\n dog ΣΑΣ") == "a hot dog σασ"


# ---- avoid -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_avoided_words_never_occur(talkative, mode):
    options = {**MODES[mode], "min_new_tokens": 8}
    plain = talkative.generate(INPUT, **options)[0]
    words = [word for word in dict.fromkeys(plain.text.split()) if len(word) > 1][:3]
    assert words, "the model says something"
    text = talkative.generate(INPUT, avoid=words, **options)[0]
    assert not text.unmet
    assert not any(has_word(text.text, word) for word in words)


def test_a_part_of_a_word_is_not_the_word(talkative):
    """Beams say words all the same that begin with an avoided one."""
    num_parts = 0
    for seed in range(8):
        options = {"num_beams": 4, "min_new_tokens": 5}
        image = {"numbers": [float(seed), 1.0 - seed]}
        plain = talkative.generate(image, **options)[0].text
        parts = [word[:-1] for word in plain.split() if word.isalpha() and len(word) > 1]
        parts = [part for part in parts if not has_word(plain, part)]
        num_parts += len(parts)
        if parts:
            assert talkative.generate(image, avoid=parts, **options)[0].text == plain
    assert num_parts > 3


def test_avoided_words_hold_after_a_start_and_while_streaming(talkative):
    text = talkative.generate(INPUT, start="a hot", avoid=["hot dog", "hot dogs"], num_beams=3)[0]
    assert text.text.startswith("a hot")
    assert not has_word(text.text, "hot dog")
    *_, last = talkative.stream(INPUT, avoid=["cat", "dog", "art"])
    assert not any(has_word(last, word) for word in ("cat", "dog", "art"))
    contradiction = talkative.generate(INPUT, start="a cat.", avoid=["cat"])[0]
    assert contradiction.unmet == ("cat",)


# ---- include ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("include", [["cat"], ["hot dog", "orange|white"], ["Café", "party", "artist"], ["zebra"]])
def test_included_words_occur(talkative, mode, include):
    text = talkative.generate(INPUT, include=include, **MODES[mode])[0]
    assert not text.unmet
    assert all(has_group(text.text, group) for group in include)


def test_what_cannot_be_met_is_reported(talkative):
    words = ["cat", "a very long phrase that does not fit in two tokens"]
    for options in MODES.values():
        text = talkative.generate(INPUT, include=words, max_new_tokens=3, **options)[0]
        assert set(text.unmet) == {word for word in words if not has_group(text.text, word)}
        assert words[1] in text.unmet
    both = talkative.generate(INPUT, include=["cat"], avoid=["cat"], num_beams=3)[0]
    assert both.unmet == ("cat",)


def test_words_that_are_said_anyway_cost_no_score(talkative):
    options = {"num_beams": 4, "min_new_tokens": 5}
    image = {"numbers": [0.0, 1.0]}
    plain = talkative.generate(image, **options)[0]
    word = next(word for word in plain.text.split() if word.isalpha())
    included = talkative.generate(image, include=[word], **options)[0]
    assert has_word(included.text, word)
    assert included.score >= plain.score - 1e-5


def test_the_start_counts(talkative):
    plain = talkative.generate(INPUT, start="a cat and", num_beams=3)[0]
    assert talkative.generate(INPUT, start="a cat and", include=["cat"], num_beams=3)[0].text == plain.text


# ---- random sets -----------------------------------------------------------------------------------------------------


def check_random_sets(count, pipelines, options):
    """Generate with `count` random sets; every set is kept, or its `unmet` is what a search of the text finds."""
    generator = random.Random(0)
    num_kept = 0
    for index in range(count):
        pipeline = pipelines[index % len(pipelines)]
        avoid = generator.sample(WORDS, generator.randint(0, 3))
        include = ["|".join(generator.sample(WORDS, generator.randint(1, 2))) for _ in range(generator.randint(0, 3))]
        image = {"numbers": [generator.gauss(0, 1) for _ in range(3)]}
        text = pipeline.generate(image, avoid=avoid, include=include, **options)[0]
        expected = [word for word in avoid if has_word(text.text, word)]
        expected += [group for group in include if not has_group(text.text, group)]
        assert list(text.unmet) == expected, (avoid, include, text)
        possible = [group for group in include if set(group.split("|")) - set(avoid)]
        assert not set(text.unmet) - (set(include) - set(possible)), (avoid, include, text)
        num_kept += not text.unmet
    return num_kept


@pytest.mark.parametrize("mode", MODES)
def test_random_sets_are_kept_or_reported(pipeline, talkative, mode):
    assert check_random_sets(50, [pipeline, talkative], {**MODES[mode], "max_new_tokens": 24}) >= 40


@pytest.mark.slow
def test_a_thousand_random_sets_under_beams(pipeline, talkative):
    assert check_random_sets(1000, [pipeline, talkative], {"num_beams": 4, "max_new_tokens": 24}) >= 800


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"avoid": [""]}, {"avoid": ["cat|dog"]}, {"include": ["a|"]}, {"include": [" "]}, {"avoid": "cat"}],
)
def test_wrong_words_are_refused(pipeline, options):
    with pytest.raises(ConfigError):
        pipeline.caption(INPUT, **options)
