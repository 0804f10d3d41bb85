"""Language models as our decoder, against transformers: with the gates shut, the same logits over any memory."""

import json
from copy import deepcopy

import pytest
import torch
from parity_cases import TOLERANCE, byte_tokenizer, saved, randomized
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mmx.config.schema import DecoderConfig
from mmx.errors import CheckpointError, ConfigError
from mmx.hub.language_model import is_new, read_language_model
from mmx.memory import Memory, Segment
from mmx.models.decoder import TextDecoder
from mmx.text.prompts import BOS, CAPTION, EOS, question_prompt

SIZE, END, OPENING = 90, 0, 1
ROPE3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE3 |= {"original_max_position_embeddings": 16}
LLAMA = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 44, "max_position_embeddings": 64, "num_key_value_heads": 2}
LLAMA |= {"bos_token_id": OPENING, "eos_token_id": END}
GPT2 = {"vocab_size": SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
GPT2 |= {"bos_token_id": END, "eos_token_id": END}


def gpt2(**facts):
    return GPT2LMHeadModel(GPT2Config(**GPT2, **facts))


def llama(**facts):
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **facts}))


def qwen2(**facts):
    return Qwen2ForCausalLM(Qwen2Config(**{**LLAMA, **facts}))


MODELS = {
    "gpt2": gpt2,
    "gpt2, not tied": lambda: gpt2(tie_word_embeddings=False),
    "llama, stretched": lambda: llama(rope_parameters=ROPE3, head_dim=12),
    "llama, biases": lambda: llama(attention_bias=True, num_key_value_heads=4),
    "llama, biases of the feed-forward": lambda: llama(mlp_bias=True),
    "smollm2": lambda: llama(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "qwen2": qwen2,
    "qwen2, tied": lambda: qwen2(tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def reference(request):
    """A tiny language model whose weights are drawn, biases too."""
    torch.manual_seed(0)
    return randomized(request.param())


def published(folder, model):
    """A folder as it is published."""
    return saved(folder, model, byte_tokenizer(SIZE, bos_token="<end>", eos_token="<end>", additional="<begin>"))


def decoder_of(folder, **facts):
    """Our decoder in float64 with its weights, and what is new in it drawn large, but for the gates."""
    config, tensors, tokenizer = read_language_model(folder, DecoderConfig(gate="tanh", dropout=0.0, **facts))
    decoder = TextDecoder(config, len(tokenizer))
    lacking, extra = decoder.load_state_dict({n.removeprefix("decoder."): t for n, t in tensors.items()}, strict=False)
    assert not extra and all(map(is_new, lacking)) and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    for name, parameter in decoder.named_parameters():
        if is_new(name) and not name.endswith("prefix_token_ids"):
            torch.nn.init.normal_(parameter)
    return decoder.double().eval(), tokenizer


def some_memory(decoder, batch):
    """Seven slots of noise for each row, one of them hidden."""
    config = decoder.config
    shape = (len(config.looking), batch, config.heads, 7, config.head_size)
    keys, values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[:, 3] = False
    return Memory(keys, values, mask, (Segment("some", 0, 7, None),))


def exact(model):
    """transformers' RMS norm computes in float32 whatever it is given: exchanged for torch's, or nothing could agree
    to more digits than float32 has."""
    for name, part in list(model.named_modules()):
        if type(part).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(len(part.weight), part.variance_epsilon, dtype=torch.float64)
            norm.weight = part.weight
            model.set_submodule(name, norm)
    return model


@pytest.mark.parametrize("every", [1, 2])
def test_with_its_gates_shut_it_speaks_as_it_did(reference, tmp_path, every):
    decoder, _ = decoder_of(published(tmp_path, reference), cross_every=every)
    lengths, longest = [11, 4, 8], 11
    tokens = torch.randint(2, SIZE, (3, longest), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    memory = some_memory(decoder, 3)
    model = exact(deepcopy(reference).double())
    with torch.no_grad():
        expected = [model(tokens[row : row + 1, :length]).logits[0] for row, length in enumerate(lengths)]
        at_once = decoder(tokens[:, None], memory, mask[:, None])[:, 0]
        cache = decoder.new_cache(3, longest)
        parts = [(0, 3), *((start, start + 1) for start in range(3, longest))]
        steps = [decoder(tokens[:, None, a:b], memory, mask[:, None, a:b], cache=cache)[:, 0] for a, b in parts]
    for found in (at_once, torch.cat(steps, 1)):
        for row, length in enumerate(lengths):
            worst = float((found[row, :length] - expected[row]).abs().max() / expected[row].abs().max())
            assert worst < TOLERANCE, f"{worst:.1e} of the largest logit in row {row}"


def test_an_open_gate_lets_the_memory_in(reference, tmp_path):
    """Or the test above would compare what never looks."""
    decoder, _ = decoder_of(published(tmp_path, reference))
    tokens = torch.randint(2, SIZE, (1, 1, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        shut = decoder(tokens, some_memory(decoder, 1))
        for block in decoder.layers:
            block.cross_residual.gate.alpha.fill_(0.5)
        assert (decoder(tokens, some_memory(decoder, 1)) - shut).abs().max() > 0.1


def test_its_tokenizer_speaks_our_prompts_in_plain_words(tmp_path):
    _, _, tokenizer = read_language_model(published(tmp_path, randomized(llama())))
    assert tokenizer.encode_prompt(question_prompt("where ")) == [OPENING, *tokenizer.encode(" Question:where? Answer:")]
    assert tokenizer.special_tokens[CAPTION] == []
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (END, END)


def test_a_model_without_an_opening_is_opened_by_its_end(tmp_path):
    _, _, tokenizer = read_language_model(published(tmp_path, randomized(llama(bos_token_id=None, eos_token_id=[7, 8]))))
    assert tokenizer.special_tokens[BOS] == tokenizer.special_tokens[EOS] == [7]


def test_a_stack_saved_without_its_head_is_read_as_well(tmp_path):
    """As "gpt2" itself is published."""
    whole = randomized(gpt2())
    decoder, _ = decoder_of(published(tmp_path, whole.transformer))
    assert torch.equal(decoder.embedding.weight.float(), whole.transformer.wte.weight)


def test_older_files_tell_their_rope_in_two_places(tmp_path):
    folder = published(tmp_path, randomized(llama()))
    told = {**ROPE3, "rope_parameters": None}
    change(
        folder,
        rope_parameters=None,
        rope_theta=5e5,
        rope_scaling={k: v for k, v in told.items() if v and k != "rope_theta"},
    )
    config, _, _ = read_language_model(folder)
    assert config.rope_theta == 5e5
    assert config.rope_scaling.model_dump() == {"factor": 8.0, "low": 1.0, "high": 4.0, "original_positions": 16}


def change(folder, **facts):
    """Other facts in config.json."""
    path = f"{folder}/config.json"
    with open(path) as file:
        document = json.load(file)
    with open(path, "w") as file:
        json.dump(document | facts, file)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"model_type": "mamba"}, r"has model_type 'mamba'; expected a language model of gpt2, llama, qwen2\.$"),
        ({"rope_parameters": YARN}, r"has the rope type 'yarn'; expected default or llama3\.$"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"has the rope type 'linear'; exp",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"config\.json of .* has no 'factor'; expected that of a llama"),
        ({"use_sliding_window": True}, r"has use_sliding_window True; mmx reads its family with False alone\.$"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"has layers of 'sliding_attention'; mmx reads"),
        ({"hidden_size": 64}, r"which does not fit its config\.json|expected \[90, 64\]"),
        ({"num_hidden_layers": 2}, r"holds model\.layers\.2\..* and 8 more, which its family has not"),
        ({"num_attention_heads": 5}, "has facts that do not fit together; expected that of a llama"),
        ({"attention_bias": True}, r"lacks model\.layers\.0\.self_attn\.q_proj\.bias; expected all tensors"),
        ({"hidden_act": "xielu"}, r"has the activation 'xielu'; expected one of"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path, facts, sentence):
    folder = published(tmp_path, randomized(llama()))
    change(folder, **facts)
    with pytest.raises((CheckpointError, ConfigError), match=sentence) as caught:
        read_language_model(folder)
    assert "\n" not in str(caught.value)


def test_a_decoder_whose_gate_is_open_is_refused(tmp_path):
    folder = published(tmp_path, randomized(llama()))
    with pytest.raises(ConfigError, match=r"gate is 'none' with init_from, .* set model\.decoder\.gate=tanh\.$"):
        read_language_model(folder, DecoderConfig())


def test_looking_less_often_than_there_are_blocks_is_refused(tmp_path):
    folder = published(tmp_path, randomized(llama()))
    ours = DecoderConfig.model_construct(gate="tanh", cross_every=4, dropout=0.0)
    with pytest.raises(ConfigError, match="cross_every 4 is more than layers 3"):
        read_language_model(folder, ours)
