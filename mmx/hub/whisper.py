"""Whisper (Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2).

An encoder of 30 seconds of audio and a decoder that transcribes it: transformers' WhisperForConditionalGeneration.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmx.config.schema import DecoderConfig, GenerationConfig, ModelConfig
from mmx.errors import CheckpointError
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint, HFConfig
from mmx.hub.hf_config import activation, first_token_id, image_source, read_generation, read_tokenizer
from mmx.hub.vit_gpt2 import has_untied_head
from mmx.hub.weight_mapping import WeightMapping, all_layers, each_layer, linear, norm

PREFIX = "model.decoder."
EMBEDDING = "model.decoder.embed_tokens.weight"
HEAD = "proj_out.weight"
PROJECTION = "sources.audio.projection"
ENGLISH = "<|en|>"
TRANSCRIBE = "transcribe"


def conversion(checkpoint: HFCheckpoint) -> ConversionSpec:
    """Return configuration and weight mappings of a checkpoint."""
    config = checkpoint.config
    is_untied = has_untied_head(checkpoint, HEAD, EMBEDDING)
    decoder = decoder_config(checkpoint, tie_word_embeddings=not is_untied)
    prompt = decoder_prompt_ids(checkpoint, {**config, **checkpoint.generation_config})
    eos = first_token_id(config["eos_token_id"])
    pad = config.get("pad_token_id")
    special_tokens = {"pad": [eos if pad is None else pad], "bos": prompt, "eos": [eos], "caption": []}
    generation = read_generation(checkpoint, len(prompt))
    return ConversionSpec(
        config=ModelConfig(
            sources={"audio": image_source(checkpoint, config)},
            decoder=decoder,
            vocab_size=config["vocab_size"],
            special_tokens=special_tokens,
        ),
        tokenizer=read_tokenizer(checkpoint, special_tokens),
        generation=_limit_new_tokens(generation, decoder.max_position_embeddings - len(prompt)),
        weights=[
            *decoder_weights(decoder.num_layers),
            *([WeightMapping("decoder.lm_head.weight", (HEAD,))] if is_untied else []),
        ],
        dropped=() if is_untied else (HEAD,),
        encoders={"audio": "model.encoder."},
    )


def decoder_config(checkpoint: HFCheckpoint, tie_word_embeddings: bool) -> DecoderConfig:
    """Return the configuration of the decoder. Its `scale_embedding` is ignored, as in transformers' decoder."""
    config = checkpoint.config
    return DecoderConfig(
        hidden_size=config["d_model"],
        num_layers=config["decoder_layers"],
        num_heads=config["decoder_attention_heads"],
        max_position_embeddings=config["max_target_positions"],
        activation=activation(config.get("activation_function", "gelu"), checkpoint),
        intermediate_size=config["decoder_ffn_dim"],
        padded_vocab_size=config["vocab_size"],
        tie_word_embeddings=tie_word_embeddings,
        dropout=config.get("dropout", 0.0),
    )


def decoder_weights(num_layers: int) -> list[WeightMapping]:
    """Map the decoder and the projection. Published keys have no bias; here it is zero."""
    ours = "decoder.layers.{i}."
    theirs = f"{PREFIX}layers.{{i}}."
    self_attention = f"{theirs}self_attn."
    cross_attention = f"{theirs}encoder_attn."
    qkv = [f"{self_attention}{name}_proj" for name in "qkv"]
    layer = [
        *norm(f"{ours}self_residual.norm", f"{theirs}self_attn_layer_norm"),
        *linear(f"{ours}self_attention.qkv", *qkv, optional_bias=True),
        *linear(f"{ours}self_attention.out", f"{self_attention}out_proj"),
        *norm(f"{ours}cross_residual.norm", f"{theirs}encoder_attn_layer_norm"),
        *linear(f"{ours}cross_attention.query", f"{cross_attention}q_proj"),
        *linear(f"{ours}cross_attention.out", f"{cross_attention}out_proj"),
        *norm(f"{ours}feed_residual.norm", f"{theirs}final_layer_norm"),
        *linear(f"{ours}feed_forward.up", f"{theirs}fc1"),
        *linear(f"{ours}feed_forward.out", f"{theirs}fc2"),
    ]
    return [
        WeightMapping("decoder.embedding.weight", (EMBEDDING,)),
        WeightMapping("decoder.embedding.positions.weight", (f"{PREFIX}embed_positions.weight",)),
        *each_layer(num_layers, layer),
        *norm("decoder.norm", f"{PREFIX}layer_norm"),
        *all_layers(num_layers, linear(f"{PROJECTION}.key", f"{cross_attention}k_proj", optional_bias=True)),
        *all_layers(num_layers, linear(f"{PROJECTION}.value", f"{cross_attention}v_proj")),
    ]


def decoder_prompt_ids(checkpoint: HFCheckpoint, config: HFConfig) -> list[int]:
    """Return the tokens that every text begins with: start, language, task, no timestamps (paper, figure 1).

    Language and task are those of the config, given by name or as the older `forced_decoder_ids`; the default is
    English and transcribe. English-only models have neither. transformers would detect the language of each audio.

    Args:
        config: config.json updated with generation_config.json.
    """
    no_timestamps = config.get("no_timestamps_token_id")
    language = config.get("language")
    task = config.get("task")
    forced: list[int] = []
    if not language and not task:
        pairs = config.get("forced_decoder_ids") or []
        forced = [token for _, token in pairs if token is not None]
    language_ids = config.get("lang_to_id")
    if language_ids:
        language_id = _language_id(checkpoint, language_ids, language, forced)
        task_ids = config.get("task_to_id") or {}
        forced = [language_id, *_task_id(task_ids, task, forced)]
    prompt = [first_token_id(config["decoder_start_token_id"])]
    prompt += [token for token in forced if token != no_timestamps]
    if no_timestamps is not None:
        prompt.append(no_timestamps)
    return prompt


def _language_id(
    checkpoint: HFCheckpoint, language_ids: Mapping[str, int], language: str | None, forced: list[int]
) -> int:
    """Return the token of a language, given by code, token or English name; else a forced one; else English."""
    if not language:
        forced_languages = [token for token in forced if token in language_ids.values()]
        return forced_languages[0] if forced_languages else language_ids[ENGLISH]
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    token = language_ids.get(code, language_ids.get(f"<|{code}|>"))
    if token is None:
        known = [name.strip("<|>") for name in language_ids]
        raise CheckpointError(
            f"{checkpoint.name!r} has the language {language!r}; expected one of {', '.join(known)}.",
            code="hub.language",
            name=checkpoint.name,
            given=language,
            expected=known,
        )
    return token


def _task_id(task_ids: Mapping[str, int], task: str | None, forced: list[int]) -> list[int]:
    """Return the token of a task, if the model has tasks; else a forced one; else that of transcribe."""
    if not task_ids:
        return []
    if task:
        return [task_ids[task]]
    forced_tasks = [token for token in forced if token in task_ids.values()]
    return [forced_tasks[0] if forced_tasks else task_ids[TRANSCRIBE]]


def _limit_new_tokens(generation: GenerationConfig, limit: int) -> GenerationConfig:
    """Limit the length of a text to the number of positions."""
    max_new_tokens = min(generation.max_new_tokens, limit)
    min_new_tokens = min(generation.min_new_tokens, max_new_tokens)
    return generation.model_copy(update={"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens})
