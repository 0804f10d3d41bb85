"""Conversion of configuration that all families share: activation, special tokens, tokenizer, generation, encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmx.config.schema import GenerationConfig, ProjectionConfig, SourceConfig
from mmx.encoders.pretrained.hf_models import TOKENIZER, describe_encoder, missing_tokenizer_files
from mmx.errors import CheckpointError
from mmx.hub.clean_up import add_clean_up, cleans_up
from mmx.hub.hf_checkpoint import GENERATION_CONFIG, HFCheckpoint, HFConfig, read_errors
from mmx.text.prompts import BOS, EOS
from mmx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig as HFGenerationConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
SHARED_FIELDS = (  # of transformers' GenerationConfig, with the same name and meaning in ours
    "num_beams",
    "length_penalty",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "do_sample",
    "early_stopping",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_eos_token_id",
    "renormalize_logits",
    "guidance_scale",
)
SAMPLING_FIELDS = ("temperature", "top_k", "top_p")
UNSUPPORTED_FIELDS = (
    "forced_bos_token_id",
    "sequence_bias",
    "exponential_decay_length_penalty",
    "encoder_no_repeat_ngram_size",
    "diversity_penalty",
    "penalty_alpha",
)
DEFAULT_MAX_NEW_TOKENS = 20  # of transformers
MIN_VOCAB_FRACTION = 0.8  # of the embedding that is in the tokenizer; the rest is padding, or timestamps of Whisper


def activation(name: str, checkpoint: HFCheckpoint) -> str:
    """Return our name of an activation function. Raises CheckpointError for one that is not supported."""
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{checkpoint.name!r} has the activation {name!r}; expected one of {', '.join(ACTIVATIONS)}.",
            code="hub.activation",
            name=checkpoint.name,
            given=name,
            expected=list(ACTIVATIONS),
        )
    return ACTIVATIONS[name]


def require_config(checkpoint: HFCheckpoint, config: Mapping[str, object], **expected: object) -> None:
    """Raise CheckpointError if a field that changes the computation has another value. A missing field is accepted."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{checkpoint.name!r} has {key} {config[key]!r}; mmx supports only {value!r} in its family.",
                code="hub.unsupported_config",
                name=checkpoint.name,
                key=key,
                given=config[key],
                expected=value,
            )


def image_source(checkpoint: HFCheckpoint, encoder: HFConfig, bridge_size: int | None = None) -> SourceConfig:
    """Return the source of a pretrained encoder whose states are projected without norm and positions.

    Args:
        encoder: its part of config.json.
        bridge_size: output size of a linear layer before the projection, if there is one.
    """
    options = describe_encoder(checkpoint.name, checkpoint.folder, encoder)
    projection = ProjectionConfig(positions="none", norm="none", hidden_size=bridge_size)
    return SourceConfig(encoder="pretrained", options=options, projection=projection)


def read_tokenizer(checkpoint: HFCheckpoint, special_tokens: Mapping[str, Sequence[int]]) -> Tokenizer:
    """Read the fast tokenizer of the folder.

    Args:
        special_tokens: name, such as pad, bos or eos, to token ids.
    """
    from transformers import AutoTokenizer

    with read_errors(checkpoint, "tokenizer"):
        hf_tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.folder), config=None, trust_remote_code=False)
        tokenizer = Tokenizer.from_json(hf_tokenizer.backend_tokenizer.to_str(), checkpoint.name, special_tokens)
        if cleans_up(hf_tokenizer, tokenizer.backend):
            add_clean_up(tokenizer.backend)
    missing = missing_tokenizer_files(hf_tokenizer, lambda file: (checkpoint.folder / file).is_file())
    if missing:
        raise CheckpointError(
            f"{checkpoint.name!r} has no {TOKENIZER}, nor {' and '.join(missing)}; expected the files of its "
            "tokenizer; download them.",
            code="hub.tokenizer",
            name=checkpoint.name,
            files=missing,
        )
    return tokenizer


def check_tokenizer(checkpoint: HFCheckpoint, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a tokenizer and an embedding of `vocab_size` tokens belong to one model.

    The embedding has all tokens that text may become, and few others. Texts begin and end with special tokens, not with
    words; that of the end is in the tokenizer. Raises CheckpointError (hub.tokenizer).
    """
    added = tokenizer.backend.get_added_tokens_decoder()
    largest = max((token for token in tokenizer.backend.get_vocab().values() if token not in added), default=0)
    size = len(tokenizer)
    if largest >= vocab_size or size < MIN_VOCAB_FRACTION * vocab_size:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.name!r} has {size} tokens, and the model an embedding of {vocab_size}; "
            "expected those of one model; download the files of its tokenizer.",
            code="hub.tokenizer",
            name=checkpoint.name,
            size=size,
            expected=vocab_size,
        )
    for special in (BOS, EOS):
        for token in tokenizer.special_tokens[special]:
            text = tokenizer.backend.id_to_token(token)
            is_missing = text is None and special is EOS
            if is_missing or (text is not None and token not in added):
                found = "unknown to" if is_missing else f"the text {text!r:.30} in"
                raise CheckpointError(
                    f"{checkpoint.name!r} has token {token} for {special.name}, which is {found} its tokenizer; "
                    "expected a special token; download config.json and the files of the tokenizer.",
                    code="hub.tokenizer",
                    name=checkpoint.name,
                    given=token,
                    use=special.name,
                )


def read_generation(checkpoint: HFCheckpoint, prompt_length: int) -> GenerationConfig:
    """Return the generation settings of generation_config.json, or of config.json where there is none.

    Args:
        prompt_length: number of prompt tokens, which transformers counts in max_length.

    Raises CheckpointError for a setting that mmx does not support.
    """
    from transformers import GenerationConfig as HFGenerationConfig

    with read_errors(checkpoint, "generation config"):
        fields = _generation_fields(checkpoint)
        _check_supported(checkpoint, fields)
        known = HFGenerationConfig().to_dict()  # type: ignore[no-untyped-call]
        known_fields = {key: value for key, value in fields.items() if key in known}
        theirs = HFGenerationConfig(**known_fields)  # type: ignore[no-untyped-call]
        return _convert_generation(theirs, prompt_length)


def first_token_id(token: int | Sequence[int]) -> int:
    """Return a token id, or the first of several."""
    return int(token[0] if isinstance(token, list | tuple) else token)  # type: ignore[arg-type]


def special_token_id(checkpoint: HFCheckpoint, key: str, *configs: HFConfig) -> int:
    """Return a special token id from generation_config.json, config.json or further `configs`, in this order.

    Raises CheckpointError if none has it.
    """
    for config in (checkpoint.generation_config, checkpoint.config, *configs):
        if config.get(key) is not None:
            return first_token_id(config[key])
    raise CheckpointError(
        f"{checkpoint.name!r} has no {key}; expected it in config.json, download it again.",
        code="hub.special_token",
        name=checkpoint.name,
        key=key,
    )


def _generation_fields(checkpoint: HFCheckpoint) -> HFConfig:
    if (checkpoint.folder / GENERATION_CONFIG).exists():
        return checkpoint.generation_config
    nested = checkpoint.config.get("decoder") or checkpoint.config.get("text_config") or {}
    return {**nested, **checkpoint.config}


def _convert_generation(theirs: HFGenerationConfig, prompt_length: int) -> GenerationConfig:
    keys = [*SHARED_FIELDS, *(SAMPLING_FIELDS if theirs.do_sample else ())]
    fields: dict[str, Any] = {}
    for key in keys:
        value = getattr(theirs, key)
        if value is not None:
            fields[key] = value
    if fields.get("num_beams", 1) > 1:
        fields["do_sample"] = False  # beam sampling is not supported: plain beam search instead
    if "early_stopping" in fields:
        fields["early_stopping"] = fields["early_stopping"] is True
    # Longer sequences are refused in _check_supported.
    suppressed = [word[0] for word in theirs.bad_words_ids or [] if len(word) == 1]
    if suppressed:
        fields["suppress_tokens"] = sorted({*fields.get("suppress_tokens", ()), *suppressed})
    if isinstance(fields.get("forced_eos_token_id"), list):
        fields["forced_eos_token_id"] = fields["forced_eos_token_id"][0]
    max_new_tokens = max(1, _max_new_tokens(theirs, prompt_length))
    min_new_tokens = theirs.min_new_tokens or max(0, (theirs.min_length or 0) - prompt_length)
    return GenerationConfig(max_new_tokens=max_new_tokens, min_new_tokens=min(min_new_tokens, max_new_tokens), **fields)


def _max_new_tokens(theirs: HFGenerationConfig, prompt_length: int) -> int:
    if theirs.max_new_tokens:
        return int(theirs.max_new_tokens)
    return int(theirs.max_length) - prompt_length if theirs.max_length else DEFAULT_MAX_NEW_TOKENS


def _check_supported(checkpoint: HFCheckpoint, fields: HFConfig) -> None:
    """Raise CheckpointError for a generation setting that would otherwise be ignored."""
    unsupported = [key for key in UNSUPPORTED_FIELDS if fields.get(key)]
    eos_token_id = fields.get("eos_token_id")
    if isinstance(eos_token_id, list) and len(eos_token_id) > 1:
        unsupported.append("several eos_token_id")
    if any(len(word) > 1 for word in fields.get("bad_words_ids") or []):
        unsupported.append("bad_words_ids of several tokens")
    if unsupported:
        raise CheckpointError(
            f"{checkpoint.name!r} generates with {unsupported[0]}, which mmx does not support; remove it from "
            "generation_config.json to load the model without it.",
            code="hub.unsupported_generation",
            name=checkpoint.name,
            keys=unsupported,
        )
