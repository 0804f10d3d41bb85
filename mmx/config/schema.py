"""Typed, frozen configuration of a model, its data and a training run: every option with its default and bounds.

Values are read from YAML by `mmx.config.loader`. Nothing here imports torch.
"""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from mmx.config.data import AugmentationConfig, DataConfig, TextConfig, TextOptions
from mmx.config.transformer import BaseTransformerConfig, DecoderConfig, FrozenModel, RopeScaling, TransformerConfig

__all__ = [
    "AugmentationConfig",
    "BaseTransformerConfig",
    "DataConfig",
    "DecoderConfig",
    "DistillationConfig",
    "FrozenModel",
    "GenerationConfig",
    "LoraConfig",
    "ModelConfig",
    "ParamGroupConfig",
    "Precision",
    "ProjectionConfig",
    "QuestionEncoderConfig",
    "RopeScaling",
    "RunConfig",
    "SourceConfig",
    "SpeechConfig",
    "SpeechTask",
    "TextConfig",
    "TextOptions",
    "TokenizerConfig",
    "TrainingConfig",
    "TransformerConfig",
]

Precision = Literal["float32", "bfloat16", "int8"]
SpeechTask = Literal["transcribe", "translate"]
MixedPrecision = Literal["auto", "no", "bf16", "fp16"]


class ProjectionConfig(FrozenModel):
    """How the features of one source become keys and values. Positions are added to the keys only.

    `hidden_size`: features are first mapped linearly to this size.
    """

    hidden_size: PositiveInt | None = None
    positions: Literal["none", "learned", "sinusoidal"] = "learned"
    max_position_embeddings: PositiveInt = 64
    norm: Literal["none", "layer", "rms"] = "layer"
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    bias: bool = True


class SourceConfig(FrozenModel):
    """One source: the name or address of its encoder, the encoder's own options, and the key-value projection."""

    encoder: str
    options: dict[str, object] = {}
    projection: ProjectionConfig = ProjectionConfig()


class QuestionEncoderConfig(TransformerConfig):
    """An image-grounded text encoder (Li et al. 2022, "BLIP", section 3.1).

    Every token of the question attends to the whole question and to the memory of the sources; the resulting states
    become the memory of the decoder. `prefix_token_ids` and `suffix_token_ids` are put before and after each question.
    `attend_padding` makes padding positions of a batch visible, as transformers' BLIP does; an answer then depends on
    the other questions of its batch.
    """

    projection: ProjectionConfig = ProjectionConfig(positions="none")
    prefix_token_ids: tuple[int, ...] = ()
    suffix_token_ids: tuple[int, ...] = ()
    attend_padding: bool = False


class TokenizerConfig(FrozenModel):
    """The tokenizer that is trained with a new model. Without these options it keeps texts as written.

    `lowercase`: texts and questions are read in lower case. `nfkc`: compatibility characters are replaced by their
    plain forms, such as full-width letters (Unicode's NFKC).
    """

    lowercase: bool = False
    nfkc: bool = False


class SpeechConfig(FrozenModel):
    """Special tokens of a speech recognition model (Radford et al. 2022, "Whisper", section 2.3).

    `language_token_ids` and `task_token_ids`: token by language code and by task; empty for a model of one language.
    The prompt has one of each, which those of a text replace. `no_speech_token_id`: its probability after the first
    token of the prompt is that of audio without speech.
    """

    language_token_ids: dict[str, int] = {}
    task_token_ids: dict[str, int] = {}
    no_speech_token_id: int | None = None


class ModelConfig(FrozenModel):
    """A whole model: named sources, one decoder, and optionally a question encoder.

    `vocab_size` is the size of a tokenizer that is trained with the model. `question_input` is what reads questions:
    `prompt` (the decoder's prompt), a text source by name, or `question_encoder`. `tie_key_value` shares the key and
    value projections: `layers` across the layers of each source (L = 1), `all` also with the decoder's self-attention
    and between sources. `special_tokens` gives the token ids of special tokens that the tokenizer lacks, such as
    `caption: []`; a special token that neither has is a task that the model was not trained for. `speech` is for speech
    recognition models; without it, the prompt and with it the language are fixed.
    """

    sources: dict[str, SourceConfig] = Field(min_length=1)
    decoder: DecoderConfig = DecoderConfig()
    question_encoder: QuestionEncoderConfig | None = None
    vocab_size: PositiveInt = 4096
    tokenizer: TokenizerConfig = TokenizerConfig()
    question_input: str = "prompt"
    tie_key_value: Literal["none", "layers", "all"] = "none"
    special_tokens: dict[str, tuple[int, ...]] = {}
    speech: SpeechConfig | None = None

    @model_validator(mode="after")
    def _check_question_input(self) -> "ModelConfig":
        known = ["prompt", *sorted(self.sources)]
        if self.question_encoder:
            known.insert(1, "question_encoder")
        if self.question_input not in known:
            raise ValueError(f"question_input is {self.question_input!r}; expected one of {', '.join(known)}")
        if self.question_encoder and self.question_input != "question_encoder":
            raise ValueError(
                f"question_input is {self.question_input!r}, but the model has a question encoder; "
                "give question_input: question_encoder"
            )
        if "question_encoder" in self.sources:
            raise ValueError("a source cannot be named question_encoder; choose another name")
        return self

    @model_validator(mode="after")
    def _check_tying(self) -> "ModelConfig":
        if self.tie_key_value != "all":
            return self
        decoder = self.decoder
        if self.question_encoder or decoder.num_kv_heads != decoder.num_heads:
            raise ValueError("tie_key_value: all excludes question_encoder and num_kv_heads; leave them out")
        different = [name for name, source in self.sources.items() if source.projection.bias != decoder.bias]
        if different:
            raise ValueError(
                f"tie_key_value: all needs bias: {str(decoder.bias).lower()} (as in the decoder) in the projection of "
                f"{', '.join(different)}"
            )
        return self


class GenerationConfig(FrozenModel):
    """Decoding options, named as in transformers' GenerationConfig.

    `guidance_scale`: classifier-free guidance (see `mmx.generation.guidance`). 1 disables it; any other value decodes
    every token a second time without the memory. `answer_temperature` divides the log-probability of an answer to give
    its `probability`; it changes no text. `mmx eval` fits it on data with answers. `language` and `task` are for speech
    recognition models of several languages: a language by code or English name (without one, that of each audio is
    detected), and whether a text is in the language of the audio or translated to English. `start`: with what every
    text begins; its tokens follow the prompt, and scores count only the tokens after it. `avoid`: words and phrases
    that a text must not have as whole words; `include`: those that it must have, each with alternatives separated by
    `|`.
    """

    max_new_tokens: int = Field(32, ge=1, le=1_000_000)
    min_new_tokens: int = Field(0, ge=0)
    num_beams: int = Field(1, ge=1, le=1000)
    do_sample: bool = False
    temperature: float = Field(1.0, ge=1e-6, le=1e6, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1.0)
    num_return_sequences: int = Field(1, ge=1, le=10_000)
    length_penalty: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False)
    early_stopping: bool = False
    repetition_penalty: float = Field(1.0, ge=1e-6, le=1e6, allow_inf_nan=False)
    no_repeat_ngram_size: int = Field(0, ge=0)
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_eos_token_id: int | None = None
    renormalize_logits: bool = False
    guidance_scale: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    answer_temperature: float = Field(1.0, ge=0.01, le=100, allow_inf_nan=False)
    stop_strings: tuple[str, ...] = ()
    start: str = ""
    avoid: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    language: str | None = None
    task: SpeechTask | None = None
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_combination(self) -> "GenerationConfig":
        if self.do_sample and self.num_beams > 1:
            raise ValueError("do_sample and num_beams > 1 contradict each other; choose sampling or beams")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        if "" in self.stop_strings:
            raise ValueError("stop_strings holds an empty text, which every text contains; leave it out")
        words = [*self.avoid, *(word for group in self.include for word in group.split("|"))]
        if not all(word.strip() for word in words):
            raise ValueError("avoid or include holds an empty word, which every text contains; leave it out")
        if any("|" in word for word in self.avoid):
            raise ValueError(
                "avoid holds a word with |, which is for alternatives of include; give each word by itself"
            )
        if self.num_return_sequences > 1 and not self.do_sample and self.num_beams < self.num_return_sequences:
            raise ValueError(
                f"num_return_sequences {self.num_return_sequences} needs do_sample: true or as many num_beams"
            )
        return self


class ParamGroupConfig(FrozenModel):
    """How one group of parameters is trained. A group is a prefix of parameter names, such as `sources.image.encoder`.

    `lr_scale` multiplies the learning rate; `freeze` excludes the group from training.
    """

    lr_scale: float = Field(1.0, ge=0)
    freeze: bool = False


class LoraConfig(FrozenModel):
    """Low-rank adapters (Hu et al. 2021, "LoRA", section 4.1) on linear layers of the decoder, named as in peft.

    `target_modules`: qkv and out of the self-attention, up, gate and out of the feed-forward. The rest of the decoder
    except its cross-attention is frozen, unless `training.param_groups` has an entry for it.
    """

    r: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: tuple[str, ...] = Field(("qkv", "out", "up"), min_length=1)


class DistillationConfig(FrozenModel):
    """Knowledge distillation (Hinton et al. 2015) from checkpoints with the same tokenizer and input preparation.

    `teachers`: checkpoint folders, whose probabilities are averaged. `weight`: weight of the teachers in the loss; the
    reference texts have 1 - weight. `temperature`: divides the logits of teachers and student.
    """

    teachers: tuple[str, ...] = Field(min_length=1)
    weight: float = Field(0.7, gt=0, le=1)
    temperature: float = Field(1.0, gt=0)


class TrainingConfig(FrozenModel):
    """Options of a training run, named as in transformers' TrainingArguments where it has them.

    A step is one optimizer update: `per_device_batch_size` images per process, times `gradient_accumulation_steps`.
    `min_lr_ratio`: final learning rate as a fraction of `learning_rate`. `texts_per_image`: texts drawn for each image.
    `max_target_length`: tokens of a target text that are learned, without its prompt; None for as many as the decoder
    has positions for. `modality_dropout`: probability that a text is trained without the sources. `ema_decay`: decay of
    the exponential moving average of the weights (0 disables it). `max_skip_fraction`: fraction of unreadable examples
    above which training stops. `reward_temperature`: sampling temperature of self-critical sequence training.
    `target_noise`: probability of replacing a token of the target texts in the decoder inputs by a random one.
    `mixed_precision`: auto is bf16 on a device that computes it natively (a GPU of compute capability 8.0 or a CPU with
    AVX512-BF16 or AMX), else no.
    """

    max_steps: PositiveInt = 1000
    per_device_batch_size: PositiveInt = 32
    gradient_accumulation_steps: PositiveInt = 1
    texts_per_image: PositiveInt = 5
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    min_lr_ratio: float = Field(0.01, ge=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.1, ge=0.0, lt=1.0)
    reward_temperature: float = Field(1.0, ge=1e-6, le=1e6, allow_inf_nan=False)
    modality_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_noise: float = Field(0.0, ge=0.0, lt=1.0)
    ema_decay: float = Field(0.0, ge=0.0, lt=1.0)
    mixed_precision: MixedPrecision = "auto"
    param_groups: dict[str, ParamGroupConfig] = {}
    lora: LoraConfig | None = None
    distillation: DistillationConfig | None = None
    seed: int = 0
    num_workers: int = Field(0, ge=0)
    logging_steps: PositiveInt = 50
    eval_steps: PositiveInt = 1000
    save_steps: PositiveInt = 500
    save_total_limit: PositiveInt = 2
    max_skip_fraction: float = Field(0.001, ge=0, le=1)
    metric_for_best_model: str = "loss"
    max_target_length: PositiveInt | None = None


class RunConfig(FrozenModel):
    """Everything one `mmx train` needs: either `model`, built from scratch, or `init`, a checkpoint to start from.

    `unmount` removes sources from the model of `init`, then `mount` adds others; a source in both is replaced. Without
    `generation`, the options of `init` are kept.
    """

    model: ModelConfig | None = None
    init: str | None = None
    unmount: tuple[str, ...] = ()
    mount: dict[str, SourceConfig] = {}
    train: tuple[DataConfig, ...] = Field(min_length=1)
    validation: dict[str, DataConfig] = {}
    training: TrainingConfig = TrainingConfig()
    generation: GenerationConfig | None = None
    output_dir: str = "runs/model"

    @model_validator(mode="after")
    def _check_model_or_init(self) -> "RunConfig":
        if (self.model is None) == (self.init is None):
            given = "both model and init" if self.model else "neither model nor init"
            raise ValueError(f"{given} are given; expected one: a model to build, or init, a checkpoint to start from")
        if self.mount and self.init is None:
            raise ValueError("mount needs init, the checkpoint to extend; without init, use model.sources")
        if self.unmount and self.init is None:
            raise ValueError("unmount needs init, the checkpoint to change; without init, use model.sources")
        return self

    @model_validator(mode="after")
    def _check_distillation(self) -> "RunConfig":
        if self.training.distillation and any(data.reward for data in self.train):
            raise ValueError("training.distillation and reward exclude each other; leave out one of them")
        return self
