"""The audit of leakage: no decoder here moves a word by a later one, a planted leak is found, and what an encoder has
seen passes any mask on slots."""

import copy

import blip_cases
import pytest
import torch
from decoder_cases import VOCAB_SIZE, randomize_parameters, random_decoder, random_memory, random_tokens
from parity_cases import letters, publish_vit_gpt2, saved, shaken
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BlipForQuestionAnswering,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

import mmx
from mmx.config.schema import DecoderConfig, ModelConfig, ProjectionConfig, QuestionEncoderConfig, SourceConfig
from mmx.errors import MmxError
from mmx.hub import load_hf_model
from mmx.interpret.leakage import InputRegion, furthest, input_regions, leakage, steps
from mmx.memory import Memory, cat
from mmx.models.checkpoint import BUNDLED, load_model
from mmx.models.decoder import TextDecoder
from mmx.models.model import Model
from mmx.nn.wait_k import wait_k_visibility
from mmx.testing import tiny_model, toy_tokenizer

PICTURE = Image.radial_gradient("L").convert("RGB").resize((32, 32))
IMAGE = SourceConfig(encoder="image", options={"backbone": "test_resnet", "size": 32})
NUMBERS = SourceConfig(encoder="mmx.testing:ToyEncoder")
LENGTH = 5


def text_source(**options):
    return SourceConfig(encoder="text", options={"hidden_size": 32, "num_layers": 2, "num_heads": 4, **options})


def model_of(sources, **facts):
    """A model that is far from where it started; its backbones stay, whose norms have learned nothing."""
    model = tiny_model(sources, **facts)
    randomize_parameters(model.decoder)
    for source in model.sources.values():
        randomize_parameters(source.projection)
        if type(source.encoder).__name__ == "TextEncoder":
            randomize_parameters(source.encoder)
    return model.requires_grad_(False)


def text_of(batch=1, length=LENGTH, vocabulary=262):
    return torch.randint(6, vocabulary, (batch, length))


def audit(model, tokens=None, mask=None, visibility=None, alignment=None, **raw):
    tokens = text_of(len(next(iter(raw.values())))) if tokens is None else tokens
    sources = {name: model.collate(name, given) for name, given in raw.items()}
    if model.config.question_input in sources:
        asked = model.config.question_input
        sources[asked] = sources[asked]._replace(streams=1)
    return leakage(model, sources, tokens, mask, visibility, alignment)


def assert_honest(report):
    """Exactly zero after, and alive before: every token moves what follows it."""
    assert report.honest()
    assert report.blind == ()
    assert (report.targets.tril(-1) == 0).all()
    assert (report.targets.diagonal() > 0).all()


# ---- the target ------------------------------------------------------------------------------------------------------

DECODERS = {
    "plain": {},
    "rope": {"positions": "rope"},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "post": {"norm_placement": "post", "embedding_norm": True, "lm_head_transform": True},
    "llama": {"norm": "rms", "positions": "rope", "glu": True, "bias": False, "activation": "silu"},
    "every other": {"cross_attention_every_n_layers": 2},
    "tanh": {"gate": "tanh"},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "relative": {"cross_attention_positions": "relative", "max_relative_distance": 3},
    "wait": {"wait_k": 2},
    "wait and relative": {"wait_k": 1, "cross_attention_positions": "relative"},
}


@pytest.mark.parametrize("name", DECODERS)
def test_no_decoder_moves_a_word_by_a_later_one(name):
    facts = DECODERS[name]
    layers = 1 if "cross_every" in facts else 2
    decoder, memory = random_decoder(**facts), random_memory(layers=layers, heads=facts.get("heads", 2), masked=1)
    report = leakage(decoder, memory, random_tokens(2, 1, 6)[:, 0])
    assert_honest(report)
    assert torch.equal(report.targets > 0, torch.ones(6, 6).triu().bool()), "all that was said is heeded"
    assert report.slots["image"].shape == (5, 6) and report.inputs == {}
    assert (report.slots["image"][4] == 0).all(), "a hidden slot moves nothing"
    if "wait_k" not in facts:
        assert (report.slots["image"][:4] > 0).all()
        assert report.ahead("image") == 3


def test_the_influence_is_that_of_one_plain_forward():
    decoder, memory, tokens = random_decoder(), random_memory(batch=1), random_tokens(1, 1, 6)[0]
    report = leakage(decoder, memory, tokens)
    other = tokens.clone()
    other[0, 2] = tokens[0, 2] - 1 if tokens[0, 2] else 1
    one, two = (decoder(t[None], memory)[0, 0].log_softmax(-1) for t in (tokens, other))
    torch.testing.assert_close(report.targets[2], (one - two).abs().amax(-1), atol=1e-5, rtol=0)


class Peeping(TextDecoder):
    """The planted leak: its mask is not causal."""

    def __init__(self, *args):
        super().__init__(*args)
        self.causal = False


class Whispering(TextDecoder):
    """A fainter one: the state of each position gets a ten-millionth of the next."""

    def states(self, *given, **named):
        states = super().hidden_states(*given, **named)
        return states + 1e-6 * states.roll(-1, 2)


@pytest.mark.parametrize("kind", [Peeping, Whispering])
def test_a_planted_leak_is_found(kind):
    config = DecoderConfig(hidden_size=16, num_heads=2, num_layers=2)
    decoder = randomize_parameters(kind(config, VOCAB_SIZE)).eval()
    report = leakage(decoder, random_memory(), random_tokens(2, 1, 6)[:, 0])
    assert not report.is_causal()
    assert "LEAKS" in report.table()
    assert (report.targets.tril(-1) > 0).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_nothing_and_is_not_asked(side):
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    mask = mask if side == "left" else mask.flip(-1)
    tokens, memory = random_tokens(2, 1, 6)[:, 0], random_memory()
    report = leakage(random_decoder(), memory, tokens, mask)
    assert_honest(report)
    assert report.padding == 0.0
    alone = leakage(random_decoder(), memory.select([1]), tokens[1:], mask[1:])
    real = mask[1]
    assert (alone.targets[~real] == 0).all() and (alone.targets[:, ~real] == 0).all()
    assert (alone.slots["image"][:, ~real] == 0).all()
    assert alone.is_causal() and alone.blind == ()


def test_padding_that_is_read_is_a_leak():
    class ReadsPadding(TextDecoder):
        def states(self, tokens, memory, mask=None, *given, **named):
            return super().hidden_states(tokens, memory, None, *given, **named)

    decoder = randomize_parameters(ReadsPadding(DecoderConfig(hidden_size=16, num_heads=2, num_layers=2), VOCAB_SIZE)).eval()
    mask = torch.tensor([[False, True, True, True]])
    report = leakage(decoder, random_memory(1), random_tokens(1, 1, 4)[:, 0], mask)
    assert report.padding > 0 and not report.is_causal()


def test_more_slots_and_tokens_than_stand_in_one_batch():
    """Batches overlap at the end, so that all have one shape: numbers are those of small batches, and zeros stay."""
    decoder, memory, tokens = random_decoder(), random_memory(batch=1, slots=45), random_tokens(1, 1, 40)[:, 0]
    report = leakage(decoder, memory, tokens)
    assert_honest(report)
    assert report.slots["image"].shape == (45, 40)
    assert (report.slots["image"] > 0).all()


def test_a_text_source_of_one_layer_for_all_and_nothing_to_see():
    assert_honest(leakage(random_decoder(), random_memory(layers=1), random_tokens(2, 1, 4)[:, 0]))
    report = leakage(random_decoder(), Memory.empty(2, 2, 2, 8), random_tokens(2, 1, 4)[:, 0])
    assert_honest(report)
    assert report.slots == {}


# ---- the sources -----------------------------------------------------------------------------------------------------

WORDS = "abcdefg"  # seven letters, a token each, and the end


def see(causal=False, k=None, visibility=None, **facts):
    model = model_of({"text": text_source(causal=causal)}, wait_k=k, **facts)
    slots = model.collate("text", [WORDS]).inputs["tokens"].shape[1]
    return slots, audit(
        model, visibility=None if visibility is None else wait_k_visibility(LENGTH, slots, visibility), text=[WORDS]
    )


def test_an_encoder_that_sees_all_lets_the_first_word_know_the_last():
    slots, report = see()
    assert_honest(report)
    assert report.ahead("text") == report.ahead("text", "inputs") == slots - 1
    assert report.ahead_by_position("text") == [slots - 1 - t for t in range(LENGTH)]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("by", ["decoder", "visibility"])
def test_a_mask_closes_the_slots_and_not_what_the_encoder_has_seen(k, by):
    slots, report = see(k=k) if by == "decoder" else see(visibility=k)
    assert_honest(report)
    assert report.ahead("text") == k - 1
    assert report.ahead_by_position("text") == [k - 1] * LENGTH
    assert report.ahead("text", "inputs") == slots - 1


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "none"])
def test_with_a_causal_encoder_both_are_closed(k, positions):
    model = model_of({"text": text_source(causal=True, positions=positions)}, wait_k=k)
    report = audit(model, text=[WORDS])
    assert_honest(report)
    for way in ("slots", "inputs"):
        assert report.ahead_by_position("text", way) == [k - 1] * LENGTH
        influence = (report.slots if way == "slots" else report.inputs)["text"]
        opened = wait_k_visibility(LENGTH, len(influence), k).T
        assert torch.equal(influence > 0, opened), "all that is open moves the step, and nothing else does"


def test_a_causal_encoder_alone_closes_nothing():
    slots, report = see(causal=True)
    assert report.ahead("text") == report.ahead("text", "inputs") == slots - 1


def test_the_monotonic_view_is_causal_at_every_step():
    _, report = see(causal=True, k=1)
    assert report.ahead("text") == report.ahead("text", "inputs") == 0


@pytest.mark.parametrize("prompt", [1, 2, 3])
def test_the_prompt_shifts_the_steps(prompt):
    """wait_k counts text positions: behind a prompt of p tokens step i stands at i + p - 1, and sees p - 1 more."""
    model = model_of({"text": text_source(causal=True)}, wait_k=2)
    report = audit(model, alignment=steps(LENGTH, prompt), text=[WORDS])
    assert report.ahead_by_position("text") == [None] * (prompt - 1) + [2 + prompt - 2] * (LENGTH - prompt + 1)
    assert report.ahead("text", "inputs") == prompt


def test_an_alignment_of_ones_own():
    """A source that says everything twice: the word at t speaks of slot 2t."""
    influence = torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0.1]])
    assert furthest(influence, torch.tensor([0, 2, 4])) == [1, 0, 0]
    assert furthest(influence, torch.tensor([2, -1, 0])) == [-1, None, 4]
    assert furthest(torch.zeros(3, 1), torch.tensor([0])) == [None]
    assert steps(4).tolist() == [0, 1, 2, 3]
    assert steps(4, prompt=3).tolist() == [-2, -1, 0, 1]


def test_the_table_says_it_in_words():
    slots, report = see(causal=False, k=2)
    lines = report.table().splitlines()
    assert lines[0] == "target: honest, later words move earlier ones by 0 nats"
    assert lines[1].startswith("text by slots: up to 1 ahead, ")
    assert lines[2].startswith(f"text by inputs: up to {slots - 1} ahead, ")
    assert len(lines) == 3


# ---- every kind of model ---------------------------------------------------------------------------------------------


def test_numbers_of_unequal_length():
    """Each number is its own slot: what stands in the padding of the shorter row moves nothing."""
    report = audit(model_of({"numbers": NUMBERS}, wait_k=1), numbers=[[0.1, 2.0, -1.0, 0.5], [3.0, 1.0]])
    assert_honest(report)
    assert report.ahead("numbers") == report.ahead("numbers", "inputs") == 0
    alone = audit(model_of({"numbers": NUMBERS}), numbers=[[3.0, 1.0]])
    assert alone.inputs["numbers"].shape == (2, LENGTH) and (alone.inputs["numbers"] > 0).all()


def test_a_picture_moves_every_word_and_has_a_place_for_every_cell():
    model = model_of({"image": IMAGE}, wait_k=1)
    report = audit(model, image=[PICTURE])
    assert_honest(report)
    rows, columns = model.encode({"image": model.collate("image", [PICTURE])}, 1).layout[0].grid
    assert report.inputs["image"].shape == report.slots["image"].shape == (rows * columns, LENGTH)
    assert (report.slots["image"] > 0).all(), "a grid is in view from the start"
    assert (report.inputs["image"] > 0).all()


def test_several_sources_are_told_apart():
    sources = {"image": IMAGE, "numbers": NUMBERS, "text": text_source(causal=True)}
    report = audit(model_of(sources, wait_k=1), image=[PICTURE], numbers=[[0.1, 2.0, 1.0]], text=[WORDS])
    assert_honest(report)
    assert set(report.slots) == set(report.inputs) == set(sources)
    assert (report.slots["image"] > 0).all()
    for name in ("numbers", "text"):
        assert report.ahead(name) == report.ahead(name, "inputs") == 0


def test_the_order_of_joined_memories_changes_no_influence():
    one, two, tokens = random_memory(slots=4, source="a"), random_memory(slots=3, source="b"), random_tokens(2, 1, 4)[:, 0]
    decoder = random_decoder(wait_k=1, cross_positions="relative")
    ahead, back = (leakage(decoder, cat(*parts), tokens) for parts in ((one, two), (two, one)))
    torch.testing.assert_close(ahead.targets, back.targets, atol=1e-5, rtol=0)
    assert ahead.ahead("a") == back.ahead("a") == ahead.ahead("b") == back.ahead("b") == 0


def test_a_question_to_a_text_source():
    model = model_of({"numbers": NUMBERS, "text": text_source()}, question_to="text")
    report = audit(model, numbers=[[0.1, 2.0], [1.0, 3.0]], text=["who is it?", "why?"])
    assert_honest(report)
    assert set(report.slots) == set(report.inputs) == {"numbers", "text"}
    assert all((part > 0).all() for part in report.inputs.values())


def test_a_reader_passes_on_what_it_has_seen():
    """The slots are those of the question; the source behind them is measured by its inputs alone."""
    config = ModelConfig(
        sources={"numbers": NUMBERS},
        decoder=DecoderConfig(hidden_size=32, num_layers=2, num_heads=4),
        question_encoder=QuestionEncoderConfig(hidden_size=24, num_layers=2, num_heads=3),
        question_input="question_encoder",
    )
    model = randomize_parameters(Model(config, toy_tokenizer())).eval()
    report = audit(model, numbers=[[0.1, 2.0, 1.0]], reader=["who?"])
    assert_honest(report)
    assert set(report.slots) == {"question_encoder"}
    assert set(report.inputs) == {"numbers", "question_encoder"}
    assert all((part > 0).all() for part in report.inputs.values())


def test_shared_attention():
    projection = ProjectionConfig(share_layers=True, positions="none")
    text = SourceConfig(
        encoder="text",
        options={"hidden_size": 32, "num_layers": 1, "num_heads": 4, "causal": True},
        projection=projection,
    )
    decoder = DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, wait_k=1)
    config = ModelConfig(sources={"text": text}, decoder=decoder, share_attention=True)
    report = audit(randomize_parameters(Model(config, toy_tokenizer())).eval(), text=[WORDS])
    assert_honest(report)
    assert report.ahead("text") == report.ahead("text", "inputs") == 0


BLOCKS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
HEARS = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
HEARS |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 60}
HEARS |= {"num_mel_bins": 8, "max_source_positions": 50, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}


def publish(folder, family):
    if family == "vit":
        model = ViTModel(ViTConfig(**BLOCKS, image_size=16, patch_size=8))
        return saved(folder, model, ViTImageProcessor(size={"height": 16, "hidden_size": 16}))
    if family == "bert":
        model = BertModel(BertConfig(**BLOCKS, vocab_size=260, max_position_embeddings=20))
        return saved(folder, model, letters(260, pad_token="[PAD]", unk_token="[UNK]"))
    return saved(folder, WhisperModel(WhisperConfig(**HEARS)), WhisperFeatureExtractor(feature_size=8, chunk_length=1))


@pytest.mark.parametrize("family", ["vit", "bert", "whisper"])
def test_encoders_of_transformers(family, tmp_path):
    """They see all of what they are given; Whisper's frames are cut into a stretch for each slot."""
    raw = {"vit": PICTURE, "bert": "a dog", "whisper": (torch.randn(16000).numpy(), 16000)}[family]
    source = SourceConfig(encoder="pretrained", options={"name": publish(tmp_path, family)})
    model = model_of({"given": source}, wait_k=2)
    prepared = model.collate("given", [raw])
    report = leakage(model, {"given": prepared}, text_of())
    assert_honest(report)
    slots, places_ = len(report.slots["given"]), len(report.inputs["given"])
    assert (slots, places_) == {"vit": (5, 4), "bert": (5, 5), "whisper": (50, 50)}[family]
    assert (report.inputs["given"] > 0).all(), "whatever is in view has seen everything"
    if family != "vit":
        assert report.ahead("given") == 1
        assert report.ahead("given", "inputs") == places_ - 1


def test_a_published_model(tmp_path):
    model = load_hf_model(str(publish_vit_gpt2(tmp_path)))[0].eval()
    report = audit(model, text_of(vocabulary=90), image=[PICTURE])
    assert_honest(report)
    assert report.inputs["image"].shape == (16, LENGTH) and report.slots["image"].shape == (17, LENGTH)


def test_a_published_model_that_answers(tmp_path):
    """BLIP: the decoder looks at the question, which has seen the picture."""
    reference = shaken(BlipForQuestionAnswering(blip_cases.tiny_config(32, num_attention_heads=2)), seed=1, size=0.2)
    folder = saved(tmp_path, reference, blip_cases.tokenizer(), blip_cases.processor())
    report = audit(load_hf_model(folder)[0].eval(), text_of(vocabulary=60), image=[PICTURE], reader=["is it red?"])
    assert_honest(report)
    assert set(report.slots) == {"question_encoder"}
    assert report.inputs["image"].shape == (16, LENGTH)
    assert (report.inputs["image"] > 0).all()


@pytest.fixture(scope="module")
def bundled():
    model = load_model(BUNDLED)
    tokens = [*model.tokenizer.encode_prompt(model.prompt()), *model.tokenizer.encode("two red stars")]
    inputs = model.collate("image", [PICTURE])
    return model, {"image": inputs}, torch.tensor([tokens])


@pytest.mark.slow  # 7 seconds: its picture is encoded 96 times
def test_the_bundled_model_and_its_pictures(bundled):
    model, sources, tokens = bundled
    report = leakage(model, sources, tokens, alignment=steps(tokens.shape[1], prompt=2))
    assert_honest(report)
    for part in (report.slots["image"], report.inputs["image"]):
        assert part.shape[1] == tokens.shape[1] and (part > 0).all()


@pytest.mark.parametrize("laid_out", ["as it was trained", "bfloat16", "float", "int8"])
def test_the_bundled_model(bundled, laid_out):
    model, sources, tokens = bundled
    if laid_out in ("float", "int8"):
        model = mmx.load(dtype="int8" if laid_out == "int8" else "float32").model
        assert model.decoder.is_prepacked
    with torch.no_grad():
        memory = model.encode(sources, 1)
    decoder = copy.deepcopy(model.decoder).to(torch.bfloat16) if laid_out == "bfloat16" else model.decoder
    report = leakage(decoder, memory, tokens)
    assert_honest(report)
    assert (report.slots["image"] > 0).float().mean() > 0.9
    assert report.table().splitlines()[1].startswith("image by slots: everywhere, ")


# ---- what is changed -------------------------------------------------------------------------------------------------


def test_the_places_of_an_input():
    every = slice(None)
    tokens = {"tokens": torch.zeros(2, 3, dtype=torch.long), "mask": torch.ones(2, 3, dtype=torch.bool)}
    assert input_regions(tokens, 3, None) == [InputRegion("tokens", (every, slice(i, i + 1))) for i in range(3)]
    samples = {"mask": torch.ones(1, 10, dtype=torch.bool), "samples": torch.zeros(1, 10)}
    assert [place.region[1] for place in input_regions(samples, 3, None)] == [slice(0, 3), slice(3, 6), slice(6, 10)]
    frames = {"spectrum": torch.zeros(1, 8, 4)}
    assert input_regions(frames, 2, None) == [InputRegion("spectrum", (every, every, slice(i, i + 2))) for i in (0, 2)]
    series = {"rows": torch.zeros(1, 4, 8), "mask": torch.ones(1, 4, dtype=torch.bool)}
    assert input_regions(series, 4, None)[0] == InputRegion("rows", (every, slice(0, 1)))
    cells = input_regions({"pixels": torch.zeros(1, 3, 8, 8)}, 7, (2, 3))
    assert [place.region[1:] for place in cells[:3]] == [
        (slice(0, 4), slice(0, 2)), (slice(0, 4), slice(2, 5)), (slice(0, 4), slice(5, 8)),
    ]  # fmt: skip
    assert len(cells) == 6
    assert input_regions({"mask": torch.ones(1, 4, dtype=torch.bool)}, 4, None) == []


def test_the_places_of_a_grid_cover_the_picture_once():
    counted = torch.zeros(1, 3, 11, 7)
    for place in input_regions({"pixels": counted}, 12, (4, 3)):
        counted[place.region] += 1
    assert (counted == 1).all()


def test_nothing_that_was_given_is_changed_and_the_answer_is_the_same_again():
    model = model_of({"text": text_source()})
    sources, tokens = {"text": model.collate("text", [WORDS])}, text_of()
    before = sources["text"].inputs["tokens"].clone(), tokens.clone(), torch.get_rng_state()
    one, other = leakage(model, sources, tokens), leakage(model, sources, tokens)
    assert torch.equal(before[0], sources["text"].inputs["tokens"]) and torch.equal(before[1], tokens)
    assert torch.equal(before[2], torch.get_rng_state())
    assert torch.equal(one.targets, other.targets) and torch.equal(one.slots["text"], other.slots["text"])
    assert torch.equal(one.inputs["text"], other.inputs["text"])
    assert not one.targets.requires_grad


def test_what_cannot_be_audited_is_one_sentence():
    decoder, memory, tokens = random_decoder(), random_memory(), random_tokens(2, 1, 4)[:, 0]
    with pytest.raises(MmxError, match="eval"):
        leakage(random_decoder().train(), memory, tokens)
    with pytest.raises(MmxError, match="a decoder with a Memory, or a model with its sources"):
        leakage(tiny_model(), memory, tokens)
    with pytest.raises(MmxError, match="2 views"):
        leakage(decoder, random_memory(batch=4).fold_streams(2), tokens)
    with pytest.raises(MmxError, match="the inputs of 'image' were not measured"):
        leakage(decoder, memory, tokens).ahead("image", "inputs")
