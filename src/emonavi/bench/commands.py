"""The commands below ``emonavi bench``; each bench is loaded when its command runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emonavi.cli import BENCH_NEEDS, DEMO_NEEDS, make, refuse, require, typed, writing

if TYPE_CHECKING:
    from emonavi.bench.ledger import Ledger

__all__ = ["Names", "benches"]


class Names(typer.core.TyperGroup):
    """Commands that are all named where what was typed is like none of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not get_close_matches(args[0], self.commands):
            ctx.fail(f"No such command {args[0]!r}: choose from {', '.join(self.commands)}.")
        return super().resolve_command(ctx, args)


def benches() -> typer.Typer:
    """Return the commands as a typer application."""
    commands = typer.Typer(cls=Names, no_args_is_help=True, help="Measure, and compare with torch's own optimizers.")
    commands.command(short_help="Paths in two variables.")(landscape)
    commands.command(short_help="Time one step beside AdamW.")(step)
    commands.command(short_help="Time what hearing costs.")(capture)
    commands.command("lr", short_help="Final losses over tasks and lrs.")(learning_rates)
    for name, (brief, _) in _LEDGERED.items():
        commands.command(name, short_help=brief)(_ledgered(name))
    return commands


def _chosen(wanted: str, known: Iterable[str], what: str = "optimizer", usual: Iterable[str] = ()) -> list[str]:
    """The names that an option stands for; none is the usual ones, or all. Leaves where one is not known."""
    from emonavi.bench.peers import choose

    try:
        return choose(wanted, list(known), what) or list(usual or known)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{what}s") from error


def _no_picture(file: Path) -> None:
    """Leave where figures would have the name of the picture that is drawn beside them, and be lost to it."""
    if file.suffix.lower() == ".png":
        problem = f"{file} is the name of a picture: name a file for figures, such as {file.with_suffix('.json')}"
        raise typer.BadParameter(problem, param_hint="--out")


def _writable(file: Path | None) -> None:
    """Leave where a file cannot be written: before what is to be in it has been measured, not after."""
    if file is None:
        return
    _no_picture(file)
    with writing("file"):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise PermissionError(f"{file} cannot be written")


def _need(command: str, task: str) -> None:
    """Leave where a package that a task is made of is missing."""
    from emonavi.bench.tasks import OPTIONAL, TASKS

    wanted = (TASKS | OPTIONAL)[task]
    needs = {module: DEMO_NEEDS.get(module, module.replace("_", "-")) for module in wanted.needs.split()}
    require(command, needs, wanted.extra)


def _ledger(out: Path, cell: type[Any]) -> Ledger[Any]:
    """Open a ledger; leave where that cannot be."""
    from emonavi.bench.ledger import Ledger

    _no_picture(out)
    try:
        with writing("file"):
            return Ledger(out, cell)
    except (RuntimeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error


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
        require("emonavi bench step --out", {"matplotlib": "matplotlib"}, "bench")
    _writable(out)
    from emonavi.bench import step as bench
    from emonavi.bench.peers import choose

    try:
        lists = choose(model, list(bench.LISTS), "list of shapes") or list(bench.LISTS)
        print("\n".join(bench.report(lists, out, rounds, device, threads)))
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
    require("emonavi bench landscape", BENCH_NEEDS, "bench")
    from emonavi.bench import landscape as bench
    from emonavi.bench.peers import missing
    from emonavi.bench.tables import console
    from emonavi.registry import FAMILY

    names = _chosen(optimizers, (*FAMILY, *bench.PEERS))
    make(out)
    if absent := missing([name for name in names if name in bench.PEERS]):
        raise typer.Exit(refuse("emonavi bench landscape", absent, "bench"))
    terminal = console()
    for shown in bench.run(out, names, steps, typed()):
        terminal.print(shown, soft_wrap=True)


def learning_rates(
    quick: Annotated[bool, typer.Option("--quick", help="Two tasks, few optimizers: under five minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All half decades from 1e-5 to 1, three seeds.")] = False,
    tasks: Annotated[str, typer.Option(help="Names separated by commas; a trailing * matches the rest.")] = "",
    optimizers: Annotated[str, typer.Option(help="Likewise.")] = "",
    split: Annotated[
        str, typer.Option(help="Only the tasks that were seen while designing (dev), or the others (test).")
    ] = "",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each kind.", show_default="1, with --full 3")
    ] = None,
    out: Annotated[Path, typer.Option(help="Results, one line each; what is there already is not run again.")] = Path(
        "runs/lr.jsonl"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Processes that train, with one thread each.")] = 2,
    rerun_ours: Annotated[
        bool, typer.Option("--rerun-ours", help="Run ours again where its sources have changed.")
    ] = False,
) -> None:
    """Final losses over a grid of tasks, optimizers and learning rates; may be stopped and continued at any time."""
    require("emonavi bench lr", BENCH_NEEDS, "bench")
    from emonavi.bench import lr
    from emonavi.bench.peers import CONTENDERS, missing
    from emonavi.bench.tables import console
    from emonavi.bench.tasks import OPTIONAL, TASKS

    if split not in ("", "dev", "test") or (quick and full):
        problem = "--quick or --full, not both" if quick and full else f"--split is dev or test, not {split!r}"
        raise typer.BadParameter(problem)
    known = TASKS | OPTIONAL
    names = _chosen(tasks, known, "task", lr.QUICK_TASKS if quick else TASKS)
    splits = ", ".join(f"{name} is {known[name].split}" for name in names)
    names = [name for name in names if split in ("", known[name].split)]
    if not names:
        problem = f"no task that was chosen is in the split {split!r}: {splits}; choose others, or leave --split out"
        raise typer.BadParameter(problem, param_hint="--split")
    for name in names:
        _need(f"emonavi bench lr --tasks {name}", name)
    contenders = _chosen(optimizers, CONTENDERS, usual=lr.QUICK_OPTIMIZERS if quick else ())
    cells = lr.grid(names, contenders, lr.HALF_DECADES if full else lr.STANDARD, seeds or (3 if full else 1))
    if absent := missing(sorted({cell.optimizer for cell in cells})):
        raise typer.Exit(refuse("emonavi bench lr", absent, "bench"))
    ledger = _ledger(out, lr.Cell)
    raise typer.Exit(lr.run(cells, ledger, workers=workers, rerun_ours=rerun_ours, command=typed(), console=console()))


# In the list of commands, and on a page of its own.
_LEDGERED = {
    "stop": (
        "When should_stop speaks.",
        "When should_stop speaks on a budget four times too long, and what running on would bring: ten minutes.",
    ),
    "shock": (
        "Bad steps in a run.",
        "Spikes, NaN, wrong labels and another task in the middle of a run: does it recover? Fifteen minutes.",
    ),
    "lowbit": (
        "What fewer bits cost.",
        "What memories and weights in bfloat16 and 8 bits cost in the final loss: four minutes a seed.",
    ),
    "autonomous": (
        "Workers that merge now and then.",
        "Workers that train alone and merge now and then, beside data-parallel ones: an hour and a half.",
    ),
    "schedules": (
        "Constant lr and five schedules.",
        "The same runs under a constant lr and five schedules: does a scheduler matter? Five minutes.",
    ),
}


def _ledgered(name: str) -> Callable[..., None]:
    """A bench whose module has ``Cell``, ``cells``, ``measure`` and ``lines``, as a command."""

    def command(
        optimizers: Annotated[
            str, typer.Option(help="Siblings, separated by commas; a trailing * matches the rest, * is all six.")
        ] = "EmoNavi",
        seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 1,
        out: Annotated[
            Path, typer.Option(help="Results, one line each; what is there already is not run again.")
        ] = Path("runs") / f"{name}.jsonl",
        workers: Annotated[int, typer.Option(min=1, help="Processes that train, with one thread each.")] = 2,
    ) -> None:
        require(f"emonavi bench {name}", BENCH_NEEDS, "bench")
        from emonavi.bench.ledger import fill
        from emonavi.bench.tables import console
        from emonavi.registry import FAMILY

        bench = import_module(f"emonavi.bench.{name}")
        cells = bench.cells(_chosen(optimizers, FAMILY), seeds)
        for task in dict.fromkeys(cell.task for cell in cells):
            _need(f"emonavi bench {name}", task)
        ledger = _ledger(out, bench.Cell)

        def found(rows: list[dict[str, Any]]) -> Iterator[Any]:
            yield from bench.lines(rows)
            if hasattr(bench, "draw"):
                bench.draw(rows, ledger.path.with_suffix(".png"))

        code = fill(
            ledger, cells, bench.measure, found,
            workers=workers, title=f"bench {name}", command=typed(), console=console(),
        )  # fmt: skip
        raise typer.Exit(code)

    command.__doc__ = _LEDGERED[name][1]
    return command
