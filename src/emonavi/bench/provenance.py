"""Where figures come from: the machine, the versions and the state of the sources."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

import emonavi

__all__ = ["hardware", "made_on", "sources", "versions"]


def made_on() -> dict[str, Any]:
    """What every record of figures says of the machine and of what ran on it."""
    return {"hardware": hardware(), "versions": versions()}


def versions() -> dict[str, str]:
    """Versions that the figures depend on."""
    return {"emonavi": emonavi.__version__, "torch": torch.__version__, "python": platform.python_version()}


def sources() -> str:
    """Short hash of the library's own source files, without the benches: tells two states of a version apart."""
    digest = hashlib.sha256()
    folder = Path(emonavi.__file__).parent
    for path in sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix in (".py", ".c", ".h")):
        if path.name != "cli.py" and path.parts[0] != "bench":
            digest.update(path.as_posix().encode() + (folder / path).read_bytes())
    return digest.hexdigest()[:8]


def hardware() -> str:
    """Name the processor; the count is of the cores that this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux leaves platform.processor() empty
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}, {platform.system()}"
