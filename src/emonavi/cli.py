"""The command line: ``emonavi demo``, ``emonavi plot``, ``emonavi bench step``, ``emonavi list``.

Only typer is imported here. What a command needs beyond it is looked for before it begins, so that a missing package
is one line with its remedy and no traceback.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
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
    commands.command("list")(siblings)
    benches = typer.Typer(no_args_is_help=True, help="Measure, and compare with torch's own optimizers.")
    benches.command()(step)
    benches.command()(marks)
    commands.add_typer(benches, name="bench")
    return commands


def _require(command: str, needs: dict[str, str]) -> None:
    missing = [package for module, package in needs.items() if find_spec(module) is None]
    if missing:
        raise typer.Exit(_refuse(command, missing))


def _refuse(command: str, missing: list[str]) -> int:
    print(f'{command} needs {", ".join(missing)}: pip install "emonavi[demo]"', file=sys.stderr)
    return 2


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
        raise typer.BadParameter(str(error), param_hint="--out") from error
    if any(folder.iterdir()):
        raise typer.BadParameter(f"{folder} is not empty: name a new folder", param_hint="--out")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a bar drawn as ??? rather than a crash where there is no UTF-8

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
    out: Annotated[Path | None, typer.Option(help="Folder for the two files.", show_default="RUN")] = None,
) -> None:
    """Draw what optimizers felt, from what writer= wrote: one PNG, and one HTML page that needs no network."""
    _require("emonavi plot", _PLOT_NEEDS)

    from emonavi.plot import draw

    try:
        png, page, count = draw(run, out or run)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="RUN") from error
    except OSError as error:
        raise typer.BadParameter(f"{error}: name another folder", param_hint="--out") from error
    print(f"{count} run{'s' * (count > 1)}\n{png}\n{page}")


def siblings() -> None:
    """List the optimizers: name, type, bytes of state per float32 parameter, when to choose it."""
    from emonavi.registry import SIBLINGS

    print(f"{'name':9} {'type':10} {'state bytes/param':24} when to choose it")
    for s in SIBLINGS.values():
        print(f"{s.name:9} {s.kind:10} {s.state_bytes:24} {s.description}")


def step(
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each optimizer.")] = 15,
) -> None:
    """Time one step beside torch's AdamW: ratios of medians, taken in turns, with one thread."""
    from emonavi.bench.step import report

    print("\n".join(report(out, rounds)))


def marks(
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train, with one thread each.")] = 2,
) -> None:
    """Compare final losses with AdamW's at its best of eleven learning rates: about eight minutes."""
    from emonavi.bench.marks import report

    for line in report(out, seeds, workers):
        print(line, flush=True)
