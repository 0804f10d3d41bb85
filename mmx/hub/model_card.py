"""The model card of a checkpoint: a README.md with YAML front matter, made from its configuration and provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from mmx.encoders.registry import BUILT_IN
from mmx.models.checkpoint import load_provenance
from mmx.models.model import Model
from mmx.text.prompts import CAPTION, QUESTION

CARD = "README.md"
GENERATED = "<!-- Written by mmx push, which replaces it. Remove this line to keep your changes. -->"
METRICS_LOG = Path("..", "..", "metrics.jsonl")  # of the run, from the resolved folder of one of its steps
PIPELINE_TAGS = {"image": "image-to-text", "audio": "automatic-speech-recognition", "text": "translation"}
TASK_TAGS = {CAPTION: "image-captioning", QUESTION: "visual-question-answering"}
METRIC_IDS = {  # beginning of a metric's name to its id on the Hub
    "bleu": "bleu",
    "rouge": "rouge",
    "cider": "cider",
    "exact match": "exact_match",
    "vqa accuracy": "accuracy",
}
GENERATED_DATA = {"scenes": "mmx-scenes"}
DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Results(NamedTuple):
    """Metrics by name, and what they were measured on."""

    metrics: dict[str, float]
    origin: str


def model_card(name: str, folder: Path, model: Model, license_name: str | None = None) -> str:
    """Return the text of the model card.

    Args:
        name: public name.
        folder: the checkpoint.
        model: the model that was loaded from it.
        license_name: identifier of its license on the Hub, such as apache-2.0.
    """
    provenance = load_provenance(folder)
    results = _results(folder, provenance)
    fields = {
        "license": license_name,
        "library_name": "mmx",
        "pipeline_tag": _pipeline_tag(model),
        "tags": _tags(model),
        "datasets": [data for data in _data(provenance) if DATASET.fullmatch(data)],
        "metrics": _metric_ids(results.metrics),
    }
    given = {key: value for key, value in fields.items() if value}
    front_matter = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{front_matter}---\n\n{GENERATED}\n\n# {name.partition('/')[2]}\n",
        _model_section(model),
        _use_section(name, model),
        _data_section(provenance),
        _results_section(results),
    ]
    return "\n".join(section for section in sections if section)


def is_generated(card: str) -> bool:
    """Whether a model card was written by `model_card` and not changed by its owner."""
    return GENERATED in card


def _model_section(model: Model) -> str:
    decoder = model.config.decoder
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    sources = [f"{name} (encoder `{source.encoder}`)" for name, source in model.config.sources.items()]
    return (
        f"A model of mmx with {parameters:.1f} million parameters. It reads "
        f"{', '.join(sources)}. Decoder: {decoder.num_layers} layers, hidden size {decoder.hidden_size}.\n"
    )


def _use_section(name: str, model: Model) -> str:
    """How to load it, and which packages it needs besides mmx."""
    plugins = sorted({source.encoder for source in model.config.sources.values()} - set(BUILT_IN))
    needed = f"\nIt needs these encoders, which are not part of mmx: {', '.join(plugins)}.\n" if plugins else ""
    return f"## Use\n\n```python\nimport mmx\n\nmodel = mmx.load({name!r})\n```\n{needed}"


def _data_section(provenance: Mapping[str, object]) -> str:
    data = _data(provenance)
    lines = "".join(f"- {name}\n" for name in data)
    return f"## Training data\n\n{lines}" if data else ""


def _results_section(results: Results) -> str:
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in results.metrics.items())
    return f"## Results\n\n{results.origin}\n\n| metric | value |\n|---|---|\n{rows}" if rows else ""


def _pipeline_tag(model: Model) -> str | None:
    sources = model.config.sources
    return next((tag for source, tag in PIPELINE_TAGS.items() if source in sources), None)


def _tags(model: Model) -> list[str]:
    has_image = "image" in model.config.sources
    known = model.tokenizer.special_tokens
    return ["mmx", *(tag for token, tag in TASK_TAGS.items() if has_image and token in known)]


def _data(provenance: Mapping[str, object]) -> list[str]:
    """Names of the training data."""
    given = provenance.get("data")
    names = [_data_name(text) for text in given if isinstance(text, str)] if isinstance(given, list) else []
    return list(dict.fromkeys(names))


def _data_name(text: str) -> str:
    """A description as it is; of a path only the file's name, because its folders mean nothing on other machines."""
    if " " in text:
        return text
    if text.startswith("hf:"):
        return text.split(":")[1]
    return GENERATED_DATA.get(text, Path(text).stem)


def _results(folder: Path, provenance: Mapping[str, object]) -> Results:
    """The validation of the checkpoint's step, if it lies in its run; else the best value that its run had reached."""
    step = provenance.get("step")
    found: dict[str, float] = {}
    log = folder.resolve() / METRICS_LOG
    if step is not None and log.is_file():
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            found.update(_validation_metrics(line, step))
    if found:
        return Results(found, f"Validation after step {step}.")
    best = _metrics(provenance)
    return Results(best, f"Best validation of the run up to step {step}.")


def _validation_metrics(line: str, step: object) -> dict[str, float]:
    """The metrics in a line of the log, if it is of that step."""
    try:
        row = json.loads(line)
    except ValueError:  # a line that was being written when the run was killed
        return {}
    return _metrics(row) if isinstance(row, dict) and row.get("step") == step else {}


def _metrics(row: Mapping[str, object]) -> dict[str, float]:
    """The metrics of validation sets, whose names are SET.METRIC."""
    return {key: float(value) for key, value in row.items() if "." in key and isinstance(value, int | float)}


def _metric_ids(results: Mapping[str, float]) -> list[str]:
    found: dict[str, None] = {}
    for key in results:
        metric = key.partition(".")[2].lower()
        for prefix, identifier in METRIC_IDS.items():
            if metric.startswith(prefix):
                found[identifier] = None
    return list(found)
