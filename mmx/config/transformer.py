"""Configuration of a transformer: its sizes, norms, positions, feed-forward, cross-attention, and the decoder's head.

Nothing here imports torch.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator, model_validator

_DERIVED: Any = None  # default of a size that is computed from other sizes


class FrozenModel(BaseModel):
    """Base of all configuration classes: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RopeScaling(FrozenModel):
    """Frequency scaling of rotary positions (Dubey et al. 2024, "The Llama 3 Herd of Models", section 3.4.2).

    Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched by `factor`, those below
    `original_max_position_embeddings / high_freq_factor` are kept, and those between are interpolated.
    """

    factor: float = Field(8.0, gt=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_position_embeddings: PositiveInt = 8192


class BaseTransformerConfig(FrozenModel):
    """A transformer of self-attention and feed-forward layers; the text encoder and the decoder share these options.

    Three sizes are derived from others where they are not given (or null): `head_dim` is hidden_size / num_heads,
    `num_kv_heads` is num_heads (fewer is grouped-query attention, Ainslie et al. 2023), and `intermediate_size` is
    4 * hidden_size. `glu` selects a gated linear unit (Shazeer 2020) for the feed-forward.
    """

    hidden_size: PositiveInt = 256
    num_layers: PositiveInt = 3
    num_heads: PositiveInt = 4
    head_dim: PositiveInt = Field(_DERIVED, validate_default=True)
    num_kv_heads: PositiveInt = Field(_DERIVED, validate_default=True)
    norm: Literal["layer", "rms"] = "layer"
    norm_placement: Literal["pre", "post"] = "pre"
    norm_eps: float = Field(1e-5, gt=0)
    positions: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    max_position_embeddings: PositiveInt = 64
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    intermediate_size: PositiveInt = Field(_DERIVED, validate_default=True)
    glu: bool = False
    bias: bool = True
    embedding_norm: bool = False
    embedding_scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0.0, lt=1.0)

    @field_validator("head_dim", "num_kv_heads", "intermediate_size", mode="before")
    @classmethod
    def _derive_size(cls, value: Any, info: ValidationInfo) -> Any:
        """Compute a size that is not given. A size that was itself refused is absent from `info.data`."""
        if value is not None:
            return value
        hidden_size = info.data.get("hidden_size", 1)
        num_heads = info.data.get("num_heads", 1)
        if info.field_name == "num_kv_heads":
            return num_heads
        if info.field_name == "intermediate_size":
            return 4 * hidden_size
        if hidden_size % num_heads and "hidden_size" in info.data:
            raise ValueError(
                f"not given, and hidden_size {hidden_size} is not a multiple of num_heads {num_heads}; "
                "change one of them, or give head_dim"
            )
        return max(1, hidden_size // num_heads)

    @model_validator(mode="after")
    def _check_heads(self) -> "BaseTransformerConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; give a divisor"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rope rotates pairs; give an even head_dim")
        return self


class TransformerConfig(BaseTransformerConfig):
    """A transformer whose layers also cross-attend to a memory.

    `cross_attention_positions: relative` adds a learned bias per distance between text position and slot, clipped to
    `max_relative_distance`. With `wait_k`, text position t attends the first t + wait_k slots of every source that has
    no grid (Ma et al. 2019, "STACL"). `gate: tanh` scales cross-attention by tanh of a scalar that starts at zero
    (Alayrac et al. 2022, "Flamingo"). `padded_vocab_size` is the number of rows of the token embedding, if that is not
    the number of tokens of the tokenizer.
    """

    cross_attention_every_n_layers: PositiveInt = 1
    cross_attention_positions: Literal["none", "relative"] = "none"
    max_relative_distance: PositiveInt = 32
    wait_k: PositiveInt | None = None
    gate: Literal["none", "tanh"] = "none"
    padded_vocab_size: PositiveInt | None = None

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with cross-attention: the last of every `cross_attention_every_n_layers` layers."""
        n = self.cross_attention_every_n_layers
        return tuple(range(n - 1, self.num_layers, n))

    @model_validator(mode="after")
    def _check_cross_attention_layers(self) -> "TransformerConfig":
        if not self.cross_attention_layers:
            raise ValueError(
                f"cross_attention_every_n_layers {self.cross_attention_every_n_layers} is more than num_layers "
                f"{self.num_layers}: no layer would have cross-attention"
            )
        return self


class DecoderConfig(TransformerConfig):
    """The text decoder.

    `pretrained` is the folder or public name of a language model (GPT-2, Llama, Qwen2) that training starts from: its
    configuration, weights and tokenizer. `lm_head_transform` puts a dense layer, an activation and a norm before the
    output projection (Devlin et al. 2019).
    """

    tie_word_embeddings: bool = True
    lm_head_transform: bool = False
    lm_head_bias: bool = False
    pretrained: str | None = None

    def max_new_tokens_after(self, prompt_length: int) -> int | None:
        """Return how many tokens can be generated after a prompt of this length; None if positions are not learned."""
        if self.positions != "learned":
            return None
        return self.max_position_embeddings + 1 - prompt_length  # the last token generated is not an input
