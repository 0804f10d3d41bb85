"""QuestionEncoder: each stream attends to its own question only, and padding changes no logit.

B rows, K streams, T text positions, V vocabulary.
"""

import pytest
import torch

from mmx.config.schema import (
    DataConfig,
    DecoderConfig,
    ModelConfig,
    QuestionEncoderConfig,
    SourceConfig,
    TrainingConfig,
)
from mmx.data.batching import TrainingDataset
from mmx.data.examples import Example, TextTask
from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline
from mmx.memory import Memory, Segment
from mmx.models.batching import IGNORE_INDEX
from mmx.models.model import Model
from mmx.models.question_encoder import QUESTION_ENCODER
from mmx.models.source import SourceBatch
from mmx.testing import tiny_model, toy_tokenizer

CLOSE = {"atol": 1e-12, "rtol": 1e-9}  # float64
NUMBERS = [[0.1, 2.0, -1.0], [3.0], [-2.0, 0.5]]
QUESTIONS = ["who?", "what is on the table?", "is it so?", "why?", "how many of them?", "or not?"]


def build(**question_encoder):
    """A small model in float64 with large weights; sizes of question encoder and decoder differ."""
    question_encoder = {
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 3,
        "max_position_embeddings": 60,
        "prefix_token_ids": (1,),
        "suffix_token_ids": (2,),
        **question_encoder,
    }
    config = ModelConfig(
        sources={"numbers": SourceConfig(encoder="mmx.testing:ToyEncoder")},
        decoder=DecoderConfig(hidden_size=32, num_layers=3, num_heads=4, max_position_embeddings=64),
        question_encoder=QuestionEncoderConfig(**question_encoder),
        question_input=QUESTION_ENCODER,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(config, toy_tokenizer()).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0 if weight.ndim > 1 else 1.0)
    return model


MODEL = build()
VARIANTS = {
    "pre": {},
    "post": {"norm_placement": "post", "embedding_norm": True},
    "rope": {"positions": "rope"},
    "every other layer": {"cross_attention_every_n_layers": 2},
}


def random_tokens(batch, streams, length=5):
    return torch.randint(6, 262, (batch, streams, length), generator=torch.Generator().manual_seed(0))


def logits(model, numbers, questions, rows, streams, tokens):
    """[B, K, T, V], with `questions` at the indices `rows` among B*K."""
    batch = model.collate(QUESTION_ENCODER, questions, rows)._replace(streams=streams)
    with torch.no_grad():
        return model({"numbers": number_batch(model, numbers), QUESTION_ENCODER: batch}, tokens)


def number_batch(model, numbers):
    batch = model.collate("numbers", numbers)
    return batch._replace(inputs={**batch.inputs, "numbers": batch.inputs["numbers"].double()})


def alone(model, numbers, question, tokens):
    """tokens [T] -> [T, V]."""
    return logits(model, [numbers], [question], [0], 1, tokens[None, None])[0, 0]


# ---- preparation ------------------------------------------------------------------------------------------------


def test_a_question_is_between_prefix_and_suffix():
    tokens = MODEL.question_encoder.prepare("who?")["tokens"].tolist()
    assert (tokens[0], tokens[-1]) == (1, 2)
    assert MODEL.tokenizer.decode(tokens[1:-1]) == "who?"


def test_a_question_that_is_too_long_is_refused():
    with pytest.raises(MmxError) as error:
        MODEL.question_encoder.prepare("a" * 90)
    assert error.value.code == "question.too_long"
    assert error.value.details == {"length": 93, "maximum": 60}


def test_a_batch_is_padded_at_the_end():
    batch = MODEL.question_encoder.collate([MODEL.question_encoder.prepare(text) for text in QUESTIONS[:2]])
    first = batch["mask"][0]
    assert first.tolist() == sorted(first.tolist(), reverse=True) and not first.all() and batch["mask"][1].all()
    assert (batch["tokens"][0][~first] == MODEL.tokenizer.pad_token_id).all()


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_padding_of_a_question_changes_no_logit(config):
    model, tokens = build(**config), random_tokens(3, 1)
    together = logits(model, NUMBERS, QUESTIONS[:3], None, 1, tokens)
    for row in range(3):
        assert torch.allclose(together[row, 0], alone(model, NUMBERS[row], QUESTIONS[row], tokens[row, 0]), **CLOSE)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_questions_of_streams_give_the_logits_of_each_alone(config):
    model, tokens, rows = build(**config), random_tokens(3, 2), [0, 1, 2, 3, 5]  # stream 0 of row 2 has no question
    together = logits(model, NUMBERS, QUESTIONS[:5], rows, 2, tokens)
    for question, row in zip(QUESTIONS, rows):
        b, k = divmod(row, 2)
        assert torch.allclose(together[b, k], alone(model, NUMBERS[b], question, tokens[b, k]), **CLOSE)
    with torch.no_grad():
        empty = model.decoder(tokens[2:, :1], model.decoder.empty_memory(1))
    assert torch.allclose(together[2, 0], empty[0, 0], **CLOSE)


def test_the_question_and_the_source_both_change_the_logits():
    tokens = random_tokens(1, 1)[0, 0]
    one = alone(MODEL, NUMBERS[0], QUESTIONS[0], tokens)
    assert (one - alone(MODEL, NUMBERS[0], QUESTIONS[3], tokens)).abs().max() > 1e-3
    assert (one - alone(MODEL, NUMBERS[1], QUESTIONS[0], tokens)).abs().max() > 1e-3


def test_attention_within_a_question_is_bidirectional():
    questions = [{"tokens": torch.tensor([[9, 10, last]]), "mask": torch.ones(1, 3).bool()} for last in (11, 12)]
    memory = MODEL.encode({"numbers": number_batch(MODEL, NUMBERS[:1])}, 1)
    with torch.no_grad():
        first, other = (MODEL.question_encoder(each, torch.tensor([0]), memory, 1).values for each in questions)
    assert (first - other)[..., 0, :].abs().max() > 1e-3


def test_visible_padding_changes_the_logits_of_the_shorter_question_only():
    model, tokens = build(attend_padding=True), random_tokens(2, 1)
    together = logits(model, NUMBERS[:2], QUESTIONS[:2], None, 1, tokens)
    differences = []
    for b in range(2):
        expected = alone(model, NUMBERS[b], QUESTIONS[b], tokens[b, 0])
        differences.append(float((together[b, 0] - expected).abs().max()))
    assert differences[0] > 1e-3
    assert differences[1] < 1e-9


def test_each_question_attends_to_the_box_of_its_stream():
    """Over a grid of two cells, a stream with the box of one cell equals a run over that cell only."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(2, 1, 3, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    memory = Memory(keys, values, torch.ones(1, 2).bool(), (Segment("numbers", 0, 2, (1, 2)),))
    boxes = torch.tensor([[[0.0, 0.0, 0.4, 1.0], [0.6, 0.0, 1.0, 1.0]]])
    questions, tokens = MODEL.collate(QUESTION_ENCODER, QUESTIONS[:2])._replace(streams=2), random_tokens(1, 2)
    with torch.no_grad():
        found = MODEL.decoder(tokens, MODEL.with_questions(memory.focus(boxes), questions))
        for cell in range(2):
            one_cell = Memory(
                keys[..., [cell], :], values[..., [cell], :], torch.ones(1, 1).bool(), (Segment("numbers", 0, 1),)
            )
            question = MODEL.collate(QUESTION_ENCODER, [QUESTIONS[cell]])._replace(streams=1)
            own = MODEL.decoder(tokens[:, cell : cell + 1], MODEL.with_questions(one_cell, question))
            assert torch.allclose(found[:, cell], own[:, 0], **CLOSE)


# ---- no question -------------------------------------------------------------------------------------------------


def test_without_a_question_the_memory_of_the_decoder_is_empty():
    """The memory of the sources is for the question encoder only."""
    tokens, numbers = random_tokens(3, 2), number_batch(MODEL, NUMBERS)
    no_questions = SourceBatch({}, torch.zeros(0, dtype=torch.long), streams=2)
    with torch.no_grad():
        expected = MODEL.decoder(tokens, MODEL.decoder.empty_memory(3))
        assert torch.equal(MODEL({"numbers": numbers}, tokens), expected)
        assert torch.equal(MODEL({"numbers": numbers, QUESTION_ENCODER: no_questions}, tokens), expected)
        assert torch.equal(MODEL({}, tokens), expected)


def test_a_question_without_a_source_is_encoded():
    tokens = random_tokens(1, 1)
    question = MODEL.collate(QUESTION_ENCODER, QUESTIONS[:1])._replace(streams=1)
    with torch.no_grad():
        found = MODEL({QUESTION_ENCODER: question}, tokens)
    assert found.isfinite().all()
    assert (found - MODEL.decoder(tokens, MODEL.decoder.empty_memory(1))).abs().max() > 1e-3


# ---- training, inference -----------------------------------------------------------------------------------------


def test_a_training_step_gives_every_parameter_a_gradient():
    model = build()
    tasks = (TextTask(("yes",), "is it so?"), TextTask(("no",), "or is it not?"))
    examples = [Example("two", {"numbers": [1.0, 2.0]}, tasks), Example("one", {"numbers": [2.0]}, tasks[:1])]
    data = TrainingDataset(
        model, [(DataConfig(path="x"), examples)], TrainingConfig(texts_per_image=2, max_target_length=20)
    )
    batch = data.collate([data[0], data[1]])
    questions = batch.sources[QUESTION_ENCODER]
    assert questions.streams == 2
    assert len(questions.rows) == 3
    batch.sources["numbers"] = batch.sources["numbers"]._replace(inputs=number_batch(model, [[1.0, 2.0], [2.0]]).inputs)
    found = model(batch.sources, batch.tokens, batch.mask, batch.label_positions)
    torch.nn.functional.cross_entropy(found, batch.labels, ignore_index=IGNORE_INDEX).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # the bias of the keys shifts all scores equally: its gradient is zero
        assert name.endswith("projection.key.bias") or parameter.grad.abs().max() > 1e-9, name


def test_batch_answers_equal_single_answers():
    model = build().float()
    pipeline = Pipeline(model)
    memory = pipeline.encode(numbers=[NUMBERS[0]])
    answers = pipeline.ask(memory, QUESTIONS)
    assert answers == [pipeline.ask(memory, question) for question in QUESTIONS]
    pairs = [({"numbers": NUMBERS[row]}, question) for row, question in enumerate(QUESTIONS[:3])]
    found = [answer.text for answer in pipeline.answers(pairs)]
    assert found == [pipeline.ask(source, question) for source, question in pairs]


def test_questions_need_a_question_encoder():
    model = tiny_model()
    assert model.question_encoder is None
    with pytest.raises(MmxError) as error:
        model.collate(QUESTION_ENCODER, ["who?"])
    assert error.value.code == "source.unknown"
