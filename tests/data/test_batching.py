"""Batches: which sample comes when, what happens to one that cannot be read, and how texts become tensors."""

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmx.config.schema import AugmentationConfig, DataConfig, SourceConfig
from mmx.data.batching import (
    IGNORE_INDEX,
    MAX_SKIPS_PER_SAMPLE,
    ExampleSchedule,
    PositionSampler,
    TrainingDataset,
    pad_texts,
    sample_texts,
    select_label_positions,
)
from mmx.data.examples import Example, TextTask
from mmx.errors import DataError
from mmx.testing import tiny_model

# ---- which sample comes when -------------------------------------------------------------------------------------


def stream(schedule: ExampleSchedule, batch: int, world: int, first: int, batches: int) -> list[list[tuple[int, int]]]:
    """The (data set, example) pairs that each rank meets."""
    ranks = [PositionSampler(batch, first, batches, rank, world) for rank in range(world)]
    return [[schedule[position] for numbers in rank for position in numbers] for rank in ranks]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    world=st.integers(1, 3),
    batch=st.integers(1, 9),
    stop=st.integers(0, 40),
)
@settings(max_examples=50, deadline=None)
def test_every_epoch_sees_every_sample_once_with_and_without_resume(sizes, seed, world, batch, stop):
    everything = {(d, e) for d, size in enumerate(sizes) for e in range(size)}
    schedule, epochs = ExampleSchedule(sizes, [1.0] * len(sizes), seed), 3
    batches = -(-epochs * len(everything) // (batch * world))
    stop = min(stop, batches)
    before = stream(schedule, batch, world, 0, stop)
    after = stream(ExampleSchedule(sizes, [1.0] * len(sizes), seed), batch, world, stop * batch * world, batches - stop)
    ranks = [first + second for first, second in zip(before, after, strict=True)]
    seen = [pair for number in range(batches) for rank in ranks for pair in rank[number * batch : (number + 1) * batch]]
    assert ranks == stream(schedule, batch, world, 0, batches)
    for epoch in range(epochs):
        part = seen[epoch * len(everything) : (epoch + 1) * len(everything)]
        assert len(part) == len(everything)
        assert set(part) == everything


@given(st.integers(1, 5), st.integers(0, 100), st.integers(0, 20), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_shards_are_disjoint_and_complete(batch, first, count, world):
    shards = [[p for numbers in PositionSampler(batch, first, count, r, world) for p in numbers] for r in range(world)]
    assert sorted(p for shard in shards for p in shard) == list(range(first, first + batch * count * world))
    assert [len(PositionSampler(batch, first, count, r, world)) for r in range(world)] == [count] * world


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 2.5)), min_size=1, max_size=3), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_weights_are_honoured_over_the_epochs(sets, seed):
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    schedule, epochs = ExampleSchedule(sizes, weights, seed), 12
    counts = Counter(pair for number in range(epochs) for pair in schedule.epoch(number))
    for dataset, (size, weight) in enumerate(sets):
        taken = [counts[dataset, example] for example in range(size)]
        assert sum(taken) == epochs * max(1, round(weight * size))
        assert max(taken) - min(taken) <= 1  # each of its examples equally often


@given(st.integers(0, 10**9), st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_the_schedule_is_a_pure_function_of_the_seed(seed, position):
    one, other = ExampleSchedule([7, 4], [1.0, 0.5], seed), ExampleSchedule([7, 4], [1.0, 0.5], seed)
    other[3 * position]  # what was asked before makes no difference
    assert one[position] == other[position]


def test_other_seeds_and_epochs_are_other_orders():
    orders = {tuple(ExampleSchedule([50], [1.0], seed).epoch(number)) for seed in range(5) for number in range(4)}
    assert len(orders) == 20


# ---- texts -------------------------------------------------------------------------------------------------------


def test_pad_texts_by_hand():
    texts = [[([1, 2], [5, 6, 9]), ([3], [9])], [([4], [7, 9])]]
    tokens, mask, targets = pad_texts(texts, 2, pad=0)
    assert tokens.tolist() == [[[1, 2, 5, 6], [3, 0, 0, 0]], [[4, 7, 0, 0], [0, 0, 0, 0]]]
    assert mask.long().tolist() == [[[1, 1, 1, 1], [1, 0, 0, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]]]
    n = IGNORE_INDEX
    assert targets.tolist() == [[[n, 5, 6, 9], [9, n, n, n]], [[7, 9, n, n], [n, n, n, n]]]
    assert [t.shape for t in pad_texts(texts, 3, 0, multiple=8)] == [(2, 3, 8)] * 3


def test_pick_wanted_by_hand():
    targets = torch.tensor([[[IGNORE_INDEX, 5], [6, IGNORE_INDEX]]])
    wanted, labels = select_label_positions(targets, 1)
    assert (wanted.tolist(), labels.tolist()) == ([1, 2], [5, 6])
    wanted, labels = select_label_positions(targets, 4)
    assert (wanted.tolist(), labels.tolist()) == ([1, 2, 0, 0], [5, 6, IGNORE_INDEX, IGNORE_INDEX])


@given(st.integers(0, 9), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_choose_texts_repeats_none_and_takes_what_there_is(streams, targets, seed):
    turns = [TextTask(tuple(f"{i}-{j}" for j in range(count)), f"q{i}") for i, count in enumerate(targets)]
    chosen = sample_texts(turns, streams, Random(seed))
    assert len(chosen) == min(streams, sum(targets))
    assert len(set(chosen)) == len(chosen)
    assert all(target.startswith(question[1:]) for question, target, _ in chosen)
    assert chosen == sample_texts(turns, streams, Random(seed))


# ---- samples -----------------------------------------------------------------------------------------------------


def numbers(count: int, bad: tuple[int, ...] = ()) -> list[Example]:
    """Examples of numbers; those numbered in `bad` have nothing to learn from."""
    return [
        Example(
            f"e{i}", {"numbers": [float(i)]}, () if i in bad else (TextTask((f"said {i}", f"also {i}")),), f"list:{i}"
        )
        for i in range(count)
    ]


def training_set(sets: Any, model: Any = None, **facts: Any) -> TrainingDataset:
    options = {"seed": 3, "texts_per_image": 2, "max_target_length": 40} | facts
    pairs = [(DataConfig(path="x"), examples) for examples in sets]
    return TrainingDataset(model or tiny_model(), pairs, **options)


def test_a_bad_sample_is_named_and_its_neighbour_taken_every_time_alike():
    first, second = (training_set([numbers(9, bad=(4, 5))]) for _ in range(2))
    for position in range(18):
        one, other = first[position], second[position]
        _, index = first.schedule[position]
        assert one.id == other.id == {4: "e6", 5: "e6"}.get(index, f"e{index}")
        assert one.texts == other.texts
        assert len(one.skipped) == {4: 2, 5: 1}.get(index, 0)
        assert all(
            f"list:{4 + (2 - len(one.skipped)) + n} has nothing to learn" in s for n, s in enumerate(one.skipped)
        )


def test_corrupt_pictures_are_named(tmp_path):
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    examples = [Example(n, {"image": str(tmp_path / f"{n}.png")}, (TextTask(("x",)),)) for n in "abc"]
    data = training_set([examples], resnet())
    taken = [data[position] for position in range(3)]
    assert sorted(sample.id for sample in taken) == ["a", "c", "c"]
    (sentence,) = [sentence for sample in taken for sentence in sample.skipped]
    assert "b.png" in sentence


def test_too_many_bad_samples_in_a_row_end_it():
    data = training_set([numbers(30, bad=tuple(range(25)))])
    start = next(position for position in range(30) if data.schedule[position][1] == 2)
    with pytest.raises(DataError, match=f"{MAX_SKIPS_PER_SAMPLE} examples in a row cannot be read; the last: list:11 "):
        data[start]
    assert data[next(p for p in range(30) if data.schedule[p][1] == 16)].id == "e25"


def test_texts_are_tidied_cut_and_ended():
    turn = TextTask(("A  Dog , running .",))
    data = training_set([[Example("a", {"numbers": [1.0]}, (turn,))]], max_text=8)
    ((prompt, target),) = data[0].texts
    tokenizer = data.tokenizer
    assert prompt == tokenizer.encode_prompt(data.prompt(None))
    assert target[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(target[:-1]) == "a dog, running"[: 8 - len(prompt) - 1]  # the first byte is its space


def test_a_question_longer_than_the_model_reads_is_a_bad_sample():
    turns = (TextTask(("x",), "why " * 60),)
    data = training_set([[Example("long", {"numbers": [1.0]}, turns), *numbers(1)]])
    found = [data[position] for position in range(2)]
    assert [sample.id for sample in found] == ["e0", "e0"]
    (sentence,) = [sentence for sample in found for sentence in sample.skipped]
    assert "has 244 tokens; the model reads 128" in sentence or "tokens; the model reads 128" in sentence


def resnet(**more: Any) -> Any:
    options = {"backbone": "resnet10t", "size": 32, "stage": 1}
    return tiny_model({"image": SourceConfig(encoder="image", options=options), **more})


def test_augmentation_is_a_function_of_seed_and_position():
    scene = Image.effect_noise((40, 40), 90).convert("RGB")
    examples = [Example(f"e{i}", {"image": scene}, (TextTask(("x",)),)) for i in range(3)]
    config = DataConfig(
        path="x", augmentation=AugmentationConfig(min_crop_scale=0.5, horizontal_flip=True, color_jitter=0.3)
    )
    model = resnet()
    made = [TrainingDataset(model, [(config, examples)], 7, 1, 40) for _ in range(2)]
    pixels = [made[0][p].inputs["image"]["pixels"] for p in range(6)]
    assert all(torch.equal(made[1][p].inputs["image"]["pixels"], pixels[p]) for p in reversed(range(6)))
    assert len({tensor.numpy().tobytes() for tensor in pixels}) == 6


def test_collate_mixes_examples_with_different_sources():
    model = tiny_model({"numbers": "mmx.testing:ToyEncoder", "more": "mmx.testing:ToyEncoder"})
    examples = [
        Example("both", {"numbers": [1.0, 2.0], "more": [3.0]}, (TextTask(("one", "two", "three")),)),
        Example("first", {"numbers": [5.0]}, (TextTask(("only",)),)),
        Example("second", {"more": [6.0, 7.0], "unknown": "x"}, (TextTask(("yes",), "really?"),)),
        Example("none", {}, (TextTask(("blind",)),)),
    ]
    data = training_set([examples], model)
    order = {data[position].id: data[position] for position in range(4)}
    batch = data.collate([order[example.id] for example in examples])
    assert batch.ids == ["both", "first", "second", "none"]
    assert batch.sources["numbers"].rows.tolist() == [0, 1]
    assert batch.sources["numbers"].inputs["numbers"].tolist() == [[1.0, 2.0], [5.0, 0.0]]
    assert batch.sources["numbers"].inputs["mask"].tolist() == [[True, True], [True, False]]
    assert batch.sources["more"].rows.tolist() == [0, 2]
    assert batch.tokens.shape[:2] == (4, 2)
    assert batch.tokens.shape[2] % 8 == 0
    assert batch.mask.any(-1).tolist() == [[True, True], [True, False], [True, False], [True, False]]
    kept = batch.labels != IGNORE_INDEX
    assert batch.tokens.flatten()[batch.label_positions[kept][1:]].shape[0] == int(kept.sum()) - 1
    assert int((batch.labels == data.tokenizer.eos_token_id).sum()) == 5
    logits = model(batch.sources, batch.tokens, batch.mask, batch.label_positions)
    assert logits.shape == (len(batch.labels), len(data.tokenizer))
    assert bool(torch.isfinite(logits).all())
    alone = data.collate([order["second"]])
    mine = model(alone.sources, alone.tokens, alone.mask)[0, 0]
    together = model(batch.sources, batch.tokens, batch.mask)[2, 0, : mine.shape[0]]
    real = alone.mask[0, 0]
    assert torch.allclose(mine[real], together[: mine.shape[0]][real], atol=1e-5)


def test_a_source_nobody_has_is_left_out():
    model = tiny_model({"numbers": "mmx.testing:ToyEncoder", "more": "mmx.testing:ToyEncoder"})
    data = training_set([numbers(2)], model)
    assert set(data.collate([data[0], data[1]]).sources) == {"numbers"}


def test_questions_go_to_a_text_source_one_a_stream():
    facts = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    sources = {"numbers": "mmx.testing:ToyEncoder", "asked": SourceConfig(encoder="text", options=facts)}
    model = tiny_model(sources, question_to="asked")
    turns = (TextTask(("yes",), "is it so?"), TextTask(("no",), "or not?"))
    examples = [Example("two", {"numbers": [1.0]}, turns), Example("one", {"numbers": [2.0]}, (TextTask(("three",)),))]
    data = training_set([examples], model, streams=3)
    order = {data[position].id: data[position] for position in range(2)}
    batch = data.collate([order["two"], order["one"]])
    asked = batch.sources["asked"]
    assert asked.streams == 3
    assert asked.rows.tolist() == [0, 1]  # row * streams + stream; a caption asks nothing, as when it is spoken
    spoken = [data.tokenizer.decode(row[m].tolist()) for row, m in zip(asked.inputs["tokens"], asked.inputs["mask"])]
    assert sorted(spoken) == ["is it so?", "or not?"]
    assert all(prompt == data.tokenizer.encode_prompt(model.prompt("x")) for prompt, _ in order["two"].texts)
    assert bool(torch.isfinite(model(batch.sources, batch.tokens, batch.mask, batch.label_positions)).all())


def test_source_dropout_withholds_its_share():
    data = training_set([numbers(50)], source_dropout=0.3)
    withheld = [data[position].modality_dropped for position in range(400)]
    assert 0.2 < sum(withheld) / 400 < 0.4
    batch = data.collate([data[0], data[1]])
    assert batch.sources["numbers"].dropped.tolist() == withheld[:2]
    assert not any(training_set([numbers(5)])[position].modality_dropped for position in range(20))


def test_batches_move_whole(tmp_path: Path):
    data = training_set([numbers(4)])
    batch = data.collate([data[0], data[1]])
    moved = batch.to(torch.device("cpu"))
    assert json.dumps(moved.ids) == json.dumps(batch.ids)
    assert torch.equal(moved.sources["numbers"].inputs["numbers"], batch.sources["numbers"].inputs["numbers"])
    assert torch.equal(moved.labels, batch.labels)
