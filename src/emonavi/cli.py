"""The command line: ``emonavi demo``, ``emonavi plot``, ``emonavi bench``, ``emonavi report``, ``emonavi list``.

Only typer is imported here. What a command needs beyond it is looked for before it begins, so that a missing package
is one line with its remedy and no traceback.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:  # the command is installed without the extra, too
    typer = None  # type: ignore[assignment]

__all__ = ["app", "build"]

# Module -> the package that brings it.
_DEMO_NEEDS = {
    "typer": "typer",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "plotly": "plotly",
    "tensorboard": "tensorboard",
    "sklearn": "scikit-learn",
}
_PLOT_NEEDS = {name: _DEMO_NEEDS[name] for name in ("matplotlib", "plotly", "tensorboard")}
_PCA_NEEDS = {"matplotlib": "matplotlib"}
_BENCH_NEEDS = {name: name for name in ("typer", "rich", "matplotlib", "plotly")}


def app() -> None:
    """Run the command ``emonavi``."""
    if typer is None:
        sys.exit(_refuse("emonavi", ["typer"]))
    build()()


def build() -> typer.Typer:
    """Return the commands as a typer application."""
    commands = typer.Typer(
        add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    commands.callback()(_root)
    commands.command()(demo)
    commands.command()(plot)
    commands.command()(report)
    commands.command("list")(siblings)
    benches = typer.Typer(no_args_is_help=True, help="Measure, and compare with torch's own optimizers.")
    benches.command()(landscape)
    benches.command()(step)
    benches.command()(capture)
    benches.command("lr")(learning_rates)
    for name in _LEDGERED:
        benches.command(name)(_ledgered(name))
    commands.add_typer(benches, name="bench")
    return commands


def _refuse(command: str, missing: list[str], extra: str = "demo") -> int:
    print(f'{command} needs {", ".join(missing)}: pip install "emonavi[{extra}]"', file=sys.stderr)
    return 2


def _require(command: str, packages: dict[str, str], extra: str = "demo") -> None:
    """Leave with one line where a package is missing."""
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise typer.Exit(_refuse(command, missing, extra))


def _chosen(wanted: str, known: Iterable[str], what: str = "optimizer", usual: Iterable[str] = ()) -> list[str]:
    """The names that an option stands for; none is the usual ones, or all. Leaves where one is not known."""
    from emonavi.bench.peers import choose

    try:
        return choose(wanted, list(known), what) or list(usual or known)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{what}s") from error


def _version(wanted: bool) -> None:
    if wanted:
        import torch

        import emonavi

        print(f"emonavi {emonavi.__version__} (torch {torch.__version__}, Python {sys.version.split()[0]})")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions.")] = False,
) -> None:
    """PyTorch optimizers that listen to the loss."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a bar drawn as ??? rather than a crash where there is no UTF-8


def _writable(file: Path | None) -> None:
    """Leave where a file cannot be written: before what is to be in it has been measured, not after."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise PermissionError(f"{file} cannot be written")
    except OSError as error:
        raise typer.BadParameter(f"{error}: name another file", param_hint="--out") from error


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A third of the steps: under a minute.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Run folder, new or empty.", show_default="runs/demo-YYYYmmdd-HHMMSS")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train, with one thread each.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Decides initial weights and batches.")] = 0,
) -> None:
    """Train four small tasks with EmoNavi, EmoFact, EmoLynx and AdamW at three learning rates, and compare."""
    _require("emonavi demo", _DEMO_NEEDS)
    folder = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{error}: name another folder", param_hint="--out") from error
    if any(folder.iterdir()):
        raise typer.BadParameter(f"{folder} is not empty: name a new folder", param_hint="--out")

    from emonavi.bench.demo import run_demo

    command = shlex.join(["emonavi", *sys.argv[1:]])
    code = 130
    with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C while the report is written
        code = run_demo(folder, quick=quick, seed=seed, workers=workers, command=command)
    raise typer.Exit(code)


def plot(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of TensorBoard event files, searched with all below.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the files.", show_default="RUN")] = None,
    pca: Annotated[
        bool, typer.Option("--pca", help="The way of the weights that monitor.trajectory() recorded, instead.")
    ] = False,
) -> None:
    """Draw what optimizers felt, from what writer= wrote: one PNG, and one HTML page that needs no network."""
    _require("emonavi plot", _PCA_NEEDS if pca else _PLOT_NEEDS)

    from emonavi.pca import draw as draw_ways
    from emonavi.plot import draw

    try:
        if pca:
            picture, lines = draw_ways(run, out or run)
            print("\n".join([*lines, str(picture)]))
            return
        png, page, count = draw(run, out or run)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="RUN") from error
    except OSError as error:
        raise typer.BadParameter(f"{error}: name another folder", param_hint="--out") from error
    print(f"{count} run{'s' * (count > 1)}\n{png}\n{page}")


def report(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="What `emonavi bench lr` has written.", exists=True, dir_okay=False)
    ],
    out: Annotated[Path | None, typer.Option(help="Folder.", show_default="FILE without its ending")] = None,
) -> None:
    """Say what `emonavi bench lr` has found, and write an HTML page and PNGs; the bench may still be running."""
    _require("emonavi report", _BENCH_NEEDS, "bench")
    from rich.console import Console

    from emonavi.bench import lr_report
    from emonavi.bench.ledger import read_rows
    from emonavi.bench.summary import Study

    folder = out or file.with_suffix("")
    try:
        study = Study(read_rows(file))
    except KeyError as error:
        raise typer.BadParameter(f"{file} is not of `emonavi bench lr`: a row lacks {error}") from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not study.rows:
        raise typer.BadParameter(f"{file} has no result yet")
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the figures, which would hide why there is no page
    except OSError as error:
        raise typer.BadParameter(f"{error}: name another folder", param_hint="--out") from error
    console = Console(highlight=False)
    console.print(lr_report.table(study))
    for sentence in lr_report.verdicts(study):
        console.print(sentence, markup=False)
    for path in lr_report.write(study, folder, str(file)):
        console.print(str(path), markup=False, soft_wrap=True)


def siblings() -> None:
    """List the optimizers: name, type, bytes of state per parameter of a large matrix, when to choose it."""
    from emonavi.registry import SIBLINGS

    print("state bytes/param, measured, with state_dtype=None, 'bf16' and '8bit':\n")
    print(f"{'name':9} {'type':10} {'None':>6} {'bf16':>6} {'8bit':>6}  when to choose it")
    for s in SIBLINGS.values():
        held = " ".join(f"{s.state_bytes(how):6.2f}" for how in (None, "bf16", "8bit"))
        print(f"{s.name:9} {s.kind:10} {held}  {s.description}")


def step(
    model: Annotated[
        str, typer.Option(help="Lists of shapes, separated by commas: one, gpt2, tiny, lora.")
    ] = "one,gpt2,tiny,lora",
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file, and a PNG.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each optimizer.")] = 15,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    threads: Annotated[
        int, typer.Option(min=1, help="Of torch and of the kernels; of more than 1, the elapsed time.")
    ] = 1,
) -> None:
    """Time one step beside torch's AdamW and others: ratios of medians, taken in turns."""
    if out is not None:
        _require("emonavi bench step --out", {"matplotlib": "matplotlib"}, "bench")
    _writable(out)
    from emonavi.bench import step as bench

    try:
        print("\n".join(bench.report(model.split(","), out, rounds, device, threads)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def capture(
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed backward passes of each variant.")] = 100,
) -> None:
    """Time the backward of 100 M parameters with 0, 1 and 4 optimizers listening: about a minute."""
    _writable(out)
    from emonavi.bench.capture import report

    print("\n".join(report(out, rounds)))


def landscape(
    out: Annotated[Path, typer.Option(help="Folder of the figures and pictures.")] = Path("runs/landscape"),
    optimizers: Annotated[str, typer.Option(help="Names separated by commas.", show_default="all")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Of each path.")] = 500,
) -> None:
    """Draw paths on five functions of two variables, from lrs over five decades: siblings and peers, a few minutes."""
    _require("emonavi bench landscape", _BENCH_NEEDS, "bench")
    from rich.console import Console

    from emonavi.bench import landscape as bench
    from emonavi.bench.peers import missing
    from emonavi.registry import FAMILY

    names = _chosen(optimizers, (*FAMILY, *bench.PEERS))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{error}: name another folder", param_hint="--out") from error
    if absent := missing([name for name in names if name in bench.PEERS]):
        raise typer.Exit(_refuse("emonavi bench landscape", absent, "bench"))
    console = Console(highlight=False)
    for shown in bench.run(out, names, steps, shlex.join(["emonavi", *sys.argv[1:]])):
        console.print(shown, soft_wrap=True)


def learning_rates(
    quick: Annotated[bool, typer.Option("--quick", help="Two tasks, few optimizers: under five minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All half decades from 1e-5 to 1, three seeds.")] = False,
    tasks: Annotated[str, typer.Option(help="Names separated by commas; a trailing * matches the rest.")] = "",
    optimizers: Annotated[str, typer.Option(help="Likewise.")] = "",
    split: Annotated[
        str, typer.Option(help="Only the tasks that were seen while designing (dev), or the others (test).")
    ] = "",
    out: Annotated[Path, typer.Option(help="Results, one line each; what is there already is not run again.")] = Path(
        "runs/lr.jsonl"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Processes that train, with one thread each.")] = 2,
    rerun_ours: Annotated[
        bool, typer.Option("--rerun-ours", help="Run ours again where its sources have changed.")
    ] = False,
) -> None:
    """Final losses over a grid of tasks, optimizers and learning rates; may be stopped and continued at any time."""
    _require("emonavi bench lr", _BENCH_NEEDS, "bench")
    from rich.console import Console

    from emonavi.bench import lr
    from emonavi.bench.ledger import Ledger
    from emonavi.bench.peers import CONTENDERS, missing
    from emonavi.bench.tasks import OPTIONAL, TASKS

    if split not in ("", "dev", "test") or (quick and full):
        problem = "--quick or --full, not both" if quick and full else f"--split is dev or test, not {split!r}"
        raise typer.BadParameter(problem)
    known = TASKS | OPTIONAL
    names = _chosen(tasks, known, "task", lr.QUICK_TASKS if quick else TASKS)
    names = [name for name in names if split in ("", known[name].split)]
    for task in (known[name] for name in names):
        needs = {module: _DEMO_NEEDS.get(module, module.replace("_", "-")) for module in task.needs.split()}
        _require(f"emonavi bench lr --tasks {task.name}", needs, task.extra)
    contenders = _chosen(optimizers, CONTENDERS, usual=lr.QUICK_OPTIMIZERS if quick else ())
    cells = lr.grid(names, contenders, lr.HALF_DECADES if full else lr.STANDARD, seeds=3 if full else 1)
    if absent := missing(sorted({cell.optimizer for cell in cells})):
        raise typer.Exit(_refuse("emonavi bench lr", absent, "bench"))
    try:
        ledger = Ledger(out, lr.Cell)
    except (OSError, RuntimeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    command = shlex.join(["emonavi", *sys.argv[1:]])
    console = Console(highlight=False)
    raise typer.Exit(lr.run(cells, ledger, workers=workers, rerun_ours=rerun_ours, command=command, console=console))


_LEDGERED = {
    "stop": "When should_stop speaks on a budget four times too long, and what running on would bring: ten minutes.",
    "shock": "Spikes, NaN, wrong labels and another task in the middle of a run: does it recover? Fifteen minutes.",
    "lowbit": "What memories and weights in bfloat16 and 8 bits cost in the final loss: four minutes a seed.",
    "autonomous": "Workers that train alone and merge now and then, beside data-parallel ones: an hour and a half.",
    "schedules": "The same runs under a constant lr and five schedules: does a scheduler matter? Five minutes.",
}


def _ledgered(name: str) -> Callable[..., None]:
    """A bench whose module has ``Cell``, ``cells``, ``measure`` and ``lines``, as a command."""

    def command(
        optimizers: Annotated[
            str, typer.Option(help="Siblings, separated by commas; a trailing * matches the rest, * is all six.")
        ] = "EmoNavi",
        seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 1,
        out: Annotated[
            Path | None,
            typer.Option(
                help="Results, one line each; what is there already is not run again.",
                show_default="runs/NAME.jsonl",
            ),
        ] = None,
        workers: Annotated[int, typer.Option(min=1, help="Processes that train, with one thread each.")] = 2,
    ) -> None:
        _require(f"emonavi bench {name}", _BENCH_NEEDS, "bench")
        from importlib import import_module

        from rich.console import Console

        from emonavi.bench.ledger import Ledger, execute
        from emonavi.bench.runner import hardware
        from emonavi.registry import FAMILY

        bench = import_module(f"emonavi.bench.{name}")
        cells = bench.cells(_chosen(optimizers, FAMILY), seeds)
        try:
            ledger = Ledger(out or Path("runs") / f"{name}.jsonl", bench.Cell)
        except (OSError, RuntimeError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--out") from error
        console = Console(highlight=False)
        try:
            todo = ledger.missing(cells)
            console.print(f"{len(cells)} runs, {len(cells) - len(todo)} of them in {ledger.path}; {hardware()}")
            outcome = execute(
                todo, bench.measure, ledger, workers=workers, title=f"bench {name}", kind=lambda c: c.task,
                console=console,
            )  # fmt: skip
        finally:
            ledger.close()
        rows = [ledger.rows[c] for c in cells if c in ledger.rows]
        for line in (*outcome.failures, *bench.lines(rows)):
            console.print(line, markup=False, soft_wrap=True)
        if hasattr(bench, "draw"):
            bench.draw(rows, ledger.path.with_suffix(".png"))
        if outcome.stopped:
            console.print(f"Stopped; the same command goes on. Everything finished is in {ledger.path}.")
        raise typer.Exit(130 if outcome.stopped else 1 if outcome.failures else 0)

    command.__doc__ = _LEDGERED[name]
    return command
