"""Compiles the kernels of farm/layers/cpu for this machine, once: kept under the user's cache until they change."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "cpu"
# OpenMP's functions are left open in the library: they are found in torch, whose threads it shares.
COMPILE = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-Wno-psabi")
BUILD_S = 300


def compiled() -> Path:
    """The compiled library, from the user's cache where this machine has compiled the same source before.

    Raises OSError where there is no compiler, subprocess.SubprocessError where it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found")
    folder = _cache()
    path = folder / f"kernels-{_key(compiler)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            unlinked, library = Path(work, "kernels.o"), Path(work, "kernels.so")
            for command in (
                [compiler, *COMPILE, "-c", str(SOURCE / "kernels.cpp"), "-o", str(unlinked)],
                [compiler, "-shared", str(unlinked), "-o", str(library)],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_S)
            library.replace(path)
    return path


def _cache() -> Path:
    """A folder that only this user writes; of this process alone where there is no home to write to."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "farm")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: nobody knows a home
        pass
    return Path(tempfile.mkdtemp(prefix="farm-kernels-"))


def _key(compiler: str) -> str:
    """Of all that the machine code depends on: the source, how it is compiled and for which processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    processor = sorted(
        {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    )
    sources = [path.read_text() for path in sorted(SOURCE.iterdir())]
    parts = (*sources, compiler, *COMPILE, platform.machine(), *processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
