"""``bench autonomous``: its figures by hand, its shards, and one small cell of each kind."""

import io
import runpy

import pytest
import torch

pytest.importorskip("rich")
from rich.console import Console

import emonavi
from emonavi.bench import autonomous as bench


def row(scheme, val, *, period=64, workers=4, optimizer="EmoNavi", lr=1e-3, sent=(1000,), times=5):
    cell = bench.Cell("charlm", optimizer, lr, workers, scheme, period, 320, 1, 0)
    return {**cell._asdict(), "val": val, "sent": list(sent), "times": times, "step_seconds": 0.1}


SYNC = row("sync", 2.0, period=1, sent=(1000, 32), times=320)


def test_bytes_and_time_of_a_ring():
    size, seconds = bench.traffic(row("mean", 1.0, sent=(1_000_000, 32), times=10))
    assert size == pytest.approx(10 * 1.5 * 1_000_032)
    assert seconds == pytest.approx(10 * (1.5 * 1_000_032 / 12.5e6 + 2 * 6 * 0.05))
    assert bench.traffic(row("sync", 1.0, workers=1)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("val", "times", "said"), [(2.05, 5, "within"), (2.07, 5, "not within"), (2.0, 8, "not within")]
)
def test_what_is_within_reach(val, times, said):
    line = list(bench.lines([SYNC, row("mean", val, times=times)]))[-1]
    assert line.startswith(f"charlm, EmoNavi, 4 workers, H = 64, seed 0: {val / 2:.3f} of sync's loss for ")
    assert f": {said} reach" in line
    assert f"{times * 1000 / (320 * 1032):.2%} of its bytes" in line


def test_the_peer_has_its_best_lr_at_each_scheme():
    peers = [row("sync", v, period=1, optimizer="AdamW", lr=lr, times=320) for v, lr in ((1.0, 3e-3), (None, 1e-2))]
    peers += [row("mean", v, optimizer="AdamW", lr=lr) for v, lr in ((1.5, 3e-3), (1.2, 1e-2))]
    assert "1.200 of sync's loss" in list(bench.lines(peers))[-1]


def test_the_table_and_the_picture(tmp_path):
    rows = [SYNC, row("mean", 2.2), row("outer", 2.4), row("shared", 2.3), row("moments", 2.1, sent=(2000,))]
    out = io.StringIO()
    Console(file=out, width=140).print(next(iter(bench.lines(rows))))
    text = out.getvalue()
    assert all(words in text for words in ("H = 64, outer", "drives", "memory", "1.10", "2.200"))
    pytest.importorskip("matplotlib")
    bench.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_each_optimizer_of_the_picture_has_its_own_points(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn = {}
    plot = axes.Axes.plot

    def keep(axis, x, y, **look):
        drawn[look["label"]] = list(y), look["color"]
        return plot(axis, x, y, **look)

    above = []
    monkeypatch.setattr(axes.Axes, "plot", keep)
    secondary = axes.Axes.secondary_xaxis
    monkeypatch.setattr(
        axes.Axes, "secondary_xaxis", lambda axis, *where: above.append(secondary(axis, *where)) or above[-1]
    )
    others = [row("sync", 1.0, period=1, optimizer="EmoZeal", times=320), row("mean", 1.3, optimizer="EmoZeal")]
    bench.draw([SYNC, row("mean", 2.2), *others], tmp_path / "a.png")
    assert drawn["EmoNavi, mean"][0] == [pytest.approx(1.1)] and drawn["EmoZeal, mean"][0] == [pytest.approx(1.3)]
    assert drawn["EmoNavi, mean"][1] != drawn["EmoZeal, mean"][1] and "EmoFact, mean" not in drawn
    assert [label.get_text() for label in above[0].get_xticklabels()] == ["64"], "H"


def test_a_family_larger_than_the_palette_is_drawn(monkeypatch):
    family = (*bench.FAMILY, "EmoSeven")
    monkeypatch.setattr("emonavi.registry.FAMILY", family)
    again = runpy.run_path(bench.__file__)
    assert set(again["_COLOURS"]) == {*family, "AdamW"}


def test_every_cell_is_there_once():
    cells = bench.cells(["EmoNavi"], seeds=2)
    assert len(cells) == len(set(cells))
    found = {(c.optimizer, c.scheme, c.period) for c in cells if c.workers == 4}
    assert {(name, "mean", period) for name in ("EmoNavi", "AdamW") for period in (1, 16, 64, 256, 320)} < found
    assert {c.workers for c in cells if c.task == "lora"} == {1, 2, 4, 8}


def test_no_two_workers_have_a_sample_in_common():
    pytest.importorskip("sklearn")
    parts = [bench.shard("digits", 0, rank, 4) for rank in range(4)]
    held = [p.batch.keywords["inputs"] for p in parts]
    whole = bench.TASKS["digits"].build(0).batch.keywords["inputs"]
    assert sum(map(len, held)) == len(whole)
    assert torch.equal(torch.stack([held[1][5], held[2][5]]), whole[[21, 22]])
    first, second = (list(p.model.parameters()) for p in parts[:2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sync_is_one_optimizer_on_the_batches_of_all():
    cell = bench.Cell("charlm", "EmoNavi", 1e-3, 2, "sync", 1, 3, 1, 0)
    found = bench.measure(cell)
    parts = [bench.shard("charlm", 0, rank, 2) for rank in range(2)]
    model = parts[0].model
    optimizer = emonavi.EmoNavi(model.parameters())
    for step in range(3):
        x, y = (torch.cat(some) for some in zip(*(p.batch(step) for p in parts), strict=True))
        optimizer.zero_grad()
        parts[0].criterion(model(x), y).backward()
        optimizer.step()
    assert found["val"] == pytest.approx(parts[0].val(), rel=1e-5)
    assert found["sent"] == [4 * sum(p.numel() for p in model.parameters()), 32]
    assert (found["times"], found["worker_steps"]) == (3, 6)


@pytest.mark.parametrize("scheme", ["shared", "moments"])
def test_the_variants_are_others(scheme):
    plain, other = (bench.measure(bench.Cell("charlm", "EmoNavi", 1e-3, 2, s, 10, 12, 1, 0)) for s in ("mean", scheme))
    assert plain["val"] != other["val"]
    assert other["sent"] > plain["sent"]


def test_workers_of_unlike_speed():
    cell = bench.Cell("charlm", "EmoNavi", 1e-3, 3, "mean", 4, 8, 4, 0)
    assert [bench.pace(cell, rank) for rank in range(3)] == pytest.approx([1, 0.5, 0.25])
    found = bench.measure(cell)
    assert (found["worker_steps"], found["times"]) == (8 + 4 + 2, 2)
    assert found["val"] < found["alone"] * 1.1
