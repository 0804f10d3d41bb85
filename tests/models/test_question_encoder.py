"""Reader: questions read over a memory. Each stream has its own and no other's, and padding changes no number.

Alphabet: B rows, K streams, T text positions, V vocabulary.
"""

import pytest
import torch

from mmx.config.schema import DataConfig, DecoderConfig, ModelConfig, QuestionEncoderConfig, SourceConfig, TrainingConfig
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
ASKED = ["who?", "what is on the table?", "is it so?", "why?", "how many of them?", "or not?"]


def build(**reader):
    """A small model in float64 with large weights; the reader is narrower than the decoder and has other heads."""
    facts = {
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 3,
        "max_position_embeddings": 60,
        "prefix_token_ids": (1,),
        "suffix_token_ids": (2,),
        **reader,
    }
    config = ModelConfig(
        sources={"numbers": SourceConfig(encoder="mmx.testing:ToyEncoder")},
        decoder=DecoderConfig(hidden_size=32, num_layers=3, num_heads=4, max_position_embeddings=64),
        question_encoder=QuestionEncoderConfig(**facts),
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
    "every other block": {"cross_attention_every_n_layers": 2},
}


def tokens_of(batch, streams, length=5):
    return torch.randint(6, 262, (batch, streams, length), generator=torch.Generator().manual_seed(0))


def logits(model, numbers, questions, rows, streams, tokens):
    """[B, K, T, V], where `questions` stand at `rows` among B*K."""
    asked = model.collate(QUESTION_ENCODER, questions, rows)._replace(streams=streams)
    with torch.no_grad():
        return model({"numbers": given(model, numbers), QUESTION_ENCODER: asked}, tokens)


def given(model, numbers):
    batch = model.collate("numbers", numbers)
    return batch._replace(inputs={n: t.double() if t.is_floating_point() else t for n, t in batch.inputs.items()})


def alone(model, numbers, question, tokens):
    """tokens [T] -> [T, V]."""
    return logits(model, [numbers], [question], [0], 1, tokens[None, None])[0, 0]


# ---- what a question is ------------------------------------------------------------------------------------------


def test_a_question_stands_between_its_opening_and_its_closing():
    tokens = MODEL.question_encoder.prepare("who?")["tokens"].tolist()
    assert (tokens[0], tokens[-1]) == (1, 2)
    assert MODEL.tokenizer.decode(tokens[1:-1]) == "who?"


def test_a_question_longer_than_the_reader_reads_is_refused():
    with pytest.raises(MmxError, match=r"^the question has 93 tokens; this model reads up to 60, ask more shortly\.$"):
        MODEL.question_encoder.prepare("a" * 90)


def test_a_batch_is_padded_at_the_end():
    batch = MODEL.question_encoder.collate([MODEL.question_encoder.prepare(text) for text in ASKED[:2]])
    first = batch["mask"][0]
    assert first.tolist() == sorted(first.tolist(), reverse=True) and not first.all() and batch["mask"][1].all()
    assert (batch["tokens"][0][~first] == MODEL.tokenizer.pad_token_id).all()


# ---- what it becomes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", VARIANTS.values(), ids=VARIANTS)
def test_padding_of_a_question_changes_nothing(facts):
    model, tokens = build(**facts), tokens_of(3, 1)
    together = logits(model, NUMBERS, ASKED[:3], None, 1, tokens)
    for row in range(3):
        assert torch.allclose(together[row, 0], alone(model, NUMBERS[row], ASKED[row], tokens[row, 0]), **CLOSE)


@pytest.mark.parametrize("facts", VARIANTS.values(), ids=VARIANTS)
def test_questions_of_streams_are_each_read_as_alone(facts):
    model, tokens, rows = build(**facts), tokens_of(3, 2), [0, 1, 2, 3, 5]  # stream 0 of row 2 asks nothing
    together = logits(model, NUMBERS, ASKED[:5], rows, 2, tokens)
    for question, place in zip(ASKED, rows):
        b, k = divmod(place, 2)
        assert torch.allclose(together[b, k], alone(model, NUMBERS[b], question, tokens[b, k]), **CLOSE)
    with torch.no_grad():
        blind = model.decoder(tokens[2:, :1], model.decoder.empty_memory(1))
    assert torch.allclose(together[2, 0], blind[0, 0], **CLOSE)


def test_the_question_and_what_it_is_about_both_matter():
    tokens = tokens_of(1, 1)[0, 0]
    one = alone(MODEL, NUMBERS[0], ASKED[0], tokens)
    assert (one - alone(MODEL, NUMBERS[0], ASKED[3], tokens)).abs().max() > 1e-3
    assert (one - alone(MODEL, NUMBERS[1], ASKED[0], tokens)).abs().max() > 1e-3


def test_every_token_of_a_question_sees_those_after_it():
    first, other = ({"tokens": torch.tensor([[9, 10, last]]), "mask": torch.ones(1, 3).bool()} for last in (11, 12))
    memory = MODEL.encode({"numbers": given(MODEL, NUMBERS[:1])}, 1)
    with torch.no_grad():
        one, two = (MODEL.question_encoder(asked, torch.tensor([0]), memory, 1).values for asked in (first, other))
    assert (one - two)[..., 0, :].abs().max() > 1e-3


def test_padding_that_is_shown_changes_the_answer_of_the_shorter_question_alone():
    shown, tokens = build(shows_padding=True), tokens_of(2, 1)
    together = logits(shown, NUMBERS[:2], ASKED[:2], None, 1, tokens)
    short, long = ((together[b, 0] - alone(shown, NUMBERS[b], ASKED[b], tokens[b, 0])).abs().max() for b in range(2))
    assert short > 1e-3
    assert long < 1e-9


def test_each_stream_reads_its_question_over_what_it_points_at():
    """Keys and values of a grid of two cells: what a stream that points at one has read is read over that one alone."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(2, 1, 3, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    whole = Memory(keys, values, torch.ones(1, 2).bool(), (Segment("numbers", 0, 2, (1, 2)),))
    boxes = torch.tensor([[[0.0, 0.0, 0.4, 1.0], [0.6, 0.0, 1.0, 1.0]]])
    questions, tokens = MODEL.collate(QUESTION_ENCODER, ASKED[:2])._replace(streams=2), tokens_of(1, 2)
    with torch.no_grad():
        found = MODEL.decoder(tokens, MODEL.with_questions(whole.focus(boxes), questions))
        for cell in range(2):
            part = Memory(
                keys[..., [cell], :], values[..., [cell], :], torch.ones(1, 1).bool(), (Segment("numbers", 0, 1),)
            )
            asked = MODEL.collate(QUESTION_ENCODER, [ASKED[cell]])._replace(streams=1)
            own = MODEL.decoder(tokens[:, cell : cell + 1], MODEL.with_questions(part, asked))
            assert torch.allclose(found[:, cell], own[:, 0], **CLOSE)


# ---- no question -------------------------------------------------------------------------------------------------


def test_without_a_question_there_is_nothing_to_see():
    """As for a stream that asks nothing beside others that ask: what was encoded is for the reader alone."""
    tokens, numbers = tokens_of(3, 2), given(MODEL, NUMBERS)
    nobody = SourceBatch({}, torch.zeros(0, dtype=torch.long), streams=2)
    with torch.no_grad():
        blind = MODEL.decoder(tokens, MODEL.decoder.empty_memory(3))
        assert torch.equal(MODEL({"numbers": numbers}, tokens), blind)
        assert torch.equal(MODEL({"numbers": numbers, QUESTION_ENCODER: nobody}, tokens), blind)
        assert torch.equal(MODEL({}, tokens), blind)


def test_a_question_about_nothing_is_read_as_it_is():
    tokens = tokens_of(1, 1)
    asked = MODEL.collate(QUESTION_ENCODER, ASKED[:1])._replace(streams=1)
    with torch.no_grad():
        found = MODEL({QUESTION_ENCODER: asked}, tokens)
    assert found.isfinite().all()
    assert (found - MODEL.decoder(tokens, MODEL.decoder.empty_memory(1))).abs().max() > 1e-3


# ---- training, and the verbs -------------------------------------------------------------------------------------


def test_a_training_step_gives_gradients_to_all_of_the_reader():
    model = build()
    turns = (TextTask(("yes",), "is it so?"), TextTask(("no",), "or is it not?"))
    examples = [Example("two", {"numbers": [1.0, 2.0]}, turns), Example("one", {"numbers": [2.0]}, turns[:1])]
    data = TrainingDataset(
        model, [(DataConfig(path="x"), examples)], TrainingConfig(texts_per_image=2, max_target_length=20)
    )
    batch = data.collate([data[0], data[1]])
    asked = batch.sources[QUESTION_ENCODER]
    assert asked.streams == 2
    assert len(asked.rows) == 3
    batch.sources["numbers"] = batch.sources["numbers"]._replace(inputs=given(model, [[1.0, 2.0], [2.0]]).inputs)
    found = model(batch.sources, batch.tokens, batch.mask, batch.label_positions)
    torch.nn.functional.cross_entropy(found, batch.labels, ignore_index=IGNORE_INDEX).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # a bias of all keys moves every score alike: it has a gradient of zero
        assert name.endswith("projection.key.bias") or parameter.grad.abs().max() > 1e-9, name


def test_questions_are_answered_as_alone_by_the_verbs():
    model = build().float()
    pipeline = Pipeline(model)
    memory = pipeline.encode(numbers=[NUMBERS[0]])
    answers = pipeline.ask(memory, ASKED)
    assert answers == [pipeline.ask(memory, question) for question in ASKED]
    given_ = [({"numbers": NUMBERS[row]}, question) for row, question in enumerate(ASKED[:3])]
    found = [said.text for said in pipeline.answers(given_)]
    assert found == [pipeline.ask(source, question) for source, question in given_]


def test_a_model_without_a_reader_has_none():
    model = tiny_model()
    assert model.question_encoder is None
    with pytest.raises(MmxError, match="the model has no source 'question_encoder'"):
        model.collate(QUESTION_ENCODER, ["who?"])
