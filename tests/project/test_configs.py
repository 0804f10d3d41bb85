"""The training configurations: each loads, and those with special starts train with tiny random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parity_cases import byte_tokenizer, save_all
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel
from transformers import ViTImageProcessor as ImageProcessor

from mmx.config.loader import load_config
from mmx.config.schema import RunConfig
from mmx.hub.language_model import is_new
from mmx.models.checkpoint import load_model
from mmx.training.loop import Trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
VOCAB_SIZE = 260
SPECIAL_TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize("name", NAMES)
def test_configuration_loads_and_is_named_after_its_file(name):
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path, RunConfig)
    assert config.output_dir == f"runs/{name}"
    assert path.read_text().splitlines()[0] == f"# mmx train configs/{name}.yaml"


def test_configurations_start_from_runs_of_other_configurations():
    started_from = {}
    for name in NAMES:
        config = load_config(CONFIGS / f"{name}.yaml", RunConfig)
        if config.init is not None:
            started_from[name] = config.init.removeprefix("runs/").removesuffix("/best")
    assert started_from == {
        "box-questions": "train-cpu",
        "distill-student": "distill-teacher",
        "efficientnet-lite": "bundled",
        "finetune-after-scst": "scst",
        "scst": "distill-student",
        "your-images": "bundled",
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with captions, and tiny random models of GPT-2, Llama and ViT."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    for number in range(6):
        Image.new("RGB", (40, 30), (40 * number, 90, 10)).save(folder / f"{number}.png")
    rows = [{"image": f"{n}.png", "captions": ["a red dog runs", "the red dog is running"]} for n in range(6)]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **SPECIAL_TOKENS))
    llama_config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **SPECIAL_TOKENS,
    )
    tokenizer = byte_tokenizer(VOCAB_SIZE, bos_token="<end>", eos_token="<end>")
    save_all(folder / "gpt2", gpt2, tokenizer)
    save_all(folder / "llama", LlamaForCausalLM(llama_config), tokenizer)
    vit_config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, image_size=32
    )
    save_all(folder / "vit", ViTModel(vit_config), ImageProcessor(size={"height": 32, "width": 32}))
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy of `published` for the runs of one test."""
    return Path(shutil.copytree(published, tmp_path / "files"))


def small_document(name: str, folder: Path) -> dict[str, Any]:
    """Return a configuration with the weights, data and sizes of this test; everything else is from the file."""
    document = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    for data in [*document["train"], *document["validation"].values()]:
        data.pop("split", None)
        if data["path"] == "scenes":
            data["num_examples"] = 6
        else:
            data["path"] = str(folder / "list.jsonl")
    if "model" in document:
        _use_small_model(document["model"], folder)
    document["training"] |= {
        "max_steps": 2,
        "per_device_batch_size": 2,
        "mixed_precision": "no",
        "logging_steps": 1,
        "num_workers": 0,
    }
    document["output_dir"] = str(folder / name)
    return document


def _use_small_model(model: dict[str, Any], folder: Path) -> None:
    source = model["sources"]["image"]
    decoder = model["decoder"]
    options = source["options"]
    if source["encoder"] == "pretrained":
        source["options"] = {"name": str(folder / "vit")}
    elif options.pop("pretrained", False):
        options |= {"backbone": "convnext_atto", "size": 64}
    else:
        options |= {"backbone": "resnet10t", "size": 32, "arguments": {}}
    if "pretrained" in decoder:
        decoder["pretrained"] = str(folder / ("gpt2" if "gpt2" in decoder["pretrained"] else "llama"))


@pytest.mark.parametrize("name", ["gpt2-cross-attention", "smollm2-cross-attention", "pretrained-backbone"])
def test_configuration_with_pretrained_weights_trains(folder, name):
    trainer = Trainer(RunConfig.model_validate(small_document(name, folder)), resume=False, quiet=True)
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    best = trainer.run()
    changed = {key for key, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[key])}
    changed_decoder = {key for key in changed if key.startswith("decoder.")}
    changed_encoder = {key for key in changed if key.startswith("sources.image.encoder.")}
    assert changed_decoder
    if name == "pretrained-backbone":
        assert changed_encoder
    else:  # the encoder and the language model are frozen
        assert all(is_new(key) or "lora_" in key for key in changed_decoder)
        assert not changed_encoder
    assert load_model(best).config.decoder.pretrained is None


def test_student_is_distilled_from_two_teachers(folder):
    document = small_document("distill-teacher", folder)
    teachers = []
    for seed in (1, 2):
        document["training"]["seed"] = seed
        document["output_dir"] = str(folder / f"teacher-{seed}")
        teachers.append(str(Trainer(RunConfig.model_validate(document), resume=False, quiet=True).run()))
    student = small_document("distill-student", folder)
    student["init"] = teachers[0]
    assert len(student["training"]["distillation"]["teachers"]) == 2
    student["training"]["distillation"]["teachers"] = teachers
    trainer = Trainer(RunConfig.model_validate(student), resume=False, quiet=True)
    assert trainer.objective.teachers is not None
    best = trainer.run()
    assert load_model(best).config.sources["image"].options["backbone"] == "resnet10t"
