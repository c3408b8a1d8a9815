"""The C kernels as a shared library: compiled when first needed, once for each compiler, processor and version.

The library is in a cache of the user (``$XDG_CACHE_HOME/emonavi``, else ``~/.cache/emonavi``). Several processes may
need it at once: each that finds none compiles its own file and renames it atomically. A hash of the content is in the
name, too: code whose file was cut short would kill the process that runs into the hole.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

__all__ = ["library"]

SOURCES = [Path(__file__).with_name(name) for name in ("sweep.c", "rules.h")]
# No -ffast-math: NaN, infinity and the order of sums must stay as in the source. None of these flags changes a value:
# errno is not read, floating-point exceptions are not trapped, and only marked loops are vectorised out of order.
FLAGS = ["-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-pthread", "-shared", "-fPIC"]
TIMEOUT = 120  # seconds; a compilation takes about one


@functools.cache
def library() -> ctypes.CDLL | str:
    """The loaded library, or the reason why there is none."""
    if os.name != "posix":
        return f"the C kernels are not made for {platform.system()}"
    words = shlex.split(os.environ.get("CC", "")) or ["cc"]
    found = shutil.which(words[0])
    if found is None:
        return f"there is no C compiler {words[0]!r}: install one (as gcc or clang), or name it in CC"
    # CC may have a launcher before the compiler (ccache gcc), and options after it, which come last to win over ours.
    end = max(i for i, word in enumerate(words) if i == 0 or not word.startswith("-")) + 1
    command = [found, *words[1:end], *FLAGS, *words[end:]]
    try:
        return _cached(command)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"the C kernels could not be made: {error}"


def _cached(command: list[str]) -> ctypes.CDLL:
    """Load the library from the cache, or compile it; without a usable cache, in a temporary folder."""
    processor = _processor()
    native = ["-march=native"] if processor else []  # only if the name of the file depends on the processor
    compiler = os.stat(command[0])
    key = [*command, *native, compiler.st_size, compiler.st_mtime_ns, platform.machine(), processor]
    digest = _hash(repr(key).encode() + b"".join(s.read_bytes() for s in SOURCES))
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emonavi"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_ours(folder):
            for path in folder.glob(f"sweep-{digest}-*.so"):
                if _is_ours(path) and path.stem.endswith(_hash(path.read_bytes())):
                    with contextlib.suppress(OSError):  # not a library of this system
                        return ctypes.CDLL(str(path))
            return ctypes.CDLL(str(_compile(command, native, folder, f"sweep-{digest}")))
    except (OSError, RuntimeError):  # no home, no space, read-only, not a library
        pass
    with tempfile.TemporaryDirectory() as private:
        return ctypes.CDLL(str(_compile(command, native, Path(private), "sweep")))


def _compile(command: list[str], native: list[str], folder: Path, name: str) -> Path:
    """Compile to a temporary file in ``folder``, then rename it to ``name`` and the hash of its content."""
    with tempfile.TemporaryDirectory(dir=folder) as private:
        made = Path(private) / "made.so"
        for extra in (native, []):
            built = subprocess.run(
                [*command, *extra, "-o", str(made), str(SOURCES[0]), "-lm"],
                capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
            if built.returncode == 0:
                made.chmod(0o700)  # whatever the umask: a file that others can write is not loaded
                with made.open("r+b") as file:
                    path = folder / f"{name}-{_hash(file.read())}.so"
                    os.fsync(file.fileno())  # else a power cut may leave the name without the content
                os.replace(made, path)
                return path
    raise RuntimeError(f"{shlex.join(command)}: {built.stderr.strip()}")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _is_ours(path: Path) -> bool:
    """Whether only this user (or root) can have written it: code is loaded from there."""
    status = path.stat()
    return status.st_uid in (0, os.getuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _processor() -> str:
    """What distinguishes processors with different instructions; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return ""
    told = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.partition("\t")[0].partition(":")[0].strip() in told)
