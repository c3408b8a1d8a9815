"""Real tasks on data that every machine already has: nothing is downloaded, one run takes seconds on one core."""

from __future__ import annotations

from dataclasses import replace

from emonavi.bench.tasks import adapt, classify, embed, fields, generate, regress, text
from emonavi.bench.tasks.adapt import LoRA
from emonavi.bench.tasks.problem import Problem, Task

__all__ = ["DEMO", "TASKS", "LoRA", "Problem", "Task"]

_LONG = ("charlm", "flow", "mlp", "vit", "gru", "patches")


def _longer(task: Task, times: int = 3) -> Task:
    """Return the same task with more steps: what is right for a short run must not be wrong for a long one."""
    steps = {"steps": times * task.steps, "quick_steps": times * task.quick_steps}
    return replace(task, name=f"{task.name}-{times}x", title=f"{task.title}, {times} x the steps", **steps)  # type: ignore[arg-type]


DEMO: dict[str, Task] = {task.name: task for task in (classify.DIGITS, text.CHARLM, regress.DIABETES, adapt.LORA)}

TASKS: dict[str, Task] = DEMO | {
    task.name: task for kind in (classify, regress, text, generate, embed, fields, adapt) for task in kind.TASKS
}
TASKS |= {longer.name: longer for longer in (_longer(TASKS[name]) for name in _LONG)}
