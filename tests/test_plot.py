"""``emonavi plot``: what event files hold, and what is drawn of it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import emonavi
from emonavi import cli, events, plot
from emonavi.events import Curve, Run

tensorboard = pytest.importorskip("torch.utils.tensorboard")
torch.set_num_threads(1)
X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def train(folder: Path, steps: int = 12, **options) -> emonavi.EmoNavi:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3e-3}]
    optimizer = emonavi.EmoNavi(groups, writer=folder, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    optimizer.writer.close()
    return optimizer


def write(folder: Path, **columns: list) -> None:
    """Write event files by hand: tags by their last part, values from step 1 on."""
    with tensorboard.SummaryWriter(str(folder)) as writer:
        for name, values in columns.items():
            for step, value in enumerate(values, start=1):
                writer.add_scalar(f"emo/{name}", value, step)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    optimizer = train(folder / "b" / "navi")
    train(folder / "a", 7, emotion="v3")
    with tensorboard.SummaryWriter(str(folder / "other")) as writer:
        writer.add_scalar("loss/train", 1.0, 1)
    return folder, optimizer


# Reading -------------------------------------------------------------------------------------------------------------


def test_every_folder_below_is_a_run(trained):
    folder, optimizer = trained
    old, navi = plot.read(folder)
    assert (old.label, navi.label) == ("a", "b/navi")
    assert (old.steps, navi.steps) == (7, 12)
    assert navi.last("emo/drive") == pytest.approx(optimizer.emotion.drive, rel=1e-6)
    assert list(navi.tags["emo/lr/group_1"]) == list(range(1, 13))
    assert "emo/trust" not in old.tags
    assert math.isnan(old.last("emo/trust"))
    (alone,) = plot.read(folder / "b" / "navi")
    assert alone.label == "navi"


def test_what_was_written_last_counts(tmp_path):
    write(tmp_path, drive=[1.0, 2.0, 3.0])
    with tensorboard.SummaryWriter(str(tmp_path), filename_suffix=".resumed") as writer:
        writer.add_scalar("emo/drive", 20.0, 2)
        writer.add_scalar("emo/drive", 0.5, 3)
    (run,) = plot.read(tmp_path)
    assert run.tags["emo/drive"] == {1: 1.0, 2: 20.0, 3: 0.5}, "neither the first nor the highest"


def test_the_log_of_hugging_faces_trainer(tmp_path):
    """It puts train/ before every tag."""
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("train/emo/drive", 2.0, 10)
        writer.add_scalar("train/loss", 1.0, 10)
    (run,) = plot.read(tmp_path)
    assert run.tags == {"emo/drive": {10: 2.0}}


def test_a_run_that_no_panel_shows(tmp_path):
    """A log that was cut short may hold any of the tags, and only those."""
    write(tmp_path / "b", should_stop=[0.0, 1.0])
    with pytest.raises(ValueError, match="hold no curve"):
        plot.draw(tmp_path, tmp_path)
    write(tmp_path / "a", drive=[1.0, 2.0])
    _, page, count = plot.draw(tmp_path, tmp_path)
    assert count == 2 and "<th>b</th>" in page.read_text()


def test_files_that_are_cut_off_or_empty_do_no_harm(trained, tmp_path):
    folder, _ = trained
    whole = next((folder / "b" / "navi").glob("*tfevents*")).read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "events.out.tfevents.1").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "events.out.tfevents.1").touch()
    (run,) = plot.read(tmp_path)
    assert run.label == "cut"
    assert 1 < run.steps < 12


def test_stretches_of_should_stop():
    def stops(*steps, of=1000):
        points = {step: float(step in steps) for step in range(1, of + 1)}
        return Run("", {"emo/should_stop": points}).stops()

    assert stops() == Run("", {}).stops() == []
    assert stops(500) == [(500, 500)]
    assert stops(*range(500, 1001)) == [(500, 1000)]
    assert stops(*range(500, 601), *range(605, 700), 900) == [(500, 699), (900, 900)]


def test_thinning_keeps_ends_and_spikes():
    values = [0.0] * 10_000
    values[3333], values[7777] = 5.0, -5.0
    thin = Curve("x", list(range(10_000)), values).thinned()
    assert len(thin.steps) <= 2 * events._POINTS + 2
    assert (thin.steps[0], thin.steps[-1]) == (0, 9999)
    assert {5.0, -5.0} < set(thin.values)
    assert thin.steps == sorted(set(thin.steps))
    short = Curve("x", [1, 2], [3.0, 4.0])
    assert short.thinned() is short


# What is shown -------------------------------------------------------------------------------------------------------


def panel(title: str) -> plot.Panel:
    return next(p for p in plot.PANELS if p.title == title)


def test_groups_are_shown_where_they_differ():
    rates = {f"emo/lr/group_{i}": {1: 1e-3, 2: 2e-3 if i % 2 else 3e-3} for i in (0, 1, 2, 10)}
    assert [curve.name for curve in panel("effective lr").curves(Run("", rates))] == ["group 0", "group 1"]
    assert events._natural("group_10") > events._natural("group_9")


@pytest.mark.parametrize(
    ("title", "values", "expected"),
    [
        ("loss", [1e-3, 1.0], (1e-3 / 1.15, 1.15, True)),
        ("loss", [1.0, 2.0], (0.95, 2.05, False)),
        ("loss", [-1.0, 19.0], (-2.0, 20.0, False)),
        ("loss", [2.0, 2.0], (1.9, 2.1, False)),
        ("loss", [math.nan], (-0.05, 0.05, False)),
        ("gradient norm", [1.0, math.inf, 3.0], (0.9, 3.1, False)),
        ("scalar, tension", [0.5, -0.1], (-1.05, 1.05, False)),
        ("scalar, tension", [50.0, -2.0], (-4.2, 4.2, False)),
    ],
)
def test_ranges(title, values, expected):
    assert panel(title).span([Curve("", [1] * len(values), values)]) == pytest.approx(expected)


def test_every_fixed_tag_is_drawn(trained):
    folder, _ = trained
    scene = plot.Scene.load(folder / "b" / "navi")
    assert scene.alone and not scene.key()
    drawn = {(p.title, line.curve.name) for p, lines in scene.panels for line in lines}
    assert drawn == {
        *(("loss", "short"), ("loss", "long"), ("effective lr", "group 0"), ("effective lr", "group 1")),
        *(("scalar, tension", "scalar"), ("scalar, tension", "tension"), ("trust", "trust"), ("drive", "drive")),
        ("gradient norm", "norm"),
    }


def test_runs_are_told_apart(trained, tmp_path):
    folder, _ = trained
    few = plot.Scene.load(folder)
    assert list(few.key()) == ["a", "b/navi"]
    assert len({line.colour for line in few.key().values()}) == 2
    for place in range(9):
        write(tmp_path / f"run{place}", loss_short=[2.0, 1.0], loss_long=[2.0, 1.5])
    many = plot.Scene.load(tmp_path)
    assert len({(line.colour, line.dash) for line in many.key().values()}) == 9
    assert {line.curve.name for _, lines in many.panels for line in lines} == {"short"}
    plot.draw(tmp_path, tmp_path / "out")


class Page(HTMLParser):
    """Collects what a page would load, its figures and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads, self.figures, self.words, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.loads += [value for key, value in attrs if key in ("src", "href", "srcset", "data")]
        self.inside = dict(attrs).get("type", "") if tag == "script" else tag

    def handle_data(self, data):
        if self.inside == "application/json":
            self.figures.append(json.loads(data))
        elif self.inside not in ("", "style"):
            self.words.append(data)


def test_picture_and_page(tmp_path):
    steps = range(1, 201)
    write(
        tmp_path / "runs" / "<b>",
        loss_short=[1 / step for step in steps],
        drive=[math.nan if step == 7 else 1.5 for step in steps],
        should_stop=[float(step > 150) for step in steps],
        **{"lr/group_0": [1.5e-3 for _ in steps]},
    )
    png, page, count = plot.draw(tmp_path / "runs", tmp_path / "new" / "out")
    assert count == 1
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.loads == [], "the page has to work without a network"
    style = "".join(re.findall(r"<style>.*?</style>", text[: text.index("plotly.js v")], re.S))
    assert "@import" not in style and "url(" not in style
    assert text.count("plotly.js v") == 1
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    titles = [figure["layout"]["title"]["text"] for figure in found.figures]
    assert titles == ["loss", "effective lr", "drive"]
    for figure in found.figures:  # where should_stop became True, in every panel
        assert [s["x0"] for s in figure["layout"]["shapes"]] == [151, 151]
    for expected in ("<b>", "200", "0.005", "1.5e-3", "1.5", "from 151", "should_stop"):
        assert expected in found.words
    assert "<b>" not in text[: text.index("plotly.js v")], "the name of a folder is no markup"


def test_names_of_any_kind_are_shown_as_they_are(tmp_path, monkeypatch):
    """matplotlib takes two dollars for a formula, and warns of letters that it has no font for."""
    figures = pytest.importorskip("matplotlib.figure")
    names = ["$\\frac$", "\N{CUNEIFORM SIGN A}"]
    for name in names:
        write(tmp_path / "$HOME$" / name, drive=[1.0, 2.0])
    keys = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda figure, path: (keys.append(figure.legends[0]), save(figure, path))
    )
    plot.draw(tmp_path / "$HOME$", tmp_path / "out")
    assert [text.get_text().replace(r"\$", "$") for text in keys[0].get_texts()] == sorted(names)


# The command ---------------------------------------------------------------------------------------------------------


def test_command(trained, tmp_path):
    folder, _ = trained
    result = CliRunner().invoke(cli.build(), ["plot", str(folder), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "2 runs",
        str(tmp_path / "emonavi-plot.png"),
        str(tmp_path / "emonavi-plot.html"),
    ]
    assert not list(folder.glob("*.png")), "--out is where it goes"
    result = CliRunner().invoke(cli.build(), ["plot", str(folder / "a")])
    assert (folder / "a" / "emonavi-plot.html").exists() and "1 run\n" in result.output


def test_errors_name_the_remedy(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "file").touch()
    (tmp_path / "hollow").mkdir()
    cases = {
        (str(tmp_path / "nowhere"),): "nowhere does not exist",
        (str(tmp_path / "file"),): "file is a file: name the folder that it lies in",
        (str(tmp_path / "hollow"),): "holds no event files (*tfevents*): name the directory that writer= writes to",
        (str(folder / "other"),): "hold no tag emo/...: construct the optimizer with a writer, as in EmoNavi(params, ",
        (str(folder / "a"), "--out", str(tmp_path / "file")): "name another folder",
        (str(folder / "other"), "--out", str(tmp_path)): "Invalid value for RUN: the event files in",
    }
    for arguments, words in cases.items():
        result = CliRunner().invoke(cli.build(), ["plot", *arguments])
        assert result.exit_code == 2
        said = re.sub(r"[\s│|]+", " ", result.output)
        assert words.replace(" ", "") in said.replace(" ", ""), said
        assert "Traceback" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_folder_whose_name_is_no_text(trained, tmp_path):
    odd = tmp_path / os.fsdecode(b"run\xff")
    shutil.copytree(trained[0] / "a", odd)
    with pytest.raises(ValueError, match=r"run\\udcff', whose name is not UTF-8: rename it"):
        plot.draw(tmp_path, tmp_path / "out")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "plotly" else object())
    result = CliRunner().invoke(cli.build(), ["plot", "anything"])
    assert result.output == 'emonavi plot needs plotly: pip install "emonavi[demo]"\n'
    assert result.exit_code == 2
