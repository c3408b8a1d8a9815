"""The demo: its runs, its record, its report and its command, on tasks that take no time."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pages import Page
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import emonavi
from emonavi import cli
from emonavi.bench import demo, demo_folder, demo_report, demo_run, tasks
from emonavi.bench.demo_folder import Findings, Result
from emonavi.bench.figures import json_line, running_mean
from emonavi.bench.tasks import Problem, Task

STEPS = 12
LEDGER = Path(__file__).parents[1] / "benchmarks" / "lr-cpu.jsonl"


def build_line(seed: int) -> Problem:
    """Least squares in four dimensions."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 4, generator=generator)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(0.1 * torch.randn(1, 4, generator=generator))
        model.bias.zero_()

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(step * 8, step * 8 + 8) % 64
        return inputs[rows], targets[rows]

    return Problem(model, nn.functional.mse_loss, batch, (inputs, targets))


def build_slow(seed: int) -> Problem:
    """The same, slow enough to be interrupted."""
    problem = build_line(seed)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(0.02)
        return problem.batch(step)

    return replace(problem, batch=batch)


def build_broken(seed: int) -> Problem:
    """A task that cannot be built."""
    raise RuntimeError(f"no data for seed {seed}")


def build_deadly(seed: int) -> Problem:
    """The first build takes its process down with it, the others are well."""
    mark = Path(os.environ["EMONAVI_TEST_MARK"])
    if not mark.exists():
        mark.touch()
        os._exit(3)
    return build_line(seed)


def build_nan(seed: int) -> Problem:
    """The held-out loss is no number."""
    problem = build_line(seed)
    return replace(problem, held_out=(problem.held_out[0], problem.held_out[1] * math.nan))


LINE = Task("line", "a line", "mean squared error", STEPS, STEPS, build_line)
SLOW = Task("slow", "a slow line", "mean squared error", STEPS, STEPS, build_slow)
BROKEN = Task("broken", "no data", "mean squared error", STEPS, STEPS, build_broken)
DEADLY = Task("deadly", "a crash", "mean squared error", STEPS, STEPS, build_deadly)
NAN = Task("nan", "not a number", "mean squared error", STEPS, STEPS, build_nan)


def strict_rows(path: Path) -> list[dict]:
    """Read JSON lines as a strict reader does: NaN is not JSON."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# --- One run


@pytest.fixture(scope="module", params=["AdamW", "EmoNavi"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = demo_run.Run(LINE, request.param, 0.03, 5, STEPS)
    return run, folder, list(demo_run.train(run, folder))


def test_result(trained):
    run, _, events = trained
    result = events[-1]
    assert isinstance(result, Result)
    assert (result.task, result.optimizer, result.lr, result.seed, result.steps) == (
        *("line", run.optimizer, 0.03, 5),
        STEPS,
    )
    assert result.status == "done"
    assert result.start_loss == pytest.approx(build_line(5).val())
    assert result.val_loss < result.start_loss
    assert result.seconds > 0
    assert result.versions["torch"] == torch.__version__
    assert result.versions["emonavi"] == emonavi.__version__


def test_history_is_that_of_the_plain_loop(trained):
    run, folder, events = trained
    problem = build_line(5)
    source = emonavi if run.optimizer == "EmoNavi" else torch.optim
    optimizer = getattr(source, run.optimizer)(problem.model.parameters(), lr=0.03)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = problem.loss(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    path = demo_folder.history_path(folder, "line", run.optimizer, 0.03)
    assert len(strict_rows(path)) == STEPS
    history = demo_folder.read_history(path)
    assert history["step"] == list(range(1, STEPS + 1))
    assert history["loss"] == pytest.approx(losses, rel=1e-5)
    assert history["val"][-1] == events[-1].val_loss == pytest.approx(problem.val(), rel=1e-5)
    assert events[-1].train_loss == pytest.approx(sum(losses) / STEPS, rel=1e-5)
    if run.optimizer == "AdamW":
        assert history["lr"] == [0.03] * STEPS
        assert all(math.isnan(x) for x in history["scalar"])
    else:
        assert history["lr"] == pytest.approx([0.03 * drive for drive in history["drive"]])
        assert max(map(abs, history["scalar"])) > 0.01, "the loss was not heard"


def test_event_files(trained):
    # Imported here, because the workers of the tests below import this file.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, folder, events = trained
    board = EventAccumulator(str(folder / "tb" / "line" / run.optimizer / "3e-2"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {"loss/train", "loss/val", "emo/lr/group_0"} <= set(tags)
    assert ("emo/scalar" in tags) == ("emo/trust" in tags) == (run.optimizer == "EmoNavi")
    assert [e.step for e in board.Scalars("loss/val")] == [0, STEPS]
    assert board.Scalars("loss/val")[-1].value == pytest.approx(events[-1].val_loss, rel=1e-6)
    history = demo_folder.read_history(demo_folder.history_path(folder, "line", run.optimizer, 0.03))
    assert [e.value for e in board.Scalars("loss/train")] == pytest.approx(history["loss"], rel=1e-6)
    assert len(board.Scalars("emo/lr/group_0")) == STEPS


def test_a_loss_that_is_no_number_is_a_divergence(tmp_path):
    *_, result = demo_run.train(demo_run.Run(NAN, "AdamW", 0.1, 0, STEPS), tmp_path)
    assert result.status == "diverged"
    result.append(tmp_path / "results.jsonl")
    assert strict_rows(tmp_path / "results.jsonl")[0]["val_loss"] is None
    (again,) = demo_folder.read_results(tmp_path / "results.jsonl")
    assert math.isnan(again.val_loss)
    assert again.train_loss == result.train_loss


# --- The report

LOSSES = {
    ("alpha", "EmoNavi"): (1.0, 1.1, 1.5),
    ("alpha", "EmoFact"): (2.0, 2.0, 2.0),
    ("alpha", "AdamW"): (7.2, 0.8, math.nan),
    ("beta", "EmoNavi"): (30.0, 60.0, 40.0),
    ("beta", "EmoFact"): (50.0, 25.0, 100.0),
    ("beta", "AdamW"): (100.0, 25.5, 51.0),
}


def write_folder(folder: Path, losses: dict, failed: tuple = ()) -> Findings:
    """Write a run folder of two tasks, three optimizers and three learning rates."""
    lrs = [1e-5, 1e-3, 1e-1]
    optimizers = list(dict.fromkeys(name for _, name in losses))
    plan = {
        "command": "emonavi demo <&>",
        **{
            "started": "now",
            "seed": 0,
            "quick": True,
            "workers": 2,
            "hardware": "a machine",
            "versions": {"torch": "9"},
        },
        **{"optimizers": optimizers, "lrs": lrs},
        "tasks": [{"name": t, "title": f"task {t}", "metric": "loss", "steps": 40} for t in ("alpha", "beta")],
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(plan))
    (folder / "history").mkdir()
    for (task, name), values in losses.items():
        for lr, value in zip(lrs, values, strict=True):
            if value is None:
                continue
            status = "diverged" if math.isnan(value) else "done"
            result = Result(task, name, lr, 0, 40, status, val_loss=value, train_loss=value, start_loss=9.0)
            if (task, name, lr) in failed:
                result = Result(task, name, lr, 0, 40, "failed", reason="ValueError: a < b")
            result.append(folder / "results.jsonl")
            with demo_folder.history_path(folder, task, name, lr).open("w") as file:
                for step in range(1, 41):
                    loss = value + 9 / step
                    file.write(json_line({"step": step, "loss": loss, "lr": lr, "scalar": math.sin(step)}))
    return Findings.load(folder)


def text_of(renderable, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"), highlight=False)  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


def test_table(tmp_path):
    found = write_folder(tmp_path, LOSSES, failed=(("alpha", "EmoFact", 1e-3),))
    table = text_of(demo_report.table(found))
    rows = [line.split() for line in table.splitlines()]
    assert ["EmoNavi", "1.000*", "1.100", "1.500", "1.50"] in rows
    assert ["EmoFact", "2.000*", "failed", "2.000*", "-"] in rows
    assert ["AdamW", "7.200", "0.8000*", "nan", "diverges"] in rows
    assert ["AdamW", "100.0", "25.50*", "51.00", "3.92"] in rows
    assert "EmoFact failed: ValueError: a < b" in table
    assert "untrained 9.000" in table
    assert max(map(len, table.splitlines())) <= 80


def test_table_in_forty_columns(tmp_path):
    """No name and no figure is cut off."""
    found = write_folder(tmp_path, LOSSES, failed=(("alpha", "EmoFact", 1e-3),))
    table = text_of(demo_report.table(found, 40), 40)
    rows = [line.split() for line in table.splitlines()]
    assert ["EmoNavi", "1.000*", "1.100", "1.500"] in rows
    assert ["EmoFact", "2.000*", "failed", "2.000*"] in rows
    assert "…" not in table


def test_the_command_that_is_shown_can_be_pasted(tmp_path):
    found = write_folder(tmp_path / "my runs", LOSSES)
    shown = text_of(demo_report.contents(found), 400).splitlines()[-2:]
    felt = tmp_path / "my runs" / "tb"
    commands = [["tensorboard", "--logdir", str(felt)], ["emonavi", "plot", str(felt / "alpha")]]
    assert list(map(shlex.split, shown)) == commands


def test_sentences_hold_the_measured_figures(tmp_path):
    said = " ".join(demo_folder.sentences(write_folder(tmp_path, LOSSES)))
    # geometric means over alpha and beta, of the runs that ended with a number
    assert f"{math.sqrt(1.5 * 2):.2f} with EmoNavi, {math.sqrt(1 * 4):.2f} with EmoFact and" in said
    assert f"{math.sqrt(9 * 100 / 25.5):.2f} with AdamW" in said
    assert "without 1 run(s) of AdamW that diverged" in said
    best, worst = math.sqrt(1.0 / 0.8 * 30 / 25.5), math.sqrt(1.5 / 0.8 * 60 / 25.5)
    assert f"EmoNavi ends at {best:.2f} to {worst:.2f}" in said
    assert "(geometric mean over 2 tasks; below 1 is better)" in said, "no range over the tasks"
    assert "on alpha AdamW (lr 1e-3) and on beta EmoFact (lr 1e-3)" in said
    assert "the same by construction" in said, "EmoFact has three equal figures on alpha"
    other = LOSSES | {("alpha", "EmoFact"): (2.0, 2.1, 2.2)}
    assert "the same by construction" not in " ".join(demo_folder.sentences(write_folder(tmp_path / "other", other)))


def test_sentences_leave_out_what_failed_or_is_missing(tmp_path):
    losses = LOSSES | {("beta", "AdamW"): (100.0, 25.5, None)}
    said = " ".join(demo_folder.sentences(write_folder(tmp_path / "a", losses, failed=(("alpha", "EmoFact", 1e-3),))))
    assert "Left out here, because runs failed: EmoFact." in said
    assert "on alpha" in said and "beta" not in said
    assert "1.50 with EmoNavi and 9.00 with AdamW" in said
    nothing = {key: (1.0, None, None) for key in LOSSES}
    assert demo_folder.sentences(write_folder(tmp_path / "b", nothing)) == [
        "There is no task at which every optimizer has all its runs and a loss: nothing to compare."
    ]


def test_page_and_pictures(tmp_path):
    found = write_folder(tmp_path, LOSSES, failed=(("alpha", "EmoFact", 1e-3),))
    demo_report.write(found)
    for task in ("alpha", "beta"):
        assert (tmp_path / f"{task}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    shown = Page(page)
    assert shown.loads == shown.links == [], "the page has to work without a network"
    assert "@import" not in page.split("</style>")[0] and "url(" not in page.split("</style>")[0]
    assert '<div class="key">' in page, "so few names wrap; none is scrolled away"
    assert page.count("plotly.js v") == 1, "plotly.js belongs into the page once"
    assert shown.tags.count("script") == 2 + 6  # plotly.js, the page's own, and a plot for each task and learning rate
    text = "".join(shown.words)
    for expected in ("1.000 ★", "failed", "nan", "diverges", "emonavi demo <&>", "ValueError: a < b", "a machine"):
        assert expected in text
    for sentence in demo_folder.sentences(found):
        assert sentence in text


def test_page_of_an_unfinished_demo(tmp_path):
    found = write_folder(tmp_path, {key: (1.0, None, None) for key in LOSSES})
    demo_report.write(found)
    assert "6 of 18 runs" in (tmp_path / "report.html").read_text()
    only = {key: losses for key, losses in found.results.items() if key[0] == "beta"}
    table = text_of(demo_report.table(replace(found, results=only)))
    assert "task beta" in table and "task alpha" not in table


def test_curves_are_smoothed_and_keep_gaps():
    assert running_mean([2.0, 2.0, math.nan, 2.0])[3] == pytest.approx(2.0)
    assert math.isnan(running_mean([2.0, math.nan])[1])
    jump = running_mean([0.0] * 50 + [1.0] * 50)
    assert 0 < jump[50] < 0.1 and jump[-1] > 0.9
    curves = {("AdamW", 0.1): {"loss": [2.0, 1e9, math.nan], "lr": [1e-3, 1e-3, 1e-3]}}
    low, high, _ = demo_folder.axis_range(curves, "loss")
    assert low < 2 and high < 10, "an explosion must not flatten the others"


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (0.00123, "0.0012"),
        (0.123, "0.12"),
        (2.345, "2.35"),
        (23.45, "23.4"),
        (2345, "2345"),
        (28364, "28k"),
        (3e6, "3e6"),
    ],
)
def test_short_figures(loss, words):
    result = Result("t", "AdamW", 0.1, 0, 1, "done", val_loss=loss)
    assert demo_report.short(result, loss).plain == words


def new_board() -> tuple[demo.Board, list[demo_run.Run]]:
    """A board of two workers, and its runs."""
    runs = [
        demo_run.Run(task, optimizer, lr, 0, task.steps)
        for task in tasks.DEMO.values()
        for optimizer in demo.OPTIMIZERS
        for lr in demo.LRS
    ]
    return demo.Board(runs, 2, quick=False), runs


def test_live_picture_fits_80_columns():
    board, runs = new_board()
    board.begin(0, runs[30])
    board.begin(1, runs[12])
    board.progress(0, demo_run.Progress(123, 28364.0, 148.0, 1.234e-05, -0.12, "braking"))
    done = Result("diabetes", "EmoNavi", 1e-5, 0, 360, "done", val_loss=28364.0, seconds=2.0)
    board.begin(1, runs[24])
    board.finish(1, done)
    picture = text_of(board).splitlines()
    assert max(len(line.rstrip()) for line in picture) <= 80
    assert len(picture) <= 23
    text = "\n".join(picture)
    assert "…" not in text
    for expected in ("1/48 runs", "28k", "braking", "-0.12", "1.2e-05", "28,364", "123/360", "148", "waiting"):
        assert expected in text
    assert "-:--" not in text, "a finished run is enough for an estimate"


@pytest.mark.parametrize("width", [80, 64, 60, 40, 30])
def test_live_picture_cuts_no_figure(width):
    """Each optimizer has its three figures of each task in its own row, however narrow the terminal is."""
    board, runs = new_board()
    for place, run in enumerate(runs):
        value = 10.1 + place  # as short as a figure may be: four characters
        board.finish(0, Result(run.task.name, run.optimizer, run.lr, 0, 360, "done", val_loss=value, seconds=2.0))
    board.begin(0, runs[30])
    board.progress(0, demo_run.Progress(123, 0.0001234, 148.0, 1.234e-05, -0.12, "braking"))
    picture = text_of(board, width).splitlines()
    assert len(picture) <= 24 or width < 40
    assert "…" not in "".join(picture)
    found = {name: [] for name in demo.OPTIMIZERS}
    for name, *figures in (line.split() for line in picture if line.strip()):
        if name in found:
            found[name] += figures
    wanted = {
        name: [f"{10.1 + place:.1f}" for place, run in enumerate(runs) if run.optimizer == name] for name in found
    }
    assert found == wanted
    said = ["diabetes", "EmoLynx", "1e-5", "123/360", "0.0001234", "1.2e-05", "-0.12", "braking", "148"]
    crew = next(line.split() for line in picture if line.startswith("diabetes"))
    assert [word for word in crew if "━" not in word] == said[: len(crew) - (width == 80)]


# --- The command


def demo_process(code: str, folder: Path, **env: str) -> subprocess.Popen:
    """Start ``emonavi demo`` on the tasks of this file, in a process group of its own."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_demo as t; {code}"
    return subprocess.Popen(
        [sys.executable, "-c", script, "demo", "--quick", "--out", str(folder)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_with(**chosen: Task) -> None:
    """Run the command on other tasks; called in the processes that ``demo_process`` starts."""
    demo.DEMO = chosen
    cli.app()


def test_one_bad_run_does_not_end_the_demo(tmp_path):
    folder = tmp_path / "out"
    process = demo_process(
        "t.run_with(line=t.LINE, broken=t.BROKEN, deadly=t.DEADLY)", folder, EMONAVI_TEST_MARK=str(tmp_path / "mark")
    )
    out, _ = process.communicate(timeout=50)
    assert process.returncode == 1, out
    results = demo_folder.read_results(folder / "results.jsonl")
    assert len(results) == 36
    of = {name: [r for r in results if r.task == name] for name in ("line", "broken", "deadly")}
    assert {r.status for r in of["line"]} == {"done"}
    assert {r.reason for r in of["broken"]} == {"RuntimeError: no data for seed 0"}
    assert sorted(r.status for r in of["deadly"]) == ["done"] * 11 + ["failed"]
    assert "the worker process died (exit code 3)" in out
    assert "13 of 36 runs failed" in out
    assert "Traceback" in (folder / "worker.log").read_text()
    assert "green" not in out, "no word about colours where there are none"
    assert max(len(line) for line in out.splitlines() if "train " in line) <= 80
    assert "[36/36]" in out and "\x1b" not in out, "plain lines where there is no terminal"
    assert (folder / "report.html").exists() and (folder / "line.png").exists()
    assert len(list((folder / "tb" / "line").glob("*/*/events*"))) == 12


def test_where_the_tracebacks_are(tmp_path, monkeypatch, capsys):
    """Brackets and colons of a path are no markup."""
    monkeypatch.setattr(demo, "DEMO", {"line": LINE})
    monkeypatch.setattr(demo, "_execute", lambda runs, folder, *_: runs[0].failed("x").append(folder / "results.jsonl"))
    folder = tmp_path / "[bold]" / ":smile:"
    assert demo.run_demo(folder, quick=True, seed=0, workers=1, command="emonavi demo") == 1
    assert f"1 of 12 runs failed; tracebacks: {folder / 'worker.log'}\n" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    folder = tmp_path / "out"
    process = demo_process("t.run_with(slow=t.SLOW)", folder)
    deadline = time.monotonic() + 30
    while not (folder / "results.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130, out
    finished = len(strict_rows(folder / "results.jsonl"))
    assert 1 <= finished < 12
    last = out.strip().splitlines()[-1]
    assert f"{finished} of 12 runs finished" in last and str(folder) in last
    assert "Traceback" not in out
    assert (folder / "report.html").exists()
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):  # nothing is left behind; multiprocessing's own helper takes a moment
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_version_and_help():
    invoke = CliRunner().invoke
    assert f"emonavi {emonavi.__version__} (torch {torch.__version__}" in invoke(cli.build(), ["--version"]).output
    out = invoke(cli.build(), ["demo", "--help"]).output
    for option in ("--quick", "--out", "--workers", "--seed"):
        assert option in out


@pytest.mark.parametrize("command", ["", "bench"])
def test_what_a_command_does_is_said_in_one_line(command):
    helped = CliRunner(env={"COLUMNS": "80"}).invoke(cli.build(), [*command.split(), "--help"]).output
    assert "schedules" in helped or "demo" in helped
    assert "..." not in helped.split("Commands")[1]


def test_an_unknown_command_is_answered_with_those_that_there_are():
    said = " ".join(CliRunner().invoke(cli.build(), ["bench", "speed"]).output.split())
    assert "No such command 'speed': choose from landscape, step, capture, lr, stop" in said
    assert "Did you mean 'demo'?" in CliRunner().invoke(cli.build(), ["dmo"]).output


@pytest.mark.parametrize("width", [80, 60])
def test_the_list_fits_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = CliRunner().invoke(cli.build(), ["list"]).output.splitlines()
    assert max(map(len, lines)) <= width
    assert {line.split()[0] for line in lines[3:] if line[0] != " "} == set(emonavi.available())


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text("precious\n")
    result = CliRunner().invoke(cli.build(), ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "not empty" in result.output
    assert (tmp_path / "results.jsonl").read_text() == "precious\n"


def test_a_seed_that_no_generator_takes_is_refused(tmp_path):
    result = CliRunner().invoke(cli.build(), ["demo", "--seed", "99999999999999999999", "--out", str(tmp_path / "new")])
    assert result.exit_code == 2 and "4294967295" in result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["demo", f"report {LEDGER}", "bench landscape --optimizers EmoNavi"])
def test_a_folder_without_the_right_to_write_is_refused_before_the_work(command, tmp_path, monkeypatch):
    for work in ("demo.run_demo", "lr_report.table", "landscape.run"):
        monkeypatch.setattr(f"emonavi.bench.{work}", lambda *_, **__: pytest.fail("worked"))
    allowed = os.access  # the superuser may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: allowed(path, mode) and not (mode & os.W_OK))
    result = CliRunner().invoke(cli.build(), [*command.split(), "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert f"no permission to write in {tmp_path}: name another folder" in " ".join(result.output.split())


@pytest.mark.parametrize("command", [["bench", "step"], ["bench", "capture"], ["demo"]], ids=" ".join)
def test_where_nothing_can_be_written_nothing_is_measured(command, tmp_path, monkeypatch):
    monkeypatch.setattr("emonavi.bench.step.report", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr("emonavi.bench.capture.report", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("precious\n")
    folder = tmp_path if command[0] == "bench" else tmp_path / "file"
    for out in (folder, tmp_path / "file" / "below"):
        result = CliRunner().invoke(cli.build(), [*command, "--out", str(out)])
        assert result.exit_code == 2
        assert re.search("name another (file|folder)", result.output)
    assert (tmp_path / "file").read_text() == "precious\n"


def test_a_folder_that_is_not_there_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("emonavi.bench.step.report", lambda *_: ["measured"])
    out = tmp_path / "new" / "folder" / "step.json"
    assert CliRunner().invoke(cli.build(), ["bench", "step", "--out", str(out)]).output == "measured\n"
    assert out.parent.is_dir()


def test_forty_columns_without_utf8(tmp_path):
    rows = [line for line in LEDGER.read_text().splitlines() if '"task":"digits"' in line]
    (tmp_path / "lr.jsonl").write_text("\n".join(rows) + "\n")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    command = [sys.executable, "-m", "emonavi", "report", str(tmp_path / "lr.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | plain)
    assert (done.returncode, done.stderr) == (0, "")
    assert any((tmp_path / "lr").glob("*.html"))
    assert "\nEmoNavi (pytorch_optimizer) " in done.stdout, "figures without the name of their optimizer"


def test_missing_packages_are_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("rich", "sklearn") else object())
    result = CliRunner().invoke(cli.build(), ["demo"])
    assert result.exit_code == 2
    assert result.output == 'emonavi demo needs rich, scikit-learn; in a clone of emonavi: pip install ".[demo]"\n'
    monkeypatch.setattr(cli, "typer", None)
    with pytest.raises(SystemExit) as exit_:
        cli.app()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == 'emonavi needs typer; in a clone of emonavi: pip install ".[demo]"\n'


def test_the_library_does_not_import_the_extra():
    code = (
        "import sys, emonavi; "
        "print([m for m in ('typer', 'rich', 'matplotlib', 'plotly', 'tensorboard', 'sklearn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
