"""A decoder from a language model: cross-attention and adapters are trained, its own weights stay bit-identical."""

import builtins
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from parity_cases import byte_tokenizer, randomized, save_all
from torch import Tensor
from toy_runs import RecordingTrainer, number_config, state_bytes, write_numbers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mmx
from mmx.config.loader import load_config
from mmx.config.schema import RunConfig
from mmx.errors import ConfigError, TrainingError
from mmx.hub.language_model import is_new, read_language_model
from mmx.models.checkpoint import load_model, read_tensors
from mmx.models.model import Model
from mmx.training.loop import Trainer, train
from mmx.training.param_groups import set_training_mode

VOCAB_SIZE = 260
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
OPTIONS = {
    "max_steps": 30,
    "learning_rate": 0.02,
    "warmup_steps": 4,
    "save_steps": 15,
    "ema_decay": 0.5,
    "label_smoothing": 0.0,
}
STOP = 20  # not at a save
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv", "out", "up"]}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with numbers to train on and two language models: GPT-2, and Llama, whose feed-forward is gated."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, **sizes, **SPECIAL_TOKENS))
    llama_config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **SPECIAL_TOKENS,
    )
    tokenizer = byte_tokenizer(VOCAB_SIZE, bos_token="<end>", eos_token="<end>")
    for name, model in {"gpt2": gpt2, "llama": LlamaForCausalLM(llama_config)}.items():
        save_all(folder / name, randomized(model, size=0.3), tokenizer)
    write_numbers(folder)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy of `published` that a test may change."""
    return Path(shutil.copytree(published, tmp_path / "models"))


def lm_config(
    folder: Path,
    language_model: str = "gpt2",
    run: str = "run",
    validate: bool = False,
    decoder: dict[str, object] | None = None,
    **training: object,
) -> RunConfig:
    """Return a run on numbers whose decoder is a pretrained language model."""
    config = number_config(str(folder / "numbers.jsonl"), folder / run, validate, **{**OPTIONS, **training})
    document = config.model_dump()
    pretrained = {"pretrained": str(folder / language_model), "gate": "tanh", "dropout": 0.1}
    document["model"]["decoder"] = {**pretrained, **(decoder or {})}
    return RunConfig.model_validate(document)


def build_trainer(config: RunConfig) -> Trainer:
    return Trainer(config, resume=False, quiet=True)


def run_to_end(config: RunConfig, resume: bool = False) -> RecordingTrainer:
    trainer = RecordingTrainer(config, resume)
    trainer.run()
    return trainer


def stop_and_resume(folder: Path, config: RunConfig) -> RecordingTrainer:
    """Stop a run, remove the language model, resume, and return the trainer of the second part."""
    stopped = RecordingTrainer(config)
    stopped.stop_in = STOP
    with pytest.raises(TrainingError):
        stopped.run()
    shutil.rmtree(folder / "gpt2")
    return run_to_end(config, resume=True)


def assert_loss_falls(trainer: RecordingTrainer) -> None:
    losses = [step.loss for step in trainer.recorded]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5]), losses


def trained_names(model: Model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def language_model_names(model: Model) -> set[str]:
    """Return the names of the parameters that were read from the language model."""
    return {name for name, _ in model.named_parameters() if name.startswith("decoder.") and not is_new(name)}


@pytest.mark.parametrize("language_model", ["gpt2", "llama"])
def test_cross_attention_is_trained_and_language_model_is_unchanged(folder, language_model):
    _, expected, _ = read_language_model(str(folder / language_model))
    trainer = RecordingTrainer(lm_config(folder, language_model, decoder={"cross_attention_every_n_layers": 2}))
    best = trainer.run()
    assert_loss_falls(trainer)
    assert language_model_names(trainer.model) == set(expected)
    shutil.rmtree(folder / language_model)
    for model in (trainer.model, load_model(best)):
        weights = model.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        gates = [weight for name, weight in weights.items() if name.endswith("gate.alpha")]
        assert len(gates) == 1
        assert all(gate.abs() > 0.01 for gate in gates)
    assert model.config.decoder.pretrained is None
    assert model.config.decoder.cross_attention_every_n_layers == 2
    assert model.config.decoder.dropout == 0.1
    question = model.tokenizer.encode_prompt(model.prompt("what"))
    assert question == [0, *model.tokenizer.encode(" Question:what? Answer:")]
    assert model.tokenizer.encode_prompt(model.prompt()) == [0]


def train_on_words(language_model: GPT2LMHeadModel, words: Tensor) -> None:
    optimizer = torch.optim.AdamW(language_model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        language_model(words, labels=words).loss.backward()
        optimizer.step()


def test_cross_attention_adds_information_that_the_language_model_lacks(tmp_path):
    """Without the memory, two equally likely words of five tokens cost ln 2 a text, which is ln 2 / 5 a token."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SPECIAL_TOKENS,
    )
    language_model = GPT2LMHeadModel(config)
    tokenizer = byte_tokenizer(VOCAB_SIZE, bos_token="<end>", eos_token="<end>")
    train_on_words(language_model, torch.tensor([[0, *tokenizer.encode(word), 0] for word in ("high", "deep")]))
    save_all(tmp_path / "gpt2", language_model, tokenizer)
    numbers = [n for n in range(-10, 11) if n]
    rows = [{"numbers": [n / 10], "captions": ["high" if n > 0 else "deep"]} for n in numbers]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_steps": 40, "per_device_batch_size": 8, "texts_per_image": 1}
    trainer = RecordingTrainer(lm_config(tmp_path, decoder={"dropout": 0.0}, **options))
    best = trainer.run()
    losses = [step.loss for step in trainer.recorded]
    assert sum(losses[:3]) / 3 > math.log(2) / 5
    assert sum(losses[-5:]) / 5 < 0.75 * math.log(2) / 5, losses
    shutil.rmtree(tmp_path / "gpt2")
    pipeline = mmx.load(str(best))
    assert [pipeline.caption(pipeline.encode(numbers=[[x]])) for x in (0.9, -0.9)] == ["high", "deep"]


def test_run_resumes_bit_equal_without_the_language_model(folder):
    run_to_end(lm_config(folder, run="whole"))
    resumed = stop_and_resume(folder, lm_config(folder, run="resumed"))
    assert [step.step for step in resumed.recorded] == list(range(STOP + 1, OPTIONS["max_steps"] + 1))
    assert state_bytes(folder / "resumed") == state_bytes(folder / "whole")


def test_param_groups_select_trained_parts_of_the_language_model(folder):
    model = build_trainer(lm_config(folder)).model
    everything = {name for name, _ in model.named_parameters()}
    new = everything - language_model_names(model)
    assert trained_names(model) == new

    def trained_with(**param_groups: dict[str, object]) -> set[str]:
        groups = {name.replace("__", "."): options for name, options in param_groups.items()}
        return trained_names(build_trainer(lm_config(folder, param_groups=groups)).model)

    assert trained_with(decoder={"freeze": False}) == everything
    assert trained_with(decoder__norm={}) == new | {"decoder.norm.weight", "decoder.norm.bias"}
    assert trained_with(decoder={"freeze": True}) == {name for name in everything if name.startswith("sources.")}


def test_frozen_layers_have_no_dropout(folder):
    trainer = build_trainer(lm_config(folder))
    set_training_mode(trainer.model, trainer.options.param_groups)
    layer = trainer.model.decoder.layers[0]
    assert not trainer.model.decoder.embedding.dropout.training
    assert not layer.self_residual.dropout.training
    assert not layer.feed_residual.dropout.training
    assert layer.cross_residual.dropout.training
    assert trainer.model.sources["numbers"].training


def test_gate_none_is_refused(folder):
    with pytest.raises(ConfigError, match="model.decoder.gate"):
        build_trainer(lm_config(folder, decoder={"gate": "none"}))


# ---- adapters ----------------------------------------------------------------------------------------------------


def compute_logits(model: Model) -> Tensor:
    """Return the logits of some tokens over three inputs."""
    tokens = torch.randint(1, VOCAB_SIZE, (3, 1, 9), generator=torch.Generator().manual_seed(1))
    inputs = [[0.1], [0.5, 0.2], [0.9, 0.1, 0.3]]
    with torch.inference_mode():
        model.eval()
        return model.decoder(tokens, model.encode({"numbers": model.collate("numbers", inputs)}, 3))


def hide_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import peft` fail."""
    real_import = builtins.__import__

    def import_without_peft(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_without_peft)


def test_new_adapters_do_not_change_the_logits(folder):
    plain = build_trainer(lm_config(folder)).model
    adapted = build_trainer(lm_config(folder, lora=LORA)).model
    weights = {}
    for name, weight in adapted.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer", "")] = weight
    assert weights.keys() == plain.state_dict().keys()
    assert len(adapted.state_dict()) > len(weights)
    plain.load_state_dict(weights)
    assert torch.equal(compute_logits(plain), compute_logits(adapted))


def test_adapters_are_trained_and_merged_in_checkpoints(folder, monkeypatch):
    _, known, _ = read_language_model(str(folder / "gpt2"))
    trainer = RecordingTrainer(lm_config(folder, lora=LORA, validate=True))
    best = trainer.run()
    assert_loss_falls(trainer)
    trained = trained_names(trainer.model)
    adapters = {name for name in trained if ".lora_" in name}
    assert len(adapters) == 2 * 2 * 4, "two matrices, two layers, qkv, out, up and out"
    assert not any("cross_attention" in name for name in adapters)
    assert not language_model_names(trainer.model) & trained - adapters
    for name, weight in trainer.model.state_dict().items():
        plain_name = name.replace(".base_layer", "")
        if plain_name in known:
            assert torch.equal(weight, known[plain_name]), name
    trainer.average.swap(trainer.model)
    expected = compute_logits(trainer.model)
    trainer.average.swap(trainer.model)
    hide_peft(monkeypatch)
    last = load_model(folder / "run" / "last")
    weights = last.state_dict()
    assert not any("lora" in name or "base_layer" in name for name in weights)
    difference = float((compute_logits(last) - expected).abs().max() / expected.abs().max())
    print(f"{difference:.1e} of the largest logit")
    assert difference < 1e-5
    changed = [name for name in known if not torch.equal(weights[name], known[name])]
    assert len(changed) == 2 * 4
    assert load_model(best).config == last.config


@pytest.mark.parametrize("ema_decay", [0.5, 0.0])
def test_run_with_adapters_resumes_bit_equal(folder, ema_decay):
    options = {"lora": {**LORA, "lora_dropout": 0.2}, "ema_decay": ema_decay}
    run_to_end(lm_config(folder, run="whole", **options))
    stop_and_resume(folder, lm_config(folder, run="resumed", **options))
    assert state_bytes(folder / "resumed") == state_bytes(folder / "whole")
    raw = read_tensors(folder / "resumed" / "last" / "training" / "model.safetensors")
    assert any("lora_B" in name and tensor.any() for name, tensor in raw.items())


def test_adapters_freeze_the_decoder_of_a_checkpoint(folder):
    checkpoint = RecordingTrainer(lm_config(folder, max_steps=6)).run()
    document = lm_config(folder, run="continued", lora=LORA, max_steps=6).model_dump()
    document |= {"model": None, "init": str(checkpoint)}
    trainer = RecordingTrainer(RunConfig.model_validate(document))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.run()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained_names(trainer.model)
    assert not language_model_names(load_model(checkpoint)) & changed
    load_model(folder / "continued" / "last")


def test_written_configuration_has_the_given_groups_only(folder):
    build_trainer(lm_config(folder, lora=LORA))
    written = load_config(folder / "run" / "config.yaml", RunConfig)
    assert written.training.lora.r == 4
    assert written.training.param_groups == {}


def test_adapters_need_peft_and_known_targets(folder, monkeypatch):
    gate = {"target_modules": ["gate"]}
    with pytest.raises(ConfigError) as error:
        build_trainer(lm_config(folder, lora=gate))
    assert error.value.code == "training.lora_target"
    assert error.value.details == {"given": "gate", "expected": ["out", "qkv", "up"]}
    build_trainer(lm_config(folder, "llama", run="llama_run", lora=gate))
    hide_peft(monkeypatch)
    with pytest.raises(ConfigError) as error:
        train(lm_config(folder, run="none", lora=LORA), quiet=True)
    assert error.value.code == "training.peft_missing"
