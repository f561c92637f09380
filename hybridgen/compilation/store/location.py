"""Where the store is, and what makes a directory private."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hybridgen.compilation.store.files import OTHERS_WRITE, UnusableError, check_owned

ENVIRONMENT = "HYBRIDGEN_CACHE_DIR"
SWITCH = "HYBRIDGEN_COMPILE_CACHE"
"""Set to 0, nothing is kept unless a config names a directory: for tests and measurements."""
_IN_CHECKOUT = "compile_cache"
_IGNORE = "# Everything here is made by running hybridgen.\n*\n!.gitignore\n!README.md\n"
_README = """# Compile cache of this checkout

What `torch.compile`, Triton and hybridgen made for models that ran from this checkout, so that the next process starts
warm. The files are code and pickle: whoever can write here can run code as you. `docs/compile-cache.md` has the rest;
`hybridgen cache list` shows what is here, `hybridgen cache clear` deletes it.
"""


def candidates(configured: bool | str = True) -> list[Path]:
    """Where the store may be, the first usable one counts: a path given, else `$HYBRIDGEN_CACHE_DIR`, else
    `compile_cache/` of the checkout and the user's cache directory."""
    if isinstance(configured, str):
        return [_absolute(configured)]
    named = os.environ.get(ENVIRONMENT)
    if named:
        return [_absolute(named)]
    checkout = _checkout()
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~")) / ".cache"
    return [*([checkout / _IN_CHECKOUT] if checkout is not None else []), base / "hybridgen"]


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _checkout() -> Path | None:
    """The top of the checkout that this module runs from; None where the package is installed."""
    top = Path(__file__).resolve().parents[2]
    try:
        with open(top / "pyproject.toml", encoding="utf-8") as file:
            return top if 'name = "hybridgen"' in file.read() else None
    except (OSError, UnicodeDecodeError):
        return None


def make_private(path: Path) -> None:
    """Make a directory of mode 0700 if there is none, and check it and everything above it.

    Raises:
        UnusableError: it is a link, no directory or another user's; others may write to it or to a directory above it;
            or it cannot be made.
    """
    try:
        _check_above(path)
        if not os.path.lexists(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_above(path)
            path.mkdir(mode=0o700, exist_ok=True)
        if path == (_checkout() or path) / _IN_CHECKOUT:
            _prepare_in_checkout(path)
        check_private(path)
    except OSError as error:
        raise UnusableError(f"{path} cannot be made ({error.strerror})") from error


def _prepare_in_checkout(path: Path) -> None:
    """The directory comes with the checkout, made with the modes of other files there."""
    info = os.lstat(path)
    ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & OTHERS_WRITE
    if ours and stat.S_IMODE(info.st_mode) != 0o700:  # a file system that is read-only refuses to set what is so
        path.chmod(0o700)
    for name, text in ((".gitignore", _IGNORE), ("README.md", _README)):
        if not (path / name).exists():
            (path / name).write_text(text)


def check_private(path: Path) -> None:
    """Raise unless it is a directory of ours that nobody else can write to or read.

    Raises:
        UnusableError: it is not.
    """
    info = os.lstat(path)
    if stat.S_ISLNK(info.st_mode):
        raise UnusableError(f"{path} is a symbolic link; name the directory itself")
    if not stat.S_ISDIR(info.st_mode):
        raise UnusableError(f"{path} is not a directory")
    check_owned(info, str(path))
    if info.st_mode & 0o077:
        raise UnusableError(f"{path} is open to others (mode {stat.S_IMODE(info.st_mode):o}); chmod 700 {path}")


def _check_above(path: Path) -> None:
    """Raise if anybody but us and root could replace the directory by renaming one above it."""
    for parent in Path(os.path.realpath(path.parent)).joinpath("x").parents:
        try:
            info = os.stat(parent)
        except FileNotFoundError:
            continue
        if info.st_uid not in (0, os.getuid()):
            raise UnusableError(f"{parent}, above {path}, belongs to user {info.st_uid}")
        # In a sticky directory such as /tmp others cannot rename what is ours.
        if info.st_mode & OTHERS_WRITE and not info.st_mode & stat.S_ISVTX:
            raise UnusableError(
                f"{parent}, above {path}, can be written by others (mode {stat.S_IMODE(info.st_mode):o}); "
                f"chmod go-w {parent}, or set {ENVIRONMENT} to a directory elsewhere"
            )
