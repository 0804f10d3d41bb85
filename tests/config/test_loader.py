"""The configuration loader: all problems at once, each with code, key, file and line; dumped text loads equal."""

import pickle
import string
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmx.config.loader import (
    ConfigProblem,
    config_from_overrides,
    dump_config,
    load_config,
    override_config,
    parse_config,
)
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


class RunSettings(Strict):
    model: Model
    training: Training
    data: Data
    note: str | None = None
    extra: dict[str, Any] = {}


VALID = """\
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


def read(folder: Path, text: str, *overrides: str) -> RunSettings:
    return load_config(write(folder, text), RunSettings, overrides)


def problems(error: ConfigError) -> tuple[ConfigProblem, ...]:
    """The problems of an error, whose text has one line for each."""
    found = error.details["problems"]
    assert isinstance(found, tuple)
    lines = str(error).splitlines()
    assert lines[len(found) > 1 :] == [f"{problem.location}: {problem.message}" for problem in found]
    assert all(problem.suggestion is None or repr(problem.suggestion) in problem.message for problem in found)
    return found


def refused(folder: Path, text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(folder, text, *overrides)
    return caught.value


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    settings = read(tmp_path, VALID)
    assert settings.model.decoder == Decoder(width=32)
    assert settings.data.train == [Source(path=Path("a.jsonl")), Source(path=Path("b.jsonl"), weight=2)]


# (a line of VALID, its replacement, the line of the problem, its code, its key, the suggestion)
PROBLEMS = [
    ("    width: 32", "    widht: 32", 4, "config.unknown_key", "model.decoder.widht", "width"),
    ("    width: 32", "    zzz: 32", 4, "config.unknown_key", "model.decoder.zzz", None),
    ("training:", "trainign: {}\ntraining:", 5, "config.unknown_key", "trainign", "training"),
    ("      weight: 2", "      wieght: 2", 11, "config.unknown_key", "data.train.1.wieght", "weight"),
    ("  steps: 10", "  steps: many", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  steps: '10'", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  steps: 012", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  steps: 1_000", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  steps: 0x10", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  steps: 12:30:45", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  steps: 1.5", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  steps: true", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  steps:", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  steps: 0", 6, "config.value", "training.steps", None),
    ("  steps: 10", "  steps: [1, 2]", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  steps: 2001-01-01", 6, "config.type", "training.steps", None),
    ("  steps: 10", "  warmup: 3", 5, "config.missing_key", "training.steps", None),
    ("  steps: 10", "  steps: 10\n  warmup: 20", 5, "config.contradiction", "training", None),
    ("  steps: 10", "  steps: 10\n  half: yes", 7, "config.type", "training.half", None),
    ("  steps: 10", "  steps: 10\n  half: off", 7, "config.type", "training.half", None),
    ("  steps: 10", "  steps: 10\n  half: 1", 7, "config.type", "training.half", None),
    ("  steps: 10", "  steps: 10\n  rate: fast", 7, "config.type", "training.rate", None),
    ("  steps: 10", "  steps: 10\n  rate: 1e999", 7, "config.type", "training.rate", None),
    ("  steps: 10", "  steps: 10\n  seed: rnd", 7, "config.type", "training.seed", "random"),
    ("  steps: 10", "  steps: 10\n  steps: 11", 7, "config.duplicate_key", "training.steps", None),
    ("  steps: 10", "  steps: 10\n  'steps': 1", 7, "config.duplicate_key", "training.steps", None),
    ("    width: 32", "    width: 0", 4, "config.value", "model.decoder.width", None),
    ("    width: 32", "    dropout: 1", 4, "config.value", "model.decoder.dropout", None),
    ("    width: 32", "    dropout: -0.1", 4, "config.value", "model.decoder.dropout", None),
    ("  name: small", "  name: 5", 2, "config.type", "model.name", None),
    ("  name: small", "  name: true", 2, "config.type", "model.name", None),
    ("  name: small", "  name: [a]", 2, "config.type", "model.name", None),
    ("  name: small", "  name: !!python/object/apply:os.system [ls]", 2, "config.not_allowed", "model.name", None),
    ("  name: small", "  name: !!binary aGk=", 2, "config.not_allowed", "model.name", None),
    ("  name: small", "  name: small\n  pooling: meen", 3, "config.value", "model.pooling", "mean"),
    ("  name: small", "  name: small\n  pooling: 7", 3, "config.value", "model.pooling", None),
    ("training:", "note: 3\ntraining:", 5, "config.type", "note", None),
    ("training:", "extra: many\ntraining:", 5, "config.type", "extra", None),
    ("training:", "extra: &a {x: *b}\ntraining:", 5, "config.syntax", None, None),
    ("training:", "extra: {<<: {a: 1}}\ntraining:", 5, "config.not_allowed", "extra", None),
    ("training:", "extra: {[a]: 1}\ntraining:", 5, "config.not_allowed", "extra", None),
    ("training:", "training: [1]\nextra:", 5, "config.type", "training", None),
    ("    - path: a.jsonl", "    - weight: 1", 9, "config.missing_key", "data.train.0.path", None),
    ("    - path: a.jsonl", "    - a.jsonl", 9, "config.type", "data.train.0", None),
    ("  train:", "  sizes: [1]\n  train:", 8, "config.missing_key", "data.sizes.1", None),
    ("  train:", "  sizes: [1, 2, 3]\n  train:", 8, "config.value", "data.sizes", None),
    ("  train:", "  sizes:\n    - 1\n    - big\n  train:", 10, "config.type", "data.sizes.1", None),
    ("  train:", "  sizes: 224\n  train:", 8, "config.type", "data.sizes", None),
    ("  train:", "  augment:\n    - kind: flip\n    - kind: crop\n      sise: 1\n      size: 2\n  train:", 11,
     "config.unknown_key", "data.augment.1.sise", "size"),
    ("  train:", "  augment:\n    - kind: corp\n  train:", 9, "config.value", "data.augment.0.kind", "crop"),
    ("  train:", "  augment:\n    - size: 3\n  train:", 9, "config.missing_key", "data.augment.0.kind", None),
    ("  train:", "  first:\n    kind: crop\n    size: big\n  train:", 10, "config.type", "data.first.size", None),
    ("  train:", "  named:\n    a: {path: x}\n    b:\n      path: 3\n  train:", 11,
     "config.type", "data.named.b.path", None),
    ("  train:", "  special:\n    - path: a\n    - paht: b\n      path: c\n  train:", 10,
     "config.unknown_key", "data.special.1.paht", "path"),
    ("  train:", "  special: many\n  train:", 8, "config.type", "data.special", None),
    ("    - path: a.jsonl", "    - path: {a", 9, "config.syntax", None, None),
    ("  steps: 10", '  steps: "10', 6, "config.syntax", None, None),
    ("  steps: 10", "\tsteps: 10", 6, "config.syntax", None, None),
    ("  steps: 10", "  steps: a: b", 6, "config.syntax", None, None),
    ("  steps: 10", "   steps: 10\n  warmup: 1", 7, "config.syntax", None, None),
    ("  steps: 10", "  steps: 10\n  warmup\n  rate: 1", 7, "config.syntax", None, None),
    ("  steps: 10", "  steps: 1\x070", 6, "config.syntax", None, None),
    ("data:", "---\ndata:", 7, "config.syntax", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("line", "replacement", "at", "code", "key", "suggestion"), PROBLEMS)
def test_one_problem_is_one_sentence_with_file_line_and_key(
    tmp_path: Path, line: str, replacement: str, at: int, code: str, key: str | None, suggestion: str | None
) -> None:
    assert f"{line}\n" in VALID
    start = time.process_time()
    error = refused(tmp_path, VALID.replace(f"{line}\n", f"{replacement}\n", 1))
    assert time.process_time() - start < 1
    path = str(tmp_path / "run.yaml")
    (problem,) = problems(error)
    assert (problem.code, problem.key, problem.suggestion) == (code, key, suggestion)
    assert (problem.file, problem.line, problem.location) == (path, at, f"{path}:{at}")
    assert key is None or problem.message.startswith(key)
    assert error.code == code
    assert {name: error.details[name] for name in ("file", "line", "key", "suggestion")} == {
        "file": path, "line": at, "key": key, "suggestion": suggestion
    }  # fmt: skip
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        ("    width: 32", "    zzz: 32", "model.decoder.zzz is not a known key; known: depth, dropout, width."),
        ("    width: 32", "    widht: 32", "model.decoder.widht is not a known key; did you mean 'width'?"),
        ("  steps: 10", "  steps: '10'", "training.steps is '10', expected an integer"),
        ("  steps: 10", "  steps:", "training.steps is empty, expected an integer"),
        ("  steps: 10", "  steps: 10\n  half: yes", "training.half is 'yes', expected true or false"),
        ("  steps: 10", "  steps: 10\n  seed: rnd",
         "training.seed is 'rnd', expected an integer or 'random'; did you mean 'random'?"),
        ("  name: small", "  name: true", "model.name is true, expected a string (put it in quotes)"),
        ("  name: small", "  name: small\n  pooling: 7",
         "model.pooling is 7, expected 'mean', 'attention' or 'none'"),
        ("  train:", "  special: many\n  train:", "data.special is 'many', expected a mapping or a list"),
        ("  train:", "  sizes: [1, 2, 3]\n  train:", "data.sizes is [1, 2, 3], expected a length of at most 2"),
    ],
)  # fmt: skip
def test_sentences_say_what_was_given_and_expected(tmp_path: Path, line: str, replacement: str, message: str) -> None:
    (problem,) = problems(refused(tmp_path, VALID.replace(f"{line}\n", f"{replacement}\n", 1)))
    assert problem.message == message


@pytest.mark.parametrize(
    ("replacement", "word"),
    [
        ('  steps: "10', "quote"),
        ("\tsteps: 10", "tab"),
        ("  steps: {a", "bracket"),
        ("  steps: a: b", "':'"),
        ("   steps: 10\n  warmup: 1", "indentation"),
        ("  steps: 10\n  warmup\n  rate: 1", "':'"),
        ("  steps: 1\x070", "control character"),
        ("  steps: *x", "alias"),
    ],
)
def test_syntax_errors_name_the_construct(tmp_path: Path, replacement: str, word: str) -> None:
    error = refused(tmp_path, VALID.replace("  steps: 10", replacement))
    assert error.code == "config.syntax"
    assert word in str(error)


# (an argument, the code of the problem, its key, the suggestion)
OVERRIDES = [
    ("training.stesp=3", "config.unknown_key", "training.stesp", "steps"),
    ("trainin.steps=3", "config.unknown_key", "trainin", "training"),
    ("training.steps=many", "config.type", "training.steps", None),
    ("training.steps=", "config.type", "training.steps", None),
    ("training.steps", "config.override", None, None),
    ("training..steps=3", "config.override", None, None),
    ("training.steps.x=3", "config.type", "training.steps", None),
    ("data.train.2.weight=3", "config.index", "data.train", None),
    ("data.train.-1.weight=3", "config.index", "data.train", None),
    ("data.train.1.wieght=3", "config.unknown_key", "data.train.1.wieght", "weight"),
    ("data.sizes=[1,2", "config.syntax", None, None),
    ("model.name=#fff", "config.override", None, None),
    ("model.name=!!python/name:os.system", "config.not_allowed", "model.name", None),
    ("data={sizes: [1, 2]}", "config.missing_key", "data.train", None),
]  # fmt: skip


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize(("override", "code", "key", "suggestion"), OVERRIDES)
def test_a_problem_on_the_command_line_names_the_argument(
    tmp_path: Path, override: str, code: str, key: str | None, suggestion: str | None, in_file: bool
) -> None:
    valid = read(tmp_path, VALID)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, VALID, override) if in_file else override_config(valid, [override])
    (problem,) = problems(caught.value)
    assert (problem.code, problem.key, problem.suggestion) == (code, key, suggestion)
    assert (problem.file, problem.line, problem.location) == (None, None, f"command line: {override}")


def test_one_argument_with_two_problems(tmp_path: Path) -> None:
    error = refused(tmp_path, VALID, "data={train: [], train: []}")
    assert error.code == "config.several_problems"
    assert [(problem.code, problem.key) for problem in problems(error)] == [
        ("config.duplicate_key", "data.train"),
        ("config.value", "data.train"),
    ]


class Several(Strict):
    sources: tuple[Source, ...] = Field(min_length=1)


@pytest.mark.parametrize(
    ("sources", "code", "key"),
    [([], "config.value", "sources"), ([{"path": "a", "wieght": 1}], "config.unknown_key", "sources.0.wieght")],
)
def test_a_tuple_is_not_called_too_short_for_its_invalid_items(sources: list[Any], code: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"sources": sources}, Several, where="here")
    (problem,) = problems(caught.value)
    assert (problem.code, problem.key, problem.location) == (code, key, "here")


def test_overrides_keep_all_other_values(tmp_path: Path) -> None:
    valid = read(tmp_path, VALID)
    assert override_config(valid, []) == valid
    changed = override_config(valid, ["training.steps=7", "data.train.1.weight=0.5", "extra.new={a: [1, b]}"])
    assert (changed.training.steps, changed.extra) == (7, {"new": {"a": [1, "b"]}})
    assert changed.data.train == [valid.data.train[0], Source(path=Path("b.jsonl"), weight=0.5)]
    assert valid.training.steps == 10
    assert changed.model == valid.model


def test_a_contradiction_with_a_loaded_configuration_names_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        override_config(read(tmp_path, VALID), ["training.warmup=20"])
    (problem,) = problems(caught.value)
    assert (problem.code, problem.key, problem.location) == ("config.contradiction", "training", "command line")


def test_a_configuration_from_overrides_alone() -> None:
    assert config_from_overrides(Decoder, ["width=3"]) == Decoder(width=3)
    with pytest.raises(ConfigError) as caught:
        config_from_overrides(Decoder, ["widht=3"])
    (problem,) = problems(caught.value)
    assert (problem.code, problem.location) == ("config.unknown_key", "command line: widht=3")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        VALID.replace("width", "widht").replace("steps: 10", "steps: 0\n  steps: 1").replace("name: sm", "nme: !x sm")
    )
    error = refused(tmp_path, text, "data.sizes=big", "note=[]")
    assert error.code == "config.several_problems"
    assert str(error).splitlines()[0] == f"{tmp_path / 'run.yaml'}: 7 problems"
    assert [(problem.line, problem.code, problem.key) for problem in problems(error)] == [
        (1, "config.missing_key", "model.name"),
        (2, "config.not_allowed", "model.nme"),
        (4, "config.unknown_key", "model.decoder.widht"),
        (6, "config.value", "training.steps"),
        (7, "config.duplicate_key", "training.steps"),
        (None, "config.type", "data.sizes"),
        (None, "config.type", "note"),
    ]
    assert pickle.loads(pickle.dumps(error)).details == error.details


# (content of the file, the line of the problem, its code)
FILES = [
    (b"", 1, "config.not_a_mapping"),
    (b"# only a comment\n", 1, "config.not_a_mapping"),
    (b"- a\n- b\n", 1, "config.not_a_mapping"),
    (b"just words\n", 1, "config.not_a_mapping"),
    (b"model:\n  name: caf\xe9\n", 2, "config.encoding"),
    ("model: 1\n".encode("utf-16"), 1, "config.encoding"),
    (b"a: " + b"[" * 5000, 1, "config.syntax"),
    (b"a: " + b"[" * 70 + b"]" * 70, 1, "config.too_large"),
    (b"a: &a [*a]\n", 1, "config.too_large"),
    (b"a: &a [*a, *a]\n", 1, "config.too_large"),
    (b'a: "\\Uffffffff"\n', 1, "config.syntax"),
    (b"a: 1\n" * 300_000, None, "config.too_large"),
    (b'note: "\\ud800"\n', 1, "config.type"),
]


@pytest.mark.parametrize(("content", "line", "code"), FILES, ids=range(len(FILES)))
def test_a_file_that_is_not_a_configuration(tmp_path: Path, content: bytes, line: int | None, code: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, RunSettings)
    (problem,) = problems(caught.value)
    assert (problem.file, problem.line, problem.code) == (str(path), line, code)
    assert caught.value.__cause__ is None
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "suggestion"), [("rum.yaml", "run.yaml"), ("other", None), ("no/such.yaml", None), ("", None)]
)
def test_a_file_that_does_not_exist(tmp_path: Path, name: str, suggestion: str | None) -> None:
    write(tmp_path, VALID)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name, RunSettings)
    (problem,) = problems(caught.value)
    assert (problem.code, problem.suggestion) == ("config.file", suggestion)
    assert (problem.file, problem.line) == (str(tmp_path / name), None)


def test_exponentially_many_aliases_are_refused_quickly(tmp_path: Path) -> None:
    rows = ["extra:", "  a0: &a0 x"] + [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    start = time.process_time()
    assert refused(tmp_path, "\n".join(rows)).code == "config.too_large"
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("typed", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("+3", 3), ("-0", 0), ("0", 0), (".inf", float("inf"))]
    + [("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("'5'", "5"), ("!!str 5", "5")]
    + [(word, word) for word in ("no", "yes", "on", "off", "012", "0o7", "0x1F", "1_000", "12:30:45", "2001-01-01")]
    + [(word, word) for word in ("1e999", "08.5", "1.2.3", ".", "e5", "y", "n", "nan", "inf", "=")],
)
def test_no_value_is_converted(tmp_path: Path, typed: str, value: Any) -> None:
    for config in (read(tmp_path, VALID + f"extra:\n  x: {typed}\n"), read(tmp_path, VALID, f"extra.x={typed}")):
        assert config.extra == {"x": value}
        assert type(config.extra["x"]) is type(value)


def test_keys_are_strings_as_typed(tmp_path: Path) -> None:
    assert read(tmp_path, VALID + "extra: {no: 1, 012: 2, null: 3}").extra == {"no": 1, "012": 2, "null": 3}


def test_overrides_reach_into_lists_and_mappings_and_the_last_one_wins(tmp_path: Path) -> None:
    settings = read(
        tmp_path, VALID, "training.steps=3", "training.steps=4", "data.train.0.weight=0.5", "data.sizes=[1,2]",
        "model.decoder={depth: 7}", "model.decoder.dropout=0", "extra.a.b=x=y", "note=no", "training.rate=1e-3",
    )  # fmt: skip
    assert (settings.training.steps, settings.training.rate) == (4, 1e-3)
    assert settings.data.train[0].weight == 0.5
    assert settings.data.train[1].weight == 2
    assert settings.data.sizes == (1, 2)
    assert settings.note == "no"
    assert settings.model.decoder == Decoder(depth=7, dropout=0)
    assert settings.extra == {"a": {"b": "x=y"}}


def test_an_overridden_value_is_not_checked(tmp_path: Path) -> None:
    assert read(tmp_path, VALID.replace("steps: 10", "steps: many"), "training.steps=5").training.steps == 5


def test_aliases_are_copies(tmp_path: Path) -> None:
    text = VALID + "extra:\n  a: &a {x: 1}\n  b: *a\n"
    assert read(tmp_path, text, "extra.b.x=2").extra == {"a": {"x": 1}, "b": {"x": 2}}


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeff" + VALID.replace("\n", "\r\n")) == read(tmp_path, VALID)


def test_a_mapping_is_checked_like_a_file() -> None:
    assert parse_config({"width": 5}, Decoder, where="decoder") == Decoder(width=5)
    assert parse_config({"path": Path("a")}, Source, where="source") == Source(path=Path("a"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"widht": 5}, [("config.unknown_key", "widht")]),
        ({"width": "x", "depth": 1.5}, [("config.type", "width"), ("config.type", "depth")]),
        ({"width": object()}, [("config.type", None)]),
        ([1], [("config.type", None)]),
    ],
)
def test_problems_of_a_mapping_have_no_line(data: Any, expected: list[tuple[str, str | None]]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, Decoder, where="decoder")
    found = problems(caught.value)
    assert [(problem.code, problem.key) for problem in found] == expected
    assert all(problem.location == "decoder" and problem.line is None for problem in found)


def test_dumped_text_is_readable(tmp_path: Path) -> None:
    assert dump_config(read(tmp_path, VALID, "note=no", "training.rate=1e-5")) == (
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
CONFIGS = st.builds(
    RunSettings,
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


@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIGS)
def test_dumped_text_loads_equal(tmp_path: Path, config: RunSettings) -> None:
    loaded = read(tmp_path, dump_config(config))
    assert loaded == config
    assert repr(loaded) == repr(config)  # == alone takes 1, 1.0 and true for the same


@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@?,~ \n\t\\<x0"), max_size=40))
def test_any_file_content_raises_a_config_error(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path, RunSettings)
