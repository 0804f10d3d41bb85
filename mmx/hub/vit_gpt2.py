"""A vision encoder with a GPT-2 that looks at it (Li et al. 2023, "TrOCR", section 3, in transformers'
VisionEncoderDecoderModel): ViT-GPT2 and its like, which caption."""

from __future__ import annotations

import torch

from mmx.config.schema import ModelConfig
from mmx.hub import gpt2
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint
from mmx.hub.hf_config import image_source, read_generation, read_tokenizer, special_token_id
from mmx.hub.weight_mapping import linear

PREFIX, HEAD, BRIDGE = "decoder.transformer.", "decoder.lm_head.weight", "enc_to_dec_proj"
PROJECTION = "sources.image.projection"


def conversion(published: HFCheckpoint) -> ConversionSpec:
    """The config map and the weight map."""
    config, tensors = published.config["decoder"], published.tensors
    bridged, own_head = f"{BRIDGE}.weight" in tensors, has_own_head(published, HEAD, f"{PREFIX}wte.weight")
    decoder = gpt2.decoder_config(published, config, tied=not own_head)
    start = special_token_id(published, "decoder_start_token_id", {"decoder_start_token_id": config["bos_token_id"]})
    end = special_token_id(published, "eos_token_id", config)
    marks = {"pad": [special_token_id(published, "pad_token_id", {"pad_token_id": end})], "bos": [start], "eos": [end]}
    marks["caption"] = []
    source = image_source(published, published.config["encoder"], decoder.hidden_size if bridged else None)
    return ConversionSpec(
        config=ModelConfig(
            sources={"image": source}, decoder=decoder, vocab_size=config["vocab_size"], special_tokens=marks
        ),
        tokenizer=read_tokenizer(published, marks),
        generation=read_generation(published, prompt=1),
        weights=[
            *gpt2.decoder_weights(PREFIX, decoder.num_layers, HEAD if own_head else None),
            *gpt2.cross_attention_weights(PREFIX, decoder.num_layers, PROJECTION),
            *(linear(f"{PROJECTION}.bridge", BRIDGE) if bridged else []),
        ],
        dropped=(*(() if own_head else (HEAD,)), rf"{PREFIX}h\.\d+\.{gpt2.BUFFERS}"),
        encoders={"image": "encoder."},
    )


def has_own_head(published: HFCheckpoint, head: str, table: str) -> bool:
    """Whether the output matrix is another than the embedding: weights are believed, flags have been wrong."""
    tensors = published.tensors
    return head in tensors and table in tensors and not torch.equal(tensors[head], tensors[table])
