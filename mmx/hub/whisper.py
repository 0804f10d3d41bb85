"""Whisper (Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2).

An encoder of 30 seconds of audio and a decoder that transcribes it: transformers' WhisperForConditionalGeneration.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmx.config.schema import DecoderConfig, GenerationConfig, ModelConfig, SpeechConfig
from mmx.errors import CheckpointError
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint, HFConfig
from mmx.hub.hf_config import activation, first_token_id, image_source, read_generation, read_tokenizer
from mmx.hub.vit_gpt2 import has_untied_head
from mmx.hub.weight_mapping import WeightMapping, all_layers, each_layer, linear, norm
from mmx.hub.whisper_languages import find_language
from mmx.text.tokenizer import Tokenizer

PREFIX = "model.decoder."
EMBEDDING = "model.decoder.embed_tokens.weight"
HEAD = "proj_out.weight"
PROJECTION = "sources.audio.projection"
ENGLISH = "en"
TRANSCRIBE = "transcribe"
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # its name, and that of older tokenizers


def conversion(checkpoint: HFCheckpoint) -> ConversionSpec:
    """Return configuration and weight mappings of a checkpoint."""
    config = checkpoint.config
    is_untied = has_untied_head(checkpoint, HEAD, EMBEDDING)
    decoder = decoder_config(checkpoint, tie_word_embeddings=not is_untied)
    merged = {**config, **checkpoint.generation_config}
    prompt = decoder_prompt_ids(checkpoint, merged)
    eos = first_token_id(config["eos_token_id"])
    pad = config.get("pad_token_id")
    special_tokens = {"pad": [eos if pad is None else pad], "bos": prompt, "eos": [eos], "caption": []}
    tokenizer = read_tokenizer(checkpoint, special_tokens)
    generation = read_generation(checkpoint, len(prompt)).model_copy(
        update={"language": fixed_language(checkpoint, merged)}
    )
    return ConversionSpec(
        config=ModelConfig(
            sources={"audio": image_source(checkpoint, config)},
            decoder=decoder,
            vocab_size=config["vocab_size"],
            special_tokens=special_tokens,
            speech=speech_config(merged, tokenizer),
        ),
        tokenizer=tokenizer,
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
    """Return the tokens that a text begins with: start, language, task, no timestamps (paper, figure 1).

    Language and task are those of the config, given by name or as the older `forced_decoder_ids`; the default is
    English and transcribe. English-only models have neither. Generation replaces the language by that of each audio,
    unless it is fixed (see `fixed_language`).

    Args:
        config: config.json updated with generation_config.json.
    """
    no_timestamps = config.get("no_timestamps_token_id")
    forced = _forced_ids(config)
    language_ids = _language_ids(config)
    if language_ids:
        language = fixed_language(checkpoint, config) or ENGLISH
        task_ids = config.get("task_to_id") or {}
        forced = [language_ids[language], *_task_id(task_ids, config.get("task"), forced)]
    prompt = [first_token_id(config["decoder_start_token_id"])]
    prompt += [token for token in forced if token != no_timestamps]
    if no_timestamps is not None:
        prompt.append(no_timestamps)
    return prompt


def fixed_language(checkpoint: HFCheckpoint, config: HFConfig) -> str | None:
    """Return the code of the language that the config gives by name or as a forced token.

    None: that of each audio is detected, as in transformers. The arguments are those of `decoder_prompt_ids`.
    """
    language_ids = _language_ids(config)
    if not language_ids:
        return None
    language = config.get("language")
    if not language:
        forced = _forced_ids(config)
        return next((code for code, token in language_ids.items() if token in forced), None)
    code = find_language(language, language_ids)
    if code is None:
        known = list(language_ids)
        raise CheckpointError(
            f"{checkpoint.name!r} has the language {language!r}; expected one of {', '.join(known)}.",
            code="hub.language",
            name=checkpoint.name,
            given=language,
            expected=known,
        )
    return code


def speech_config(config: HFConfig, tokenizer: Tokenizer) -> SpeechConfig:
    """Return the tokens of languages, tasks and missing speech. config: as of `decoder_prompt_ids`."""
    found = [tokenizer.backend.token_to_id(name) for name in NO_SPEECH]
    language_ids = _language_ids(config)
    return SpeechConfig(
        language_token_ids=language_ids,
        task_token_ids=(config.get("task_to_id") or {}) if language_ids else {},
        no_speech_token_id=next((token for token in found if token is not None), None),
    )


def _language_ids(config: HFConfig) -> dict[str, int]:
    """The token of each language code; none for an English-only model."""
    return {name.strip("<|>"): token for name, token in (config.get("lang_to_id") or {}).items()}


def _forced_ids(config: HFConfig) -> list[int]:
    """The tokens of `forced_decoder_ids`, which a language or task by name replaces."""
    if config.get("language") or config.get("task"):
        return []
    return [token for _, token in config.get("forced_decoder_ids") or [] if token is not None]


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
