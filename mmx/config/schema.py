"""The typed, frozen configuration: every fact of a model and of a training run, as a field with a default and bounds.

Values live in YAML, structure lives here. `mmx.config.loader` reads files into these classes; nothing here imports torch.
Alphabet: E decoder width, H heads, D head width, L layers, F feature width of an encoder, V vocabulary, K streams.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Precision = Literal["float32", "bfloat16", "int8"]  # of the decoder's weights; int8: on the CPU


class Frozen(BaseModel):
    """Immutable; a key that is not a field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RopeScaling(Frozen):
    """How rotary positions reach further than they were trained (Dubey et al. 2024, "The Llama 3 Herd of Models",
    section 3.4.2): waves longer than `original_positions / low` are slowed down by `factor`, those shorter than
    `original_positions / high` are kept, between them one goes over into the other."""

    factor: float = Field(8.0, gt=0)
    low: float = Field(1.0, gt=0)
    high: float = Field(4.0, gt=0)
    original_positions: PositiveInt = 8192


class TransformerConfig(Frozen):
    """What a stack of self-attention and feed-forward blocks is made of; the decoder and the text encoder share it.

    `kv_heads`: keys and values of self-attention, each shared by heads / kv_heads queries (grouped-query attention).
    """

    width: PositiveInt = 256
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    head_width: PositiveInt | None = None
    kv_heads: PositiveInt | None = None
    norm: Literal["layer", "rms"] = "layer"
    norm_placement: Literal["pre", "post"] = "pre"
    norm_eps: float = Field(1e-5, gt=0)
    positions: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    max_positions: PositiveInt = 64
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    feed_forward: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    feed_forward_width: PositiveInt | None = None
    gated: bool = False
    biases: bool = True
    embedding_norm: bool = False
    embedding_scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _heads_fit(self) -> "TransformerConfig":
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; or give head_width")
        if self.heads % self.key_heads:
            raise ValueError(f"heads {self.heads} cannot share kv_heads {self.key_heads} evenly; give a divisor")
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(f"rope turns pairs, and the head width {self.head_size} is odd; give an even head_width")
        return self

    @property
    def head_size(self) -> int:
        """D: the given head width, or width / heads."""
        return self.head_width or self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of the keys and values of self-attention."""
        return self.kv_heads or self.heads

    @property
    def hidden_size(self) -> int:
        """Width inside the feed-forward: the given one, or four times the width."""
        return self.feed_forward_width or 4 * self.width


class LookingConfig(TransformerConfig):
    """A transformer over text that also looks at a memory. `table`: rows of its embedding, where it is not just as many
    as the tokenizer has tokens.

    `cross_positions: relative`: a bias on the distance between a word and a slot, up to `cross_reach` each way.
    `wait_k`: of a source without a grid, text position t sees the first t + wait_k slots only.
    """

    cross_every: PositiveInt = 1
    cross_positions: Literal["none", "relative"] = "none"
    cross_reach: PositiveInt = 32
    wait_k: PositiveInt | None = None
    gate: Literal["none", "tanh"] = "none"
    table: PositiveInt | None = None

    @property
    def looking(self) -> tuple[int, ...]:
        """Indices of the blocks with cross-attention: the last of every `cross_every` blocks."""
        return tuple(range(self.cross_every - 1, self.layers, self.cross_every))

    @model_validator(mode="after")
    def _looks_somewhere(self) -> "LookingConfig":
        if not self.looking:
            raise ValueError(f"cross_every {self.cross_every} is more than layers {self.layers}: no block would look")
        return self


class DecoderConfig(LookingConfig):
    """The shared text decoder: it looks, and it speaks. `init_from`: the folder or public name of a language model
    (GPT-2, Llama, Qwen2) that a training run takes it from: its facts, its weights and its tokenizer."""

    tied_embeddings: bool = True
    head_transform: bool = False
    head_bias: bool = False
    init_from: str | None = None


class ProjectionConfig(Frozen):
    """How the features of one source become keys and values. Positions go on the keys; values stay content.

    `width`: a linear map to this width comes first.
    """

    width: PositiveInt | None = None
    position: Literal["none", "learned", "sinusoidal"] = "learned"
    max_positions: PositiveInt = 64
    share_layers: bool = False
    norm: Literal["none", "layer", "rms"] = "layer"
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    bias: bool = True


class SourceConfig(Frozen):
    """One source: the encoder's name or address, its own options, and its projection."""

    encoder: str
    options: dict[str, Any] = {}
    projection: ProjectionConfig = ProjectionConfig()


class ReaderConfig(LookingConfig):
    """A question read while looking (Li et al. 2022, "BLIP", section 3.1): every token sees the whole question and the
    memory of the sources, and its states become the memory that the decoder looks at.

    `opening`: tokens before every question, `closing`: after it. `shows_padding`: the states of a batch's padding are
    looked at as well, as transformers' BLIP does it: what is answered then depends on what else is asked.
    """

    projection: ProjectionConfig = ProjectionConfig(position="none")
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    shows_padding: bool = False


class ModelConfig(Frozen):
    """A whole model: named sources, one decoder, where the questions go (into the prompt, to a source, to the reader).

    `share_attention`: one W_K and one W_V for all attention, of every source, of the decoder to itself, and within text
    encoders. `marks`: the tokens of marks that are not tokens of their own, as `caption: []`; with them, a mark that
    neither the tokenizer nor `marks` has is a task that the model was not made for.
    """

    sources: dict[str, SourceConfig] = Field(min_length=1)
    decoder: DecoderConfig = DecoderConfig()
    reader: ReaderConfig | None = None
    vocabulary: PositiveInt = 4096
    question_to: str = "prompt"
    share_attention: bool = False
    marks: dict[str, tuple[int, ...]] = {}

    @model_validator(mode="after")
    def _question_goes_somewhere(self) -> "ModelConfig":
        known = ["prompt", *(["reader"] if self.reader else []), *sorted(self.sources)]
        if self.question_to not in known:
            raise ValueError(f"question_to is {self.question_to!r}; expected one of {', '.join(known)}")
        if self.reader and self.question_to != "reader":
            raise ValueError(f"question_to is {self.question_to!r}, and there is a reader; give question_to: reader")
        if "reader" in self.sources:
            raise ValueError("a source is named reader, which is the part that reads questions; choose another name")
        return self

    @model_validator(mode="after")
    def _attention_can_be_shared(self) -> "ModelConfig":
        decoder, given = self.decoder, {name: source.projection for name, source in self.sources.items()}
        if not self.share_attention:
            return self
        if self.reader or decoder.key_heads != decoder.heads:
            raise ValueError("share_attention goes with neither a reader nor kv_heads; leave them out")
        if apart := [name for name, p in given.items() if not p.share_layers or p.bias != decoder.biases]:
            raise ValueError(
                f"share_attention needs share_layers: true and bias: {str(decoder.biases).lower()} (the decoder's "
                f"biases) in the projection of {', '.join(apart)}"
            )
        return self


class AugmentConfig(Frozen):
    """What may happen to a training picture: a crop of at least this area, a mirror image, changed light, and with
    this probability a part painted over."""

    crop: float = Field(1.0, gt=0.0, le=1.0)
    flip: bool = False
    color: float = Field(0.0, ge=0.0, le=1.0)
    erase: float = Field(0.0, ge=0.0, le=1.0)

    def in_place(self) -> "AugmentConfig":
        """Without what moves or hides things: a box that points at one must still do so."""
        return AugmentConfig(color=self.color)


class DataConfig(Frozen):
    """One data set. `path` is a file or folder in a format mmx reads, or `scenes` for generated ones.

    `part` takes a stretch of the examples by fraction, [from, to]; `weight` is its share of the pictures in training;
    `kinds` keeps only questions of these kinds (of scenes: exists, count, color, shape, size, relation, position,
    pointed), and `objects` only scenes of at most so many shapes. `derive_questions` adds the questions that captions
    answer (of kinds color, count, object, action, place, exists; see `mmx.data.derived_questions`). `reward: cider` trains
    captions not word by word, but by what the model itself says of each picture (see `mmx.training.scst`).
    """

    path: str
    format: Literal["auto", "manifest", "karpathy", "coco", "vqa", "folder", "scenes"] = "auto"
    split: str | None = None
    annotations: str | None = None
    part: tuple[float, float] = (0.0, 1.0)
    weight: float = Field(1.0, gt=0)
    derive_questions: bool = False
    reward: Literal["cider"] | None = None
    limit: PositiveInt | None = None
    augment: AugmentConfig = AugmentConfig()
    count: PositiveInt = 1000
    seed: int = 0
    tasks: tuple[Literal["caption", "ask"], ...] = ("caption", "ask")
    kinds: tuple[str, ...] = ()
    objects: PositiveInt | None = None

    @model_validator(mode="after")
    def _part_is_a_stretch(self) -> "DataConfig":
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(f"part is {list(self.part)}; expected two fractions such as [0, 0.9]")
        return self

    @model_validator(mode="after")
    def _only_captions_are_rewarded(self) -> "DataConfig":
        if self.reward and "caption" not in self.tasks:
            raise ValueError(f"reward is {self.reward!r}, and tasks has no captions; add caption to tasks")
        if self.reward and self.derive_questions:
            raise ValueError("reward is for captions; list the data a second time for derive_questions, tasks: [ask]")
        if self.derive_questions and "ask" not in self.tasks:
            raise ValueError("derive_questions is true, and tasks has no questions; add ask to tasks")
        return self


class GenerationConfig(Frozen):
    """How words are chosen. The names are those of transformers' GenerationConfig.

    `guidance_scale`: how many times what looking adds to a token's score is taken (see `mmx.generation.guidance`);
    1 is off and costs nothing, any other number reads every token a second time, without the memory.
    """

    max_new_tokens: PositiveInt = 32
    min_new_tokens: int = Field(0, ge=0)
    num_beams: int = Field(1, ge=1, le=1000)
    do_sample: bool = False
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1.0)
    num_return_sequences: PositiveInt = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    repetition_penalty: float = Field(1.0, gt=0)
    no_repeat_ngram_size: int = Field(0, ge=0)
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_eos_token_id: int | None = None
    renormalize_logits: bool = False
    guidance_scale: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _no_contradiction(self) -> "GenerationConfig":
        if self.do_sample and self.num_beams > 1:
            raise ValueError("do_sample and num_beams > 1 contradict each other; choose sampling or beams")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        if "" in self.stop_strings:
            raise ValueError("stop_strings holds an empty text, which every text contains; leave it out")
        if self.num_return_sequences > 1 and not self.do_sample and self.num_beams < self.num_return_sequences:
            raise ValueError(
                f"num_return_sequences {self.num_return_sequences} needs do_sample: true or as many num_beams"
            )
        return self


class PartConfig(Frozen):
    """How one part of the model (a prefix of parameter names, such as `sources.image.encoder`) is trained."""

    lr: float = Field(1.0, ge=0)
    freeze: bool = False


class LoraConfig(Frozen):
    """Low-rank adapters (Hu et al. 2021, "LoRA", section 4.1) on linear maps of the decoder's blocks, by their names
    there: qkv and out of the self-attention, up, gate and out of the feed-forward. All else of the decoder but its
    cross-attention is frozen, unless `training.parts` has an entry for it."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...] = Field(("qkv", "out", "up"), min_length=1)


class TrainingConfig(Frozen):
    """One training run. A step is one optimizer update of `batch_size` pictures a process times `accumulation`.

    `reward_temperature`: that of the captions that data with a `reward` has the model say. Below 1, what it learns from
    is closer to what it will say; smoothed labels leave half of a sample's words to chance at 1.
    """

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    accumulation: PositiveInt = 1
    streams: PositiveInt = 5
    lr: float = Field(1e-3, gt=0)
    warmup: int = Field(100, ge=0)
    final_lr: float = Field(0.01, ge=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.1, ge=0.0, lt=1.0)
    reward_temperature: float = Field(1.0, gt=0)
    source_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    ema: float = Field(0.0, ge=0.0, lt=1.0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    parts: dict[str, PartConfig] = {}
    lora: LoraConfig | None = None
    seed: int = 0
    workers: int = Field(0, ge=0)
    log_every: PositiveInt = 50
    validate_every: PositiveInt = 1000
    save_every: PositiveInt = 500
    keep: PositiveInt = 2
    bad_limit: float = Field(0.001, ge=0, le=1)
    monitor: str = "loss"
    max_text: PositiveInt = 40


class Config(Frozen):
    """Everything one `mmx train` needs: a `model` to be trained from the start, or `init`, the checkpoint folder to
    start from. `mount` adds sources to the model of `init`; what it had stays as it was until it is trained.
    `generation` that is not given is that of `init`."""

    model: ModelConfig | None = None
    init: str | None = None
    mount: dict[str, SourceConfig] = {}
    train: tuple[DataConfig, ...] = Field(min_length=1)
    validation: dict[str, DataConfig] = {}
    training: TrainingConfig = TrainingConfig()
    generation: GenerationConfig | None = None
    out: str = "runs/model"

    @model_validator(mode="after")
    def _starts_somewhere(self) -> "Config":
        if (self.model is None) == (self.init is None):
            given = "both model and init" if self.model else "neither model nor init"
            raise ValueError(f"{given} are given; expected a model to be built, or init, a checkpoint to start from")
        if self.mount and self.init is None:
            raise ValueError("mount adds sources to the checkpoint of init; without init, put them into model.sources")
        return self
