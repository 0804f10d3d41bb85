"""What published families tell alike: activations, special tokens, tokenizers, generation, the encoder's own facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmx.config.schema import GenerationConfig, ProjectionConfig, SourceConfig
from mmx.encoders.pretrained.hf_models import describe_encoder
from mmx.errors import CheckpointError
from mmx.hub.hf_checkpoint import HFCheckpoint, read_errors
from mmx.hub.weight_mapping import WeightMapping
from mmx.text.tokenizer import Tokenizer

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
LIKE_OURS = (  # facts of transformers' GenerationConfig that have the same name and meaning here
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
NOT_HEEDED = (
    "forced_bos_token_id",
    "sequence_bias",
    "exponential_decay_length_penalty",
    "encoder_no_repeat_ngram_size",
    "diversity_penalty",
    "penalty_alpha",
)
WHEN_SAMPLING = ("temperature", "top_k", "top_p")


def activation(name: Any, published: HFCheckpoint) -> Any:
    """Our name of an activation. Raises CheckpointError for one that the feed-forward does not have."""
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"{published.name!r} has the activation {name!r}; expected one of {known}.")
    return ACTIVATIONS[name]


def require_config(published: HFCheckpoint, config: Mapping[str, Any], **expected: Any) -> None:
    """Raise CheckpointError where a fact that changes the arithmetic is not as expected; one not given is."""
    for fact, value in expected.items():
        if config.get(fact, value) != value:
            raise CheckpointError(
                f"{published.name!r} has {fact} {config[fact]!r}; mmx reads its family with {value!r} alone."
            )


def image_source(published: HFCheckpoint, encoder: Mapping[str, Any], bridge: int | None = None) -> SourceConfig:
    """A pretrained encoder whose every state is looked at as it is; `bridge`: the width of a linear map between."""
    options = describe_encoder(published.name, published.folder, dict(encoder))
    projection = ProjectionConfig(positions="none", norm="none", hidden_size=bridge)
    return SourceConfig(encoder="pretrained", options=options, projection=projection)


def read_tokenizer(published: HFCheckpoint, marks: Mapping[str, Sequence[int]]) -> Tokenizer:
    """The fast tokenizer of the folder, with the tokens that open, close and fill up its texts."""
    from transformers import AutoTokenizer

    with read_errors(published, "tokenizer"):
        found = AutoTokenizer.from_pretrained(str(published.folder), config=None, trust_remote_code=False)
        return Tokenizer.from_json(found.backend_tokenizer.to_str(), published.name, marks)


def read_generation(published: HFCheckpoint, prompt: int) -> GenerationConfig:
    """How the published model chooses words: its generation_config.json, or what its config.json says of it.

    prompt: tokens that open every text, which transformers counts as part of max_length.
    """
    from transformers import GenerationConfig as Theirs

    with read_errors(published, "generation config"):
        if (published.folder / "generation_config.json").exists():
            facts = published.read_json("generation_config.json")
        else:
            nested = published.config.get("decoder") or published.config.get("text_config") or {}
            facts = {**nested, **published.config}
        known = Theirs().to_dict()  # type: ignore[no-untyped-call]
        _refuse_unheeded(published, facts)
        theirs = Theirs(**{fact: value for fact, value in facts.items() if fact in known})  # type: ignore[no-untyped-call]
        kept = [*LIKE_OURS, *(WHEN_SAMPLING if theirs.do_sample else ())]
        ours = {fact: value for fact in kept if (value := getattr(theirs, fact)) is not None}
        if ours.get("num_beams", 1) > 1:
            ours["do_sample"] = False  # beams that are drawn by lot are not to be had here; the likeliest are
        if "early_stopping" in ours:
            ours["early_stopping"] = ours["early_stopping"] is True
        if banned := [word[0] for word in theirs.bad_words_ids or [] if len(word) == 1]:  # longer ones are not kept
            ours["suppress_tokens"] = sorted({*ours.get("suppress_tokens", ()), *banned})
        if isinstance(ours.get("forced_eos_token_id"), list):
            ours["forced_eos_token_id"] = ours["forced_eos_token_id"][0]
        most = theirs.max_new_tokens or (theirs.max_length - prompt if theirs.max_length else 20)
        least = theirs.min_new_tokens or max(0, (theirs.min_length or 0) - prompt)
        return GenerationConfig(max_new_tokens=max(1, most), min_new_tokens=min(least, max(1, most)), **ours)


def _refuse_unheeded(published: HFCheckpoint, facts: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a way of choosing words that would be passed over without a word."""
    end = facts.get("eos_token_id")
    words = [word for word in facts.get("bad_words_ids") or [] if len(word) > 1]
    told = [name for name in NOT_HEEDED if facts.get(name)]
    told += ["several eos_token_id"] if isinstance(end, list) and len(end) > 1 else []
    told += ["bad_words_ids of several tokens"] if words else []
    if told:
        raise CheckpointError(
            f"{published.name!r} chooses its words with {told[0]}, which mmx does not have; take it out of "
            "generation_config.json to read the model without."
        )


def first_token_id(token: Any) -> int:
    """A special token, or the first of several."""
    return int(token[0] if isinstance(token, list) else token)


def special_token_id(published: HFCheckpoint, fact: str, *configs: Mapping[str, Any]) -> int:
    """A special token by its name, from where transformers looks first: generation_config.json, then config.json, then
    other `configs` of parts. Raises CheckpointError where none has it."""
    saved = (published.folder / "generation_config.json").exists()
    for told in (published.read_json("generation_config.json") if saved else {}, published.config, *configs):
        if told.get(fact) is not None:
            return first_token_id(told[fact])
    raise CheckpointError(f"{published.name!r} tells no {fact}; expected it in config.json, download it again.")


def computed_mapping(ours: str, beside: str, table: Tensor) -> WeightMapping:
    """A rule for what is computed and not published, such as waves; `beside`: a tensor that is there anyway."""
    return WeightMapping(ours, (beside,), lambda _: table)
