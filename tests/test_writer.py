"""TensorBoard shows what the optimizer feels."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from emonavi import EmoFact, EmoLynx, EmoNavi
from emonavi.monitor import LAYOUT, Recorder

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
TAGS = {
    *("emo/lr/group_0", "emo/lr/group_1", "emo/scalar", "emo/trust", "emo/drive", "emo/tension"),
    *("emo/loss_short", "emo/loss_long", "emo/grad_norm", "emo/should_stop"),
}


class Notebook:
    """The least that a writer has to be."""

    def __init__(self):
        self.lines = []

    def add_scalar(self, tag, value, step):
        assert isinstance(tag, str)
        assert isinstance(value, (int, float))
        assert isinstance(step, int)
        self.lines.append((tag, value, step))

    def of(self, tag):
        return [(step, value) for t, value, step in self.lines if t == tag]


def two_groups():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    return model, [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3e-3}]


def train(model, optimizer, steps, each=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        each()


@pytest.mark.parametrize("sibling", [EmoNavi, EmoFact, EmoLynx])
def test_every_tag_at_every_step(sibling):
    notebook = Notebook()
    model, groups = two_groups()
    optimizer = sibling(groups, writer=notebook)
    assert optimizer.writer is notebook
    expected = []

    def look():
        e, (one, two) = optimizer.emotion, optimizer.effective_lr
        expected.append(
            {
                "emo/lr/group_0": one, "emo/lr/group_1": two, "emo/scalar": e.scalar, "emo/trust": e.trust,
                "emo/drive": e.drive, "emo/tension": e.tension, "emo/loss_short": e.short, "emo/loss_long": e.long,
                "emo/grad_norm": e.grad_norm, "emo/should_stop": float(e.should_stop),
            }
        )  # fmt: skip

    train(model, optimizer, 12, look)
    assert {tag for tag, *_ in notebook.lines} == TAGS
    for tag in TAGS:
        # On the CPU each step is there at once, with what could be read at that moment.
        assert notebook.of(tag) == [(i + 1, values[tag]) for i, values in enumerate(expected)]


@pytest.mark.parametrize("emotion", ["v1", "v3", "v4"])
def test_presets_write_what_they_have(emotion):
    notebook = Notebook()
    model, groups = two_groups()
    train(model, EmoNavi(groups, emotion=emotion, writer=notebook), 3)
    assert TAGS - {tag for tag, *_ in notebook.lines} == {"emo/trust", "emo/tension"}
    assert [step for step, _ in notebook.of("emo/scalar")] == [1, 2, 3]


def test_without_a_loss_nothing_is_made_up():
    notebook = Notebook()
    model, groups = two_groups()
    train(model, EmoNavi(groups, writer=notebook, capture=False), 3)
    assert TAGS - {tag for tag, *_ in notebook.lines} == {"emo/loss_short", "emo/loss_long"}


def test_steps_never_go_back_even_where_updates_are_skipped():
    notebook = Notebook()
    model, groups = two_groups()
    optimizer = EmoNavi(groups, writer=notebook)
    train(model, optimizer, 3)
    model[0].weight.grad[0, 0] = torch.nan
    optimizer.step(loss=1.0)
    train(model, optimizer, 3)
    steps = [step for step, _ in notebook.of("emo/drive")]
    assert steps == sorted(steps)
    assert steps[-1] == optimizer.emotion.steps == 6
    assert len(steps) == 7


def test_steps_that_do_nothing_write_nothing():
    notebook = Notebook()
    model, groups = two_groups()
    optimizer = EmoNavi(groups, writer=notebook)
    optimizer.step(loss=1.0)
    train(model, optimizer, 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 2)
    assert len(notebook.of("emo/drive")) == 1


def test_the_writer_can_be_taken_away_and_given_back():
    first, second = Notebook(), Notebook()
    model, groups = two_groups()
    optimizer = EmoNavi(groups, writer=first)
    train(model, optimizer, 2)
    optimizer.writer = None
    assert optimizer.writer is None
    train(model, optimizer, 2)
    optimizer.writer = second
    train(model, optimizer, 2)
    assert [step for step, _ in first.of("emo/drive")] == [1, 2]
    assert [step for step, _ in second.of("emo/drive")] == [5, 6]


@pytest.mark.parametrize("bad", [3, object(), print], ids=["number", "object", "function"])
def test_what_cannot_be_written_to_is_refused_and_the_old_writer_kept(bad):
    model, groups = two_groups()
    with pytest.raises(TypeError, match=r"add_scalar\(tag, value, step\)"):
        EmoNavi(two_groups()[1], writer=bad)
    notebook = Notebook()
    optimizer = EmoNavi(groups, writer=notebook)
    with pytest.raises(TypeError):
        optimizer.writer = bad
    train(model, optimizer, 1)
    assert notebook.of("emo/drive")


def test_the_writer_is_in_no_checkpoint_and_in_no_copy():
    notebook = Notebook()
    model, groups = two_groups()
    optimizer = EmoNavi(groups, writer=notebook)
    silent = EmoNavi(two_groups()[1])
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0].keys() == silent.state_dict()["param_groups"][0].keys()
    assert saved.keys() == {"state", "param_groups"}
    twin = copy.deepcopy(optimizer)
    assert twin.writer is None
    optimizer.load_state_dict(saved)
    assert optimizer.writer is notebook  # loading takes nothing away either
    train(model, optimizer, 1)
    assert len(notebook.of("emo/drive")) == 3


def test_flush_reaches_the_writers_own_flush_and_needs_none():
    _, groups = two_groups()
    notebook = Notebook()
    optimizer = EmoNavi(groups, writer=notebook)
    optimizer.flush()
    flushed = []
    notebook.flush = lambda: flushed.append(1)
    optimizer.flush()
    assert flushed == [1]
    optimizer.writer = None
    assert flushed == [1, 1]
    optimizer.flush()


def test_writing_changes_nothing():
    runs = []
    for writer in (None, Notebook()):
        model, groups = two_groups()
        optimizer = EmoNavi(groups, writer=writer)
        train(model, optimizer, 10)
        runs.append([p.detach().clone() for p in model.parameters()] + [optimizer.param_groups[0]["emotion"].clone()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Board(Notebook):
    """What a SummaryWriter is to us."""

    def __init__(self, log_dir):
        super().__init__()
        self.log_dir = log_dir


@pytest.mark.parametrize("boards", [lambda: [Notebook()] * 2, lambda: [Board("runs/gan"), Board("runs/../runs/gan")]])
def test_two_that_write_in_turns_into_one_run_are_told_once(boards):
    models, groups = zip(*(two_groups() for _ in range(2)), strict=True)
    pair = [EmoNavi(params, writer=board) for params, board in zip(groups, boards(), strict=True)]
    for model, optimizer in zip(models, pair, strict=True):
        train(model, optimizer, 1)
    with pytest.warns(UserWarning, match="overwrite each other: give each a writer of its own") as told:
        for _ in range(3):
            for model, optimizer in zip(models, pair, strict=True):
                train(model, optimizer, 1)
    assert len(told) == 1 and told[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_who_follows_on_another_is_not_told():
    """A cell run once more, a resume beside the first optimizer, the same writer again, a folder each."""
    board = Board("runs/first")
    model, groups = two_groups()
    optimizer = EmoNavi(groups, writer=board)
    train(model, optimizer, 2)
    optimizer.writer = optimizer.writer
    train(model, optimizer, 2)
    again, groups = two_groups()
    resumed = EmoNavi(groups, writer=Board("runs/first"))
    resumed.load_state_dict(optimizer.state_dict())
    train(again, resumed, 2)
    beside = Board("runs/second")
    twin, groups = two_groups()
    other = EmoNavi(groups, writer=beside)
    for _ in range(2):
        train(twin, other, 1)
        train(again, resumed, 1)
    assert len(board.of("emo/drive")) == 4 and len(beside.of("emo/drive")) == 2


# TensorBoard itself --------------------------------------------------------------------------------------------------


def read(folder):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_directory_becomes_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    notebook = Notebook()
    model, groups = two_groups()
    train(model, EmoNavi(groups, writer=notebook), 7)
    model, groups = two_groups()
    optimizer = EmoNavi(groups, writer=str(tmp_path / "runs"))
    train(model, optimizer, 7)
    optimizer.flush()
    found = read(tmp_path / "runs")
    assert found.keys() == TAGS
    for tag in TAGS:
        assert found[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in notebook.of(tag)]
    optimizer.writer.close()


def test_a_path_is_a_directory_too(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (tmp_path / "path", "~/home"):  # a trainer's command line leaves the ~ to us
        model, groups = two_groups()
        optimizer = EmoNavi(groups, writer=given)
        train(model, optimizer, 2)
        optimizer.writer.close()
    assert read(tmp_path / "path").keys() == read(tmp_path / "home").keys() == TAGS


def test_a_directory_that_cannot_be_written_is_refused_and_nothing_is_lost(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("precious")
    bad = str(tmp_path / "file" / "runs")
    remedy = r"writer='.*runs': Not a directory; name a directory that can be written"
    with pytest.raises(NotADirectoryError, match=remedy):
        EmoNavi(two_groups()[1], writer=bad)
    notebook = Notebook()
    model, groups = two_groups()
    optimizer = EmoNavi(groups, writer=notebook)
    train(model, optimizer, 2)
    with pytest.raises(NotADirectoryError):
        optimizer.writer = bad
    assert optimizer.writer is notebook
    assert optimizer._recorder._finalizer.alive, "what waits on a device would not be written at the end"
    train(model, optimizer, 1)
    assert [step for step, _ in notebook.of("emo/drive")] == [1, 2, 3]
    assert (tmp_path / "file").read_text() == "precious"


def test_a_writer_that_fails_costs_no_step():
    """A disk that is full for a while: the optimizer has moved, and the step is written with the next one."""

    class Full(Notebook):
        full = False

        def add_scalar(self, tag, value, step):
            if self.full:
                raise OSError("no space left on device")
            super().add_scalar(tag, value, step)

    notebook = Full()
    model, groups = two_groups()
    optimizer = EmoNavi(groups, writer=notebook)
    train(model, optimizer, 1)
    notebook.full = True
    with pytest.raises(OSError, match="no space"):
        train(model, optimizer, 1)
    notebook.full = False
    train(model, optimizer, 1)
    assert [step for step, _ in notebook.of("emo/drive")] == [1, 2, 3]


def layouts(folder):
    """The layouts of a run, as TensorBoard's own tab reads them."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    if metadata.CONFIG_SUMMARY_TAG not in events.Tags()["tensors"]:
        return []
    found = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    return [layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]) for event in found]


def test_the_layout_is_written_once_and_finds_every_tag(tmp_path):
    board = pytest.importorskip("torch.utils.tensorboard")
    with board.SummaryWriter(str(tmp_path)) as writer:
        model, groups = two_groups()
        optimizer = EmoNavi(groups, writer=writer)
        optimizer.writer = None
        optimizer.writer = writer
        EmoNavi(two_groups()[1], writer=writer)
        train(model, optimizer, 3)
    (layout,) = layouts(tmp_path)
    assert [category.title for category in layout.category] == ["emonavi"]
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts == {title: tags for title, (_, tags) in LAYOUT["emonavi"].items()}
    shown = [tag for tag in TAGS for patterns in charts.values() for p in patterns if re.match(p, tag)]
    assert sorted(shown) == sorted(TAGS), "each tag stands in one chart"


def test_a_layout_of_ones_own_is_added_after_it(tmp_path):
    board = pytest.importorskip("torch.utils.tensorboard")
    with board.SummaryWriter(str(tmp_path)) as writer:
        optimizer = EmoNavi(two_groups()[1], writer=writer)
        writer.add_custom_scalars({**LAYOUT, "mine": {"loss": ["Multiline", ["loss/"]]}})
        optimizer.writer = None
        optimizer.writer = writer  # does not come back over it
    assert [c.title for c in layouts(tmp_path)[-1].category] == ["emonavi", "mine"]
    assert len(layouts(tmp_path)) == 2


def test_writers_that_cannot_be_hashed_get_the_layout_too():
    class Odd(Notebook):
        __hash__ = None
        added = 0

        def add_custom_scalars(self, layout):
            assert layout is LAYOUT
            self.added += 1

    odd = Odd()
    model, groups = two_groups()
    train(model, EmoNavi(groups, writer=odd), 2)
    assert odd.added == 1


SCRIPT = """
import sys, torch, emonavi
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.ones(3))
optimizer = emonavi.EmoNavi([weight], writer=sys.argv[1])
for _ in range(5):
    optimizer.zero_grad()
    weight.square().sum().backward()
    optimizer.step()
"""


def test_a_script_that_ends_without_a_word_has_written_everything(tmp_path):
    """The string came from a command line: nobody there holds a writer that could be closed."""
    pytest.importorskip("tensorboard")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in read(tmp_path)["emo/drive"]] == [1, 2, 3, 4, 5]


# A device, where reading waits ---------------------------------------------------------------------------------------


class Far(torch.Tensor):
    """A tensor that says it lives on a device."""

    @property
    def device(self):
        return torch.device("cuda")


def far_vectors(count):
    model, groups = two_groups()
    optimizer = EmoNavi(groups)
    for _ in range(count):
        train(model, optimizer, 1)
        vector = optimizer.param_groups[0]["emotion"].clone().as_subclass(Far)
        assert vector.device.type == "cuda"
        yield vector, torch.tensor(optimizer.effective_lr)


def test_on_a_device_steps_wait_and_are_written_fifty_at_once():
    notebook = Notebook()
    recorder = Recorder(notebook, EmoNavi(two_groups()[1])._emotion)
    counts = []
    for vector, rates in far_vectors(120):
        recorder.record(vector, rates)
        vector.zero_()  # the optimizer goes on to write into its vector
        counts.append(len(notebook.of("emo/drive")))
    assert counts == [0] * 49 + [50] * 50 + [100] * 21
    recorder.flush()
    assert [step for step, _ in notebook.of("emo/drive")] == list(range(1, 121))
    recorder.flush()
    assert len(notebook.of("emo/drive")) == 120


def test_what_waits_is_written_when_the_recorder_goes():
    notebook = Notebook()
    recorder = Recorder(notebook, EmoNavi(two_groups()[1])._emotion)
    for vector, rates in far_vectors(3):
        recorder.record(vector, rates)
    assert not notebook.lines
    del recorder
    gc.collect()
    assert [step for step, _ in notebook.of("emo/drive")] == [1, 2, 3]


def test_a_writer_that_fails_can_be_taken_away():
    class Full:
        def add_scalar(self, tag, value, step):
            raise OSError("no space left on device")

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = EmoNavi([weight], writer=Full())
    weight.grad = torch.ones(2)
    with pytest.raises(OSError, match="no space"):
        optimizer.step(loss=1.0)
    with pytest.raises(OSError, match="no space"):
        optimizer.writer = None  # says once more what it could not write
    assert optimizer.writer is None
    optimizer.step(loss=1.0)
