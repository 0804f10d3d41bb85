"""Texts of examples as the options of their data set have them: by default as written."""

from dataclasses import replace

from mmx.config.schema import DataConfig, TextOptions
from mmx.data.examples import TextTask

JOINED_SIGNS = (".", ",", "?", "!", ";", ":", "'s", "n't")


def format_task(task: TextTask, config: DataConfig) -> TextTask:
    """Return a task with the texts that the model learns, and that its texts are compared with."""
    options = config.text.caption if task.question is None else config.text.ask
    question = task.question
    if question is not None and options.collapse_whitespace:
        question = _single_spaced(question)
    return replace(task, targets=tuple(format_target(target, options) for target in task.targets), question=question)


def format_target(text: str, options: TextOptions) -> str:
    """Return a target text without white space at its ends, changed by the options in the order of their fields."""
    text = text.strip()
    if options.lowercase:
        text = text.lower()
    if options.collapse_whitespace:
        text = _single_spaced(text)
    if options.join_punctuation:
        for sign in JOINED_SIGNS:
            text = text.replace(f" {sign}", sign)
    if options.strip_final_period:
        text = text.rstrip(" .") or text
    return text


def _single_spaced(text: str) -> str:
    return " ".join(text.split())
