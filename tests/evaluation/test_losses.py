"""Bits per word under each condition equal those of single texts, for every way that a model reads questions."""

import math

import pytest
import torch

from mmx.config.schema import DecoderConfig, GenerationConfig, ModelConfig, QuestionEncoderConfig, SourceConfig
from mmx.data.examples import Example, TextTask
from mmx.evaluation.evaluate import EvaluationOptions, ProcessGroup, evaluate
from mmx.inference.pipeline import Pipeline
from mmx.models.model import Model
from mmx.nn.features import Features
from mmx.testing import tiny_model, toy_tokenizer

NUMBERS = SourceConfig(encoder="mmx.testing:ToyEncoder")
TEXT = SourceConfig(encoder="text", options={"hidden_size": 16, "num_layers": 1, "num_heads": 2})
ONE_TOKEN = GenerationConfig(max_new_tokens=1)
INFORMATION = EvaluationOptions(ONE_TOKEN, information=True)
IMAGES = ("image", "another image", "blank image")


def build_pipeline(question_input):
    """A model that reads questions in this way, with parameters large enough that memories matter."""
    sources = {"numbers": NUMBERS, "question": TEXT} if question_input == "question" else {"numbers": NUMBERS}
    question_encoder = None
    if question_input == "question_encoder":
        question_encoder = QuestionEncoderConfig(hidden_size=16, num_layers=1, num_heads=2)
    config = ModelConfig(
        sources=sources,
        decoder=DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64),
        question_encoder=question_encoder,
        question_input=question_input,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(config, toy_tokenizer()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "positions" not in name:
                parameter.mul_(6.0)
    return Pipeline(model)


def example(number, *tasks):
    return Example(f"e{number}", {"numbers": [float(number), 1.0]}, tasks)


def bits_alone(pipeline, numbers, question, target):
    """Bits of one text, evaluated alone."""
    model = pipeline.model
    prompt = model.tokenizer.encode_prompt(model.prompt(question))
    labels = [*model.tokenizer.encode(target), model.tokenizer.eos_token_id]
    tokens = torch.tensor([[[*prompt, *labels[:-1]]]])
    with torch.inference_mode():
        memory = pipeline.unconditional_memory() if numbers is None else pipeline.encode(numbers=[numbers])
        memory = pipeline.with_questions(memory, [[question]])
        logprobs = model.decoder(tokens, memory)[0, 0, len(prompt) - 1 :].log_softmax(-1)
    return -sum(float(row[token]) for row, token in zip(logprobs, labels, strict=True)) / math.log(2)


@pytest.mark.parametrize("question_input", ["prompt", "question", "question_encoder"])
def test_bits_per_word_of_answers_are_those_of_single_texts(question_input):
    pipeline = build_pipeline(question_input)
    numbers = [[0.0, 2.0], [1.0], [-3.0, 0.5, 1.0]]
    texts = [("who?", "a red dog"), ("what is it?", "two"), ("why?", "so it is")]
    num_words = 7
    examples = []
    for i, (question, answer) in enumerate(texts):
        examples.append(Example(f"e{i}", {"numbers": numbers[i]}, (TextTask((answer,), question),)))
    metrics = evaluate(pipeline, examples, INFORMATION).metrics
    given = {
        "image": numbers,
        "another image": [numbers[1], numbers[2], numbers[0]],
        "blank image": [[0.0] * len(row) for row in numbers],
    }
    expected = {
        "no question, no image": [bits_alone(pipeline, None, "", answer) for _, answer in texts],
        "no question, image": [bits_alone(pipeline, numbers[i], "", answer) for i, (_, answer) in enumerate(texts)],
        "question, no image": [bits_alone(pipeline, None, *text) for text in texts],
    }
    for name in IMAGES:
        expected[f"question, {name}"] = [bits_alone(pipeline, given[name][i], *text) for i, text in enumerate(texts)]
    found = {name: value for name, value in metrics.items() if name.startswith("bits")}
    assert list(found) == [f"bits per word of answers: {name}" for name in expected]
    for name, bits in expected.items():
        assert found[f"bits per word of answers: {name}"] == pytest.approx(sum(bits) / num_words, rel=1e-4), name
    assert len({round(sum(bits), 2) for bits in expected.values()}) == 6, "all conditions differ"


@pytest.fixture(scope="module")
def pipeline():
    return build_pipeline("prompt")


def test_bits_per_word_of_captions_are_the_loss_in_other_units(pipeline):
    captions = [("A dog , red .", "bird"), ("two cats",), ("it is so",)]
    examples = [example(i, TextTask(targets)) for i, targets in enumerate(captions)]
    options = EvaluationOptions(ONE_TOKEN, batch_size=2, information=True)
    metrics = evaluate(pipeline, examples, options).metrics
    names = [f"bits per word of captions: {name}" for name in ("no image", *IMAGES)]
    assert [name for name in metrics if name.startswith("bits")] == names
    texts = [text for targets in captions for text in targets]
    words = sum(len(text.split()) for text in texts)
    tokens = sum(len(pipeline.model.tokenizer.encode(text)) + 1 for text in texts)
    assert words == 11
    nats_per_token = metrics["bits per word of captions: image"] * words * math.log(2) / tokens
    assert nats_per_token == pytest.approx(metrics["loss"], rel=1e-12)


def test_a_batch_of_one_has_no_other_image(pipeline):
    options = EvaluationOptions(ONE_TOKEN, batch_size=2, information=True)
    examples = [example(i, TextTask((f"number {i}",))) for i in range(3)]
    three, two, one = (evaluate(pipeline, examples[:n], options).metrics for n in (3, 2, 1))
    assert three["bits per word of captions: another image"] == two["bits per word of captions: another image"]
    assert three["bits per word of captions: blank image"] != two["bits per word of captions: blank image"]
    assert "bits per word of captions: another image" not in one
    assert "bits per word of captions: blank image" in one


@pytest.mark.parametrize("count", [1, 4])
def test_two_processes_find_the_same_bits(count):
    pipeline = build_pipeline("question")
    examples = []
    for i in range(count):
        examples.append(example(i, TextTask((f"number {i}",)), *[TextTask((f"{i}",), "which?")] * (i % 3)))
    options = EvaluationOptions(ONE_TOKEN, batch_size=2, information=True)
    results = []

    def collect(items):
        results.extend(items)
        return items

    for rank in (0, 1):
        evaluate(pipeline, examples, options, ProcessGroup(rank, 2, collect))
    found = evaluate(pipeline, examples, options, ProcessGroup(0, 2, lambda items: results[:2]))
    expected = evaluate(pipeline, examples, options)
    assert list(found.metrics.items()) == list(expected.metrics.items())


def test_without_information_nothing_is_encoded_twice_and_other_metrics_are_equal(pipeline):
    examples = [example(i, TextTask((f"number {i}",)), TextTask(("x",), "which?")) for i in range(3)]
    calls = []
    hook = pipeline.model.encoder("numbers").register_forward_pre_hook(lambda *_: calls.append(1))
    without = evaluate(pipeline, examples, EvaluationOptions(ONE_TOKEN)).metrics
    assert len(calls) == 1
    with_information = evaluate(pipeline, examples, INFORMATION).metrics
    hook.remove()
    assert len(calls) == 3
    assert without == {name: value for name, value in with_information.items() if not name.startswith("bits")}
    assert len(with_information) == len(without) + 10


def test_a_blank_text_is_empty():
    pipeline = Pipeline(tiny_model({"text": TEXT}))
    tasks = (TextTask(("x y",)),)
    metrics = evaluate(pipeline, [Example("a", {"text": "guten tag"}, tasks)], INFORMATION).metrics
    empty = evaluate(pipeline, [Example("a", {"text": ""}, tasks)], INFORMATION).metrics
    blank = metrics["bits per word of captions: blank image"]
    assert blank == pytest.approx(empty["bits per word of captions: image"], rel=1e-6)
    assert blank != pytest.approx(metrics["bits per word of captions: image"], rel=1e-6)


def test_a_source_without_float_inputs_is_left_out_of_the_blank_condition():
    pipeline = build_pipeline("prompt")
    encoder = pipeline.model.encoder("numbers")
    encoder.prepare = lambda raw: {"codes": torch.tensor([1, 2]), "mask": torch.tensor([True, True])}
    encoder.forward = lambda batch: Features(batch["codes"][..., None].float().expand(-1, -1, 8), batch["mask"])
    metrics = evaluate(pipeline, [example(0, TextTask(("x",)))], INFORMATION).metrics
    assert metrics["bits per word of captions: blank image"] == metrics["bits per word of captions: no image"]
