"""Leakage: decoders are causal, planted leaks are found, and what an encoder mixes passes every mask on slots."""

import copy

import blip_cases
import pytest
import torch
from decoder_cases import VOCAB_SIZE, random_decoder, random_memory, random_tokens, randomize_parameters
from parity_cases import byte_tokenizer, randomized, save_all, save_vit_gpt2
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
from mmx.interpret.leakage import default_alignment, leakage, lookahead_by_position
from mmx.memory import Memory, cat
from mmx.models.checkpoint import BUNDLED, load_model
from mmx.models.decoder import TextDecoder
from mmx.models.model import Model
from mmx.nn.wait_k import wait_k_visibility
from mmx.testing import tiny_model, toy_tokenizer

PHOTO = Image.radial_gradient("L").convert("RGB").resize((32, 32))
IMAGE = SourceConfig(encoder="image", options={"backbone": "test_resnet", "size": 32})
NUMBERS = SourceConfig(encoder="mmx.testing:ToyEncoder")
LENGTH = 5


def text_source(**options):
    return SourceConfig(encoder="text", options={"hidden_size": 32, "num_layers": 2, "num_heads": 4, **options})


def random_model(sources, **config):
    """A model with random parameters; image backbones keep their initial ones."""
    model = tiny_model(sources, **config)
    randomize_parameters(model.decoder)
    for source in model.sources.values():
        randomize_parameters(source.projection)
        if type(source.encoder).__name__ == "TextEncoder":
            randomize_parameters(source.encoder)
    return model.requires_grad_(False)


def random_text(batch=1, length=LENGTH, vocab_size=262):
    return torch.randint(6, vocab_size, (batch, length))


def audit(model, tokens=None, visibility=None, alignment=None, **raw):
    """The leakage of a model over raw inputs by source."""
    if tokens is None:
        tokens = random_text(len(next(iter(raw.values()))))
    sources = {name: model.collate(name, given) for name, given in raw.items()}
    name = model.config.question_input
    if name in sources:
        sources[name] = sources[name]._replace(streams=1)
    return leakage(model, sources, tokens, visibility=visibility, alignment=alignment)


def assert_causal(report):
    """No influence on earlier positions, exactly, and some influence of every token on its own position."""
    assert report.is_causal()
    assert report.without_effect == ()
    assert (report.targets.tril(-1) == 0).all()
    assert (report.targets.diagonal() > 0).all()


# ---- the target ------------------------------------------------------------------------------------------------------

DECODERS = {
    "default": {},
    "rope": {"positions": "rope"},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "post norm": {"norm_placement": "post", "embedding_norm": True, "lm_head_transform": True},
    "llama": {"norm": "rms", "positions": "rope", "glu": True, "bias": False, "activation": "silu"},
    "every 2nd layer": {"cross_attention_every_n_layers": 2},
    "gated": {"gate": "tanh"},
    "grouped queries": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "relative": {"cross_attention_positions": "relative", "max_relative_distance": 3},
    "wait-k": {"wait_k": 2},
    "wait-k and relative": {"wait_k": 1, "cross_attention_positions": "relative"},
}


@pytest.mark.parametrize("name", DECODERS)
def test_no_token_influences_an_earlier_position(name):
    config = DECODERS[name]
    layers = 1 if "cross_attention_every_n_layers" in config else 2
    decoder = random_decoder(**config)
    memory = random_memory(layers=layers, heads=config.get("num_heads", 2), masked=1)
    report = leakage(decoder, memory, random_tokens(2, 1, 6)[:, 0])
    assert_causal(report)
    assert torch.equal(report.targets > 0, torch.ones(6, 6).triu().bool()), "every token influences all later positions"
    assert report.slots["image"].shape == (5, 6)
    assert report.inputs == {}
    assert (report.slots["image"][4] == 0).all(), "a masked slot has no influence"
    if "wait_k" not in config:
        assert (report.slots["image"][:4] > 0).all()
        assert report.lookahead("image") == 3


def test_the_influence_is_the_change_of_one_forward_pass():
    decoder = random_decoder()
    memory = random_memory(batch=1)
    tokens = random_tokens(1, 1, 6)[0]
    report = leakage(decoder, memory, tokens)
    other = tokens.clone()
    other[0, 2] = tokens[0, 2] - 1 if tokens[0, 2] else 1
    one, two = (decoder(t[None], memory)[0, 0].log_softmax(-1) for t in (tokens, other))
    torch.testing.assert_close(report.targets[2], (one - two).abs().amax(-1), atol=1e-5, rtol=0)


class WithoutCausalMask(TextDecoder):
    def __init__(self, *args):
        super().__init__(*args)
        self.causal = False


class WithFaintLeak(TextDecoder):
    """The state of each position gets a millionth of the next one."""

    def hidden_states(self, *args, **kwargs):
        states = super().hidden_states(*args, **kwargs)
        return states + 1e-6 * states.roll(-1, 2)


class WithoutPaddingMask(TextDecoder):
    def hidden_states(self, tokens, memory, mask=None, *args, **kwargs):
        return super().hidden_states(tokens, memory, None, *args, **kwargs)


def leaking_decoder(kind):
    config = DecoderConfig(hidden_size=16, num_heads=2, num_layers=2)
    return randomize_parameters(kind(config, VOCAB_SIZE)).eval()


@pytest.mark.parametrize("kind", [WithoutCausalMask, WithFaintLeak])
def test_a_planted_leak_is_found(kind):
    report = leakage(leaking_decoder(kind), random_memory(), random_tokens(2, 1, 6)[:, 0])
    assert not report.is_causal()
    assert "NOT CAUSAL" in report.table()
    assert (report.targets.tril(-1) > 0).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence_and_is_not_measured(side):
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    mask = mask if side == "left" else mask.flip(-1)
    tokens = random_tokens(2, 1, 6)[:, 0]
    memory = random_memory()
    report = leakage(random_decoder(), memory, tokens, mask)
    assert_causal(report)
    assert report.padding == 0.0
    alone = leakage(random_decoder(), memory.select([1]), tokens[1:], mask[1:])
    real = mask[1]
    assert (alone.targets[~real] == 0).all()
    assert (alone.targets[:, ~real] == 0).all()
    assert (alone.slots["image"][:, ~real] == 0).all()
    assert alone.is_causal()
    assert alone.without_effect == ()


def test_attended_padding_is_a_leak():
    mask = torch.tensor([[False, True, True, True]])
    report = leakage(leaking_decoder(WithoutPaddingMask), random_memory(1), random_tokens(1, 1, 4)[:, 0], mask)
    assert report.padding > 0
    assert not report.is_causal()


def test_more_slots_and_tokens_than_one_batch_holds():
    """The last batch overlaps the one before it, so that all have the same shape."""
    report = leakage(random_decoder(), random_memory(batch=1, slots=45), random_tokens(1, 1, 40)[:, 0])
    assert_causal(report)
    assert report.slots["image"].shape == (45, 40)
    assert (report.slots["image"] > 0).all()


def test_a_memory_of_one_layer_and_an_empty_memory():
    assert_causal(leakage(random_decoder(), random_memory(layers=1), random_tokens(2, 1, 4)[:, 0]))
    report = leakage(random_decoder(), Memory.empty(2, 2, 2, 8), random_tokens(2, 1, 4)[:, 0])
    assert_causal(report)
    assert report.slots == {}


# ---- the sources -----------------------------------------------------------------------------------------------------

WORDS = "abcdefg"
SLOTS = 9  # the space before the text, seven letters, and the end token


def audit_words(causal=False, wait_k=None, visibility=None):
    model = random_model({"text": text_source(causal=causal)}, wait_k=wait_k)
    visible = None if visibility is None else wait_k_visibility(LENGTH, SLOTS, visibility)
    return audit(model, visibility=visible, text=[WORDS])


def test_with_a_bidirectional_encoder_the_first_position_depends_on_the_last_input():
    report = audit_words()
    assert_causal(report)
    assert report.lookahead("text") == report.lookahead("text", "inputs") == SLOTS - 1
    assert report.lookahead_by_position("text") == [SLOTS - 1 - t for t in range(LENGTH)]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("by", ["decoder", "visibility"])
def test_a_mask_hides_slots_but_not_what_the_encoder_mixed_into_them(k, by):
    report = audit_words(wait_k=k) if by == "decoder" else audit_words(visibility=k)
    assert_causal(report)
    assert report.lookahead("text") == k - 1
    assert report.lookahead_by_position("text") == [k - 1] * LENGTH
    assert report.lookahead("text", "inputs") == SLOTS - 1


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "none"])
def test_with_a_causal_encoder_the_mask_hides_the_inputs_too(k, positions):
    model = random_model({"text": text_source(causal=True, positions=positions)}, wait_k=k)
    report = audit(model, text=[WORDS])
    assert_causal(report)
    for path in ("slots", "inputs"):
        assert report.lookahead_by_position("text", path) == [k - 1] * LENGTH
        influence = report.influence(path)["text"]
        visible = wait_k_visibility(LENGTH, len(influence), k).T
        assert torch.equal(influence > 0, visible), "exactly the visible elements have influence"


def test_a_causal_encoder_without_a_mask_hides_nothing():
    report = audit_words(causal=True)
    assert report.lookahead("text") == report.lookahead("text", "inputs") == SLOTS - 1


@pytest.mark.parametrize("prompt_length", [1, 3])
def test_the_prompt_shifts_the_steps(prompt_length):
    """wait_k counts text positions: with a prompt of p tokens, step i is at i + p - 1 and sees p - 1 more slots."""
    model = random_model({"text": text_source(causal=True)}, wait_k=2)
    report = audit(model, alignment=default_alignment(LENGTH, prompt_length), text=[WORDS])
    steps = LENGTH - prompt_length + 1
    assert report.lookahead_by_position("text") == [None] * (prompt_length - 1) + [prompt_length] * steps
    assert report.lookahead("text", "inputs") == prompt_length


def test_lookahead_by_hand():
    influence = torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0.1]])
    assert lookahead_by_position(influence, torch.tensor([0, 2, 4])) == [1, 0, 0]
    assert lookahead_by_position(influence, torch.tensor([2, -1, 0])) == [-1, None, 4]
    assert lookahead_by_position(torch.zeros(3, 1), torch.tensor([0])) == [None]
    assert default_alignment(4).tolist() == [0, 1, 2, 3]
    assert default_alignment(4, prompt_length=3).tolist() == [-2, -1, 0, 1]


def test_the_table_has_a_line_for_the_target_and_each_path():
    lines = audit_words(causal=False, wait_k=2).table().splitlines()
    assert lines[0] == "target: causal, largest influence of a later token 0 nats"
    assert lines[1].startswith("text, slots: lookahead 1, ")
    assert lines[2].startswith(f"text, inputs: lookahead {SLOTS - 1}, ")
    assert len(lines) == 3


# ---- all kinds of models ---------------------------------------------------------------------------------------------


def test_sequences_of_unequal_length():
    report = audit(random_model({"numbers": NUMBERS}, wait_k=1), numbers=[[0.1, 2.0, -1.0, 0.5], [3.0, 1.0]])
    assert_causal(report)
    assert report.lookahead("numbers") == report.lookahead("numbers", "inputs") == 0
    alone = audit(random_model({"numbers": NUMBERS}), numbers=[[3.0, 1.0]])
    assert alone.inputs["numbers"].shape == (2, LENGTH)
    assert (alone.inputs["numbers"] > 0).all()


def test_an_image_influences_every_position_and_has_a_region_for_each_cell():
    model = random_model({"image": IMAGE}, wait_k=1)
    report = audit(model, image=[PHOTO])
    assert_causal(report)
    rows, columns = model.encode({"image": model.collate("image", [PHOTO])}, 1).layout[0].grid
    assert report.inputs["image"].shape == report.slots["image"].shape == (rows * columns, LENGTH)
    assert (report.slots["image"] > 0).all(), "wait_k does not mask grids"
    assert (report.inputs["image"] > 0).all()


def test_several_sources_are_measured_separately():
    sources = {"image": IMAGE, "numbers": NUMBERS, "text": text_source(causal=True)}
    report = audit(random_model(sources, wait_k=1), image=[PHOTO], numbers=[[0.1, 2.0, 1.0]], text=[WORDS])
    assert_causal(report)
    assert set(report.slots) == set(report.inputs) == set(sources)
    assert (report.slots["image"] > 0).all()
    for name in ("numbers", "text"):
        assert report.lookahead(name) == report.lookahead(name, "inputs") == 0


def test_the_order_of_concatenated_memories_changes_no_influence():
    one = random_memory(slots=4, source="a")
    two = random_memory(slots=3, source="b")
    tokens = random_tokens(2, 1, 4)[:, 0]
    decoder = random_decoder(wait_k=1, cross_attention_positions="relative")
    first = leakage(decoder, cat(one, two), tokens)
    second = leakage(decoder, cat(two, one), tokens)
    torch.testing.assert_close(first.targets, second.targets, atol=1e-5, rtol=0)
    lookaheads = [report.lookahead(source) for report in (first, second) for source in ("a", "b")]
    assert lookaheads == [0] * 4


def test_a_question_for_a_text_source():
    model = random_model({"numbers": NUMBERS, "text": text_source()}, question_input="text")
    report = audit(model, numbers=[[0.1, 2.0], [1.0, 3.0]], text=["who is it?", "why?"])
    assert_causal(report)
    assert set(report.slots) == set(report.inputs) == {"numbers", "text"}
    assert all((influence > 0).all() for influence in report.inputs.values())


def test_a_question_encoder_passes_on_the_sources_it_attends_to():
    """The slots are those of the question; the source behind them is measured by its inputs."""
    config = ModelConfig(
        sources={"numbers": NUMBERS},
        decoder=DecoderConfig(hidden_size=32, num_layers=2, num_heads=4),
        question_encoder=QuestionEncoderConfig(hidden_size=24, num_layers=2, num_heads=3),
        question_input="question_encoder",
    )
    model = randomize_parameters(Model(config, toy_tokenizer())).eval()
    report = audit(model, numbers=[[0.1, 2.0, 1.0]], question_encoder=["who?"])
    assert_causal(report)
    assert set(report.slots) == {"question_encoder"}
    assert set(report.inputs) == {"numbers", "question_encoder"}
    assert all((influence > 0).all() for influence in report.inputs.values())


def test_tied_weights():
    options = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "causal": True}
    text = SourceConfig(encoder="text", options=options, projection=ProjectionConfig(positions="none"))
    decoder = DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, wait_k=1)
    config = ModelConfig(sources={"text": text}, decoder=decoder, tie_key_value="all")
    report = audit(randomize_parameters(Model(config, toy_tokenizer())).eval(), text=[WORDS])
    assert_causal(report)
    assert report.lookahead("text") == report.lookahead("text", "inputs") == 0


TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
WHISPER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 60}
WHISPER |= {"num_mel_bins": 8, "max_source_positions": 50, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}


def save_encoder(folder, family):
    if family == "vit":
        model = ViTModel(ViTConfig(**TRANSFORMER, image_size=16, patch_size=8))
        return save_all(folder, model, ViTImageProcessor(size={"height": 16, "width": 16}))
    if family == "bert":
        model = BertModel(BertConfig(**TRANSFORMER, vocab_size=260, max_position_embeddings=20))
        return save_all(folder, model, byte_tokenizer(260, pad_token="[PAD]", unk_token="[UNK]"))
    model = WhisperModel(WhisperConfig(**WHISPER))
    return save_all(folder, model, WhisperFeatureExtractor(feature_size=8, chunk_length=1))


@pytest.mark.parametrize("family", ["vit", "bert", "whisper"])
def test_encoders_of_transformers(family, tmp_path):
    """They are bidirectional; the frames of Whisper are divided into one region for each slot."""
    raw = {"vit": PHOTO, "bert": "a dog", "whisper": (torch.randn(16000).clamp(-1, 1).numpy(), 16000)}[family]
    source = SourceConfig(encoder="pretrained", options={"name": save_encoder(tmp_path, family)})
    model = random_model({"given": source}, wait_k=2)
    report = leakage(model, {"given": model.collate("given", [raw])}, random_text())
    assert_causal(report)
    slots = len(report.slots["given"])
    regions = len(report.inputs["given"])
    assert (slots, regions) == {"vit": (5, 4), "bert": (5, 5), "whisper": (50, 50)}[family]
    assert (report.inputs["given"] > 0).all(), "every visible slot depends on all inputs"
    if family != "vit":
        assert report.lookahead("given") == 1
        assert report.lookahead("given", "inputs") == regions - 1


def test_an_imported_captioning_model(tmp_path):
    model = load_hf_model(str(save_vit_gpt2(tmp_path)))[0].eval()
    report = audit(model, random_text(vocab_size=90), image=[PHOTO])
    assert_causal(report)
    assert report.inputs["image"].shape == (16, LENGTH)
    assert report.slots["image"].shape == (17, LENGTH)


def test_an_imported_question_answering_model(tmp_path):
    """BLIP: the decoder attends to the question, which attends to the image."""
    config = blip_cases.tiny_config(32, num_attention_heads=2)
    reference = randomized(BlipForQuestionAnswering(config), seed=1, size=0.2)
    folder = save_all(tmp_path, reference, blip_cases.tokenizer(), blip_cases.processor())
    model = load_hf_model(folder)[0].eval()
    report = audit(model, random_text(vocab_size=60), image=[PHOTO], question_encoder=["is it red?"])
    assert_causal(report)
    assert set(report.slots) == {"question_encoder"}
    assert report.inputs["image"].shape == (16, LENGTH)
    assert (report.inputs["image"] > 0).all()


@pytest.fixture(scope="module")
def bundled():
    """The bundled model, its sources, and a text."""
    model = load_model(BUNDLED)
    tokens = [*model.tokenizer.encode_prompt(model.prompt()), *model.tokenizer.encode("two red stars")]
    return model, {"image": model.collate("image", [PHOTO])}, torch.tensor([tokens])


@pytest.mark.slow  # 7 seconds: the image is encoded 96 times
def test_the_bundled_model_and_its_image(bundled):
    model, sources, tokens = bundled
    report = leakage(model, sources, tokens, alignment=default_alignment(tokens.shape[1], prompt_length=2))
    assert_causal(report)
    for influence in (report.slots["image"], report.inputs["image"]):
        assert influence.shape[1] == tokens.shape[1]
        assert (influence > 0).all()


@pytest.mark.parametrize("precision", ["as trained", "bfloat16", "prepacked float32", "prepacked int8"])
def test_the_bundled_decoder(bundled, precision):
    model, sources, tokens = bundled
    if precision.startswith("prepacked"):
        model = mmx.load(dtype=precision.split()[1]).model
        assert model.decoder.is_prepacked
    with torch.no_grad():
        memory = model.encode(sources, 1)
    decoder = copy.deepcopy(model.decoder).to(torch.bfloat16) if precision == "bfloat16" else model.decoder
    report = leakage(decoder, memory, tokens)
    assert_causal(report)
    assert (report.slots["image"] > 0).float().mean() > 0.9
    assert report.table().splitlines()[1].startswith("image, slots: whole grid, ")


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_and_global_state_are_unchanged_and_results_reproducible():
    model = random_model({"text": text_source()})
    sources = {"text": model.collate("text", [WORDS])}
    tokens = random_text()
    inputs_before = sources["text"].inputs["tokens"].clone()
    tokens_before = tokens.clone()
    rng_before = torch.get_rng_state()
    one = leakage(model, sources, tokens)
    other = leakage(model, sources, tokens)
    assert torch.equal(inputs_before, sources["text"].inputs["tokens"])
    assert torch.equal(tokens_before, tokens)
    assert torch.equal(rng_before, torch.get_rng_state())
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.slots["text"], other.slots["text"])
    assert torch.equal(one.inputs["text"], other.inputs["text"])
    assert not one.targets.requires_grad


def test_invalid_arguments():
    decoder = random_decoder()
    memory = random_memory()
    tokens = random_tokens(2, 1, 4)[:, 0]
    with pytest.raises(MmxError) as error:
        leakage(random_decoder().train(), memory, tokens)
    assert error.value.code == "leakage.training_mode"
    with pytest.raises(MmxError) as error:
        leakage(tiny_model(), memory, tokens)
    assert error.value.code == "leakage.arguments"
    with pytest.raises(MmxError) as error:
        leakage(decoder, random_memory(batch=4).fold_streams(2), tokens)
    assert (error.value.code, error.value.details["streams"]) == ("leakage.streams", 2)
    with pytest.raises(MmxError) as error:
        leakage(decoder, memory, tokens).lookahead("image", "inputs")
    assert (error.value.code, error.value.details["source"]) == ("leakage.source", "image")
