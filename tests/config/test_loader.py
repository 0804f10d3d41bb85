"""Configuration files: every mistake is named once, by file and line, with what to type; what is written reads back."""

import string
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmx.config.loader import dump_config, load_config, override_config, parse_config
from mmx.errors import ConfigError


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Decoder(Strict):
    width: int = Field(default=64, gt=0)
    depth: int = 2
    dropout: float = Field(default=0.1, ge=0, lt=1)


class Crop(Strict):
    kind: Literal["crop"]
    size: int


class Flip(Strict):
    kind: Literal["flip"]
    chance: float = 0.5


Step = Annotated[Crop | Flip, Field(discriminator="kind")]


class Source(Strict):
    path: Path
    weight: float = 1.0


class Model(Strict):
    name: str
    decoder: Decoder = Decoder()
    pooling: Literal["mean", "attention", "none"] = "mean"


class Training(Strict):
    steps: int = Field(ge=1)
    warmup: int = 0
    rate: float = 1e-4
    half: bool = False
    seed: int | Literal["random"] = "random"

    @model_validator(mode="after")
    def check(self) -> "Training":
        if self.warmup > self.steps:
            raise ValueError("warmup is longer than steps; lower it")
        return self


class Data(Strict):
    train: list[Source] = Field(min_length=1)
    sizes: tuple[int, int] = (224, 224)
    augment: list[Step] = []
    first: Step | None = None
    named: dict[str, Source] = {}
    special: Crop | list[Source] | None = None


class Settings(Strict):
    model: Model
    training: Training
    data: Data
    note: str | None = None
    extra: dict[str, Any] = {}


GOOD = """\
model:
  name: small
  decoder:
    width: 32
training:
  steps: 10
data:
  train:
    - path: a.jsonl
    - path: b.jsonl
      weight: 2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text.encode())
    return path


def read(folder: Path, text: str, *overrides: str) -> Settings:
    return load_config(write(folder, text), Settings, overrides)


def complaint(folder: Path, text: str, *overrides: str) -> str:
    """The message, with the folder taken out of it."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_good_file_reads(tmp_path: Path) -> None:
    settings = read(tmp_path, GOOD)
    assert settings.model.decoder == Decoder(width=32)
    assert settings.data.train == [Source(path=Path("a.jsonl")), Source(path=Path("b.jsonl"), weight=2)]


# (a line of GOOD, what stands there instead, the line of the complaint, the whole complaint)
EXACT = [
    ("    width: 32", "    widht: 32", 4, "model.decoder.widht is not a known key; did you mean 'width'?"),
    ("    width: 32", "    zzz: 32", 4, "model.decoder.zzz is not a known key; known: depth, dropout, width."),
    ("training:", "trainign: {}\ntraining:", 5, "trainign is not a known key; did you mean 'training'?"),
    ("      weight: 2", "      wieght: 2", 11, "data.train.1.wieght is not a known key; did you mean 'weight'?"),
    ("  steps: 10", "  steps: many", 6, "training.steps is 'many', expected a whole number"),
    ("  steps: 10", "  steps: '10'", 6, "training.steps is '10', expected a whole number"),
    ("  steps: 10", "  steps: 012", 6, "training.steps is '012', expected a whole number"),
    ("  steps: 10", "  steps: 1_000", 6, "training.steps is '1_000', expected a whole number"),
    ("  steps: 10", "  steps: 0x10", 6, "training.steps is '0x10', expected a whole number"),
    ("  steps: 10", "  steps: 12:30:45", 6, "training.steps is '12:30:45', expected a whole number"),
    ("  steps: 10", "  steps: 1.5", 6, "training.steps is 1.5, expected a whole number"),
    ("  steps: 10", "  steps: true", 6, "training.steps is true, expected a whole number"),
    ("  steps: 10", "  steps:", 6, "training.steps is empty, expected a whole number"),
    ("  steps: 10", "  steps: 0", 6, "training.steps is 0, expected at least 1"),
    ("  steps: 10", "  steps: [1, 2]", 6, "training.steps is [1, 2], expected a whole number"),
    ("  steps: 10", "  steps: 2001-01-01", 6, "training.steps is '2001-01-01', expected a whole number"),
    ("  steps: 10", "  warmup: 3", 5, "training.steps is missing; add it"),
    ("  steps: 10", "  steps: 10\n  warmup: 20", 5, "training: warmup is longer than steps; lower it"),
    ("  steps: 10", "  steps: 10\n  half: yes", 7, "training.half is 'yes', expected true or false"),
    ("  steps: 10", "  steps: 10\n  half: off", 7, "training.half is 'off', expected true or false"),
    ("  steps: 10", "  steps: 10\n  half: 1", 7, "training.half is 1, expected true or false"),
    ("  steps: 10", "  steps: 10\n  rate: fast", 7, "training.rate is 'fast', expected a number"),
    ("  steps: 10", "  steps: 10\n  rate: 1e999", 7, "training.rate is '1e999', expected a number"),
    ("  steps: 10", "  steps: 10\n  seed: rnd", 7,
     "training.seed is 'rnd', expected a whole number or 'random'; did you mean 'random'?"),
    ("  steps: 10", "  steps: 10\n  steps: 11", 7, "training.steps is given twice, first at run.yaml:6; keep one"),
    ("  steps: 10", "  steps: 10\n  'steps': 1", 7, "training.steps is given twice, first at run.yaml:6; keep one"),
    ("    width: 32", "    width: 0", 4, "model.decoder.width is 0, expected more than 0"),
    ("    width: 32", "    dropout: 1", 4, "model.decoder.dropout is 1, expected less than 1"),
    ("    width: 32", "    dropout: -0.1", 4, "model.decoder.dropout is -0.1, expected at least 0"),
    ("  name: small", "  name: 5", 2, "model.name is 5, expected text (put it in quotes)"),
    ("  name: small", "  name: true", 2, "model.name is true, expected text (put it in quotes)"),
    ("  name: small", "  name: [a]", 2, "model.name is ['a'], expected text"),
    ("  name: small", "  name: !!python/object/apply:os.system [ls]", 2,
     "model.name: the tag !!python/object/apply:os.system is not allowed; write the plain value"),
    ("  name: small", "  name: !!binary aGk=", 2, "model.name: the tag !!binary is not allowed; write the plain value"),
    ("  name: small", "  name: small\n  pooling: meen", 3,
     "model.pooling is 'meen', expected 'mean', 'attention' or 'none'; did you mean 'mean'?"),
    ("  name: small", "  name: small\n  pooling: 7", 3, "model.pooling is 7, expected 'mean', 'attention' or 'none'"),
    ("training:", "note: 3\ntraining:", 5, "note is 3, expected text (put it in quotes)"),
    ("training:", "extra: many\ntraining:", 5, "extra is 'many', expected keys and values"),
    ("training:", "extra: &a {x: *b}\ntraining:", 5, "an alias (*name) has no anchor; write &name before it"),
    ("training:", "extra: {<<: {a: 1}}\ntraining:", 5,
     "extra: '<<' merges are not supported; write the keys out, or alias single values"),
    ("training:", "extra: {[a]: 1}\ntraining:", 5, "extra: a key must be a plain word; write 'key: value'"),
    ("training:", "training: [1]\nextra:", 5, "training is [1], expected keys and values"),
    ("    - path: a.jsonl", "    - weight: 1", 9, "data.train.0.path is missing; add it"),
    ("    - path: a.jsonl", "    - a.jsonl", 9, "data.train.0 is 'a.jsonl', expected keys and values"),
    ("  train:", "  sizes: [1]\n  train:", 8, "data.sizes.1 is missing; add it"),
    ("  train:", "  sizes: [1, 2, 3]\n  train:", 8, "data.sizes is [1, 2, 3], expected a length of at most 2"),
    ("  train:", "  sizes:\n    - 1\n    - big\n  train:", 10, "data.sizes.1 is 'big', expected a whole number"),
    ("  train:", "  sizes: 224\n  train:", 8, "data.sizes is 224, expected a list"),
    ("  train:", "  augment:\n    - kind: flip\n    - kind: crop\n      sise: 1\n      size: 2\n  train:", 11,
     "data.augment.1.sise is not a known key; did you mean 'size'?"),
    ("  train:", "  augment:\n    - kind: corp\n  train:", 9,
     "data.augment.0.kind is 'corp', expected one of 'crop', 'flip'; did you mean 'crop'?"),
    ("  train:", "  augment:\n    - size: 3\n  train:", 9, "data.augment.0.kind is missing; add it"),
    ("  train:", "  first:\n    kind: crop\n    size: big\n  train:", 10,
     "data.first.size is 'big', expected a whole number"),
    ("  train:", "  named:\n    a: {path: x}\n    b:\n      path: 3\n  train:", 11,
     "data.named.b.path is 3, expected text (put it in quotes)"),
    ("  train:", "  special:\n    - path: a\n    - paht: b\n      path: c\n  train:", 10,
     "data.special.1.paht is not a known key; did you mean 'path'?"),
    ("  train:", "  special: many\n  train:", 8, "data.special is 'many', expected keys and values or a list"),
    ("    - path: a.jsonl", "    - path: {a", 9, "a bracket is never closed, or a comma is missing"),
    ("  steps: 10", '  steps: "10', 6, "a quote is never closed; close it"),
    ("  steps: 10", "\tsteps: 10", 6, "a tab cannot stand here; use spaces"),
    ("  steps: 10", "  steps: a: b", 6, "one ':' too many, or a wrong indentation; quote a text that holds ': '"),
    ("  steps: 10", "   steps: 10\n  warmup: 1", 7, "the indentation does not fit the lines above; align it with them"),
    ("  steps: 10", "  steps: 10\n  warmup\n  rate: 1", 7, "a line without ':'; write 'key: value'"),
    ("  steps: 10", "  steps: 1\x070", 6, "a control character stands here; remove it"),
    ("data:", "---\ndata:", 7, "a second document begins; keep one"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "instead", "at", "message"), EXACT)
def test_one_mistake_gives_one_line_with_file_line_and_remedy(
    tmp_path: Path, line: str, instead: str, at: int, message: str
) -> None:
    assert f"{line}\n" in GOOD
    begun = time.process_time()
    text = complaint(tmp_path, GOOD.replace(f"{line}\n", f"{instead}\n", 1))
    assert text == f"run.yaml:{at}: {message}"
    assert time.process_time() - begun < 1


COMMAND_LINE = [
    ("training.stesp=3", "training.stesp is not a known key; did you mean 'steps'?"),
    ("trainin.steps=3", "trainin is not a known key; did you mean 'training'?"),
    ("training.steps=many", "training.steps is 'many', expected a whole number"),
    ("training.steps=", "training.steps is empty, expected a whole number"),
    ("training.steps", "expected key=value, as in training.steps=100"),
    ("training..steps=3", "expected key=value, as in training.steps=100"),
    ("training.steps.x=3", "training.steps is 10, expected keys and values"),
    ("data.train.2.weight=3", "data.train has length 2, counted from 0; there is no item '2'"),
    ("data.train.-1.weight=3", "data.train has length 2, counted from 0; there is no item '-1'"),
    ("data.train.1.wieght=3", "data.train.1.wieght is not a known key; did you mean 'weight'?"),
    ("data.sizes=[1,2", "a bracket is never closed, or a comma is missing"),
    ("model.name=#fff", "'#' begins a comment; put the value in quotes"),
    ("model.name=!!python/name:os.system", 
     "model.name: the tag !!python/name:os.system is not allowed; write the plain value"),
    ("data={sizes: [1, 2]}", "data.train is missing; add it"),
    ("data={train: [], train: []}",
     ("data.train is given twice, first at command line: data={train: [], train: []}; keep one\n"
      "data.train is [], expected a length of at least 1")),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), COMMAND_LINE)
def test_a_mistake_on_the_command_line_names_it(tmp_path: Path, override: str, message: str) -> None:
    lines = complaint(tmp_path, GOOD, override).splitlines()
    expected = [f"command line: {override}: {line}" for line in message.splitlines()]
    assert lines == ([f"run.yaml: {len(expected)} problems"] if len(expected) > 1 else []) + expected


class Several(Strict):
    sources: tuple[Source, ...] = Field(min_length=1)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "sources is [], expected a length of at least 1"),
        ([{"path": "a", "wieght": 1}], "sources.0.wieght is not a known key; did you mean 'weight'?"),
    ],
)
def test_a_tuple_is_not_called_too_short_for_its_wrong_items(sources: list[Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"sources": sources}, Several, where="here")
    assert str(caught.value) == f"here: {message}"


@pytest.mark.parametrize(("override", "message"), COMMAND_LINE)
def test_settings_in_hand_are_changed_with_the_same_sentences(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override_config(read(tmp_path, GOOD), [override])
    expected = [f"command line: {override}: {line}" for line in message.splitlines()]
    assert str(caught.value).splitlines() == ["command line: 2 problems"] * (len(expected) > 1) + expected


def test_settings_in_hand_keep_what_is_not_overridden(tmp_path: Path) -> None:
    whole = read(tmp_path, GOOD)
    assert override_config(whole, []) == whole
    changed = override_config(whole, ["training.steps=7", "data.train.1.weight=0.5", "extra.new={a: [1, b]}"])
    assert (changed.training.steps, changed.extra) == (7, {"new": {"a": [1, "b"]}})
    assert changed.data.train == [whole.data.train[0], Source(path=Path("b.jsonl"), weight=0.5)]
    assert whole.training.steps == 10
    assert changed.model == whole.model


def test_a_contradiction_with_settings_in_hand_names_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        override_config(read(tmp_path, GOOD), ["training.warmup=20"])
    assert str(caught.value) == "command line: training: warmup is longer than steps; lower it"


def test_all_mistakes_are_named_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD.replace("width", "widht").replace("steps: 10", "steps: 0\n  steps: 1").replace("name: sm", "nme: !x sm")
    assert complaint(tmp_path, text, "data.sizes=big", "note=[]").splitlines() == [
        "run.yaml: 7 problems",
        "run.yaml:1: model.name is missing; add it",
        "run.yaml:2: model.nme: the tag !x is not allowed; write the plain value",
        "run.yaml:4: model.decoder.widht is not a known key; did you mean 'width'?",
        "run.yaml:6: training.steps is 0, expected at least 1",
        "run.yaml:7: training.steps is given twice, first at run.yaml:6; keep one",
        "command line: data.sizes=big: data.sizes is 'big', expected a list",
        "command line: note=[]: note is [], expected text",
    ]


FILES = [
    (b"", ":1: the file is empty, expected keys and values; known: model, training, data, note, extra."),
    (b"# only a comment\n", ":1: the file is empty, expected keys and values"),
    (b"- a\n- b\n", ":1: this is not a mapping, expected keys and values; known: model,"),
    (b"just words\n", ":1: this is not a mapping, expected keys and values; known: model,"),
    (b"model:\n  name: caf\xe9\n", ":2: this is not UTF-8 text; save the file as UTF-8"),
    ("model: 1\n".encode("utf-16"), ":1: this is not UTF-8 text"),
    (b"a: " + b"[" * 5000, ":1: this is nested too deeply"),
    (b"a: " + b"[" * 70 + b"]" * 70, ":1: too many values, or nested too deeply"),
    (b"a: &a [*a]\n", ":1: too many values, or nested too deeply"),
    (b"a: &a [*a, *a]\n", ":1: too many values, or nested too deeply"),
    (b'a: "\\Uffffffff"\n', ":1: this is nested too deeply, or holds an impossible escape"),
    (b"a: 1\n" * 300_000, ": the file is larger than 1048576 bytes"),
    (b'note: "\\ud800"\n', ":1: a value is neither text, number"),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=[message for _, message in FILES])
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, Settings)
    assert str(caught.value).startswith(f"{path}{message}")
    assert caught.value.__cause__ is None
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    for name, message in [
        ("rum.yaml", "there is no such file; did you mean 'run.yaml'?"),
        ("other", "there is no such file; check the path"),
        ("no/such.yaml", "there is no such file; check the path"),
        ("", "this is a folder, expected a YAML file"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name, Settings)
        assert str(caught.value) == f"{tmp_path / name}: {message}"


def test_many_aliases_of_aliases_end_soon(tmp_path: Path) -> None:
    rows = ["extra:", "  a0: &a0 x"] + [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    begun = time.process_time()
    assert "too many values" in complaint(tmp_path, "\n".join(rows))
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("typed", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("+3", 3), ("-0", 0), ("0", 0), (".inf", float("inf"))]
    + [("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("'5'", "5"), ("!!str 5", "5")]
    + [(word, word) for word in ("no", "yes", "on", "off", "012", "0o7", "0x1F", "1_000", "12:30:45", "2001-01-01")]
    + [(word, word) for word in ("1e999", "08.5", "1.2.3", ".", "e5", "y", "n", "nan", "inf", "=")],
)
def test_nothing_becomes_another_value_than_was_typed(tmp_path: Path, typed: str, value: Any) -> None:
    for whole in (read(tmp_path, GOOD + f"extra:\n  x: {typed}\n"), read(tmp_path, GOOD, f"extra.x={typed}")):
        assert whole.extra == {"x": value}
        assert type(whole.extra["x"]) is type(value)


def test_keys_are_names_as_typed(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD + "extra: {no: 1, 012: 2, null: 3}").extra == {"no": 1, "012": 2, "null": 3}


def test_overrides_reach_into_lists_and_mappings_and_the_last_one_wins(tmp_path: Path) -> None:
    settings = read(
        tmp_path, GOOD, "training.steps=3", "training.steps=4", "data.train.0.weight=0.5", "data.sizes=[1,2]",
        "model.decoder={depth: 7}", "model.decoder.dropout=0", "extra.a.b=x=y", "note=no", "training.rate=1e-3",
    )  # fmt: skip
    assert (settings.training.steps, settings.training.rate) == (4, 1e-3)
    assert settings.data.train[0].weight == 0.5
    assert settings.data.train[1].weight == 2
    assert settings.data.sizes == (1, 2)
    assert settings.note == "no"
    assert settings.model.decoder == Decoder(depth=7, dropout=0)
    assert settings.extra == {"a": {"b": "x=y"}}


def test_a_mended_value_is_not_complained_about(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD.replace("steps: 10", "steps: many"), "training.steps=5").training.steps == 5


def test_anchors_are_copies(tmp_path: Path) -> None:
    text = GOOD + "extra:\n  a: &a {x: 1}\n  b: *a\n"
    assert read(tmp_path, text, "extra.b.x=2").extra == {"a": {"x": 1}, "b": {"x": 2}}


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeff" + GOOD.replace("\n", "\r\n")) == read(tmp_path, GOOD)


def test_a_mapping_in_hand_gets_the_same_sentences() -> None:
    assert parse_config({"width": 5}, Decoder, where="decoder") == Decoder(width=5)
    assert parse_config({"path": Path("a")}, Source, where="source") == Source(path=Path("a"))
    for data, message in [
        ({"widht": 5}, "decoder: widht is not a known key; did you mean 'width'?"),
        ({"width": "x", "depth": 1.5},
         ("decoder: 2 problems\ndecoder: width is 'x', expected a whole number\n"
          "decoder: depth is 1.5, expected a whole number")),
        ({"width": object()}, "decoder: a value is neither text, number, true, false, list nor mapping"),
        ([1], "decoder: the configuration is [1], expected keys and values"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            parse_config(data, Decoder, where="decoder")  # type: ignore[arg-type]
        assert str(caught.value) == message


def test_the_text_written_is_made_for_people(tmp_path: Path) -> None:
    assert dump_config(read(tmp_path, GOOD, "note=no", "training.rate=1e-5")) == (
        "model:\n  name: small\n  decoder:\n    width: 32\n    depth: 2\n    dropout: 0.1\n  pooling: mean\n"
        "training:\n  steps: 10\n  warmup: 0\n  rate: 1.0e-05\n  half: false\n  seed: random\n"
        "data:\n  train:\n  - path: a.jsonl\n    weight: 1.0\n  - path: b.jsonl\n    weight: 2.0\n"
        "  sizes:\n  - 224\n  - 224\n  augment: []\n  first: null\n  named: {}\n  special: null\n"
        "note: 'no'\nextra: {}\n"
    )


TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["1e-4", "no", "012", "null", "True", "~", "<<", "=", "12:30:45", "0x1F", "1_0"]
    + ["&a", "*a", "!x", "#", "- a", "a: b", "\x85", "a\u2028", "a\n", " \n a"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
PATHS = st.text(string.ascii_letters + "./ :#é", min_size=1).map(Path)
SOURCES = st.builds(Source, path=PATHS, weight=st.floats(allow_nan=False))
STEPS = st.builds(Crop, kind=st.just("crop"), size=st.integers()) | st.builds(Flip, kind=st.just("flip"))
WHOLE = st.builds(
    Settings,
    model=st.builds(Model, name=TEXTS, decoder=st.builds(Decoder, depth=st.integers())),
    training=st.builds(Training, steps=st.integers(100), seed=st.integers() | st.just("random")),
    data=st.builds(
        Data,
        train=st.lists(SOURCES, min_size=1, max_size=2),
        augment=st.lists(STEPS, max_size=2),
        first=st.none() | STEPS,
        named=st.dictionaries(TEXTS, SOURCES, max_size=2),
        special=st.none() | st.builds(Crop, kind=st.just("crop")) | st.lists(SOURCES, max_size=2),
    ),
    note=st.none() | TEXTS,
    extra=st.dictionaries(TEXTS, VALUES, max_size=3),
)


@effort(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WHOLE)
def test_what_is_written_reads_back_equal(tmp_path: Path, whole: Settings) -> None:
    again = read(tmp_path, dump_config(whole))
    assert again == whole
    assert repr(again) == repr(whole)  # == alone takes 1, 1.0 and true for the same


@effort(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@?,~ \n\t\\<x0"), max_size=40))
def test_whatever_a_file_holds_the_answer_is_a_config_error(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path, Settings)
