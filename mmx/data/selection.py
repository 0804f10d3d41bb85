"""Selection of tasks by the configuration of a data set."""

from dataclasses import replace

from mmx.config.schema import DataConfig
from mmx.data.examples import Example, TextTask
from mmx.data.texts import format_task


def select_tasks(example: Example, config: DataConfig) -> Example:
    """Return the example with its selected tasks only, and their texts as configured."""
    return replace(
        example, tasks=tuple(format_task(task, config) for task in example.tasks if is_selected(task, config))
    )


def is_selected(task: TextTask, config: DataConfig) -> bool:
    """Return whether a task is of the configured tasks and question types. With a reward, only captions are."""
    if task.question is None:
        return "caption" in config.tasks
    if config.reward or "ask" not in config.tasks:
        return False
    return not config.question_types or task.question_type in config.question_types
