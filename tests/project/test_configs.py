"""The configurations that begin with weights from elsewhere: the same file with random tiny ones takes its steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parity_cases import byte_tokenizer, save_all
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel
from transformers import ViTImageProcessor as Processor

from mmx.config.schema import RunConfig
from mmx.hub.language_model import is_new
from mmx.models.checkpoint import load_model
from mmx.training.loop import Trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZE = 260
FACTS = {"vocab_size": SIZE, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Pictures with captions, and a tiny published model of each sort."""
    torch.manual_seed(0)
    for number in range(6):
        Image.new("RGB", (40, 30), (40 * number, 90, 10)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "captions": ["a red dog runs", "the red dog is running"]} for n in range(6)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpt2 = GPT2LMHeadModel(GPT2Config(**FACTS, n_embd=32, n_layer=3, n_head=4, n_positions=64))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    llama = LlamaForCausalLM(
        LlamaConfig(
            **FACTS, **heads, hidden_size=32, num_hidden_layers=3, intermediate_size=40, tie_word_embeddings=True
        )
    )
    for name, model in {"gpt2": gpt2, "llama": llama}.items():
        save_all(tmp_path / name, model, byte_tokenizer(SIZE, bos_token="<end>", eos_token="<end>"))
    vit = ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, image_size=32)
    )
    vit.save_pretrained(tmp_path / "vit")
    Processor(size={"height": 32, "hidden_size": 32}).save_pretrained(tmp_path / "vit")
    return tmp_path


def stands_in(document: dict[str, Any], place: Path) -> RunConfig:
    """The configuration with the weights, data and sizes of a test; all else is the file's."""
    source, decoder = document["model"]["sources"]["image"], document["model"]["decoder"]
    if source["encoder"] == "pretrained":
        source["options"] = {"name": str(place / "vit")}
    else:
        assert source["options"].pop("pretrained") is True
        source["options"] |= {"backbone": "convnext_atto", "size": 64}
    if "init_from" in decoder:
        decoder["pretrained"] = str(place / ("gpt2" if "gpt2" in decoder["pretrained"] else "llama"))
    for data in [*document["train"], *document["validation"].values()]:
        data.pop("split", None)
        data["path"] = str(place / "list.jsonl")
    document["training"] |= {"max_steps": 2, "per_device_batch_size": 2, "mixed_precision": "no", "logging_steps": 1}
    return RunConfig.model_validate({**document, "output_dir": str(place / "run")})


@pytest.mark.parametrize("name", ["gpt2-looks", "smollm2-looks", "pretrained-backbone"])
def test_it_trains_as_written(place, name):
    config = stands_in(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), place)
    trainer = Trainer(config, resume=False, quiet=True)
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    best = trainer.run()
    moved = {key for key, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[key])}
    decoder = {key for key in moved if key.startswith("decoder.")}
    assert decoder
    if "looks" in name:  # the encoder and the language model stay as they are
        assert all(is_new(key) or "lora_" in key for key in decoder)
        assert not any(key.startswith("sources.image.encoder.") for key in moved)
    else:
        assert any(key.startswith("sources.image.encoder.") for key in moved)
    assert load_model(best).config.decoder.pretrained is None
