"""The pages: every python block runs, the site builds without a warning, and a browser finds nothing to complain of."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pages import Page, browse, found_in

import emonavi

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# The python blocks ---------------------------------------------------------------------------------------------------

# A block that cannot run here has a line before it that says why: <!-- not run: needs two machines -->
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n+)?```python\n(.*?)^```$", re.S | re.M)


def blocks(text: str) -> list[tuple[bool, str]]:
    """The python blocks of a page, each with whether it is to be run."""
    return [(not mark, code) for mark, code in BLOCK.findall(text)]


def usual() -> dict:
    """What a page takes for granted: a model that has a gradient, an optimizer, data."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = emonavi.EmoNavi(model.parameters(), on_missing_loss="ignore")
    data = [torch.ones(2, 4)] * 3
    model(data[0]).square().mean().backward()
    params = [torch.nn.Parameter(torch.ones(3))]
    return {"torch": torch, "emonavi": emonavi, "model": model, "optimizer": optimizer, "data": data, "params": params}


def trainer(space: dict) -> None:
    from transformers import Trainer, TrainingArguments

    space |= {"Trainer": Trainer, "args": TrainingArguments(output_dir="out", report_to=[], use_cpu=True)}


def prepared(space: dict) -> None:
    from accelerate import Accelerator

    space |= {"accelerator": Accelerator(cpu=True), "loader": torch.utils.data.DataLoader(space["data"])}


def lightning(space: dict) -> None:
    from lightning import Trainer

    import emonavi.integrations.lightning  # noqa: F401

    space["Trainer"] = partial(Trainer, accelerator="cpu", logger=False, enable_checkpointing=False)


def boards(space: dict) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def board(folder: str) -> SummaryWriter:
        boards.append(SummaryWriter(folder))
        return boards[-1]

    boards = space.setdefault("boards", [])  # closed when the page is done: their threads write to a relative path
    anything = SimpleNamespace(add_scalar=lambda tag, value, step: None)
    space |= {"SummaryWriter": board, "anything": anything, "writer": board("runs/other")}


def rows(space: dict) -> None:
    """Weights & Biases and MLflow, as far as the pages use them."""
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=lambda row: None)
    space |= {"wandb": SimpleNamespace(init=lambda: run), "mlflow": SimpleNamespace(log_metric=lambda *a, **k: None)}


def alone(space: dict) -> None:
    """A process group of one, and a user's own loop."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=Path("alone").absolute().as_uri(), rank=0, world_size=1)
    space |= {"dist": dist, "my_own_data": space["data"], "loss_of": lambda model, batch: model(batch).square().mean()}


def pairs(space: dict) -> None:
    """Inputs with targets, and a loss of both."""
    space |= {"loader": [(x, x[:, :1]) for x in space["data"]], "loss_of": torch.nn.functional.mse_loss}


class Loss(torch.nn.Linear):
    """A model that returns its loss."""

    def forward(self, x):
        return super().forward(x).square().mean()


# A word of a block -> the package that it needs, and what is set up for it.
STAGES = {
    "optimizer_cls_and_kwargs(": ("transformers", trainer),
    "accelerator.prepare": ("accelerate", prepared),
    "configure_optimizers": ("lightning", lightning),
    "timm.optim": ("timm", lambda space: space.update(timm=__import__("timm"))),
    "SummaryWriter(": ("tensorboard", boards),
    "add_custom_scalars": ("tensorboard", boards),
    "monitor.live": ("rich", lambda space: None),
    "wandb.init": ("torch", rows),
    "mlflow.": ("torch", rows),
    "Merger(": ("torch", alone),
    "for x, y in loader": ("torch", pairs),
    "loss = model(batch)": ("torch", lambda space: space.update(model=Loss(4, 1))),
}


def run(code: str, space: dict, name: str, wanted: bool = True) -> None:
    """Run a block; where that is not possible, it has to compile, and the names of this library to exist."""
    compiled = compile(code, name, "exec")
    stages = [stage for word, stage in STAGES.items() if word in code]
    assert unknown(code) == []
    if not wanted or any(find_spec(package) is None for package, _ in stages):
        return
    with warnings.catch_warnings():
        if stages:
            warnings.simplefilter("ignore")  # of trainers, about themselves
        for _, prepare in stages:
            prepare(space)
        exec(compiled, space)


def unknown(code: str) -> list[str]:
    """Names of this library that a block uses and that are not there; read, since their trainers may be missing.

    Nor are those there that lie in a module which neither the block imports nor the package does by itself: run here,
    the block would find what an earlier test has imported.
    """
    used = [tuple(path.rsplit(".", 1)) for path in re.findall(r"\b(emonavi(?:\.\w+)+)\b(?= ?[(\[])", code)]
    for module, names in re.findall(r"^from (emonavi[.\w]*) import (.+)$", code, re.M):
        used += [(module, name.strip()) for name in names.split(",")]
    files = {module: ROOT / "src" / f"{module.replace('.', '/')}.py" for module, _ in used}
    files["emonavi"] = ROOT / "src" / "emonavi" / "__init__.py"
    texts = {module: file.read_text() if file.exists() else "" for module, file in files.items()}
    reached = {"emonavi", *re.findall(r"^(?:from|import) (emonavi[.\w]*)", code + "\n" + texts["emonavi"], re.M)}
    texts |= dict.fromkeys(texts.keys() - reached, "")
    return [f"{module}.{name}" for module, name in used if not re.search(rf"\b{name}\b", texts[module])]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text())], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_python_block_runs(page, tmp_path, monkeypatch, capsys):
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # pages read what is committed
    monkeypatch.chdir(tmp_path)
    space = usual()
    for number, (wanted, code) in enumerate(blocks(page.read_text(encoding="utf-8")), start=1):
        run(code, space, f"{page.name}, block {number}", wanted)
    with contextlib.suppress(AttributeError):  # of a wrapper: no writer may outlive the test
        space["optimizer"].writer = None
    for board in space.get("boards", []):
        board.close()
    if "dist" in space:
        space["dist"].destroy_process_group()


def test_a_block_that_fails_is_seen(monkeypatch):
    page = "```python\nemonavi.EmoNobody(params)\n```\n<!-- not run: slow -->\n```python\nhere\n```\n```python\n2\n```"
    assert [wanted for wanted, _ in blocks(page)] == [True, False, True]
    for wanted in (True, False):
        with pytest.raises(AssertionError, match="EmoNobody"):
            run(blocks(page)[0][1], usual(), "by hand", wanted)
    run(blocks(page)[1][1], usual(), "by hand", wanted=False)
    monkeypatch.setattr("test_docs.find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="register"):  # nothing has imported it
        run("emonavi.integrations.timm.register()\ntimm.optim", usual(), "by hand")
    run("from emonavi.integrations.timm import register\ntimm.optim", usual(), "by hand")
    with pytest.raises(AssertionError, match="unheard"):
        run("emonavi.monitor.unheard()\ntimm.optim", usual(), "by hand")
    with pytest.raises(AssertionError, match="unheard"):
        run("from emonavi.integrations.timm import register, unheard\ntimm.optim", usual(), "by hand")
    with pytest.raises(SyntaxError):
        run("timm.optim = = 1", usual(), "by hand")


# The pictures --------------------------------------------------------------------------------------------------------


def test_the_pictures_are_made_by_their_command(tmp_path):
    for needed in ("matplotlib", "sklearn"):
        pytest.importorskip(needed)
    command = [sys.executable, str(ROOT / "docs" / "pictures.py"), "--steps", "12", "--out", str(tmp_path)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr[-3000:]
    assert {p.name for p in tmp_path.glob("*.png")} == {p.name for p in (ROOT / "docs" / "pictures").glob("*.png")}
    assert re.search(r"AdamW: \d+% and \d+% of the variance, 12 steps", made.stdout)


# The site ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for needed in ("material", "mkdocstrings"):
        pytest.importorskip(needed)
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert built.returncode == 0, built.stderr[-3000:]
    return out


@pytest.mark.parametrize(("page", "language"), [("ja/emotion.html", "ja"), ("emotion.html", "en")])
def test_pages_say_their_language(site, page, language):
    assert f'<html lang="{language}"' in (site / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "ja").glob("*.md")), ids=lambda page: page.name)
def test_no_blank_falls_into_a_japanese_sentence(page):
    """A line that ends within one would be shown with a blank there."""
    kana_or_kanji = "[\u3001\u3041-\u30ff\u4e00-\u9fff]"
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert not re.findall(rf".{{5}}{kana_or_kanji}\n{kana_or_kanji}.{{5}}", prose)


def test_links_lead_somewhere_and_nothing_is_fetched(site):
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 15
    for path, page in pages.items():
        for load in page.loads:
            assert "//" not in load, f"{path.name} loads {load}"
            assert (path.parent / load.split("?")[0]).exists(), f"{path.name} loads {load}"
        for link in (link for link in page.links if "//" not in link):
            target, _, anchor = link.partition("#")
            there = (path.parent / target).resolve() if target else path
            assert there.exists(), f"{path.name} links to {link}"
            if anchor and there in pages and not anchor.startswith("__"):
                assert anchor in pages[there].anchors, f"{path.name} links to {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


# Looks at each page in a frame as wide as a phone, and says how wide it is and what it loaded.
LOOK = """<iframe id="page" style="border: 0; width: 390px; height: 800px"></iframe><script>
const pages = PAGES, found = {}, frame = document.getElementById("page");
const look = async page => {
  await new Promise(done => { frame.onload = done; frame.src = page; });
  const inside = frame.contentWindow;
  await new Promise(done => setTimeout(done, 150));
  found[page] = { wide: inside.document.documentElement.scrollWidth,
    loaded: inside.performance.getEntriesByType("resource").map(entry => entry.name) };
};
(async () => { for (const page of pages) await look(page);
  document.documentElement.dataset.found = JSON.stringify(found); })();
</script>"""


def test_the_site_in_a_browser(site, tmp_path):
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    missing = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form, *words):
            pass

        def send_error(self, code, *words):
            missing.append(self.path)
            super().send_error(code, *words)

    (site / "look.htm").write_text(LOOK.replace("PAGES", json.dumps(pages)))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}/"
        dom = browse(tmp_path, f"{home}look.htm", "--virtual-time-budget=60000")
        server.shutdown()
    found = found_in(dom)
    assert sorted(found) == sorted(pages)
    assert [path for path in missing if "favicon" not in path] == []
    for page, seen in found.items():
        assert seen["wide"] <= 390, f"{page} scrolls sideways: {seen['wide']} pixels"
        assert all(name.startswith((home, "data:", "blob:")) for name in seen["loaded"]), seen["loaded"]


def test_the_search_works_from_a_folder(site, tmp_path):
    dom = browse(tmp_path, f"{(site / 'index.html').as_uri()}?q=hypergradient", "--virtual-time-budget=20000")
    assert 'class="md-search-result__link"' in dom
    assert "emotion.html" in dom[dom.index("md-search-result__list") :]
