"""Evaluation: metrics of known texts, equal results for any number of processes, and atomic reports."""

import json
import math

import pytest
import torch

from mmx.config.schema import GenerationConfig
from mmx.data.examples import Example, TextTask
from mmx.errors import DataError
from mmx.evaluation.evaluate import EvaluationOptions, ProcessGroup, evaluate, skip_limit
from mmx.evaluation.report import EvaluationReport
from mmx.inference.outputs import GeneratedText
from mmx.inference.pipeline import Pipeline
from mmx.testing import tiny_model

THREE_TOKENS = GenerationConfig(max_new_tokens=3)


class FixedTexts(Pipeline):
    """Gives every question a fixed answer."""

    def __init__(self, texts):
        super().__init__(tiny_model())
        self.texts = texts

    def generate_batch(self, memory, questions, options, boxes=()):
        return [[[GeneratedText(self.texts[question], -1.0, ())] for question in row] for row in questions]


class ListsOnly(FixedTexts):
    """Its encoder accepts only lists."""

    def __init__(self, texts):
        super().__init__(texts)
        encoder = self.model.encoder("numbers")
        prepare = encoder.prepare

        def strict_prepare(raw):
            if not isinstance(raw, list):
                raise DataError(f"{raw!r} is not a list.")
            return prepare(raw)

        encoder.prepare = strict_prepare


def example(number, *tasks, **sources):
    return Example(f"e{number}", {"numbers": [float(number), 1.0]} | sources, tasks, f"list:{number}")


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(tiny_model())


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_known_texts():
    examples = [
        example(0, TextTask(("a dog runs in the park",)), TextTask(("red",), "color?", "color")),
        example(1, TextTask(("two cats", "a dog runs in the park")), TextTask(("Blue", "blue"), "sky?", "color")),
        example(2, TextTask(("yes",) * 9 + ("no",), "so?", "yes/no"), TextTask((), "open?")),
    ]
    texts = {None: "a dog runs in the park", "color?": "red", "sky?": "green", "so?": "yes", "open?": "x"}
    report = evaluate(FixedTexts(texts), examples)
    metrics = report.metrics
    assert (metrics["captions"], metrics["questions"]) == (2, 3)
    assert metrics["BLEU-4"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["ROUGE-L"] == pytest.approx(1.0)
    assert metrics["exact match"] == pytest.approx(2 / 3)
    assert metrics["exact match, color"] == 0.5
    assert metrics["exact match, yes/no"] == 1.0
    assert metrics["most frequent answer"] == 0.0, "every question occurs once"
    assert metrics["VQA accuracy"] == pytest.approx(1 / 3), "0 for questions with one answer"
    assert [text.key for text in report.predictions] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert report.predictions[-1].prediction == "x"
    assert report.predictions[1].question_type == "color"


def test_novel_captions_are_counted_against_training_captions():
    examples = [example(i, TextTask(("a",))) for i in range(2)]
    known = EvaluationOptions(training_captions=["A dog."])
    assert evaluate(FixedTexts({None: "a dog"}), examples, known).metrics["novel"] == 0
    assert evaluate(FixedTexts({None: "a cat"}), examples, known).metrics["novel"] == 2
    assert "novel" not in evaluate(FixedTexts({None: "a cat"}), examples).metrics


def test_the_loss_is_the_mean_over_all_target_tokens(pipeline):
    examples = [example(0, TextTask(("A dog .", "bird"))), example(1, TextTask(("no",), "is it?"))]
    targets = [(0, None, "A dog ."), (0, None, "bird"), (1, "is it?", "no")]
    model = pipeline.model
    total = 0.0
    count = 0
    for number, question, target in targets:
        prompt = model.tokenizer.encode_prompt(model.prompt(question))
        labels = [*model.tokenizer.encode(target), model.tokenizer.eos_token_id]
        tokens = torch.tensor([[[*prompt, *labels[:-1]]]])
        with torch.inference_mode():
            logits = model.decoder(tokens, pipeline.encode(numbers=[[float(number), 1.0]]))[0, 0]
        logprobs = logits[len(prompt) - 1 :].log_softmax(-1)
        total -= sum(float(logprobs[position, token]) for position, token in enumerate(labels))
        count += len(labels)
    report = evaluate(pipeline, examples, EvaluationOptions(GenerationConfig(max_new_tokens=2)))
    assert report.metrics["loss"] == pytest.approx(total / count, rel=1e-5)


def test_targets_that_exceed_the_positions_are_cut_counted_and_named(pipeline):
    positions = pipeline.model.config.decoder.max_position_embeddings
    fitting = "x" * (positions - 3)  # one byte is a space, and the prompt has two tokens
    examples = [example(0, TextTask(("a", "b"))), example(1, TextTask((fitting, fitting + "x"))), example(2)]
    report = evaluate(pipeline, examples, EvaluationOptions(GenerationConfig(max_new_tokens=2)))
    assert report.metrics["cut targets"] == 1
    assert report.cut == ["list:1"]
    assert report.cut_sentence().startswith("1 of 4 ")
    whole = evaluate(pipeline, examples[:1], EvaluationOptions(GenerationConfig(max_new_tokens=2)))
    assert "cut targets" not in whole.metrics
    assert whole.cut_sentence() == ""


def test_few_texts_have_fewer_metrics():
    one = evaluate(FixedTexts({None: "a"}), [example(0, TextTask(("a",)))])
    assert "CIDEr" not in one.metrics
    assert one.metrics["captions"] == 1
    assert math.isfinite(one.metrics["loss"])
    questions = [example(0, TextTask((), "q?")), example(1, TextTask((), "q?"))]
    without_answers = evaluate(FixedTexts({"q?": "a"}), questions)
    assert without_answers.metrics == {"captions": 0, "questions": 0}
    assert [text.prediction for text in without_answers.predictions] == ["a", "a"]
    assert evaluate(FixedTexts({}), []).metrics == {"captions": 0, "questions": 0}


def test_batch_size_and_padding_change_no_text_and_the_loss_only_by_rounding(pipeline):
    examples = [example(i, TextTask(("x" * (1 + i % 5),)), TextTask(("y",), "q" * (1 + i % 4))) for i in range(7)]
    alone = evaluate(pipeline, examples, EvaluationOptions(THREE_TOKENS, batch_size=1))
    together = evaluate(pipeline, examples, EvaluationOptions(THREE_TOKENS, batch_size=7))
    assert [text.prediction for text in alone.predictions] == [text.prediction for text in together.predictions]
    assert alone.metrics["loss"] == pytest.approx(together.metrics["loss"], rel=1e-5)


def test_the_model_stays_in_eval_mode_and_a_source_may_be_absent():
    pipeline = Pipeline(tiny_model({"numbers": "mmx.testing:ToyEncoder", "more": "mmx.testing:ToyEncoder"}))
    examples = [
        Example("a", {"more": [1.0]}, (TextTask(("x",)),)),
        Example("b", {"numbers": [1.0], "other": "?"}, (TextTask(("x",)),)),
        Example("c", {}, (TextTask(("x",)),)),
    ]
    report = evaluate(pipeline, examples, EvaluationOptions(GenerationConfig(max_new_tokens=2)))
    assert [text.id for text in report.predictions] == ["a", "b", "c"]
    assert not pipeline.model.training


def test_an_example_without_a_source_of_the_model_is_refused(pipeline):
    misspelt = Example("a", {"number": [1.0]}, (TextTask(("x",)),), "list:1")
    for wrong in (misspelt, Example("b", {"numbers": None}, (TextTask(("x",)),), "list:1")):
        with pytest.raises(DataError) as error:
            evaluate(pipeline, [example(0, TextTask(("x",))), wrong], EvaluationOptions(THREE_TOKENS))
        assert (error.value.code, error.value.details["origin"]) == ("data.unknown_source", "list:1")


# ---- processes -------------------------------------------------------------------------------------------------------


def gathered(results):
    """A `gather` that returns the results of all processes."""
    return lambda items: results


def evaluate_in_processes(pipeline, examples, options, world_size):
    """The report of process 0, with the results that the other processes would send."""
    results = []

    def collect(items):
        results.extend(items)
        return items

    for rank in range(world_size):
        evaluate(pipeline, examples, options, ProcessGroup(rank, world_size, collect))
    return evaluate(pipeline, examples, options, ProcessGroup(0, world_size, gathered(results)))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_results_are_equal_for_any_number_of_processes(pipeline, count):
    examples = []
    for i in range(count):
        questions = [TextTask((f"{i}",), "which?", "k")] * (i % 3)
        examples.append(example(i, TextTask((f"number {i}", "some")), *questions))
    options = EvaluationOptions(THREE_TOKENS, batch_size=2)
    expected = evaluate(pipeline, examples, options)
    for world_size in (2, 3):
        found = evaluate_in_processes(pipeline, examples, options, world_size)
        assert found.metrics == expected.metrics
        assert found.predictions == expected.predictions
        assert len({text.key for text in found.predictions}) == len(found.predictions)


def test_evaluation_stops_between_two_batches():
    done = []
    examples = [example(i, TextTask(("a",))) for i in range(10)]
    report = evaluate(
        FixedTexts({None: "a"}),
        examples,
        EvaluationOptions(batch_size=2),
        progress=done.append,
        should_stop=lambda: len(done) == 3,
    )
    assert done == [2, 2, 2]
    assert report.metrics["captions"] == 6


# ---- unreadable examples ---------------------------------------------------------------------------------------------


def test_unreadable_examples_are_skipped_and_named():
    examples = [example(i, TextTask(("a",)), numbers="no list" if i in (1, 6) else [1.0]) for i in range(20)]
    report = evaluate(ListsOnly({None: "a"}), examples, EvaluationOptions(batch_size=3))
    assert report.metrics["captions"] == 18
    assert [sentence.split(":")[1] for sentence in report.skipped] == ["1", "6"]
    assert [text.id for text in report.predictions] == [f"e{i}" for i in range(20) if i not in (1, 6)]


def test_too_many_unreadable_examples_are_an_error():
    examples = [example(i, TextTask(("a",)), numbers="x") for i in range(11)] + [example(11, TextTask(("a",)))]
    with pytest.raises(DataError) as error:
        evaluate(ListsOnly({None: "a"}), examples)
    assert error.value.code == "evaluation.too_many_skipped"
    details = error.value.details
    assert (details["skipped"], details["examples"], details["limit"]) == (11, 12, 1)
    assert [reason.split(":")[1] for reason in details["reasons"]] == [str(i) for i in range(11)]
    assert all(f"list:{i}" in str(error.value) for i in range(3))
    tolerant = EvaluationOptions(max_skip_fraction=1.0)
    assert len(evaluate(ListsOnly({None: "a"}), examples, tolerant).skipped) == 11


@pytest.mark.parametrize(
    ("num_examples", "fraction", "limit"),
    [(1, 0.0, 0), (9, 0.001, 0), (10, 0.001, 1), (29, 0.0, 2), (100, 0.0, 10), (5000, 0.001, 10), (20_000, 0.001, 20)],
)
def test_ten_examples_and_a_tenth_of_a_small_set_may_be_unreadable(num_examples, fraction, limit):
    assert skip_limit(num_examples, fraction) == limit


@pytest.mark.parametrize(("bad", "accepted"), [(2, True), (3, False)])
def test_at_most_a_tenth_of_a_small_set_may_be_unreadable(bad, accepted):
    examples = [example(i, TextTask(("a",)), numbers="x" if i < bad else [1.0]) for i in range(20)]
    if accepted:
        assert len(evaluate(ListsOnly({None: "a"}), examples).skipped) == bad
        return
    with pytest.raises(DataError) as error:
        evaluate(ListsOnly({None: "a"}), examples)
    assert (error.value.details["skipped"], error.value.details["limit"]) == (3, 2)


def test_an_example_that_cannot_be_loaded_is_unreadable():
    class Lazy(list):
        def __getitem__(self, position):
            if position == 3:
                raise DataError("list:3 is damaged.")
            return super().__getitem__(position)

    examples = Lazy(example(i, TextTask(("a",))) for i in range(10))
    report = evaluate(FixedTexts({None: "a"}), examples)
    assert report.metrics["captions"] == 9
    assert report.skipped == ["example 3: list:3 is damaged."]


def test_a_question_that_is_too_long_is_an_unreadable_example():
    examples = [example(0, TextTask(("a",), "why " * 80)), *(example(i, TextTask(("a",), "ok?")) for i in range(1, 10))]
    report = evaluate(FixedTexts({"ok?": "a"}), examples)
    assert report.metrics["exact match"] == 1.0
    assert len(report.skipped) == 1
    assert report.skipped[0].startswith("list:0")


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_reports_are_written_atomically(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    examples = [example(0, TextTask(("a", "b"))), example(1, TextTask(("c",)))]
    report = evaluate(FixedTexts({None: "é"}), examples)
    report.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "predictions.jsonl"]
    assert json.loads((folder / "metrics.json").read_text()) == report.metrics
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "id": "e0",
        "question": None,
        "question_type": None,
        "prediction": "é",
        "score": -1.0,
        "targets": ["a", "b"],
    }
    before = (folder / "metrics.json").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmx.io.atomic.os.replace", full_disk)
    with pytest.raises(DataError) as error:
        EvaluationReport({"x": 1.0}, []).save(folder)
    assert error.value.code == "evaluation.write"
    assert error.value.details["path"] == str(folder)
    assert (folder / "metrics.json").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "predictions.jsonl"]
