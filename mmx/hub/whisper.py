"""Whisper (Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2): a sound of
thirty seconds, and a decoder that writes down what is said in it. Published: WhisperForConditionalGeneration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmx.config.schema import DecoderConfig, GenerationConfig, ModelConfig
from mmx.errors import CheckpointError
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint
from mmx.hub.hf_config import activation, first_token_id, image_source, read_generation, read_tokenizer
from mmx.hub.vit_gpt2 import has_own_head
from mmx.hub.weight_mapping import WeightMapping, all_layers, each_layer, linear, norm

PREFIX, TABLE, HEAD = "model.decoder.", "model.decoder.embed_tokens.weight", "proj_out.weight"
PROJECTION = "sources.audio.projection"
ENGLISH, TRANSCRIBE = "<|en|>", "transcribe"


def conversion(published: HFCheckpoint) -> ConversionSpec:
    """The config map and the weight map."""
    config = published.config
    own_head = has_own_head(published, HEAD, TABLE)
    decoder = decoder_config(published, tied=not own_head)
    there = (published.folder / "generation_config.json").exists()
    prompt = decoder_prompt_ids(
        published, {**config, **(published.read_json("generation_config.json") if there else {})}
    )
    end, filler = first_token_id(config["eos_token_id"]), config.get("pad_token_id")
    marks = {"pad": [end if filler is None else filler], "bos": prompt, "eos": [end], "caption": []}
    source = image_source(published, config)
    return ConversionSpec(
        config=ModelConfig(
            sources={"audio": source}, decoder=decoder, vocab_size=config["vocab_size"], special_tokens=marks
        ),
        tokenizer=read_tokenizer(published, marks),
        generation=_within(read_generation(published, len(prompt)), decoder.max_position_embeddings - len(prompt)),
        weights=[
            *decoder_weights(decoder.num_layers),
            *([WeightMapping("decoder.lm_head.weight", (HEAD,))] if own_head else []),
        ],
        dropped=() if own_head else (HEAD,),
        encoders={"audio": "model.encoder."},
    )


def decoder_config(published: HFCheckpoint, tied: bool) -> DecoderConfig:
    """The config map of the decoder. Its `scale_embedding` scales nothing: transformers' decoder does not ask it."""
    config = published.config
    return DecoderConfig(
        hidden_size=config["d_model"],
        num_layers=config["decoder_layers"],
        num_heads=config["decoder_attention_heads"],
        max_position_embeddings=config["max_target_positions"],
        activation=activation(config.get("activation_function", "gelu"), published),
        intermediate_size=config["decoder_ffn_dim"],
        padded_vocab_size=config["vocab_size"],
        tie_word_embeddings=tied,
        dropout=config.get("dropout", 0.0),
    )


def decoder_weights(layers: int) -> list[WeightMapping]:
    """The weight map. Keys have no bias there; here it is one of zeros."""
    ours, theirs = "decoder.layers.{i}.", f"{PREFIX}layers.{{i}}."
    itself, cross = (f"{theirs}{kind}." for kind in ("self_attn", "encoder_attn"))
    fused = (f"{itself}q_proj", f"{itself}k_proj", f"{itself}v_proj")
    return [
        WeightMapping("decoder.embedding.weight", (TABLE,)),
        WeightMapping("decoder.embedding.positions.weight", (f"{PREFIX}embed_positions.weight",)),
        *each_layer(
            layers,
            [
                *norm(f"{ours}self_residual.norm", f"{theirs}self_attn_layer_norm"),
                *linear(f"{ours}self_attention.qkv", *fused, optional_bias=True),
                *linear(f"{ours}self_attention.out", f"{itself}out_proj"),
                *norm(f"{ours}cross_residual.norm", f"{theirs}encoder_attn_layer_norm"),
                *linear(f"{ours}cross_attention.query", f"{cross}q_proj"),
                *linear(f"{ours}cross_attention.out", f"{cross}out_proj"),
                *norm(f"{ours}feed_residual.norm", f"{theirs}final_layer_norm"),
                *linear(f"{ours}feed_forward.up", f"{theirs}fc1"),
                *linear(f"{ours}feed_forward.out", f"{theirs}fc2"),
            ],
        ),
        *norm("decoder.norm", f"{PREFIX}layer_norm"),
        *all_layers(layers, linear(f"{PROJECTION}.key", f"{cross}k_proj", optional_bias=True)),
        *all_layers(layers, linear(f"{PROJECTION}.value", f"{cross}v_proj")),
    ]


def decoder_prompt_ids(published: HFCheckpoint, facts: Mapping[str, Any]) -> list[int]:
    """The tokens that every text begins with (Radford et al. 2022, figure 1): start, language, task, no timestamps.

    facts: config.json, and over it generation_config.json. Language and task are those that it names, or forces
    (`forced_decoder_ids`, the older way); else English, written down and not translated. A model of English alone has
    neither. transformers would listen for the language instead, which is another answer for each sound.
    """
    language, task, untimed = (facts.get(fact) for fact in ("language", "task", "no_timestamps_token_id"))
    forced = [] if language or task else [token for _, token in facts.get("forced_decoder_ids") or []]
    begun = [token for token in forced if token is not None]
    if languages := facts.get("lang_to_id"):
        named = _language(published, languages, language) if language else None
        begun = [
            named or next((token for token in begun if token in languages.values()), languages[ENGLISH]),
            *_task(facts.get("task_to_id") or {}, task, begun),
        ]
    begun = [token for token in begun if token != untimed]
    return [first_token_id(facts["decoder_start_token_id"]), *begun, *([] if untimed is None else [untimed])]


def _language(published: HFCheckpoint, languages: Mapping[str, int], language: str) -> int:
    """The token of a language by its code, its token's text or its English name."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    found = languages.get(code, languages.get(f"<|{code}|>"))
    if found is None:
        known = ", ".join(name.strip("<|>") for name in languages)
        raise CheckpointError(f"{published.name!r} is set to speak {language!r}; expected one of {known}.")
    return found


def _task(tasks: Mapping[str, int], task: str | None, forced: list[int]) -> list[int]:
    if not tasks:
        return []
    return [tasks[task] if task else next((t for t in forced if t in tasks.values()), tasks[TRANSCRIBE])]


def _within(generation: GenerationConfig, most: int) -> GenerationConfig:
    """No more words than there are positions for."""
    most = min(generation.max_new_tokens, most)
    least = min(generation.min_new_tokens, most)
    return generation.model_copy(update={"max_new_tokens": most, "min_new_tokens": least})
