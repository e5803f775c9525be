"""Where a result comes from: the commit, the library versions, the machine. Never imports torch."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REPORTED_PACKAGES = ("farm", "torch", "transformers", "ray", "deepspeed", "datasets", "safetensors")


def git_sha(folder: Path | None = None) -> str | None:
    """Commit of the checkout that holds `folder` (default: this file's), with "+" if it has local changes.

    None outside a checkout, without git, and where the checkout around it does not know its files: an environment that
    the package is installed in may lie in a project of somebody's own.
    """
    folder = folder or Path(__file__).resolve().parent
    try:
        if not _git(folder, "ls-files", "."):
            return None
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        return _git(folder, "rev-parse", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def versions() -> dict[str, str]:
    """Python and the installed versions of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str | int | float]:
    """Processor, cores this process may use, memory in GiB; once torch is loaded the vectors and GPUs that it sees."""
    found: dict[str, str | int | float] = {
        "cpu": _cpu_name(),
        "cores": _usable_cores(),
        "platform": platform.platform(),
    }
    if hasattr(os, "sysconf"):
        total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found["memory_gib"] = round(total_bytes / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None:  # processors of one name can have vectors of another width
        found["vectors"] = torch.backends.cpu.get_cpu_capability()
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return found


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
