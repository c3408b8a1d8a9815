"""``emonavi bench landscape``: the functions, a path by hand, what is written and what the command says."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("prodigyopt")
pytest.importorskip("schedulefree")
pytest.importorskip("pytorch_optimizer")
from rich.console import Console
from typer.testing import CliRunner

from emonavi import cli
from emonavi.bench import landscape
from emonavi.registry import SIBLINGS


@pytest.mark.parametrize("name", landscape.SURFACES)
def test_the_lowest_value_is_0_at_the_minima_and_nowhere_below(name):
    surface = landscape.SURFACES[name]
    for minimum in surface.minima:
        x, y = torch.tensor(minimum, dtype=torch.float64, requires_grad=True)
        value = surface.value(x, y)
        assert value.item() == pytest.approx(0, abs=1e-9)
        slopes = torch.autograd.grad(value, (x, y))
        assert max(slope.abs().item() for slope in slopes) < 1e-3  # the minima are given to six places
    x, y = torch.rand(2, 5000, dtype=torch.float64).mul(10).sub(5)
    assert surface.value(x, y).min() >= 0
    assert surface.value(*torch.tensor(surface.start)).item() > 1


def test_a_path_follows_the_gradient_and_ends_where_it_says():
    found = landscape.walk("quadratic", "AdamW", 0.1, steps=3)
    # Adam's first step has the length lr in each direction, weight decay would make it shorter.
    assert found.points[:2] == [(-1.5, 1.0), (pytest.approx(-1.4), pytest.approx(0.9))]
    x, y = found.points[-1]
    assert found.end == (x, y) and found.value == pytest.approx(x**2 + 1000 * y**2)
    assert found.row()["distance"] == pytest.approx(math.hypot(x, y))


def test_schedule_free_is_read_at_its_average():
    found = landscape.walk("quadratic", "ScheduleFree AdamW", 0.1, steps=20)
    assert found.end != found.points[-1]


@pytest.mark.parametrize("name", SIBLINGS)
def test_each_sibling_walks_towards_lower_values(name):
    found = landscape.walk("himmelblau", name, 1e-2, steps=80)
    start = landscape.SURFACES["himmelblau"].value(*torch.tensor(found.points[0])).item()
    assert found.value < start / 2


def test_a_path_that_diverged_is_said_to_have():
    row = landscape.Walk("quadratic", "AdamW", 1e-5, [(0.0, 0.0)], (math.inf, 0.0), math.inf).row()
    rows = [row | {"lr": lr} for lr in landscape.LRS]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(*landscape.tables(rows))
    assert console.export_text().count("diverged") == len(landscape.LRS)


def test_command(tmp_path):
    arguments = ["bench", "landscape", "--steps", "2", "--optimizers", "EmoNavi,adamw", "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(cli.build(), arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("value at the end") == len(landscape.SURFACES)
    record = json.loads((tmp_path / "new" / "landscape.json").read_text())
    assert record["steps"] == 2 and "hardware" in record
    kinds = {(w["surface"], w["optimizer"], w["lr"]) for w in record["walks"]}
    assert kinds == {(s, o, lr) for s in landscape.SURFACES for o in ("EmoNavi", "AdamW") for lr in landscape.LRS}
    for name in landscape.SURFACES:
        picture = tmp_path / "new" / f"landscape-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in result.output
    result = CliRunner().invoke(cli.build(), ["bench", "landscape", "--optimizers", "nobody"])
    assert result.exit_code == 2 and "no optimizer 'nobody'" in result.output
