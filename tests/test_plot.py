"""``emonavi plot``: what event files hold, and what is drawn of it."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from pages import Page, probed
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


def test_a_folder_in_one_of_the_same_name_has_another(tmp_path):
    write(tmp_path / "x", drive=[1.0])
    assert [run.label for run in plot.read(tmp_path / "x")] == ["x"]
    write(tmp_path / "x" / "x", drive=[1.0])
    assert [run.label for run in plot.read(tmp_path / "x")] == [".", "x"]


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


def test_a_mean_neither_lags_nor_leaves_the_ends():
    steps = list(range(1, 61))
    line, fall = [2.0 * step for step in steps], [0.5**step for step in steps]
    assert Curve("x", steps, line).smoothed(False).values == pytest.approx(line)
    assert Curve("x", steps, fall).smoothed(True).values == pytest.approx(fall)
    noise = [(-1.0) ** step for step in steps]
    assert max(map(abs, Curve("x", steps, noise).smoothed(False).values[5:-5])) < 0.2
    long = Curve("x", list(range(3000)), [float(step >= 1500) for step in range(3000)]).smoothed(False)
    assert sum(0 < value < 1 for value in long.values) == 60, "1 % of the run on either side"
    line[30], line[31] = math.nan, math.inf
    gaps = Curve("x", steps, line).smoothed(False).values
    assert [step for step, value in enumerate(gaps) if not math.isfinite(value)] == [30, 31]
    assert gaps[0] == 2 and gaps[-1] == 120
    assert Curve("x", [1], [math.nan]).smoothed(True).steps == [1]


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


def test_trust_begins_where_there_is_a_last_step():
    (curve,) = panel("trust").curves(Run("", {"emo/trust": {1: 0.0, 2: 0.5, 3: 0.0}}))
    assert (curve.steps, curve.values) == ([2, 3], [0.5, 0.0])
    assert panel("trust").curves(Run("", {"emo/trust": {1: 0.0}})) == []
    (resumed,) = panel("trust").curves(Run("", {"emo/trust": {7: 0.3, 8: 0.5}}))
    assert resumed.steps == [7, 8]


def test_the_strong_line_is_a_mean_as_the_panel_is_drawn():
    falling = {step: 0.5**step for step in range(1, 101)}
    faint, strong = plot._lines(panel("gradient norm"), [Run("", {"emo/grad_norm": falling})])
    assert (faint.faint, strong.faint) == (True, False)
    assert strong.curve.values == pytest.approx(list(falling.values()))


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
        write(tmp_path / f"run{place}", loss_short=[2.0, 1.0], loss_long=[2.0, 1.5], scalar=[0.0, 0.1], tension=[1, 2])
    many = plot.Scene.load(tmp_path)
    assert len({(line.colour, line.dash) for line in many.key().values()}) == 9
    assert {line.curve.name for _, lines in many.panels for line in lines} == {"short", "scalar"}
    _, page, _ = plot.draw(tmp_path, tmp_path / "out")
    found = Page(page.read_text(encoding="utf-8"))
    assert [figure["layout"]["title"]["text"] for figure in found.figures] == ["loss", "scalar"]
    assert not [words for words in found.words if "tension" in words or "the long one" in words]


def test_more_runs_than_lines_that_differ(trained, tmp_path, monkeypatch):
    runs = [Run(str(place), {"emo/drive": {1: 1.0, 2: 2.0}}) for place in range(plot._MOST)]
    assert len({(line.colour, line.dash) for line in plot._lines(panel("drive"), runs)}) == len(runs) == 24
    monkeypatch.setattr(plot, "_MOST", 1)
    words = rf"holds more than 1 runs, .*: name a folder with fewer runs, such as {re.escape(str(trained[0] / 'a'))}$"
    with pytest.raises(ValueError, match=words):
        plot.draw(trained[0], tmp_path)


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


@pytest.fixture
def saved(monkeypatch):
    """The pictures that were written, as matplotlib's figures."""
    kind = pytest.importorskip("matplotlib.figure").Figure
    figures, save = [], kind.savefig
    monkeypatch.setattr(kind, "savefig", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_names_of_any_kind_are_shown_as_they_are(tmp_path, saved):
    """matplotlib takes two dollars for a formula, and warns of letters that it has no font for."""
    names = ["$\\frac$", "\N{CUNEIFORM SIGN A}"]
    for name in names:
        write(tmp_path / "$HOME$" / name, drive=[1.0, 2.0])
    plot.draw(tmp_path / "$HOME$", tmp_path / "out")
    texts = saved[0].legends[0].get_texts()
    assert [text.get_text().replace(r"\$", "$") for text in texts] == sorted(names)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("lr{}", 4),
        ("Nov30_08-02-4{}_workstation-07_lr1e-3_batch64", 3),
        ("run {} with a rather long name: a sentence of more than 60 letters", 2),
        ("Nov30_" * 22 + "{}", 1),
    ],
)
def test_names_fit_the_picture(name, columns, tmp_path, saved):
    runs = [Run(name.format(place), {"emo/drive": {1: 1.0, 2: 2.0 + place}}) for place in range(5)]
    scene = plot.Scene(Path("/x" * 150), runs, [(panel("drive"), plot._lines(panel("drive"), runs))], [])
    plot._write_png(tmp_path / "x.png", scene)
    (figure,) = saved
    (legend,) = figure.legends
    assert legend._ncols == columns
    parts = [figure._suptitle, *legend.get_texts(), *legend.get_lines()]
    for box in (part.get_window_extent() for part in parts):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    assert len({text.get_text() for text in legend.get_texts()}) == 5


def test_no_curve_runs_through_the_names_of_groups(tmp_path, saved):
    write(tmp_path, **{f"lr/group_{i}": [10.0**-i, 10.0 ** (1 - i)] for i in range(8)})
    plot.draw(tmp_path, tmp_path)
    axis = saved[0].axes[0]
    assert len(axis.get_legend().get_texts()) == 8
    assert axis.get_legend().get_window_extent().y0 >= axis.get_window_extent().y1


def test_a_run_of_one_step_is_a_point(tmp_path, saved):
    write(tmp_path, drive=[2.0], loss_short=[1.0])
    _, page, _ = plot.draw(tmp_path, tmp_path)
    assert [line.get_marker() for axis in saved[0].axes for line in axis.lines] == ["o", "o"]
    assert all(tick == int(tick) for axis in saved[0].axes for tick in axis.get_xticks())
    assert {t["mode"] for figure in Page(page.read_text()).figures for t in figure["data"]} == {"markers"}


PROBE = """addEventListener("load", () => {
  const all = name => [...document.querySelectorAll(name)], table = all(".wide")[0];
  const tall = all(".names span").filter(name => name.getBoundingClientRect().height > 30);
  const broken = all("tr > td, tr + tr > th").filter(cell => cell.getBoundingClientRect().height > 40);
  const found = [tall.length, broken.length, table.scrollWidth - table.clientWidth];
  parent.postMessage(JSON.stringify([...found, document.documentElement.scrollWidth]), "*");
});"""


def test_page_on_a_phone(tmp_path):
    rates = {f"lr/group_{i}": [1e-3 * (i + 1), 2e-3 * (i + 1)] for i in range(8)}
    write(tmp_path / "a", loss_short=[0.5, 0.25], drive=[1.0, 5.92], trust=[0.0, 0.66], **rates)
    _, page, _ = plot.draw(tmp_path / "a", tmp_path)
    tall, broken, hidden, wide = probed(tmp_path, page, PROBE, 375)
    assert (tall, broken) == (0, 0), "a line breaks between a sample and its name"
    assert hidden == 0, "the table of a single run scrolls"
    assert wide <= 375


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


def test_an_error_is_of_the_option_that_it_belongs_to(trained, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def said():
        result = CliRunner().invoke(cli.build(), ["plot", str(trained[0] / "a"), "--out", str(tmp_path / "new")])
        assert result.exit_code == 2 and "Traceback" not in result.output
        return re.sub(r"[\s│|]+", " ", result.output)

    def refuse(error):
        def fail(*arguments, **options):
            raise error

        return fail

    with monkeypatch.context() as patch:  # as below /proc
        patch.setattr(Path, "mkdir", refuse(FileNotFoundError(2, "No such file or directory", "new")))
        assert "--out: [Errno 2]" in said()
    monkeypatch.setattr(EventAccumulator, "Reload", refuse(PermissionError(13, "Permission denied", b"a/events")))
    assert "for RUN: a/events cannot be read: permission denied" in said()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_folder_whose_name_is_no_text(trained, tmp_path):
    odd = tmp_path / os.fsdecode(b"run\xff")
    shutil.copytree(trained[0] / "a", odd)
    with pytest.raises(ValueError, match=r"run\\udcff', whose name is not UTF-8: rename it"):
        plot.draw(tmp_path, tmp_path / "out")


def test_the_library_imports_nothing_of_its_benches():
    folder = Path(emonavi.__file__).parent
    ours = [file for file in folder.rglob("*.py") if "bench" not in file.relative_to(folder).parts]
    assert [file.name for file in ours if "from emonavi.bench" in file.read_text()] == ["cli.py"]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "plotly" else object())
    result = CliRunner().invoke(cli.build(), ["plot", "anything"])
    assert result.output == 'emonavi plot needs plotly; in a clone of emonavi: pip install ".[demo]"\n'
    assert result.exit_code == 2
