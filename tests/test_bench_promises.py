"""The benches of promises: ``stop``, ``shock``, ``schedules`` and ``lowbit``: figures by hand, and a small cell."""

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("typer")
from typer.testing import CliRunner

from emonavi import cli
from emonavi.bench import ledger, lowbit, schedules, shock, stop
from emonavi.bench.tasks import TASKS
from emonavi.registry import FAMILY

BF16 = "bf16 weights"


def cells_of(table):
    """What a table shows, row by row."""
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def stopped(task, first, stays, raw):
    said = {"first": first, "stays": stays}
    return {
        "task": task, "optimizer": "EmoNavi", "split": "test", "steps": 400, "at": [100, 200, 300, 400],
        "raw": raw, "calm": raw, "should_stop": said, "published": {"first": 20, "stays": None},
    }  # fmt: skip


def test_what_stopping_costs_and_saves():
    rows = [stopped("a", 190, 250, [4.0, 3.0, 2.1, 2.0]), stopped("b", 150, 150, [1.0, 1.3, None, 2.0])]
    (table,) = stop.lines(rows)
    ours, published = cells_of(table)
    assert table.title.startswith("test tasks")
    # 1 - 250/400 and 1 - 150/400 saved; 2.1 / 2.0 and 1.3 / 1.0 there.
    assert ours == ["EmoNavi", "should_stop", "2 of 2", "50%", *["1.18, 1.30 (b)"] * 2, "none"]
    assert published == ["EmoNavi", "published", "0 of 2", "0%", "-", "-", "a, b"]


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
    (table,) = shock.lines(rows)
    assert cells_of(table) == [
        ["loss x10", "EmoNavi", "1e-3", "0", "1 of 1", "1.04", "digits"],
        ["loss NaN", "EmoNavi", "1e-3", "0", "0 of 1", "inf", "digits"],
        ["switch", "EmoNavi", "1e-3", "", "1 of 1", "1.03", "digits"],  # against the fresh run
    ]


def test_a_shock_is_named_once_and_lrs_of_emonavi_are_for_those_who_ask_for_it():
    rows = [{**run(kind, name)(2.0, 1.0)} for kind in ("none", "loss inf") for name in ("EmoNavi", "AdamW")]
    (table,) = shock.lines(rows)
    assert [cells[:2] for cells in cells_of(table)] == [["loss inf", "EmoNavi"], ["", "AdamW"]]
    assert {cell.optimizer for cell in shock.cells(["EmoZeal"])} == {"EmoZeal", *shock.PEERS}
    assert {cell.lr for cell in shock.cells(["EmoNavi"]) if cell.optimizer == "EmoNavi"} == {1e-3, 1.0, 10.0}


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
    (table,) = schedules.lines(rows)
    assert [column.header for column in table.columns] == ["", "lr", "constant", "step"], "only those that were run"
    assert cells_of(table) == [
        ["a", "1e-3", "1.00/1.00", "1.50/1.00"],
        ["≤ 1.10", "of 1", "1/1", "0/1"],
        ["worst", "", "1.00/1.00", "1.50/1.00"],
    ]


def test_fewer_bits_are_compared_with_float32():
    row = {"task": "mlp", "optimizer": "EmoNavi", "lr": 1e-3, "before": 4.0}
    kinds = (("float32", (1.0, 2.0)), ("bf16 state", (1.1, 2.0)), ("8bit state", (4.0, 2.0)))
    rows = [row | {"storage": kind, "seed": s, "raw": raws[s]} for kind, raws in kinds for s in (0, 1)]
    rows += [
        row | {"storage": kind, "seed": 0, "lr": 1e-5, "raw": raw} for kind, raw in (("float32", 2.0), (BF16, 3.0))
    ]
    usual, careful = lowbit.lines(rows)
    # Geometric means of 1 and 1, of 1.1 and 1, of 4 and 1; at the small lr, 4 - 3 of 4 - 2.
    assert cells_of(usual) == [["float32", "1.000"], ["bf16 state", "1.049"], ["8bit state", "2.000"]]
    assert cells_of(careful) == [["float32", "1.000"], [BF16, "0.500"]]
    assert careful.title.startswith("EmoNavi, lr 1e-5: fall")


@pytest.mark.parametrize("name", ["stop", "shock", "lowbit", "autonomous", "schedules"])
def test_every_bench_takes_the_whole_family(name, tmp_path, monkeypatch):
    asked = []

    def note(todo, *_, **__):
        asked.append(list(dict.fromkeys(cell.optimizer for cell in todo if cell.optimizer in FAMILY)))
        return ledger.Outcome()

    def command(optimizers):
        out = tmp_path / f"{len(asked)}.jsonl"
        return CliRunner().invoke(cli.build(), ["bench", name, "--optimizers", optimizers, "--out", str(out)])

    monkeypatch.setattr(ledger, "execute", note)
    for optimizers in ("*", "emozeal, EmoNe*", ""):
        result = command(optimizers)
        assert result.exit_code == 0, result.output
    refused = command("nobody")
    assert set(asked[0]) == set(asked[2]) == set(FAMILY)
    assert set(asked[1]) == {"EmoZeal", "EmoNeco"}
    assert refused.exit_code == 2 and len(asked) == 3
    assert f"no optimizer 'nobody': choose from {', '.join(FAMILY)}" in " ".join(refused.output.split())


@pytest.mark.parametrize("name", ["stop", "shock", "lowbit", "autonomous", "schedules"])
def test_a_bench_of_packages_that_are_missing(name, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda module: None if module in ("sklearn", "mlxtend") else object())
    monkeypatch.setattr(ledger, "execute", lambda *_, **__: pytest.fail("measured"))
    result = CliRunner().invoke(cli.build(), ["bench", name, "--out", str(tmp_path / "a.jsonl")])
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert result.output.startswith(f"emonavi bench {name} needs ")
    assert result.output.endswith('in a clone of emonavi: pip install ".[bench]"\n')


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
