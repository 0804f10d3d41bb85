"""The model types of transformers that the pretrained encoder supports."""

from dataclasses import dataclass
from typing import Literal

Modality = Literal["image", "text", "audio"]


@dataclass(frozen=True)
class HFFamily:
    """How a model type of transformers is used as an encoder.

    modality: what it encodes.
    model_class: its class and, after a dot, the submodule that is the encoder.
    final_norm: the last norm, which is removed if the option `layer` selects an earlier state.
    unused_module: a module that does not affect the states.
    weight_prefix: prefix of its tensors in a larger model, where transformers does not find them itself.
    float32_only: no autocast.
    """

    modality: Modality
    model_class: str
    final_norm: str = ""
    unused_module: str = ""
    weight_prefix: str = ""
    float32_only: bool = False


HF_FAMILIES = {
    "vit": HFFamily("image", "ViTModel", "layernorm"),
    "deit": HFFamily("image", "DeiTModel", "layernorm"),
    "beit": HFFamily("image", "BeitModel", "layernorm"),
    "dinov2": HFFamily("image", "Dinov2Model", "layernorm"),
    "dinov2_with_registers": HFFamily("image", "Dinov2WithRegistersModel", "layernorm"),
    "dinov3_vit": HFFamily("image", "DINOv3ViTModel", "norm"),
    "clip_vision_model": HFFamily("image", "CLIPVisionModel", unused_module="post_layernorm"),
    "siglip_vision_model": HFFamily("image", "SiglipVisionModel", "post_layernorm"),
    "blip_vision_model": HFFamily("image", "BlipVisionModel", "post_layernorm", weight_prefix="vision_model."),
    "swin": HFFamily("image", "SwinModel", "layernorm"),
    "convnext": HFFamily("image", "ConvNextModel", unused_module="layernorm"),
    "convnextv2": HFFamily("image", "ConvNextV2Model", unused_module="layernorm"),
    "resnet": HFFamily("image", "ResNetModel"),
    "bert": HFFamily("text", "BertModel"),
    "roberta": HFFamily("text", "RobertaModel"),
    "xlm-roberta": HFFamily("text", "XLMRobertaModel"),
    "electra": HFFamily("text", "ElectraModel"),
    "mpnet": HFFamily("text", "MPNetModel"),
    "distilbert": HFFamily("text", "DistilBertModel"),
    # DeBERTa fills masked scores with the lowest float32, which bfloat16 cannot represent.
    "deberta": HFFamily("text", "DebertaModel", float32_only=True),
    "deberta-v2": HFFamily("text", "DebertaV2Model"),
    "modernbert": HFFamily("text", "ModernBertModel", "final_norm"),
    "t5": HFFamily("text", "T5EncoderModel", "encoder.final_layer_norm"),
    "mt5": HFFamily("text", "MT5EncoderModel", "encoder.final_layer_norm"),
    "clip_text_model": HFFamily("text", "CLIPTextModel", "final_layer_norm"),
    "whisper": HFFamily("audio", "WhisperModel.encoder", "layer_norm"),
    "wav2vec2": HFFamily("audio", "Wav2Vec2Model", "encoder.layer_norm"),
    "hubert": HFFamily("audio", "HubertModel", "encoder.layer_norm"),
    "wavlm": HFFamily("audio", "WavLMModel", "encoder.layer_norm"),
}

TOWERS = {  # model types with several encoders: tower to the key of its configuration
    "clip": {"image": "vision_config", "text": "text_config"},
    "siglip": {"image": "vision_config"},  # its text encoder was trained attending padding
    "blip": {"image": "vision_config"},
}
