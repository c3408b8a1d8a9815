"""``monitor.trajectory`` and ``emonavi plot --pca``: what is recorded, and the plane that it is drawn in."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import emonavi
from emonavi import cli
from emonavi.monitor import trajectory
from emonavi.trajectory import FILE, RECORDS, Trajectory


def descend(optimizer, weights, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(w.square().sum() for w in weights).backward()
        optimizer.step()


def read(folder):
    held = torch.load(folder / FILE, weights_only=True)
    return held["steps"], held["weights"]


@pytest.mark.parametrize("cls", [emonavi.EmoNavi, torch.optim.AdamW, torch.optim.SGD])
def test_the_weights_of_each_step_are_recorded(cls, tmp_path):
    weights = [torch.nn.Parameter(torch.rand(shape)) for shape in ((3, 2), (4,), (1,))]
    weights[1].requires_grad_(False)
    optimizer = cls([{"params": weights[:2]}, {"params": weights[2:]}], lr=1e-2)
    expected = [torch.cat([weights[0].detach().flatten(), weights[2].detach()])]
    with trajectory(optimizer, tmp_path / "new"):
        for _ in range(4):
            descend(optimizer, [weights[0], weights[2]], 1)
            expected.append(torch.cat([weights[0].detach().flatten(), weights[2].detach()]))
    descend(optimizer, [weights[0], weights[2]], 3)  # the hook is gone
    steps, found = read(tmp_path / "new")
    assert steps.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(found, torch.stack(expected))


def test_a_sample_is_of_the_same_places_each_time(tmp_path):
    weights = [torch.nn.Parameter(torch.arange(n).float() + 1000 * i) for i, n in enumerate((300, 500, 7))]
    optimizer = torch.optim.SGD(weights, lr=0.0)
    with trajectory(optimizer, tmp_path, coordinates=64):
        descend(optimizer, weights, 2)
    _, found = read(tmp_path)
    assert found.shape == (3, 64)
    assert torch.equal(found[0], found[2])
    assert found[0].unique().numel() > 55  # spread: few are drawn twice
    assert (found[0] < 1000).any() and ((found[0] >= 1000) & (found[0] < 2000)).any()
    with trajectory(torch.optim.Adam(weights), tmp_path / "other", coordinates=64):
        pass
    assert torch.equal(read(tmp_path / "other")[1][0], found[0]), "and the same for the same network"


def test_a_long_run_is_thinned_and_keeps_its_ends(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    recorded = Trajectory(torch.optim.SGD([weight], lr=0.0))
    for step in range(1, 1003):
        weight.data.fill_(step)
        recorded.record()
    recorded.save(tmp_path)
    steps, found = read(tmp_path)
    assert steps[0] == 0 and steps[-1] == 1002 and len(steps) <= RECORDS + 1
    assert steps[:-1].diff().unique().tolist() == [4]
    assert torch.equal(found[1:, 0], steps[1:].float()), "each record is of its own step"


def test_a_loop_that_fails_leaves_its_way(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(KeyboardInterrupt), trajectory(optimizer, tmp_path):
        descend(optimizer, [weight], 2)
        raise KeyboardInterrupt
    assert len(read(tmp_path)[0]) == 3


@pytest.mark.parametrize("cls", [emonavi.EmoNavi, torch.optim.SGD])
@pytest.mark.filterwarnings("error")
def test_a_second_part_goes_on_where_the_first_one_ended(cls, tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([weight], lr=1e-2)
    with trajectory(optimizer, tmp_path):
        descend(optimizer, [weight], 3)
    first = read(tmp_path)[1]
    with pytest.raises(RuntimeError, match="at once"), trajectory(optimizer, tmp_path):
        raise RuntimeError("at once")
    assert torch.equal(read(tmp_path)[1], first)
    with trajectory(optimizer, tmp_path):
        descend(optimizer, [weight], 2)
    steps, found = read(tmp_path)
    assert steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(found[:4], first) and torch.equal(found[5], weight.detach())
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_long_run_that_goes_on_is_thinned_as_before(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    for _ in range(3):
        with trajectory(optimizer, tmp_path):
            descend(optimizer, [weight], 301)
    steps, found = read(tmp_path)
    assert steps[0] == 0 and steps[-1] == 903 and len(steps) <= RECORDS + 1
    gaps = steps.diff()
    assert (gaps > 0).all() and gaps.max() <= 4, "no part is coarser than the others"
    assert (found[1:] < found[:-1]).all(), "each record is of its own step"


def test_a_record_that_goes_on_from_other_weights(tmp_path):
    """After a resume from a checkpoint before the crash, or in the folder of another run."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1e-2)
    with trajectory(optimizer, tmp_path):
        descend(optimizer, [weight], 3)
    weight.data.fill_(1.0)
    warning = pytest.warns(UserWarning, match="goes on after step 3, but from other weights")
    with warning as told, trajectory(optimizer, tmp_path):
        descend(optimizer, [weight], 3)
    assert told[0].filename == __file__
    steps, found = read(tmp_path)
    assert steps.tolist() == list(range(7)) and torch.equal(found[1:4], found[4:])


def test_the_record_of_another_network_is_refused_and_kept(tmp_path):
    def follow(count, coordinates=64):
        weight = torch.nn.Parameter(torch.ones(count))
        optimizer = torch.optim.SGD([weight], lr=1e-2)
        with trajectory(optimizer, tmp_path, coordinates=coordinates):
            descend(optimizer, [weight], 2)

    path = tmp_path / FILE
    follow(300)
    before = path.read_bytes()
    for count, coordinates in ((500, 64), (300, 65)):
        remedy = rf"records 64 of 300 weights, and not {coordinates} of {count}: name another folder"
        with pytest.raises(ValueError, match=remedy):
            follow(count, coordinates)
    assert path.read_bytes() == before
    path.write_bytes(before[:100])
    with pytest.raises(ValueError, match=rf"{FILE} is no record of weights \(\w+\): name another folder"):
        follow(300)
    assert path.read_bytes() == before[:100]
    torch.save({"steps": torch.arange(1), "weights": torch.ones(1, 5)}, path)  # of a run that was killed
    follow(300)
    assert read(tmp_path)[1].shape == (3, 64)


@pytest.mark.parametrize("late", [False, True], ids=["in mid-run", "at the end"])
@pytest.mark.parametrize("size", [2, 9])
def test_a_weight_of_another_size_ends_the_record_and_not_the_training(size, late, tmp_path):
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=1e-2)
    warning = pytest.warns(UserWarning, match="another size than at step 2: the record of the weights ends there")
    with warning as told, trajectory(optimizer, tmp_path) as recorded:
        recorded._every = 2  # as in a long run
        descend(optimizer, weights, 3)
        weights[0].data, weights[0].grad = torch.ones(size), None
        if not late:
            descend(optimizer, weights, 5)
    assert len(told) == 1
    assert read(tmp_path)[0].tolist() == [0, 2]


def test_a_disk_that_is_full_leaves_the_record_from_before(tmp_path, monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1e-2)
    with trajectory(optimizer, tmp_path):
        descend(optimizer, [weight], 3)

    def write_bytes(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left"), trajectory(optimizer, tmp_path):
        pytest.fail("it is told before the loop")
    assert len(read(tmp_path)[0]) == 4 and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_told_before_the_loop(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    (tmp_path / "file").touch()
    reached = False
    with pytest.raises(OSError, match="file"), trajectory(torch.optim.SGD([weight], lr=0.1), tmp_path / "file"):
        reached = True
    assert not reached


def test_bfloat16_is_kept_as_float32(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    Trajectory(torch.optim.SGD([weight], lr=0.1)).save(tmp_path)
    assert read(tmp_path)[1].dtype == torch.float32


def test_nothing_to_follow():
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="nothing in this optimizer requires a gradient"):
        Trajectory(torch.optim.SGD([frozen], lr=0.1))
    with pytest.raises(ValueError, match="coordinates is 1: two at least"):
        Trajectory(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), coordinates=1)
    with pytest.raises(ValueError, match="all that this optimizer trains is one number"):
        Trajectory(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


# The plane -----------------------------------------------------------------------------------------------------------


def way(weights, label="a"):
    from emonavi.pca import Way

    return Way(label, torch.arange(len(weights)), weights.double())


def test_a_flat_spiral_is_found_in_a_space_of_many_dimensions():
    from emonavi.pca import explained, project

    angle = torch.linspace(0, 6, 80, dtype=torch.float64)
    flat = torch.stack([3 * angle.cos(), angle.sin()], dim=1)
    directions = torch.linalg.qr(torch.randn(50, 2, dtype=torch.float64)).Q
    spiral = way(flat @ directions.T + 7)
    points = project(spiral)
    assert points[0].tolist() == [0, 0]
    # Distances are those of the weights, whatever the plane's axes.
    assert torch.allclose(torch.cdist(points, points), torch.cdist(flat, flat), atol=1e-6)
    one, two = explained(spiral, points)
    shares = flat.var(0) / flat.var(0).sum()
    assert one > 0.8 and one >= shares.max() - 1e-9
    assert one + two == pytest.approx(1)
    noisy = way(spiral.weights + torch.randn(80, 50, dtype=torch.float64))
    assert sum(explained(noisy, project(noisy))) < 0.5
    still = way(torch.ones(5, 4))
    assert explained(still, project(still)) == (0, 0)


@pytest.fixture
def runs(tmp_path):
    pytest.importorskip("matplotlib")
    for name, cls in (("navi", emonavi.EmoNavi), ("adamw", torch.optim.AdamW)):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(6))
        optimizer = cls([weight], lr=1e-2)
        with trajectory(optimizer, tmp_path / name):
            descend(optimizer, [weight], 30)
    return tmp_path


def test_command(runs, tmp_path):
    result = CliRunner().invoke(cli.build(), ["plot", "--pca", str(runs), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    first, second, picture = result.output.splitlines()
    assert re.fullmatch(r"adamw: \d+% and \d+% of the variance, 30 steps, end \d\.\d+ from the start", first)
    assert second.startswith("navi: ")
    assert picture == str(tmp_path / "out" / "emonavi-pca.png")
    assert (tmp_path / "out" / "emonavi-pca.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverged_is_drawn_up_to_there(tmp_path):
    from emonavi.pca import read

    weights = torch.rand(6, 4)
    weights[4:] = math.nan
    torch.save({"steps": torch.arange(6), "weights": weights}, tmp_path / FILE)
    (found,), _ = read(tmp_path)
    assert found.steps.tolist() == [0, 1, 2, 3]


def test_runs_that_cannot_be_drawn_are_left_out(runs, tmp_path, monkeypatch):
    """One that still trains or was killed, one that is damaged, one that may not be read."""
    Trajectory(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)).save(runs / "trains")
    for name, held in (
        ("damaged", torch.ones(3)),
        ("flat", {"steps": torch.arange(3), "weights": torch.ones(3)}),
        ("narrow", {"steps": torch.arange(3), "weights": torch.ones(3, 1)}),
    ):
        (runs / name).mkdir()
        torch.save(held, runs / name / FILE)
    whole = Path.read_bytes

    def read_bytes(path):
        if path.parent.name == "navi":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    result = CliRunner().invoke(cli.build(), ["plot", "--pca", str(runs), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    first, *rest, picture = result.output.splitlines()
    assert first.startswith("adamw: ") and picture.endswith(".png")
    assert rest == [
        f"left out: {runs / 'damaged' / FILE} is no record of weights (TypeError): record it anew",
        f"left out: {runs / 'flat' / FILE} is no record of weights (IndexError): record it anew",
        f"left out: {runs / 'narrow' / FILE} holds samples of 1 weight: two are needed for a plane",
        f"left out: {runs / 'navi' / FILE} cannot be read: permission denied",
        f"left out: {runs / 'trains' / FILE} holds 1 finite sample: three are needed for a plane, and most come when "
        "the run ends",
    ]
    (runs / "adamw" / FILE).unlink()
    result = CliRunner().invoke(cli.build(), ["plot", "--pca", str(runs)])
    assert result.exit_code == 2
    said = re.sub(r"[\s│|]+", " ", result.output)
    assert "(TypeError): record it anew; nor can the other 4 be drawn" in said


@pytest.mark.parametrize("name", ["Nov30_08-02-4{}_workstation-07_lr1e-3_batch64", "Nov30_" * 30 + "{}", "{}"])
def test_titles_fit_their_panels(name, tmp_path, monkeypatch):
    from emonavi import pca

    kind = pytest.importorskip("matplotlib.figure").Figure
    figures, save = [], kind.savefig
    monkeypatch.setattr(kind, "savefig", lambda figure, path: (figures.append(figure), save(figure, path)))
    for count in (1, 5):
        ways = [way(torch.rand(5, 3), name.format(place)) for place in range(count)]
        pca._write_png(tmp_path / "x.png", ways, [pca.project(each) for each in ways])
        *_, figure = figures
        boxes = [axis.title.get_window_extent() for axis in figure.axes]
        for box in (figure._suptitle.get_window_extent(), *boxes):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)
        assert len({axis.get_title() for axis in figure.axes}) == count


def test_errors_name_the_remedy(tmp_path):
    def said(folder):
        result = CliRunner().invoke(cli.build(), ["plot", "--pca", str(folder)])
        assert result.exit_code == 2 and "Traceback" not in result.output
        return re.sub(r"[\s│|]+", "", result.output)

    pytest.importorskip("matplotlib")
    assert "nowheredoesnotexist" in said(tmp_path / "nowhere")
    assert "emonavi.monitor.trajectory(optimizer,folder)" in said(tmp_path)
    (tmp_path / FILE).write_bytes(b"no tensor")
    assert "isnorecordofweights" in said(tmp_path)
    assert "isafile:namethefolderthatitliesin" in said(tmp_path / FILE)
    torch.save({"steps": torch.arange(2), "weights": torch.rand(2, 4)}, tmp_path / FILE)
    assert "holds2finitesamples:threeareneeded" in said(tmp_path)


def test_a_wrapper_is_looked_through(tmp_path):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = emonavi.EmoNavi([weight])
    with trajectory(Wrapper(optimizer), tmp_path):
        descend(optimizer, [weight], 4)
    assert read(tmp_path)[1].shape == (5, 3)
