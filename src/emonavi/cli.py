"""The command line: ``emonavi demo``, ``emonavi plot``, ``emonavi bench``, ``emonavi report``, ``emonavi list``.

Only typer is imported here. What a command needs beyond it is looked for before it begins, so that a missing package
is one line with its remedy and no traceback.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:  # the command is installed without the extra, too
    typer = None  # type: ignore[assignment]

__all__ = ["BENCH_NEEDS", "DEMO_NEEDS", "app", "build", "make", "refuse", "require", "typed", "writing"]

# Module -> the package that brings it.
DEMO_NEEDS = {
    "rich": "rich",
    "matplotlib": "matplotlib",
    "plotly": "plotly",
    "tensorboard": "tensorboard",
    "sklearn": "scikit-learn",
}
_PLOT_NEEDS = {name: DEMO_NEEDS[name] for name in ("matplotlib", "plotly", "tensorboard")}
_PCA_NEEDS = {"matplotlib": "matplotlib"}
BENCH_NEEDS = {name: name for name in ("rich", "matplotlib", "plotly")}


def app() -> None:
    """Run the command ``emonavi``."""
    if typer is None:
        sys.exit(refuse("emonavi", ["typer"]))
    build()()


def build() -> typer.Typer:
    """Return the commands as a typer application."""
    from emonavi.bench.commands import Names, benches

    commands = typer.Typer(
        cls=Names, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    commands.callback()(_root)
    commands.command(short_help="Compare with AdamW on four small tasks.")(demo)
    commands.command(short_help="Draw what writer= wrote.")(plot)
    commands.command(short_help="Read what `bench lr` found.")(report)
    commands.command("list", short_help="The optimizers: bytes, when to choose which.")(siblings)
    commands.add_typer(benches(), name="bench")
    return commands


def typed() -> str:
    """The command line, to be written beside what it made."""
    return shlex.join(["emonavi", *sys.argv[1:]])


def refuse(command: str, missing: list[str], extra: str = "demo") -> int:
    """Say which packages a command lacks; returns the code to leave with."""
    remedy = f'in a clone of emonavi: pip install ".[{extra}]"'
    print(f"{command} needs {', '.join(missing)}; {remedy}", file=sys.stderr)
    return 2


def require(command: str, packages: dict[str, str], extra: str = "demo") -> None:
    """Leave with one line where a package is missing; ``packages`` are by the module that each brings."""
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise typer.Exit(refuse(command, missing, extra))


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Leave where inside the ``with`` block ``--out``, which is a file or a folder, cannot be written."""
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(f"{error}: name another {what}", param_hint="--out") from error


def make(folder: Path) -> None:
    """Make a folder where there is none; leave where nothing can be written in it: before the work, not after."""
    with writing("folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in {folder}")


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


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A third of the steps: under a minute.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Run folder, new or empty.", show_default="runs/demo-YYYYmmdd-HHMMSS")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train, with one thread each.")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Decides initial weights and batches.")] = 0,
) -> None:
    """Train four small tasks with EmoNavi, EmoFact, EmoLynx and AdamW at three learning rates, and compare."""
    require("emonavi demo", DEMO_NEEDS)
    folder = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    make(folder)
    if any(folder.iterdir()):
        raise typer.BadParameter(f"{folder} is not empty: name a new folder", param_hint="--out")

    from emonavi.bench.demo import run_demo

    code = 130
    with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C while the report is written
        code = run_demo(folder, quick=quick, seed=seed, workers=workers, command=typed())
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
    require("emonavi plot", _PCA_NEEDS if pca else _PLOT_NEEDS)

    from emonavi.pca import draw as draw_ways
    from emonavi.plot import draw

    try:
        with writing("folder"):
            if pca:
                picture, lines = draw_ways(run, out or run)
                print("\n".join([*lines, str(picture)]))
                return
            png, page, count = draw(run, out or run)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RUN") from error
    print(f"{count} run{'s' * (count > 1)}\n{png}\n{page}")


def report(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="What `emonavi bench lr` has written.", exists=True, dir_okay=False)
    ],
    out: Annotated[Path | None, typer.Option(help="Folder.", show_default="FILE without its ending")] = None,
) -> None:
    """Say what `emonavi bench lr` has found, and write an HTML page and PNGs; the bench may still be running."""
    require("emonavi report", BENCH_NEEDS, "bench")
    from emonavi.bench import lr_report
    from emonavi.bench.ledger import read_rows
    from emonavi.bench.summary import Study
    from emonavi.bench.tables import console

    folder = out or (file.with_suffix("") if file.suffix else file.with_name(f"{file.name}-report"))
    try:
        rows = read_rows(file)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="FILE") from error
    if not rows:
        raise typer.BadParameter(f"{file} has no result yet", param_hint="FILE")
    try:
        study = Study(rows)
    except ValueError as error:
        problem = f"{file} is not of `emonavi bench lr`: {error}; name another file"
        raise typer.BadParameter(problem, param_hint="FILE") from error
    make(folder)
    shown = console()
    shown.print(lr_report.table(study, shown.width), *lr_report.verdicts(study), sep="\n")
    for path in lr_report.write(study, folder, str(file)):
        shown.print(str(path), soft_wrap=True)


def siblings() -> None:
    """List the optimizers: name, type, bytes of state per parameter of a large matrix, when to choose it."""
    from emonavi.registry import SIBLINGS

    print("bytes of state a parameter, measured, by state_dtype:\n")
    print(f"{'name':9} {'type':10} {'None':>6} {'bf16':>6} {'8bit':>6}  when to choose it")
    for s in SIBLINGS.values():
        held = " ".join(f"{s.state_bytes(how):6.2f}" for how in (None, "bf16", "8bit"))
        figures = f"{s.name:9} {s.kind:10} {held}  "
        room = max(shutil.get_terminal_size().columns - len(figures), 16)
        print(figures + f"\n{'':{len(figures)}}".join(textwrap.wrap(s.description, room)))
