"""Training batches: examples that cannot be read, targets, augmentation, and the collation of sources and texts."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmx.config.schema import AugmentationConfig, DataConfig, SourceConfig, TrainingConfig
from mmx.data.batching import MAX_SKIPS_PER_SAMPLE, TrainingDataset, sample_texts
from mmx.data.examples import Example, TextTask
from mmx.errors import DataError
from mmx.models.batching import IGNORE_INDEX
from mmx.models.model import Model
from mmx.testing import tiny_model


def number_examples(count: int, without_text: Sequence[int] = ()) -> list[Example]:
    """Return examples of one number with two captions each."""
    examples = []
    for i in range(count):
        tasks = () if i in without_text else (TextTask((f"caption {i}", f"text {i}")),)
        examples.append(Example(f"e{i}", {"numbers": [float(i)]}, tasks, f"list:{i}"))
    return examples


def build_dataset(
    *sets: Sequence[Example],
    model: Model | None = None,
    config: DataConfig | None = None,
    seed: int = 3,
    texts_per_image: int = 2,
    **options: object,
) -> TrainingDataset:
    config = config or DataConfig(path="x")
    training = TrainingConfig(seed=seed, texts_per_image=texts_per_image, **options)
    return TrainingDataset(model or tiny_model(), [(config, examples) for examples in sets], training)


def image_model() -> Model:
    options = {"backbone": "resnet10t", "size": 32, "stage": 1}
    return tiny_model({"image": SourceConfig(encoder="image", options=options)})


@given(st.integers(0, 9), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_sample_texts_draws_without_replacement(streams, num_targets, seed):
    tasks = [TextTask(tuple(f"{i}-{j}" for j in range(count)), f"q{i}") for i, count in enumerate(num_targets)]
    texts = sample_texts(tasks, streams, Random(seed))
    assert len(texts) == min(streams, sum(num_targets))
    assert len(set(texts)) == len(texts)
    assert all(target.startswith(question[1:]) for question, target, _ in texts)
    assert texts == sample_texts(tasks, streams, Random(seed))


# ---- examples that cannot be read --------------------------------------------------------------------------------


def test_unreadable_example_is_replaced_by_the_next_one():
    first = build_dataset(number_examples(9, without_text=(4, 5)))
    second = build_dataset(number_examples(9, without_text=(4, 5)))
    for position in range(18):
        one = first[position]
        other = second[position]
        _, index = first.schedule[position]
        assert one.id == other.id == {4: "e6", 5: "e6"}.get(index, f"e{index}")
        assert one.texts == other.texts
        origins = {4: ["list:4", "list:5"], 5: ["list:5"]}.get(index, [])
        assert [message.split()[0] for message in one.skipped] == origins


def test_damaged_images_are_named(tmp_path):
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    examples = [Example(n, {"image": str(tmp_path / f"{n}.png")}, (TextTask(("x",)),)) for n in "abc"]
    dataset = build_dataset(examples, model=image_model())
    samples = [dataset[position] for position in range(3)]
    assert sorted(sample.id for sample in samples) == ["a", "c", "c"]
    (message,) = [message for sample in samples for message in sample.skipped]
    assert "b.png" in message


def test_too_many_unreadable_examples_in_a_row_are_an_error():
    dataset = build_dataset(number_examples(30, without_text=range(25)))
    positions = {dataset.schedule[position][1]: position for position in range(30)}
    with pytest.raises(DataError) as error:
        dataset[positions[2]]
    assert error.value.code == "data.too_many_unreadable"
    assert error.value.details["last"].startswith(f"list:{2 + MAX_SKIPS_PER_SAMPLE - 1} ")
    assert dataset[positions[16]].id == "e25"


def test_example_without_a_source_of_the_model_is_not_skipped_but_refused():
    misspelt = Example("a", {"number": [1.0]}, (TextTask(("x",)),), "list:1")
    dataset = build_dataset([misspelt, *number_examples(1)])
    with pytest.raises(DataError) as error:
        [dataset[position] for position in range(2)]
    assert (error.value.code, error.value.details["origin"]) == ("data.unknown_source", "list:1")
    assert (error.value.details["unknown"], error.value.details["known"]) == (["number"], ["numbers"])


def test_question_longer_than_the_positions_is_skipped():
    long_example = Example("long", {"numbers": [1.0]}, (TextTask(("x",), "why " * 60),))
    dataset = build_dataset([long_example, *number_examples(1)])
    samples = [dataset[position] for position in range(2)]
    assert [sample.id for sample in samples] == ["e0", "e0"]
    (message,) = [message for sample in samples for message in sample.skipped]
    assert "128 positions" in message


# ---- single examples ---------------------------------------------------------------------------------------------


def caption_dataset(caption: str, **options: object) -> TrainingDataset:
    return build_dataset([Example("a", {"numbers": [1.0]}, (TextTask((caption,)),), "list:7")], **options)


def test_targets_are_learned_as_written_and_ended():
    dataset = caption_dataset("A  Dög , running ½ .")
    ((prompt, target),) = dataset[0].texts
    tokenizer = dataset.tokenizer
    assert prompt == tokenizer.encode_prompt(dataset.prompt(None))
    assert target == [*tokenizer.encode("A  Dög , running ½ ."), tokenizer.eos_token_id]
    assert tokenizer.decode(target) == "A  Dög , running ½ ."
    assert dataset[0].cut == ()


@pytest.mark.parametrize(
    ("limit", "learned", "is_cut"),
    [(4, "na", True), (5, "naï", True), (10, "naïve", True), (13, "naïve 日", True), (14, "naïve 日本", False)],
)
def test_a_longer_target_is_cut_between_characters_without_an_end(limit, learned, is_cut):
    """The toy tokens are bytes; the first is a space."""
    dataset = caption_dataset("naïve 日本", max_target_length=limit)
    ((_, target),) = dataset[0].texts
    assert dataset.tokenizer.decode(target) == learned
    assert (dataset.tokenizer.eos_token_id in target) == (not is_cut)
    assert dataset[0].cut == (("list:7",) if is_cut else ())


def test_the_limit_counts_the_target_and_positions_count_the_prompt_too():
    positions = caption_dataset("x").max_positions
    for length, is_cut in ((positions - 3, False), (positions - 2, True)):
        dataset = caption_dataset("x" * length)
        ((prompt, target),) = dataset[0].texts
        assert len(prompt) == 2
        assert bool(dataset[0].cut) == is_cut
        assert len(prompt) + len(target) - 1 <= positions
    question = Example("a", {"numbers": [1.0]}, (TextTask(("four",), "why " * 9),), "list:7")
    limited = build_dataset([question], max_target_length=5)
    assert limited[0].cut == (), "a long prompt does not shorten the target"


def test_a_target_without_room_for_a_character_is_skipped():
    with pytest.raises(DataError) as error:
        caption_dataset("日本", max_target_length=1)[0]
    assert error.value.code == "data.too_many_unreadable"


def test_a_batch_counts_its_texts_and_those_that_were_cut():
    tasks = (TextTask(("a", "bb", "a longer text")),)
    examples = [Example(str(number), {"numbers": [1.0]}, tasks, f"list:{number}") for number in range(2)]
    dataset = build_dataset(examples, texts_per_image=3, max_target_length=5)
    batch = dataset.collate([dataset[0], dataset[1]])
    assert batch.num_texts == 6
    assert sorted(batch.cut) == ["list:0", "list:1"]
    labels = batch.labels[batch.labels != IGNORE_INDEX].tolist()
    assert labels.count(dataset.tokenizer.eos_token_id) == 4


def test_augmentation_is_a_pure_function_of_seed_and_position():
    noise = Image.effect_noise((40, 40), 90).convert("RGB")
    examples = [Example(f"e{i}", {"image": noise}, (TextTask(("x",)),)) for i in range(3)]
    augmentation = AugmentationConfig(min_crop_scale=0.5, horizontal_flip=True, color_jitter=0.3)
    config = DataConfig(path="x", augmentation=augmentation)
    model = image_model()
    one = build_dataset(examples, model=model, config=config, texts_per_image=1)
    other = build_dataset(examples, model=model, config=config, texts_per_image=1)
    pixels = [one[position].inputs["image"]["pixels"] for position in range(6)]
    for position in reversed(range(6)):
        assert torch.equal(other[position].inputs["image"]["pixels"], pixels[position])
    assert len({tensor.numpy().tobytes() for tensor in pixels}) == 6


# ---- batches -----------------------------------------------------------------------------------------------------


def test_collate_combines_examples_with_different_sources():
    model = tiny_model({"numbers": "mmx.testing:ToyEncoder", "more": "mmx.testing:ToyEncoder"})
    examples = [
        Example("both", {"numbers": [1.0, 2.0], "more": [3.0]}, (TextTask(("one", "two", "three")),)),
        Example("first", {"numbers": [5.0]}, (TextTask(("only",)),)),
        Example("second", {"more": [6.0, 7.0], "unknown": "x"}, (TextTask(("yes",), "really?"),)),
        Example("none", {}, (TextTask(("blind",)),)),
    ]
    dataset = build_dataset(examples, model=model)
    samples = {sample.id: sample for sample in (dataset[position] for position in range(4))}
    batch = dataset.collate([samples[example.id] for example in examples])
    assert batch.ids == ["both", "first", "second", "none"]
    assert batch.sources["numbers"].rows.tolist() == [0, 1]
    assert batch.sources["numbers"].inputs["numbers"].tolist() == [[1.0, 2.0], [5.0, 0.0]]
    assert batch.sources["numbers"].inputs["mask"].tolist() == [[True, True], [True, False]]
    assert batch.sources["more"].rows.tolist() == [0, 2]
    assert batch.tokens.shape[:2] == (4, 2)
    assert batch.tokens.shape[2] % 8 == 0
    assert batch.mask.any(-1).tolist() == [[True, True], [True, False], [True, False], [True, False]]
    assert int((batch.labels == dataset.tokenizer.eos_token_id).sum()) == 5
    logits = model(batch.sources, batch.tokens, batch.mask, batch.label_positions)
    assert logits.shape == (len(batch.labels), len(dataset.tokenizer))
    assert bool(torch.isfinite(logits).all())
    single = dataset.collate([samples["second"]])
    expected = model(single.sources, single.tokens, single.mask)[0, 0]
    in_batch = model(batch.sources, batch.tokens, batch.mask)[2, 0, : expected.shape[0]]
    real = single.mask[0, 0]
    assert torch.allclose(expected[real], in_batch[real], atol=1e-5)


def test_labels_are_the_tokens_after_their_positions():
    dataset = build_dataset(number_examples(2))
    batch = dataset.collate([dataset[0], dataset[1]])
    length = batch.tokens.shape[-1]
    next_tokens = torch.cat([batch.tokens[..., 1:], torch.zeros_like(batch.tokens[..., :1])], -1).flatten()
    for position, label in zip(batch.label_positions.tolist(), batch.labels.tolist(), strict=True):
        is_last = position % length == length - 1 or not batch.mask.flatten()[position + 1]
        if label == IGNORE_INDEX:
            assert position == 0
        elif is_last:
            assert label == dataset.tokenizer.eos_token_id
        else:
            assert label == int(next_tokens[position])


def test_source_that_no_example_has_is_left_out():
    model = tiny_model({"numbers": "mmx.testing:ToyEncoder", "more": "mmx.testing:ToyEncoder"})
    dataset = build_dataset(number_examples(2), model=model)
    assert set(dataset.collate([dataset[0], dataset[1]]).sources) == {"numbers"}


def test_text_source_reads_one_question_a_stream():
    encoder = SourceConfig(encoder="text", options={"hidden_size": 16, "num_layers": 1, "num_heads": 2})
    sources = {"numbers": "mmx.testing:ToyEncoder", "question": encoder}
    model = tiny_model(sources, question_input="question")
    tasks = (TextTask(("yes",), "is it so?"), TextTask(("no",), "or not?"))
    examples = [Example("two", {"numbers": [1.0]}, tasks), Example("one", {"numbers": [2.0]}, (TextTask(("three",)),))]
    dataset = build_dataset(examples, model=model, texts_per_image=3)
    samples = {sample.id: sample for sample in (dataset[position] for position in range(2))}
    batch = dataset.collate([samples["two"], samples["one"]])
    source = batch.sources["question"]
    assert source.streams == 3
    assert source.rows.tolist() == [0, 1]  # row * streams + stream; a caption has no question
    tokenizer = dataset.tokenizer
    rows = zip(source.inputs["tokens"], source.inputs["mask"], strict=True)
    texts = [tokenizer.decode(tokens[mask].tolist()) for tokens, mask in rows]
    assert sorted(texts) == ["is it so?", "or not?"]
    assert all(prompt == tokenizer.encode_prompt(model.prompt("x")) for prompt, _ in samples["two"].texts)
    logits = model(batch.sources, batch.tokens, batch.mask, batch.label_positions)
    assert bool(torch.isfinite(logits).all())


def test_modality_dropout_has_its_probability():
    dataset = build_dataset(number_examples(50), modality_dropout=0.3)
    dropped = [dataset[position].modality_dropped for position in range(400)]
    assert 0.2 < sum(dropped) / 400 < 0.4
    batch = dataset.collate([dataset[0], dataset[1]])
    assert batch.sources["numbers"].dropped.tolist() == dropped[:2]
    without = build_dataset(number_examples(5))
    assert not any(without[position].modality_dropped for position in range(20))


def test_batch_moves_to_a_device(tmp_path: Path):
    dataset = build_dataset(number_examples(4))
    batch = dataset.collate([dataset[0], dataset[1]])
    moved = batch.to(torch.device("meta"))
    assert moved.ids == batch.ids
    tensors = [moved.tokens, moved.mask, moved.label_positions, moved.labels]
    tensors += moved.sources["numbers"].inputs.values()
    assert all(tensor.device.type == "meta" for tensor in tensors)
    same = batch.to(torch.device("cpu"))
    assert torch.equal(same.sources["numbers"].inputs["numbers"], batch.sources["numbers"].inputs["numbers"])
    assert torch.equal(same.labels, batch.labels)
