"""Compiles loops by Numba, and keeps the result on disk."""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import pickle
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import njit
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps

LOG = logging.getLogger("lnpu_torch")
ROOT = Path(__file__).parents[__name__.count(".")]
"""The folder that the package lies in."""
PACKAGE, INIT = f"{__name__.split('.')[0]}.", "__init__.py"
DIGEST = hashlib.sha256().digest_size


def compiled(function: Any, **options: Any) -> Any:
    """Compile at the first call, without the interpreter's lock; keep the result on disk where that can be written."""
    dispatcher = njit(nogil=True, **options)(function)
    dispatcher._cache = _Cache(function)
    return dispatcher


def inlined(function: Any) -> Any:
    """The same, put wherever it is called before anything is compiled: so it is compiled once, with its caller."""
    return compiled(function, inline="always")


class _Cache:
    """Numba's cache of a function, in the folder that Numba chooses, but in files of our own.

    Numba holds code for fresh while the file that the function stands in is unchanged, whatever other modules it puts
    into the code.
    """

    def __init__(self, function: Any) -> None:
        self.cache_path: str | None = None
        self._numba: Any = NullCache()
        try:
            self._numba = FunctionCache(function)
        except RuntimeError:  # no folder can be written
            return
        self.cache_path = self._numba.cache_path
        name = os.path.join(self._numba.cache_path, self._numba._impl.filename_base)
        self._numba._cache_file = _Files(name, sources(Path(function.__code__.co_filename)))

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code for a signature; None if it is to be compiled."""
        found = self._numba.load_overload(sig, target_context)
        if found is None:
            _announce(_shown(self.cache_path))
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code for a signature, where that is possible."""
        try:
            self._numba.save_overload(sig, data)
        except OSError as error:
            LOG.warning("lnpu_torch: compiled loops cannot be kept, set NUMBA_CACHE_DIR to another folder: %s", error)
            self._numba = NullCache()


class _Files:
    """The compiled code of a function: a file for each signature, of two digests and a pickle.

    The first digest is of the rest of the file, the second of the sources and of what the code was compiled for.
    """

    def __init__(self, name: str, sources: bytes) -> None:
        self._name, self._sources = name, sources

    def _place(self, key: Any) -> tuple[Path, bytes]:
        """The file of a signature, and the second digest of a fresh one."""
        target = repr(key).encode()
        versions = f"{numba.__version__} {llvmlite.__version__} ".encode()
        path = Path(f"{self._name}.{hashlib.sha256(target).hexdigest()[:16]}.nbc")
        return path, hashlib.sha256(self._sources + versions + target).digest()

    def load(self, key: Any) -> Any:
        """The code; None if there is no file, or one that is out of date or damaged."""
        path, stamp = self._place(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        digest, rest = content[:DIGEST], content[DIGEST:]
        if digest != hashlib.sha256(rest).digest():
            LOG.warning("lnpu_torch: %s is damaged, and is compiled anew", path)
            return None
        return pickle.loads(rest[DIGEST:]) if rest.startswith(stamp) else None

    def save(self, key: Any, data: Any) -> None:
        """Put the code into its file, whole or not at all."""
        path, stamp = self._place(key)
        rest = stamp + dumps(data)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            unfinished.write_bytes(hashlib.sha256(rest).digest() + rest)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _shown(folder: str | None) -> str | None:
    """A folder for compiled code as a user is told of it: the package, if it is one of those beside its modules."""
    package = str(ROOT / PACKAGE.rstrip("."))
    return package if folder is not None and folder.startswith(package) else folder


@cache
def _announce(folder: str | None) -> None:
    """Say that code is compiled, once in a process: the first step of a training seems to hang then."""
    if folder is None:
        kept = "in every process, as no folder for the result can be written: set NUMBA_CACHE_DIR to one"
    else:
        kept = f"once per installation; kept in {folder}"
    LOG.warning("lnpu_torch: compiling loops for the CPU (up to a minute), %s", kept)


def sources(file: Path) -> bytes:
    """A digest of a source file and of all of the package that it imports, directly or not."""
    found: dict[Path, bytes] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found[path], imported = _source(path, path.stat().st_mtime_ns)
            waiting += imported
    return hashlib.sha256(b"".join(found[path] for path in sorted(found))).digest()


@cache
def _source(path: Path, _: int) -> tuple[bytes, list[Path]]:
    """A digest of one source file of that time, and the files that its imports may mean."""
    text = path.read_bytes()
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.parent.relative_to(ROOT).parts) if node.level else None
            module = resolve_name("." * node.level + (node.module or ""), package)
            names += [module, *(f"{module}.{name.name}" for name in node.names)]
    own = [ROOT.joinpath(*name.split(".")) for name in names if name.startswith(PACKAGE)]
    return hashlib.sha256(text).digest(), [file for place in own for file in (place.with_suffix(".py"), place / INIT)]
