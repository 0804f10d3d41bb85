"""A decoder taken from a language model: it learns to look, and what it knew stays as it was, to the bit."""

import builtins
import json
import math
import shutil

import pytest
import torch
from parity_cases import byte_tokenizer, save_all, randomized
from toy_runs import Watched, number_config, state_bytes, write_numbers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mmx
from mmx.config.loader import load_config
from mmx.config.schema import RunConfig
from mmx.errors import ConfigError, MmxError
from mmx.hub.language_model import is_new, read_language_model
from mmx.models.checkpoint import load_model, read_tensors
from mmx.training import loop
from mmx.training.loop import Trainer
from mmx.training.optim import set_mode

SIZE = 260
STEPS = {
    "max_steps": 40,
    "learning_rate": 0.02,
    "warmup_steps": 4,
    "save_steps": 20,
    "ema_decay": 0.5,
    "label_smoothing": 0.0,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv", "out", "up"]}


@pytest.fixture
def place(tmp_path):
    """A folder with numbers to learn from and two published language models: speaker, and one with gates in its
    feed-forward."""
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, **special))
    facts = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    facts |= {"intermediate_size": 40, "vocab_size": SIZE, "max_position_embeddings": 64}
    llama = LlamaForCausalLM(LlamaConfig(**facts, **special, tie_word_embeddings=True))
    for name, model in {"speaker": gpt2, "llama": llama}.items():
        save_all(tmp_path / name, randomized(model, size=0.3), byte_tokenizer(SIZE, bos_token="<end>", eos_token="<end>"))
    return tmp_path


def config(place, speaker="speaker", out="run", validate=False, decoder=None, **training):
    """A run on numbers whose decoder is a language model."""
    path = place / "numbers.jsonl"
    data = str(path) if path.exists() else write_numbers(place)
    given = number_config(data, place / out, validate, **{**STEPS, **training}).model_dump()
    given["model"]["decoder"] = {"pretrained": str(place / speaker), "gate": "tanh", "dropout": 0.1, **(decoder or {})}
    return RunConfig.model_validate(given)


def from_language_model(model):
    """The names of what was read from it."""
    return {name for name, _ in model.named_parameters() if name.startswith("decoder.") and not is_new(name)}


@pytest.mark.parametrize("speaker", ["speaker", "llama"])
def test_it_learns_to_look_and_forgets_nothing(place, speaker):
    _, known, _ = read_language_model(str(place / speaker))
    run = Watched(config(place, speaker, decoder={"cross_attention_every_n_layers": 2}))
    best = run.run()
    losses = [loss for _, loss, *_ in run.taken]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5]), losses
    assert from_language_model(run.model) == set(known)
    shutil.rmtree(place / speaker)
    for model in (run.model, load_model(best)):
        weights = model.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in known.items())
        gates = [w for name, w in weights.items() if name.endswith("gate.alpha")]
        assert len(gates) == 1 and all(gate.abs() > 0.01 for gate in gates)
    assert model.config.decoder.pretrained is None
    assert model.config.decoder.cross_attention_every_n_layers == 2 and model.config.decoder.dropout == 0.1
    assert model.tokenizer.encode_prompt(model.prompt("what")) == [0, *model.tokenizer.encode(" Question:what? Answer:")]
    assert model.tokenizer.encode_prompt(model.prompt()) == [0]


def test_it_sees_what_it_could_not_know(tmp_path):
    """A language model that has learned two words, each as likely, chooses once it can look: for one that cannot, there
    are ln 2 nats in a text, 0.139 a token."""
    torch.manual_seed(0)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    facts = {"vocab_size": SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0}
    speaker = GPT2LMHeadModel(GPT2Config(**facts, **still, eos_token_id=0))
    tokenizer = byte_tokenizer(SIZE, bos_token="<end>", eos_token="<end>")
    words = torch.tensor([[0, *tokenizer.encode(word), 0] for word in ("high", "deep")])
    optimizer = torch.optim.AdamW(speaker.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        speaker(words, labels=words).loss.backward()
        optimizer.step()
    folder = save_all(tmp_path / "speaker", speaker, tokenizer)
    rows = [{"numbers": [n / 10], "captions": ["high" if n > 0 else "deep"]} for n in range(-10, 11) if n]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Watched(config(tmp_path, batch_size=8, streams=1, decoder={"dropout": 0.0}))
    best = run.run()
    losses = [loss for _, loss, *_ in run.taken]
    assert sum(losses[:3]) / 3 > math.log(2) / 5
    assert sum(losses[-5:]) / 5 < 0.75 * math.log(2) / 5, losses
    shutil.rmtree(folder)
    pipe = mmx.load(str(best))
    assert pipe.caption(pipe.encode(numbers=[[0.9], [-0.9]])) == ["high", "deep"]


def test_a_run_goes_on_to_the_bit_without_the_language_model(place):
    through = Watched(config(place, out="through"))
    through.run()
    halted = Watched(config(place, out="halted"))
    halted.stop_in = 25
    with pytest.raises(MmxError):
        halted.run()
    shutil.rmtree(place / "speaker")
    goes_on = Watched(config(place, out="halted"), resume=True)
    goes_on.run()
    assert [step for step, *_ in goes_on.taken] == list(range(26, 41))
    assert state_bytes(place / "halted") == state_bytes(place / "through")


def trained(trainer):
    return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


def test_its_parts_are_trained_when_they_are_named(place):
    everything = {name for name, _ in Trainer(config(place, out="a"), False, True).model.named_parameters()}
    known = from_language_model(Trainer(config(place, out="a2"), False, True).model)
    assert trained(Trainer(config(place, out="b"), False, True)) == everything - known
    opened = {"decoder": {"freeze": False}}
    assert trained(Trainer(config(place, out="c", parts=opened), False, True)) == everything
    norms = {"decoder.norm": {}}
    assert trained(Trainer(config(place, out="d", parts=norms), False, True)) == (everything - known) | {
        "decoder.norm.weight",
        "decoder.norm.bias",
    }
    shut = {"decoder": {"freeze": True}}
    left = trained(Trainer(config(place, out="e", parts=shut), False, True))
    assert left == {name for name in everything if name.startswith("sources.")}


def test_what_is_frozen_stands_still(place):
    """Dropout too: the language model is asked as it was trained to be asked."""
    trainer = Trainer(config(place), False, True)
    set_mode(trainer.model, trainer.options.param_groups)
    block = trainer.model.decoder.layers[0]
    assert not trainer.model.decoder.embedding.dropout.training
    assert not block.self_residual.dropout.training and not block.feed_residual.dropout.training
    assert block.cross_residual.dropout.training and trainer.model.sources["numbers"].training


def test_a_gate_that_is_open_is_refused(place):
    with pytest.raises(ConfigError, match=r"needs 'tanh'.*; set model\.decoder\.gate=tanh\.$"):
        Trainer(config(place, decoder={"gate": "none"}), False, True)


# ---- adapters --------------------------------------------------------------------------------------------------


def answers(model):
    """The logits of some tokens over three inputs."""
    tokens = torch.randint(1, SIZE, (3, 1, 9), generator=torch.Generator().manual_seed(1))
    raw = [[0.1], [0.5, 0.2], [0.9, 0.1, 0.3]]
    with torch.inference_mode():
        model.eval()
        return model.decoder(tokens, model.encode({"numbers": model.collate("numbers", raw)}, 3))


def test_adapters_change_nothing_at_the_start(place):
    plain = Trainer(config(place, out="plain"), False, True).model
    adapted = Trainer(config(place, out="adapted", lora=LORA), False, True).model
    weights = plain.state_dict()
    others = {n.replace(".base_layer", ""): w for n, w in adapted.state_dict().items() if ".lora_" not in n}
    assert others.keys() == weights.keys() and len(adapted.state_dict()) > len(weights)
    plain.load_state_dict(others)
    assert torch.equal(answers(plain), answers(adapted))


def test_adapters_learn_and_are_handed_over_added_up(place, monkeypatch):
    _, known, _ = read_language_model(str(place / "speaker"))
    run = Watched(config(place, lora=LORA, validate=True))
    best = run.run()
    losses = [loss for _, loss, *_ in run.taken]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5]), losses
    names = trained(run)
    adapters = {name for name in names if ".lora_" in name}
    assert len(adapters) == 2 * 2 * 4, "two matrices, two blocks, qkv, out, up and out"
    assert not any("cross_attention" in name for name in adapters)
    assert not from_language_model(run.model) & names - adapters
    for name, weight in run.model.state_dict().items():
        if (own := name.replace(".base_layer", "")) in known:
            assert torch.equal(weight, known[own]), name
    run.average.swap(run.model)
    expected = answers(run.model)
    run.average.swap(run.model)
    without_peft(monkeypatch)
    last = load_model(place / "run" / "last")
    assert not any("lora" in name or "base_layer" in name for name in last.state_dict())
    difference = float((answers(last) - expected).abs().max() / expected.abs().max())
    print(f"{difference:.1e} of the largest logit")
    assert difference < 1e-5
    changed = [
        name for name, weight in last.state_dict().items() if name in known and not torch.equal(weight, known[name])
    ]
    assert len(changed) == 2 * 4
    assert load_model(best).config == last.config


def without_peft(monkeypatch):
    """As on a machine where it is not installed."""
    found = builtins.__import__

    def lacking(name, *rest, **named):
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return found(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", lacking)


@pytest.mark.parametrize("ema_decay", [0.5, 0.0])
def test_adapters_go_on_to_the_bit(place, ema):
    through = Watched(config(place, out="through", lora={**LORA, "dropout": 0.2}, ema=ema))
    through.run()
    halted = Watched(config(place, out="halted", lora={**LORA, "dropout": 0.2}, ema=ema))
    halted.stop_in = 25
    with pytest.raises(MmxError):
        halted.run()
    goes_on = Watched(config(place, out="halted", lora={**LORA, "dropout": 0.2}, ema=ema), resume=True)
    goes_on.run()
    assert state_bytes(place / "halted") == state_bytes(place / "through")
    raw = read_tensors(place / "halted" / "last" / "training" / "model.safetensors")
    assert any("lora_B" in name and tensor.any() for name, tensor in raw.items())


def test_adapters_of_a_checkpoint_freeze_its_decoder(place):
    """Without a language model too: what an adapter is for is to leave the rest as it is."""
    folder = Watched(config(place)).run()
    given = config(place, out="further", lora=LORA).model_dump() | {"model": None, "init": str(folder)}
    run = Watched(RunConfig.model_validate(given))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.run()
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained(run)
    assert not from_language_model(load_model(folder)) & changed
    load_model(place / "further" / "last")


def test_a_run_with_adapters_tells_of_them_in_its_configuration(place):
    Trainer(config(place, lora=LORA), False, True)
    written = load_config(place / "run" / "config.yaml", RunConfig)
    assert written.training.lora.r == 4 and written.training.param_groups == {}


def test_adapters_without_peft_or_without_a_map_are_refused(place, monkeypatch):
    with pytest.raises(ConfigError, match=r"targets names 'gate'; expected some of out, qkv, up\.$"):
        Trainer(config(place, lora={"target_modules": ["gate"]}), False, True)
    Trainer(config(place, "llama", out="other", lora={"target_modules": ["gate"]}), False, True)
    without_peft(monkeypatch)
    with pytest.raises(ConfigError, match=r"^training\.lora needs peft, .* pip install 'mmx\[lora\]'\.$"):
        loop.train(config(place, out="none", lora=LORA), quiet=True)
