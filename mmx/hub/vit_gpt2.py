"""A vision encoder with a GPT-2 that cross-attends to it: transformers' VisionEncoderDecoderModel.

Li et al. 2023, "TrOCR", section 3. Captioners such as ViT-GPT2.
"""

from __future__ import annotations

import torch

from mmx.config.schema import ModelConfig
from mmx.hub import gpt2
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint
from mmx.hub.hf_config import image_source, read_generation, read_tokenizer, special_token_id
from mmx.hub.weight_mapping import linear

PREFIX = "decoder.transformer."
HEAD = "decoder.lm_head.weight"
BRIDGE = "enc_to_dec_proj"
PROJECTION = "sources.image.projection"


def conversion(checkpoint: HFCheckpoint) -> ConversionSpec:
    """Return configuration and weight mappings of a checkpoint."""
    config = checkpoint.config["decoder"]
    has_bridge = f"{BRIDGE}.weight" in checkpoint.tensors
    is_untied = has_untied_head(checkpoint, HEAD, f"{PREFIX}wte.weight")
    decoder = gpt2.decoder_config(checkpoint, config, tie_word_embeddings=not is_untied)
    source = image_source(checkpoint, checkpoint.config["encoder"], decoder.hidden_size if has_bridge else None)
    special_tokens = special_token_ids(checkpoint)
    return ConversionSpec(
        config=ModelConfig(
            sources={"image": source}, decoder=decoder, vocab_size=config["vocab_size"], special_tokens=special_tokens
        ),
        tokenizer=read_tokenizer(checkpoint, special_tokens),
        generation=read_generation(checkpoint, prompt_length=1),
        weights=[
            *gpt2.decoder_weights(PREFIX, decoder.num_layers, HEAD if is_untied else None),
            *gpt2.cross_attention_weights(PREFIX, decoder.num_layers, PROJECTION),
            *(linear(f"{PROJECTION}.bridge", BRIDGE) if has_bridge else []),
        ],
        dropped=(*(() if is_untied else (HEAD,)), rf"{PREFIX}h\.\d+\.{gpt2.BUFFERS}"),
        encoders={"image": "encoder."},
    )


def special_token_ids(checkpoint: HFCheckpoint) -> dict[str, list[int]]:
    """Return the ids of pad, bos and eos. A missing start token is GPT-2's bos token, a missing pad token is eos."""
    config = checkpoint.config["decoder"]
    bos = special_token_id(checkpoint, "decoder_start_token_id", {"decoder_start_token_id": config["bos_token_id"]})
    eos = special_token_id(checkpoint, "eos_token_id", config)
    pad = special_token_id(checkpoint, "pad_token_id", {"pad_token_id": eos})
    return {"pad": [pad], "bos": [bos], "eos": [eos], "caption": []}


def has_untied_head(checkpoint: HFCheckpoint, head: str, embedding: str) -> bool:
    """Return whether the output matrix differs from the embedding. The tensors are compared: flags are often wrong."""
    tensors = checkpoint.tensors
    return head in tensors and embedding in tensors and not torch.equal(tensors[head], tensors[embedding])
