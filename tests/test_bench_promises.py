"""The benches of promises: ``stop``, ``shock`` and ``schedules``. Their figures by hand, and one small cell of each."""

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
from emonavi.bench import schedules, shock, stop
from emonavi.bench.tasks import TASKS


def stopped(task, first, stays, raw):
    said = {"first": first, "stays": stays}
    return {
        "task": task, "optimizer": "EmoNavi", "split": "test", "steps": 400, "at": [100, 200, 300, 400],
        "raw": raw, "calm": raw, "should_stop": said, "published": {"first": 20, "stays": None},
    }  # fmt: skip


def test_what_stopping_costs_and_saves():
    rows = [stopped("a", 190, 250, [4.0, 3.0, 2.1, 2.0]), stopped("b", 150, 150, [1.0, 1.3, None, 2.0])]
    ours, published = stop.lines(rows)
    assert "test tasks, EmoNavi, should_stop: stops 2 of 2 runs" in ours
    assert "50% saved" in ours  # 1 - 250/400 and 1 - 150/400
    assert "raw loss there over the run's best: median 1.18, worst 1.30 (b)" in ours  # 2.1 / 2.0 and 1.3 / 1.0
    assert ours.endswith("budget: none")
    assert "stops 0 of 2 runs" in published and published.endswith("budget: a, b")


@pytest.mark.parametrize(
    ("flags", "first", "stays"),
    [([0, 0, 1, 0, 1, 1], 3, 5), ([0, 1, 0], 2, None), ([0, 0], None, None), ([1, 1], 1, 1)],
)
def test_a_rule_that_speaks_and_one_that_stays(flags, first, stays):
    assert stop._spoke([bool(flag) for flag in flags]) == {"first": first, "stays": stays}


def test_a_run_of_stop_looks_at_the_whole_budget():
    row = stop.measure(stop.Cell("diabetes", "EmoNavi", 0, 200))
    assert row["at"][-1] == 200 and len(row["at"]) == len(row["raw"]) == len(row["calm"]) == 100
    assert row["raw"][-1] < row["raw"][0]
    assert set(row["should_stop"]) == {"first", "stays"}
    assert len(row["losses"]) == 200


def run(shock_name, optimizer="EmoNavi", seed=0):
    row = {"task": "digits", "optimizer": optimizer, "lr": 1e-3, "shock": shock_name, "seed": seed}
    at = str(148 + 50)  # of 370 steps
    return lambda soon, end: {**row, "soon": {at: soon}, "end": end}


def test_what_counts_as_recovered():
    rows = [run("none")(2.0, 1.0), run("fresh")(None, 3.0), run("loss x10")(2.2, 1.04), run("loss NaN")(None, None)]
    rows += [run("switch")(9.0, 3.1)]
    said = dict(line.split(" EmoNavi lr 0.001: ") for line in list(shock.lines(rows))[1:])
    said = {name.strip(): words for name, words in said.items()}
    assert said["loss x10"] == "0 / 1 of 1, worst 1.04 (digits)"
    assert said["loss NaN"] == "0 / 0 of 1, worst inf (digits)"
    assert said["switch"] == "1 of 1, worst 1.03 (digits)"  # against the fresh run


def test_shocks_that_last_and_early_ones_are_looked_at_later_and_earlier():
    assert shock._soon(shock.SPOILT["inputs x100, five times"], 1000) == 400 + 4 + 100
    assert shock._soon(shock.SPOILT["loss x1000, sixth step"], 370) == 5 + 50


@pytest.mark.parametrize("name", [name for name, s in shock.SPOILT.items() if s.gradients is None])
def test_a_spoilt_loss_is_another_one(name):
    problem = TASKS["digits"].build(0)
    loss, spoilt = problem.loss(3), shock.SPOILT[name].loss(problem, 3)
    assert spoilt.requires_grad
    assert not spoilt.isfinite() or abs((spoilt - loss).item()) > 1e-4  # an untrained net knows no label


@pytest.mark.parametrize(("name", "factor"), [("gradient x1e6", 1e6), ("gradient NaN", math.nan)])
def test_spoilt_gradients(name, factor):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    shock.SPOILT[name].gradients([weight])
    assert weight.grad[0].item() == pytest.approx(factor, nan_ok=True)


def test_a_shock_in_a_row_is_one_at_each_step(monkeypatch):
    seen = []
    spoil = shock.Shock(lambda problem, step: seen.append(step) or problem.loss(step), at=3, times=2)
    monkeypatch.setitem(shock.SPOILT, "twice", spoil)
    shock.measure(shock.Cell("diabetes", "EmoNavi", 1e-3, "twice", 0))
    assert seen == [3, 4]


def test_a_switch_turns_training_and_held_out_data_round():
    problem = TASKS["diabetes"].build(0)
    switched = shock._switched(problem)
    assert torch.equal(switched.batch(2)[0], -problem.batch(2)[0])
    assert torch.equal(switched.held_out[0], -problem.held_out[0])


def test_a_nan_leaves_a_sibling_as_it_was_and_ruins_adamw():
    ours, adamw = (shock.measure(shock.Cell("diabetes", name, 1e-3, "loss NaN", 0)) for name in ("EmoNavi", "AdamW"))
    undisturbed = shock.measure(shock.Cell("diabetes", "EmoNavi", 1e-3, "none", 0))
    assert ours["end"] < 1.05 * undisturbed["end"]
    assert not math.isfinite(adamw["end"])


def test_schedules_are_compared_with_the_best():
    row = {"task": "a", "optimizer": "EmoNavi", "lr": 1e-3}
    rows = [
        row | {"schedule": "constant", "raw": 1.0, "calm": 2.0},
        row | {"schedule": "step", "raw": 1.5, "calm": 2.0},
    ]
    said = list(schedules.lines(rows))
    assert said[1] == "EmoNavi, a, lr 1e-3: constant 1.00 / 1.00, step 1.50 / 1.00"
    assert said[2:] == [
        "EmoNavi, raw: 50% within 1.10 of the best schedule, worst 1.50",
        "EmoNavi, calm: 100% within 1.10 of the best schedule, worst 1.00",
    ]


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_schedules_move_the_lr(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule, seen = schedules.SCHEDULES[name](optimizer, 40), set()
    for step in range(39):
        optimizer.step()
        seen.add(round(optimizer.param_groups[0]["lr"], 9))
        schedule.step(1.0) if name == "plateau" else schedule.step()
        assert step < 39
    assert (len(seen) == 1) == (name == "constant")
    assert max(seen) == pytest.approx(0.1)
