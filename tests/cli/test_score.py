"""The commands score and compare: output, joins that fail, files, exit codes, and time."""

import json
from random import Random

import pytest
from cli_cases import draw, write_jsonl
from clip_cases import write_clip

WORDS = ["a", "the", "dog", "cat", "runs", "sits", "on", "grass", "sand", "red", "two", "and", "ball", "with", "man"]


def sentence(rng):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 12)))


def altered(rng, text, fraction):
    return " ".join(rng.choice(WORDS) if rng.random() < fraction else word for word in text.split())


@pytest.fixture
def data(tmp_path):
    """COCO captions of 60 images, and two results: one with fewer wrong words."""
    rng = Random(0)
    captions = {number: [sentence(rng) for _ in range(3)] for number in range(60)}
    annotations = [{"image_id": key, "caption": text} for key, texts in captions.items() for text in texts]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in captions]
    document = {"images": images, "annotations": annotations}
    (tmp_path / "captions.json").write_text(json.dumps(document))
    for name, fraction in (("bad", 0.6), ("good", 0.2)):
        rows = [{"image_id": key, "caption": altered(rng, texts[0], fraction)} for key, texts in captions.items()]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def test_score_prints_metrics_with_intervals(mmx, data) -> None:
    words = ("score", data / "good.json", "--data", data / "captions.json")
    ran = mmx(*words, "--json")
    assert (ran.code, ran.err) == (0, "")
    (document,) = ran.rows
    assert list(document["metrics"]) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert all(0 < score["low"] < score["value"] < score["high"] for score in document["metrics"].values())
    assert {name: document[name] for name in ("captions", "answers", "resamples", "seed")} == {
        "captions": 60,
        "answers": 0,
        "resamples": 1000,
        "seed": 0,
    }
    table = mmx(*words).lines
    assert [line.rsplit("  ", 2)[0].strip() for line in table[:6]] == list(document["metrics"])
    assert f"{document['metrics']['CIDEr']['value']:.4f}" in table[5]
    assert table[-1].split() == ["captions", "60"]


def test_predictions_of_eval_have_the_scores_that_eval_prints(mmx, tmp_path, model, images) -> None:
    left = [0, 0, 0.5, 1]
    rows: list[dict] = [{"image": str(image), "captions": ["a b", "b c"]} for image in images]
    rows += [{"image": str(image), "question": "what?", "answers": ["a", "b"]} for image in images]
    rows += [{"image": str(image), "question": "what?", "box": left, "answer": "c"} for image in images]
    data = write_jsonl(tmp_path / "list.jsonl", *rows)
    (evaluated,) = mmx("eval", model, "--data", data, "--out-dir", tmp_path / "results", "--json").rows
    ran = mmx("score", tmp_path / "results" / "predictions.jsonl", "--data", data, "--json")
    (document,) = ran.rows
    assert (ran.code, ran.err, document["captions"], document["answers"]) == (0, "", 5, 10)
    values = {name: score["value"] for name, score in document["metrics"].items()}
    del values["ANLS"]
    assert len(values) == 8
    assert values == pytest.approx({name: evaluated[name] for name in values}, abs=1e-12)


def test_all_kinds_of_files_have_equal_scores(mmx, data) -> None:
    rows = json.loads((data / "good.json").read_text())
    write_jsonl(data / "rows.jsonl", *({"image": f"{row['image_id']}.jpg", "caption": row["caption"]} for row in rows))
    lines = ["file_name,caption", *(f"{row['image_id']}.jpg,{row['caption']}" for row in rows)]
    (data / "rows.csv").write_text("\n".join(lines))
    expected = mmx("score", data / "good.json", "--data", data / "captions.json").out
    for name in ("rows.jsonl", "rows.csv"):
        ran = mmx("score", data / name, "--data", data / "captions.json")
        assert (ran.code, ran.out) == (0, expected)
        assert "60 of 60" in ran.err, "joined by the names of files"


def test_what_does_not_join_is_named_and_the_exit_code_is_1(mmx, data) -> None:
    rows = json.loads((data / "good.json").read_text())
    (data / "part.json").write_text(json.dumps([*rows[:50], {"image_id": 777, "caption": "a dog"}]))
    ran = mmx("score", data / "part.json", "--data", data / "captions.json", "--json")
    (document,) = ran.rows
    assert ran.code == 1
    assert (document["captions"], document["predictions_not_scored"], document["references_not_scored"]) == (50, 1, 10)
    assert len(ran.errors) == 2
    assert "row 50" in ran.errors[0] and "50" in ran.errors[1]


def test_selected_metrics_seed_and_resamples(mmx, data) -> None:
    words = ("score", data / "good.json", "--data", data / "captions.json", "--metrics", "CIDEr,BLEU-4", "--json")
    (first,) = mmx(*words).rows
    (second,) = mmx(*words, "--seed", 1).rows
    (bare,) = mmx(*words, "--resamples", 0).rows
    assert list(first["metrics"]) == ["BLEU-4", "CIDEr"]
    assert first["metrics"]["CIDEr"]["value"] == second["metrics"]["CIDEr"]["value"]
    assert first["metrics"]["CIDEr"]["low"] != second["metrics"]["CIDEr"]["low"]
    assert bare["metrics"]["CIDEr"] == {"value": first["metrics"]["CIDEr"]["value"], "low": None, "high": None}


def test_out_dir_has_the_document_that_json_prints(mmx, data) -> None:
    words = ("score", data / "good.json", "--data", data / "captions.json")
    ran = mmx(*words, "--out-dir", data / "new")
    assert ran.code == 0
    assert str(data / "new" / "scores.json") in ran.err
    assert json.loads((data / "new" / "scores.json").read_text()) == mmx(*words, "--json").rows[0]


def test_answers_of_vqa_results(mmx, tmp_path) -> None:
    questions = [{"question_id": n, "image_id": n // 3, "question": f"what is {n}?"} for n in range(30)]
    answers = [{"question_id": n, "answers": [{"answer": "yes"}] * 5 + [{"answer": "no"}] * 5} for n in range(30)]
    results = [{"question_id": n, "answer": "yes" if n % 2 else "blue"} for n in range(30)]
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": answers}))
    (tmp_path / "results.json").write_text(json.dumps(results))
    ran = mmx(
        "score",
        tmp_path / "results.json",
        "annotations=annotations.json",
        "--data",
        tmp_path / "questions.json",
        "--json",
    )
    (document,) = ran.rows
    values = {name: score["value"] for name, score in document["metrics"].items()}
    assert ran.code == 0
    assert values == {"exact match": 0.5, "VQA accuracy": 0.5, "ANLS": 0.5}
    assert (document["captions"], document["answers"]) == (0, 30)


def test_compare_finds_the_better_result(mmx, data) -> None:
    words = ("compare", data / "bad.json", data / "good.json", "--data", data / "captions.json")
    ran = mmx(*words, "--json")
    (document,) = ran.rows
    assert (ran.code, ran.err, document["texts"]) == (0, "", 60)
    for row in document["metrics"].values():
        assert row["difference"] == pytest.approx(row["second"] - row["first"])
        assert 0 < row["low"] < row["difference"] < row["high"]
        assert row["p_value"] == pytest.approx(2 / 1001)
    (scored,) = mmx("score", data / "good.json", "--data", data / "captions.json", "--json").rows
    assert document["metrics"]["CIDEr"]["second"] == scored["metrics"]["CIDEr"]["value"]
    table = mmx(*words).lines
    assert len(table) == 8
    assert table[-1].split() == ["texts", "60"]


def test_compare_uses_the_references_that_both_have_texts_for(mmx, data) -> None:
    rows = json.loads((data / "good.json").read_text())
    (data / "first.json").write_text(json.dumps(rows[:40]))
    (data / "last.json").write_text(json.dumps(rows[20:]))
    ran = mmx("compare", data / "first.json", data / "last.json", "--data", data / "captions.json", "--json")
    (document,) = ran.rows
    assert (ran.code, document["texts"]) == (1, 20)
    assert all(row["difference"] == 0 and row["p_value"] == 1 for row in document["metrics"].values())
    (data / "last.json").write_text(json.dumps(rows[40:]))
    ran = mmx("compare", data / "first.json", data / "last.json", "--data", data / "captions.json")
    assert (ran.code, ran.error.code) == (2, "compare.nothing_common")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), "score.no_data"),
        (("--data", "captions.json", "--metrics", "CIDEr,"), "option.metrics"),
        (("--data", "captions.json", "--metrics", "METEOR"), "score.unknown_metric"),
        (("--data", "captions.json", "--out-dir", ""), "option.out_dir"),
        (("--clip", "none", "--metrics", "CIDEr"), "option.unused"),
        (("--clip", "none", "--objects", "objects.txt"), "option.unused"),
        (("--data", "captions.json", "--instances", "instances.json"), "option.unused"),
        (("--data", "captions.json", "--objects", "none.txt"), "data.missing"),
        (("--data", "captions.json", "--device", "tpu"), "option.device"),
        (("--data", "none.json"), "data.missing"),
    ],
)
def test_wrong_usage_is_refused(mmx, data, monkeypatch, words, code) -> None:
    monkeypatch.chdir(data)
    assert mmx("score", "good.json", *words).refused().code == code


def test_clipscore_without_references(mmx, tmp_path) -> None:
    clip_folder = write_clip(tmp_path / "clip")
    rows = [{"image": str(draw(tmp_path / f"{number}.png", number)), "caption": "a dog"} for number in range(4)]
    rows.append({"image": str(tmp_path / "none.png"), "caption": "a cat"})
    ran = mmx("score", write_jsonl(tmp_path / "rows.jsonl", *rows), "--clip", clip_folder, "--json")
    (document,) = ran.rows
    assert (ran.code, list(document["metrics"]), len(ran.errors)) == (1, ["CLIPScore"], 1)
    data = write_jsonl(tmp_path / "list.jsonl", *rows[:4])
    ran = mmx("compare", data, data, "--data", data, "--clip", clip_folder, "--json")
    (document,) = ran.rows
    assert ran.code == 0
    assert {"CIDEr", "CLIPScore", "RefCLIPScore"} <= document["metrics"].keys()


def test_captions_without_references_are_compared_image_by_image(mmx, tmp_path) -> None:
    clip_folder = write_clip(tmp_path / "clip")
    rows = [{"image": str(draw(tmp_path / f"{number}.png", number)), "caption": "a dog"} for number in range(4)]
    others = [{**row, "caption": "a cat"} for row in rows]
    first = write_jsonl(tmp_path / "first.jsonl", *rows)
    words = ("--clip", clip_folder, "--json", "--resamples", "50")
    ran = mmx("compare", first, write_jsonl(tmp_path / "reversed.jsonl", *rows[::-1]), *words)
    (document,) = ran.rows
    score = document["metrics"]["CLIPScore"]
    assert (ran.code, document["texts"]) == (0, 4)
    assert (score["low"], score["high"], score["p_value"]) == pytest.approx((0, 0, 1), abs=1e-6)
    ran = mmx("compare", first, write_jsonl(tmp_path / "others.jsonl", *others[2:], others[0]), *words)
    (document,) = ran.rows
    assert (ran.code, document["texts"], len(ran.errors)) == (1, 3, 1)


def test_chair_of_two_results(mmx, data) -> None:
    (data / "objects.txt").write_text("dog\ncat\nperson, man\nball\n")
    words = ("--data", data / "captions.json", "--objects", data / "objects.txt", "--metrics", "ROUGE-L", "--json")
    (scored,) = mmx("score", data / "good.json", *words).rows
    assert list(scored["metrics"]) == ["ROUGE-L", "CHAIRi", "CHAIRs"]
    assert 0 <= scored["metrics"]["CHAIRi"]["low"] < scored["metrics"]["CHAIRi"]["value"] < 0.3
    (compared,) = mmx("compare", data / "bad.json", data / "good.json", *words).rows
    assert compared["metrics"]["CHAIRs"]["difference"] < 0
    categories = [{"id": n, "name": name} for n, name in enumerate(["dog", "cat", "person", "ball"])]
    annotations = [{"image_id": image, "category_id": n} for image in range(60) for n in range(4)]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(60)]
    document = {"categories": categories, "images": images, "annotations": annotations}
    (data / "instances.json").write_text(json.dumps(document))
    (everything,) = mmx("score", data / "good.json", *words, "--instances", data / "instances.json").rows
    assert everything["metrics"]["CHAIRi"]["value"] == 0


def test_five_thousand_rows_are_scored(mmx, tmp_path) -> None:
    rng = Random(0)
    captions = [[sentence(rng) for _ in range(5)] for _ in range(5000)]
    data = write_jsonl(tmp_path / "list.jsonl", *({"image": f"{n}.jpg", "captions": c} for n, c in enumerate(captions)))
    rows = [{"image": f"{n}.jpg", "caption": altered(rng, c[0], 0.3)} for n, c in enumerate(captions)]
    ran = mmx("score", write_jsonl(tmp_path / "rows.jsonl", *rows), "--data", data)
    assert ran.code == 0
