"""Evaluation: the numbers of known texts, the same over any number of processes, and reports that are whole."""

import json
import math
from typing import Any

import pytest
import torch

from mmx.config.schema import DecoderConfig, GenerationConfig, ModelConfig, QuestionEncoderConfig, SourceConfig
from mmx.data.examples import Example, TextTask
from mmx.errors import DataError
from mmx.evaluation.evaluate import EvaluationReport, evaluate
from mmx.inference.pipeline import GeneratedText, Pipeline
from mmx.models.model import Model
from mmx.nn.features import Features
from mmx.testing import tiny_model, toy_tokenizer


class Parrot(Pipeline):
    """Says what it is told to: the text of each (question, kind of numbers) comes from a table."""

    def __init__(self, table: dict[str | None, str], **model: Any) -> None:
        super().__init__(tiny_model(**model))
        self.table = table

    def say(self, memory: Any, questions: Any, options: Any, boxes: Any = ()) -> list[list[list[GeneratedText]]]:
        return [[[GeneratedText(self.table[question], -1.0, ())] for question in row] for row in questions]


def example(number: int, *turns: TextTask, **sources: Any) -> Example:
    return Example(f"e{number}", {"numbers": [float(number), 1.0]} | sources, turns, f"list:{number}")


def test_metrics_of_known_texts():
    examples = [
        example(0, TextTask(("a dog runs in the park",)), TextTask(("red",), "color?", "color")),
        example(1, TextTask(("two cats", "a dog runs in the park")), TextTask(("Blue", "blue"), "sky?", "color")),
        example(2, TextTask(("yes",) * 9 + ("no",), "so?", "yes/no"), TextTask((), "open?")),
    ]
    table = {None: "a dog runs in the park", "color?": "red", "sky?": "green", "so?": "yes", "open?": "x"}
    report = evaluate(Parrot(table), examples)
    metrics = report.metrics
    assert (metrics["captions"], metrics["questions"]) == (2, 3)
    assert metrics["BLEU-4"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["ROUGE-L"] == pytest.approx(1.0)
    assert metrics["exact match"] == pytest.approx(2 / 3)
    assert metrics["exact match, color"] == 0.5
    assert metrics["exact match, yes/no"] == 1.0
    assert metrics["VQA accuracy"] == pytest.approx(1 / 3)  # one answer a question counts nothing there
    assert [text.key for text in report.predictions] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [text.prediction for text in report.predictions][-1] == "x"


def test_the_loss_is_the_mean_over_all_tokens_of_what_training_teaches():
    pipeline = Pipeline(tiny_model())
    examples = [example(0, TextTask(("A dog .", "bird"))), example(1, TextTask(("no",), "is it?"))]
    said = [(0, None, "a dog"), (0, None, "bird"), (1, "is it?", "no")]
    model, total, count = pipeline.model, 0.0, 0
    for number, question, target in said:
        prompt = model.tokenizer.encode_prompt(model.prompt(question))
        wanted = [*model.tokenizer.encode(target), model.tokenizer.eos_token_id]
        tokens = torch.tensor([[[*prompt, *wanted[:-1]]]])
        with torch.inference_mode():
            logits = model.decoder(tokens, pipeline.encode(numbers=[[float(number), 1.0]]))[0, 0]
        logprobs = logits[len(prompt) - 1 :].log_softmax(-1)
        total -= sum(float(logprobs[place, token]) for place, token in enumerate(wanted))
        count += len(wanted)
    found = evaluate(pipeline, examples, pipeline.generation_config({"max_new_tokens": 2})).metrics["loss"]
    assert found == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("count", range(1, 10))
def test_two_ranks_find_what_one_finds_for_every_remainder(count):
    pipeline = Pipeline(tiny_model())
    examples = [
        example(i, TextTask((f"number {i}", "some")), *([TextTask((f"{i}",), "which?", "k")] * (i % 3)))
        for i in range(count)
    ]
    options = GenerationConfig(max_new_tokens=3)
    whole = evaluate(pipeline, examples, options, batch_size=2)
    for world in (2, 3):
        ranks = [ranked(pipeline, examples, options, rank, world) for rank in range(world)]
        gathered = [[rank[call] for rank in ranks] for call in range(3)]
        calls = iter(gathered)
        found = evaluate(pipeline, examples, options, 2, 0, world, gather=lambda items, c=calls: next(c))
        assert found.metrics.keys() == whole.metrics.keys()
        assert all(abs(found.metrics[key] - value) <= 1e-12 for key, value in whole.metrics.items())
        assert found.predictions == whole.predictions
        assert len({text.key for text in found.predictions}) == len(found.predictions)


def ranked(
    pipeline: Pipeline, examples: list[Example], options: GenerationConfig, rank: int, world: int, **further: Any
) -> list[Any]:
    """What one rank would send to the others."""
    sent: list[Any] = []

    def gather(items: list[Any]) -> list[Any]:
        sent.append(items[0])
        return items

    evaluate(pipeline, examples, options, 2, rank, world, gather, **further)
    return sent


# ---- information -------------------------------------------------------------------------------------------------

TOY = SourceConfig(encoder="mmx.testing:ToyEncoder")
READING = SourceConfig(encoder="text", options={"hidden_size": 16, "num_layers": 1, "num_heads": 2})
SHORT = GenerationConfig(max_new_tokens=1)
UNTOLD = "no question, no picture", "no question, picture", "question, no picture"
TOLD = "question, picture", "question, another picture", "question, blank picture"


def model_asked(question_to: str) -> Model:
    """A model whose questions go there, and whose memories matter."""
    sources = {"numbers": TOY, "question": READING} if question_to == "question" else {"numbers": TOY}
    reader = (
        QuestionEncoderConfig(hidden_size=16, num_layers=1, num_heads=2) if question_to == "question_encoder" else None
    )
    decoder = DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ModelConfig(sources=sources, decoder=decoder, question_encoder=reader, question_input=question_to)
        model = Model(config, toy_tokenizer()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "positions" not in name:
                weight.mul_(6.0)
    return model


def bits_alone(pipeline: Pipeline, numbers: list[float] | None, question: str | None, target: str) -> float:
    """What one text costs, read alone."""
    model, encoder = pipeline.model, pipeline.model.tokenizer
    prompt, wanted = encoder.encode_prompt(model.prompt(question)), [*encoder.encode(target), encoder.eos_token_id]
    with torch.inference_mode():
        memory = pipeline.with_questions(pipeline.encode(numbers=[numbers]), [[question]])
        logits = model.decoder(torch.tensor([[[*prompt, *wanted[:-1]]]]), memory)[0, 0, len(prompt) - 1 :]
    return -sum(float(row[token]) for row, token in zip(logits.log_softmax(-1), wanted, strict=True)) / math.log(2)


@pytest.mark.parametrize("question_input", ["prompt", "question", "question_encoder"])
def test_every_condition_is_measured_as_what_it_says(question_to):
    pipeline = Pipeline(model_asked(question_to))
    numbers = [[0.0, 2.0], [1.0], [-3.0, 0.5, 1.0]]
    asked = [("who?", "a red dog"), ("what is it?", "two"), ("why?", "so it is")]
    examples = [
        Example(f"e{i}", {"numbers": given}, (TextTask((answer,), question),))
        for i, (given, (question, answer)) in enumerate(zip(numbers, asked, strict=True))
    ]
    metrics = evaluate(pipeline, examples, SHORT, information=True).metrics
    blanks = [[0.0] * len(given) for given in numbers]
    others = [numbers[1], numbers[2], numbers[0]]
    ways = dict.fromkeys(UNTOLD + TOLD)
    ways["no question, no picture"] = [bits_alone(pipeline, None, "", answer) for _, answer in asked]
    ways["no question, picture"] = [bits_alone(pipeline, n, "", a) for n, (_, a) in zip(numbers, asked, strict=True)]
    ways["question, no picture"] = [bits_alone(pipeline, None, *text) for text in asked]
    for name, seen in zip(TOLD, (numbers, others, blanks), strict=True):
        ways[name] = [bits_alone(pipeline, given, *text) for given, text in zip(seen, asked, strict=True)]
    assert [name for name in metrics if name.startswith("bits")] == [f"bits a word of answers: {name}" for name in ways]
    for name, costs in ways.items():
        assert metrics[f"bits a word of answers: {name}"] == pytest.approx(sum(costs) / 7, rel=1e-4), name
    assert len({round(sum(costs), 2) for costs in ways.values()}) == 6, "they must differ, or equality says nothing"


def test_bits_of_captions_are_the_loss_in_other_units():
    pipeline = Pipeline(model_asked("prompt"))
    texts = [("A dog , red .", "bird"), ("two cats",), ("it is so",)]
    examples = [example(i, TextTask(targets)) for i, targets in enumerate(texts)]
    metrics = evaluate(pipeline, examples, SHORT, batch_size=2, information=True).metrics
    names = ["no picture", "picture", "another picture", "blank picture"]
    assert [name for name in metrics if name.startswith("bits")] == [f"bits a word of captions: {n}" for n in names]
    tidied = ["a dog, red", "bird", "two cats", "it is so"]
    words = sum(len(text.split()) for text in tidied)
    tokens = sum(len(pipeline.model.tokenizer.encode(text)) + 1 for text in tidied)
    assert words == 9
    found = metrics["bits a word of captions: picture"] * words * math.log(2) / tokens
    assert found == pytest.approx(metrics["loss"], rel=1e-12)


def test_who_is_alone_in_a_batch_has_no_other_picture_and_is_left_out_of_that_figure_alone():
    pipeline, options = Pipeline(model_asked("prompt")), {"per_device_batch_size": 2, "information": True}
    examples = [example(i, TextTask((f"number {i}",))) for i in range(3)]
    three, two, one = (evaluate(pipeline, examples[:n], SHORT, **options).metrics for n in (3, 2, 1))
    assert three["bits a word of captions: another picture"] == two["bits a word of captions: another picture"]
    assert three["bits a word of captions: blank picture"] != two["bits a word of captions: blank picture"]
    assert "bits a word of captions: another picture" not in one
    assert "bits a word of captions: blank picture" in one


@pytest.mark.parametrize("count", [1, 4, 7])
def test_two_ranks_find_the_same_bits(count):
    pipeline = Pipeline(model_asked("question"))
    examples = [
        example(i, TextTask((f"number {i}",)), *([TextTask((f"{i}",), "which?")] * (i % 3))) for i in range(count)
    ]
    whole = evaluate(pipeline, examples, SHORT, 2, information=True)
    ranks = [ranked(pipeline, examples, SHORT, rank, 2, information=True) for rank in range(2)]
    calls = iter([[rank[call] for rank in ranks] for call in range(3)])
    found = evaluate(pipeline, examples, SHORT, 2, 0, 2, gather=lambda items: next(calls), information=True)
    assert list(found.metrics.items()) == list(whole.metrics.items())


def test_without_information_nothing_is_encoded_twice_and_no_number_is_another():
    pipeline = Pipeline(model_asked("prompt"))
    examples = [example(i, TextTask((f"number {i}",)), TextTask(("x",), "which?")) for i in range(3)]
    calls: list[int] = []
    hook = pipeline.model.encoder("numbers").register_forward_pre_hook(lambda *_: calls.append(1))
    plain = evaluate(pipeline, examples, SHORT).metrics
    assert len(calls) == 1
    told = evaluate(pipeline, examples, SHORT, information=True).metrics
    hook.remove()
    assert len(calls) == 3
    assert plain == {name: value for name, value in told.items() if not name.startswith("bits")}
    assert len(told) == len(plain) + 10


def test_a_text_is_blank_when_it_is_empty_and_what_has_no_numbers_when_it_is_absent():
    pipeline = Pipeline(tiny_model({"text": READING}))
    metrics = evaluate(
        pipeline, [Example("a", {"text": "guten tag"}, (TextTask(("x y",)),))], SHORT, information=True
    ).metrics
    empty = evaluate(pipeline, [Example("a", {"text": ""}, (TextTask(("x y",)),))], SHORT, information=True).metrics
    blank = metrics["bits a word of captions: blank picture"]
    assert blank == pytest.approx(empty["bits a word of captions: picture"], rel=1e-6)
    assert blank != pytest.approx(metrics["bits a word of captions: picture"], rel=1e-6)
    counting = Pipeline(model_asked("prompt"))
    encoder = counting.model.encoder("numbers")
    encoder.prepare = lambda raw: {"codes": torch.tensor([1, 2]), "mask": torch.tensor([True, True])}
    encoder.forward = lambda batch: Features(batch["codes"][..., None].float().expand(-1, -1, 8), batch["mask"])
    found = evaluate(counting, [example(0, TextTask(("x",)))], SHORT, information=True).metrics
    assert found["bits a word of captions: blank picture"] == found["bits a word of captions: no picture"]


def test_padding_and_batches_change_nothing_but_the_last_digits():
    pipeline = Pipeline(tiny_model())
    examples = [example(i, TextTask(("x" * (1 + i % 5),)), TextTask(("y",), "q" * (1 + i % 4))) for i in range(7)]
    options = GenerationConfig(max_new_tokens=3)
    alone, together = (evaluate(pipeline, examples, options, batch_size=size) for size in (1, 7))
    assert [t.prediction for t in alone.predictions] == [t.prediction for t in together.predictions]
    assert alone.metrics["loss"] == pytest.approx(together.metrics["loss"], rel=1e-5)


def test_bad_examples_are_counted_named_and_passed_over():
    examples = [example(i, TextTask(("a",)), numbers="no list" if i in (1, 6) else [1.0]) for i in range(7)]
    pipeline = Refusing({None: "a"})
    report = evaluate(pipeline, examples, batch_size=3)
    assert report.metrics["captions"] == 5
    assert [sentence.split(":")[1] for sentence in report.skipped] == ["1", "6"]
    assert [text.id for text in report.predictions] == ["e0", "e2", "e3", "e4", "e5"]


def test_too_many_bad_examples_end_it():
    examples = [example(i, TextTask(("a",)), numbers="x") for i in range(11)] + [example(11, TextTask(("a",)))]
    with pytest.raises(DataError, match="11 of 12 examples cannot be read; the first: list:0"):
        evaluate(Refusing({None: "a"}), examples)
    assert len(evaluate(Refusing({None: "a"}), examples, max_skip_fraction=1.0).skipped) == 11


class Refusing(Parrot):
    """Its encoder takes only lists."""

    def __init__(self, table: dict[str | None, str]) -> None:
        super().__init__(table)
        encoder = self.model.encoder("numbers")
        prepare = encoder.prepare

        def strict(raw: Any) -> Any:
            if not isinstance(raw, list):
                raise DataError(f"{raw!r} is no list.")
            return prepare(raw)

        encoder.prepare = strict


def test_a_question_too_long_for_the_model_is_one_bad_example():
    examples = [example(0, TextTask(("a",), "why " * 80)), example(1, TextTask(("a",), "ok?"))]
    report = evaluate(Parrot({"ok?": "a"}), examples)
    assert report.metrics["exact match"] == 1.0
    assert "tokens" in report.skipped[0]


def test_few_texts_have_the_metrics_they_allow():
    one = evaluate(Parrot({None: "a"}), [example(0, TextTask(("a",)))])
    assert "CIDEr" not in one.metrics
    assert one.metrics["captions"] == 1
    assert math.isfinite(one.metrics["loss"])
    nobody_knows = evaluate(Parrot({"q?": "a"}), [example(0, TextTask((), "q?")), example(1, TextTask((), "q?"))])
    assert nobody_knows.metrics == {"captions": 0, "questions": 0}
    assert [text.prediction for text in nobody_knows.predictions] == ["a", "a"]
    assert evaluate(Parrot({}), []).metrics == {"captions": 0, "questions": 0}


def test_it_stops_between_two_batches_when_asked():
    done: list[int] = []
    examples = [example(i, TextTask(("a",))) for i in range(10)]
    report = evaluate(Parrot({None: "a"}), examples, batch_size=2, progress=done.append, stop=lambda: len(done) == 3)
    assert done == [2, 2, 2]
    assert report.metrics["captions"] == 6


def test_the_model_is_left_in_eval_mode_and_its_source_may_be_absent():
    pipeline = Pipeline(tiny_model({"numbers": "mmx.testing:ToyEncoder", "more": "mmx.testing:ToyEncoder"}))
    examples = [
        Example("a", {"more": [1.0]}, (TextTask(("x",)),)),
        Example("b", {"numbers": [1.0], "other": "?"}, (TextTask(("x",)),)),
        Example("c", {}, (TextTask(("x",)),)),
    ]
    report = evaluate(pipeline, examples, pipeline.generation_config({"max_new_tokens": 2}))
    assert [text.id for text in report.predictions] == ["a", "b", "c"]
    assert not pipeline.model.training


def test_reports_are_written_whole(tmp_path, monkeypatch):
    report = evaluate(Parrot({None: "é"}), [example(0, TextTask(("a", "b"))), example(1, TextTask(("c",)))])
    report.save(tmp_path / "deep" / "er")
    folder = tmp_path / "deep" / "er"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "texts.jsonl"]
    assert json.loads((folder / "metrics.json").read_text()) == report.metrics
    lines = [json.loads(line) for line in (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"id": "e0", "question": None, "said": "é", "score": -1.0, "target_modules": ["a", "b"]}
    before = (folder / "metrics.json").read_bytes()
    monkeypatch.setattr("mmx.io.atomic.os.replace", full_disk)
    with pytest.raises(DataError, match="cannot be written: No space left"):
        EvaluationReport({"x": 1.0}, []).save(folder)
    assert (folder / "metrics.json").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "texts.jsonl"]


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")
