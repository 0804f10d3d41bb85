"""Language models as our decoder against transformers: with closed gates, the same logits for any memory."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from parity_cases import TOLERANCE, byte_tokenizer, randomized, relative_difference, save_all
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mmx.config.schema import DecoderConfig
from mmx.errors import CheckpointError, ConfigError
from mmx.hub.language_model import is_new, read_language_model
from mmx.memory import Memory, Segment
from mmx.models.decoder import TextDecoder
from mmx.text.prompts import BOS, CAPTION, EOS, question_prompt

VOCAB_SIZE = 90
EOS_ID = 0
BOS_ID = 1
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3_ROPE |= {"original_max_position_embeddings": 16}
LLAMA = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 44, "max_position_embeddings": 64, "num_key_value_heads": 2}
LLAMA |= {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
GPT2 |= {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID}


def gpt2(**fields):
    return GPT2LMHeadModel(GPT2Config(**GPT2, **fields))


def llama(**fields):
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **fields}))


def qwen2(**fields):
    return Qwen2ForCausalLM(Qwen2Config(**{**LLAMA, **fields}))


MODELS = {
    "gpt2": gpt2,
    "gpt2, not tied": lambda: gpt2(tie_word_embeddings=False),
    "llama, rope scaling": lambda: llama(rope_parameters=LLAMA3_ROPE, head_dim=12),
    "llama, attention bias": lambda: llama(attention_bias=True, num_key_value_heads=4),
    "llama, feed-forward bias": lambda: llama(mlp_bias=True),
    "smollm2": lambda: llama(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "qwen2": qwen2,
    "qwen2, tied": lambda: qwen2(tie_word_embeddings=True),
}
DEFAULT_RUN = ("gpt2", "llama, rope scaling", "llama, attention bias", "qwen2, tied")
PARAMS = [pytest.param(name, marks=[] if name in DEFAULT_RUN else pytest.mark.slow) for name in MODELS]


@pytest.fixture(scope="module", params=PARAMS)
def reference(request):
    """A tiny language model with random weights and biases."""
    torch.manual_seed(0)
    return randomized(MODELS[request.param]())


def save(folder, model):
    """Save a checkpoint; return its folder."""
    tokenizer = byte_tokenizer(model.config.vocab_size, ("<begin>",), bos_token="<end>", eos_token="<end>")
    return save_all(folder, model, tokenizer)


def load_decoder(folder, **fields):
    """Our decoder in float64 and its tokenizer. New tensors are random, except for the gates."""
    config, tensors, tokenizer = read_language_model(folder, DecoderConfig(gate="tanh", dropout=0.0, **fields))
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    decoder = TextDecoder(config, len(tokenizer))
    own_tensors = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    missing, unexpected = decoder.load_state_dict(own_tensors, strict=False)
    assert not unexpected
    assert all(is_new(name) for name in missing)
    for name, parameter in decoder.named_parameters():
        if is_new(name) and not name.endswith("alpha"):
            torch.nn.init.normal_(parameter)
    return decoder.double().eval(), tokenizer


def random_memory(decoder, batch):
    """Seven random slots per row, one of them masked."""
    config = decoder.config
    shape = (len(config.cross_attention_layers), batch, config.num_heads, 7, config.head_dim)
    keys, values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[:, 3] = False
    return Memory(keys, values, mask, (Segment("source", 0, 7, None),))


def with_float64_norms(model):
    """Replace the RMS norms of transformers, which compute in float32 for any input, by those of torch."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


@pytest.mark.parametrize("every", [1, 2])
def test_closed_gates_leave_the_logits_of_the_language_model(reference, tmp_path, every):
    decoder, _ = load_decoder(save(tmp_path, reference), cross_attention_every_n_layers=every)
    lengths = [11, 4, 8]
    longest = max(lengths)
    tokens = torch.randint(2, VOCAB_SIZE, (3, longest), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    memory = random_memory(decoder, 3)
    model = with_float64_norms(deepcopy(reference).double())
    chunks = [slice(0, 3), *(slice(start, start + 1) for start in range(3, longest))]
    with torch.no_grad():
        expected = [model(tokens[row : row + 1, :length]).logits[0] for row, length in enumerate(lengths)]
        one_pass = decoder(tokens[:, None], memory, mask[:, None])[:, 0]
        cache = decoder.new_cache(3, longest)
        steps = [decoder(tokens[:, None, c], memory, mask[:, None, c], cache=cache)[:, 0] for c in chunks]
    for found in (one_pass, torch.cat(steps, 1)):
        for row, length in enumerate(lengths):
            assert relative_difference(found[row, :length], expected[row]) < TOLERANCE


def test_open_gates_change_the_logits(reference, tmp_path):
    """Otherwise the test above would hold without cross-attention."""
    decoder, _ = load_decoder(save(tmp_path, reference))
    tokens = torch.randint(2, VOCAB_SIZE, (1, 1, 5), generator=torch.Generator().manual_seed(1))
    memory = random_memory(decoder, 1)
    with torch.no_grad():
        closed = decoder(tokens, memory)
        for layer in decoder.layers:
            layer.cross_residual.gate.alpha.fill_(0.5)
        assert (decoder(tokens, memory) - closed).abs().max() > 0.1


def test_prompts_are_plain_words(tmp_path):
    tokenizer = read_language_model(save(tmp_path, randomized(llama()))).tokenizer
    prompt = tokenizer.encode_prompt(question_prompt("where "))
    assert prompt == [BOS_ID, *tokenizer.encode(" Question:where? Answer:")]
    assert tokenizer.special_tokens[CAPTION] == []
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (EOS_ID, EOS_ID)


def test_missing_bos_token_is_replaced_by_eos(tmp_path):
    model = randomized(llama(bos_token_id=None, eos_token_id=[BOS_ID, 8]))
    tokenizer = read_language_model(save(tmp_path, model)).tokenizer
    assert tokenizer.special_tokens[BOS] == tokenizer.special_tokens[EOS] == [BOS_ID]


@pytest.mark.parametrize("size", [None, 1, VOCAB_SIZE // 2, VOCAB_SIZE + 9])
def test_tokenizer_of_another_model_is_an_error(tmp_path, size):
    folder = save(tmp_path, gpt2())
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    if size is not None:
        byte_tokenizer(size, bos_token="<end>", eos_token="<end>").save_pretrained(folder)
    with pytest.raises(CheckpointError) as caught:
        read_language_model(folder)
    assert caught.value.code == "hub.tokenizer"
    if size is not None:
        assert (caught.value.details["size"], caught.value.details["expected"]) == (size, VOCAB_SIZE)


def test_stack_saved_without_head_is_read(tmp_path):
    """As "gpt2" itself is published."""
    whole = randomized(gpt2())
    decoder, _ = load_decoder(save(tmp_path, whole.transformer))
    assert torch.equal(decoder.embedding.weight.float(), whole.transformer.wte.weight)


def test_rope_of_older_files_is_read(tmp_path):
    folder = save(tmp_path, randomized(llama()))
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    rewrite_config(folder, rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    config = read_language_model(folder).config
    assert config.rope_theta == 5e5
    assert config.rope_scaling.model_dump() == {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }


def rewrite_config(folder, **fields):
    """Change fields of config.json."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
LINEAR = {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}
MIXED_LAYERS = ["full_attention", "sliding_attention"]
INVALID_CONFIGS = [  # fields of config.json, the error code, what the message names
    ({"model_type": "mamba"}, "hub.model_type", "mamba"),
    ({"rope_parameters": YARN}, "hub.rope_type", "yarn"),
    (LINEAR, "hub.rope_type", "linear"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "hub.config", "factor"),
    ({"use_sliding_window": True}, "hub.unsupported_config", "use_sliding_window"),
    ({"layer_types": MIXED_LAYERS}, "hub.unsupported_config", "sliding_attention"),
    ({"hidden_size": 64}, "hub.tensor_shape", "64"),
    ({"num_hidden_layers": 2}, "hub.unexpected_tensors", "model.layers.2."),
    ({"num_attention_heads": 5}, "hub.config", "do not fit together"),
    ({"attention_bias": True}, "hub.missing_tensors", "model.layers.0.self_attn.q_proj.bias"),
    ({"hidden_act": "xielu"}, "hub.activation", "xielu"),
]


@pytest.mark.parametrize(("fields", "code", "named"), INVALID_CONFIGS, ids=lambda given: str(given)[:40])
def test_invalid_configuration_is_an_error(tmp_path, fields, code, named):
    folder = save(tmp_path, randomized(llama()))
    rewrite_config(folder, **fields)
    with pytest.raises(CheckpointError) as caught:
        read_language_model(folder)
    assert caught.value.code == code
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gate_must_be_tanh(tmp_path):
    folder = save(tmp_path, randomized(llama()))
    with pytest.raises(ConfigError) as caught:
        read_language_model(folder, DecoderConfig())
    assert caught.value.code == "config.gate"
    assert caught.value.details["key"] == "model.decoder.gate"


def test_at_least_one_layer_needs_cross_attention(tmp_path):
    folder = save(tmp_path, randomized(llama()))
    config = DecoderConfig.model_construct(gate="tanh", cross_attention_every_n_layers=4, dropout=0.0)
    with pytest.raises(ConfigError, match="cross_attention_every_n_layers"):
        read_language_model(folder, config)
