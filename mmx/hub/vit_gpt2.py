"""A vision encoder with a GPT-2 that looks at it (Li et al. 2023, "TrOCR", section 3, in transformers'
VisionEncoderDecoderModel): ViT-GPT2 and its like, which caption."""

from __future__ import annotations

import torch

from mmx.config.schema import ModelConfig
from mmx.hub import gpt2
from mmx.hub.conversion import Plan
from mmx.hub.hf_checkpoint import Published
from mmx.hub.hf_config import picture_source, read_generation, read_tokenizer, special
from mmx.hub.weight_mapping import linear

PREFIX, HEAD, BRIDGE = "decoder.transformer.", "decoder.lm_head.weight", "enc_to_dec_proj"
PROJECTION = "sources.image.projection"


def plan(published: Published) -> Plan:
    """The config map and the weight map."""
    config, tensors = published.config["decoder"], published.tensors
    bridged, own_head = f"{BRIDGE}.weight" in tensors, has_own_head(published, HEAD, f"{PREFIX}wte.weight")
    decoder = gpt2.decoder_config(published, config, tied=not own_head)
    start = special(published, "decoder_start_token_id", {"decoder_start_token_id": config["bos_token_id"]})
    end = special(published, "eos_token_id", config)
    marks = {"pad": [special(published, "pad_token_id", {"pad_token_id": end})], "bos": [start], "eos": [end]}
    marks["caption"] = []
    source = picture_source(published, published.config["encoder"], decoder.width if bridged else None)
    return Plan(
        config=ModelConfig(sources={"image": source}, decoder=decoder, vocabulary=config["vocab_size"], marks=marks),
        tokenizer=read_tokenizer(published, marks),
        generation=read_generation(published, prompt=1),
        weights=[
            *gpt2.decoder_weights(PREFIX, decoder.layers, HEAD if own_head else None),
            *gpt2.looking_weights(PREFIX, decoder.layers, PROJECTION),
            *(linear(f"{PROJECTION}.bridge", BRIDGE) if bridged else []),
        ],
        dropped=(*(() if own_head else (HEAD,)), rf"{PREFIX}h\.\d+\.{gpt2.BUFFERS}"),
        encoders={"image": "encoder."},
    )


def has_own_head(published: Published, head: str, table: str) -> bool:
    """Whether the output matrix is another than the embedding: weights are believed, flags have been wrong."""
    tensors = published.tensors
    return head in tensors and table in tensors and not torch.equal(tensors[head], tensors[table])
