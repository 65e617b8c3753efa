"""What ran: versions of this package, of what it computes with, and the commit of a checkout."""

from __future__ import annotations

import platform
from pathlib import Path

COMPUTES_WITH = ("torch", "numpy", "numba", "triton")


def versions() -> dict[str, str]:
    """Versions by name, of what is installed; "commit" only in a checkout, with "+" if it has been changed since."""
    found = {"lnpu-torch": _version("lnpu-torch"), "commit": _commit(Path(__file__).parent.parent)}
    found |= {"python": platform.python_version(), **{name: _version(name) for name in COMPUTES_WITH}}
    return {name: version for name, version in found.items() if version}


def _version(package: str) -> str:
    from importlib import metadata  # here, as in `_git`: a third of the time of `import lnpu_torch`

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit(folder: Path) -> str:
    import subprocess

    if not (folder / ".git").exists():
        return ""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    import subprocess

    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
