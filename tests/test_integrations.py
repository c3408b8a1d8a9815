"""The bridges that need no trainer here: timm's registry, missing packages, and that nothing is imported unasked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

import emonavi.integrations
from emonavi.integrations import readings
from emonavi.integrations.timm import register

PACKAGES = ["transformers", "lightning", "accelerate", "peft", "timm"]


@pytest.mark.parametrize("module", ["emonavi", "emonavi.integrations", "emonavi.integrations.timm"])
def test_nothing_is_imported_unasked(module):
    code = f"import sys, {module}; print([p for p in {PACKAGES} if p in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["transformers", "lightning", "timm"])
def test_a_missing_package_is_named_with_the_remedy(package, monkeypatch):
    for name in (package, "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [n for n in sys.modules if n.startswith((f"{package}.", f"emonavi.integrations.{package}"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ImportError, match=rf'emonavi\.integrations\.{package} needs {package}.*: pip install "{package}'
    ):
        import_module(f"emonavi.integrations.{package}").register()


def test_lightning_under_its_old_name_alone(monkeypatch):
    """A stand-in; the module is loaded under a name of its own, so that no other test gets this one."""
    alone = ModuleType("pytorch_lightning")
    for name in ("Callback", "LightningModule", "Trainer"):
        setattr(alone, name, type(name, (), {}))
    for name in [n for n in sys.modules if n.startswith("lightning.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", alone)
    spec = spec_from_file_location("bridge", Path(emonavi.integrations.__file__).with_name("lightning.py"))
    bridge = module_from_spec(spec)
    spec.loader.exec_module(bridge)
    assert issubclass(bridge.EmotionCallback, alone.Callback)


@dataclass(frozen=True)
class OptimInfo:
    """A stand-in with timm 1.0.31's fields: timm needs torchvision, which brings another torch."""

    name: str
    opt_class: str
    description: str = ""
    has_eps: bool = True
    has_momentum: bool = False
    has_betas: bool = False
    num_betas: int = 2
    second_order: bool = False
    defaults: dict | None = None


class Registry:
    """A stand-in for timm's registry, and for the part of its factory that passes arguments on."""

    def __init__(self):
        self.infos, self.registered = {}, 0

    def register(self, info):
        self.infos[info.name] = info
        self.registered += 1

    def list_optimizers(self):
        return sorted(self.infos)

    def create(self, params, opt, lr=None, weight_decay=0.0, **kwargs):
        info = self.infos[opt.lower().split("_")[-1]]
        module, name = info.opt_class.rsplit(".", 1)
        args = {"weight_decay": weight_decay, **kwargs} | ({} if lr is None else {"lr": lr})
        args |= {"momentum": 0.9} if info.has_momentum else {}
        for key, has in (("eps", info.has_eps), ("betas", info.has_betas)):
            if not has:
                args.pop(key, None)
        return getattr(import_module(module), name)(params, **args)


def check(names, create):
    assert names == emonavi.available()
    for name, cls in (("emonavi", emonavi.EmoNavi), ("emofact", emonavi.EmoFact), ("emolynx", emonavi.EmoLynx)):
        model = torch.nn.Linear(3, 2)
        optimizer = create(model.parameters(), name, lr=1e-2, weight_decay=0.02, betas=(0.8, 0.95), eps=1e-7)
        assert type(optimizer) is cls
        assert [optimizer.defaults[k] for k in ("lr", "betas", "eps")] == [1e-2, (0.8, 0.95), 1e-7]
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        optimizer.step()
        assert optimizer.emotion.loss == pytest.approx(float(loss.detach()))


def test_timms_registry_stood_in_for(monkeypatch):
    registry = Registry()
    for name, attributes in {
        "timm": {}, "timm.optim": {"OptimInfo": OptimInfo},
        "timm.optim._optim_factory": {"default_registry": registry},
    }.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    check(register(), registry.create)
    register()
    assert registry.registered == len(emonavi.available())


def test_timms_own_registry():
    try:
        optim = import_module("timm.optim")
    except ImportError as error:
        pytest.skip(f"timm cannot be imported: {error}")
    check(register(), optim.create_optimizer_v2)
    check(register(), optim.create_optimizer_v2)
    assert {"emonavi", "emofact", "emolynx"} <= set(optim.list_optimizers())


def test_readings_refuse_what_does_not_listen():
    with pytest.raises(TypeError, match="holds no optimizer that listens"):
        readings(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
