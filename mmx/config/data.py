"""Configuration of the data sets of a run. Nothing here imports torch."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from mmx.config.transformer import FrozenModel


class TextOptions(FrozenModel):
    """Changes of target texts, which are otherwise learned as they are written, without white space at their ends.

    `lowercase`: lower case. `collapse_whitespace`: one space for each run of white space, also in questions.
    `join_punctuation`: no space before . , ? ! ; : 's and n't. `strip_final_period`: no full stops at the end, unless
    the text has nothing else.
    """

    lowercase: bool = False
    collapse_whitespace: bool = False
    join_punctuation: bool = False
    strip_final_period: bool = False


class TextConfig(FrozenModel):
    """Changes of the target texts of each task: captions, and answers (`ask`)."""

    caption: TextOptions = TextOptions()
    ask: TextOptions = TextOptions()


class AugmentationConfig(FrozenModel):
    """Random changes of training images.

    `min_crop_scale`: smallest area of a random crop, as a fraction. `horizontal_flip`: mirror with probability 0.5.
    `color_jitter`: strength of changes of brightness, contrast and saturation. `random_erasing`: probability that a
    rectangle is erased (Zhong et al. 2020).
    """

    min_crop_scale: float = Field(1.0, gt=0.0, le=1.0)
    horizontal_flip: bool = False
    color_jitter: float = Field(0.0, ge=0.0, le=1.0)
    random_erasing: float = Field(0.0, ge=0.0, le=1.0)

    def without_geometry(self) -> "AugmentationConfig":
        """The same without crops, flips and erasing, for examples whose boxes must stay valid."""
        return AugmentationConfig(color_jitter=self.color_jitter)


class DataConfig(FrozenModel):
    """One data set. `path` is a file or folder in a supported format, `hf:NAME:SPLIT`, or `scenes` for generated ones.

    `columns` names the columns of a table, such as {caption: description}. `fraction` selects examples by position,
    [from, to]. `sampling_weight` multiplies how often its examples are drawn in training. `question_types` keeps only
    questions of these types (of scenes: exists, count, color, shape, size, relation, position, pointed); `max_objects`
    keeps only scenes of at most so many shapes; `num_examples` is the number of generated scenes. `derive_questions`
    adds questions that are answered by the captions (types color, count, object, action, place, animal, subject,
    exists, verify; see `mmx.data.derived_questions`). `wordings` of these questions: `first` asks each in one way;
    `seen` draws from several, with and without capitals and question mark; `held_back` draws from others, for
    evaluation. `unanswerable`: fraction of these questions that have nothing to do with their image and are answered
    "can't tell" (type unanswerable). `reward: cider` trains captions by self-critical sequence training (see
    `mmx.training.scst`). With `image_cache_size`, each image is decoded once, resized to a square of this many pixels a
    side, and kept in memory as uint8. `text` changes the texts of a task (see `mmx.data.texts`).
    """

    path: str
    format: Literal[
        "auto",
        "manifest",
        "csv",
        "parquet",
        "karpathy",
        "coco",
        "vqa",
        "folder",
        "sidecar",
        "webdataset",
        "hf",
        "scenes",
    ] = "auto"
    split: str | None = None
    annotations: str | None = None
    columns: dict[str, str] = {}
    fraction: tuple[float, float] = (0.0, 1.0)
    sampling_weight: float = Field(1.0, gt=0)
    derive_questions: bool = False
    wordings: Literal["first", "seen", "held_back"] = "first"
    unanswerable: float = Field(0.0, ge=0, le=0.5)
    reward: Literal["cider"] | None = None
    max_examples: PositiveInt | None = None
    augmentation: AugmentationConfig = AugmentationConfig()
    num_examples: PositiveInt = 1000
    seed: int = 0
    tasks: tuple[Literal["caption", "ask"], ...] = ("caption", "ask")
    question_types: tuple[str, ...] = ()
    max_objects: PositiveInt | None = None
    image_cache_size: PositiveInt | None = None
    text: TextConfig = TextConfig()

    @model_validator(mode="after")
    def _check_fraction(self) -> "DataConfig":
        if not 0 <= self.fraction[0] < self.fraction[1] <= 1:
            raise ValueError(f"fraction is {list(self.fraction)}; expected two numbers such as [0, 0.9]")
        return self

    @model_validator(mode="after")
    def _check_reward(self) -> "DataConfig":
        if self.reward and "caption" not in self.tasks:
            raise ValueError(f"reward is {self.reward!r}, and tasks has no captions; add caption to tasks")
        if self.reward and self.derive_questions:
            raise ValueError(
                "reward applies to captions only; list the data a second time with derive_questions and tasks: [ask]"
            )
        if self.derive_questions and "ask" not in self.tasks:
            raise ValueError("derive_questions is true, and tasks has no questions; add ask to tasks")
        if not self.derive_questions and (self.wordings != "first" or self.unanswerable):
            raise ValueError("wordings and unanswerable apply to derived questions only; add derive_questions: true")
        return self
