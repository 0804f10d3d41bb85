"""The forced start of a text: the same under greedy decoding, beams, sampling and streaming, in batches and windows."""

import pytest
import torch

from mmx.config.schema import GenerationConfig
from mmx.errors import MmxError
from mmx.inference.outputs import Question
from mmx.inference.pipeline import Pipeline
from mmx.models.decoder import TextDecoder
from mmx.testing import tiny_model

INPUT = {"numbers": [1.0, 2.0]}
OTHER = {"numbers": [-3.0, 0.5, 4.0]}
START = "a photo of"


@pytest.fixture(scope="module")
def pipeline():
    model = tiny_model(positions="learned")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "positions" not in name:
                weight.mul_(6.0)
    return Pipeline(model, GenerationConfig(max_new_tokens=6, min_new_tokens=2))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 1.5}, {"guidance_scale": 2.0}]
)
def test_text_begins_with_the_start_and_is_the_continuation(pipeline, options):
    text = pipeline.generate(INPUT, start=START, **options)[0]
    assert text.text.startswith(START)
    assert len(text.tokens) <= 6, "the tokens are those that were generated"
    assert pipeline.ask(INPUT, "what?", start="it is", **options).startswith("it is")


def test_scores_are_those_of_the_generated_tokens(pipeline):
    """Against the decoder: log p(token | prompt, start, tokens before it)."""
    memory = pipeline.encode(numbers=[INPUT["numbers"]])
    options = pipeline.generation_config({"start": START})
    output = pipeline.generate_tokens(memory, [[None]], options)[0][0][0]
    prompt = [*pipeline.prompt_tokens(None), *pipeline.model.tokenizer.encode(START)]
    eos = pipeline.model.tokenizer.eos_token_id
    target = [*output.tokens, eos] if output.finished else list(output.tokens)
    decoder: TextDecoder = pipeline.model.decoder
    with torch.no_grad():
        logprobs = decoder(torch.tensor([[[*prompt, *target[:-1]]]]), memory)[0, 0].log_softmax(-1)
    expected = [logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(target)]
    assert list(output.logprobs) == pytest.approx(expected, abs=1e-4)
    assert output.score == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_streaming_starts_with_it(pipeline):
    texts = list(pipeline.stream(INPUT, start=START))
    assert all(text.startswith(START) for text in texts)
    assert texts[-1] == pipeline.caption(INPUT, start=START)


def test_batches_with_a_start_for_each_input(pipeline):
    starts = ["a", "the cat and", "", "the cat"]
    inputs = [INPUT, OTHER, INPUT, INPUT]
    results = [result.text for _, result in pipeline.captions(inputs, 4, starts)]
    for text, start, item in zip(results, starts, inputs, strict=True):
        assert text.startswith(start)
        if start:
            assert text == pipeline.caption(item, start=start)
    questions = [Question(INPUT, "what?", None, "it is"), Question(INPUT, "why?"), Question(OTHER, "what?")]
    answers = [answer.text for answer in pipeline.answers(questions, start="the")]
    assert answers == [
        pipeline.ask(INPUT, "what?", start="it is"),
        pipeline.ask(INPUT, "why?", start="the"),
        pipeline.ask(OTHER, "what?", start="the"),
    ]


def test_look_at_no_words_is_refused(pipeline):
    with pytest.raises(MmxError) as error:
        pipeline.look(INPUT, text=" ")
    assert error.value.code == "look.empty_text"


def test_the_start_of_look_is_explained_too(pipeline):
    look = pipeline.look(INPUT, start="a photo")
    assert look.text == pipeline.caption(INPUT, start="a photo")


def test_a_lowercase_tokenizer_keeps_the_start_as_given(pipeline):
    lowercase = pipeline.model.tokenizer.train(["a photo of the cat"] * 3, 300, lowercase=True)
    small = Pipeline(tiny_model(tokenizer=lowercase), GenerationConfig(max_new_tokens=4))
    assert small.caption(INPUT, start="A Photo").startswith("A Photo")


def test_white_space_alone_is_no_start(pipeline):
    assert pipeline.caption(INPUT, start="  ") == pipeline.caption(INPUT)


def test_errors(pipeline):
    def code_of(call):
        with pytest.raises(MmxError) as error:
            call()
        return error.value.code

    long = "word " * 80
    assert code_of(lambda: pipeline.caption(INPUT, start=long)) == "start.too_long"
    assert code_of(lambda: list(pipeline.captions([INPUT, OTHER], 2, ["a"]))) == "captions.starts"
    assert code_of(lambda: list(pipeline.captions([INPUT], 2, "a"))) == "captions.starts"
    assert code_of(lambda: list(pipeline.captions([INPUT], 2, ["a", "b"]))) == "captions.starts"
    (answer,) = pipeline.answers([Question(INPUT, "what?", None, long)])
    assert answer.code == "start.too_long", "of one question, not of the call"
