"""A C++ compiler that compiles nothing twice: what it was given before, with the same options, is copied.

Tests start from empty compile caches, so that Inductor writes the same few C++ files for them again and again.
`install` puts a `g++` on PATH in front of the machine's own; what that makes is kept for the test run. Inductor, and
tests that count what it compiles, see no difference. This file is also its script, which imports next to nothing.
"""

from __future__ import annotations

import os
import sys

COMPILER = "g++"


def install(directory: str) -> None:
    """For this process and all that it starts, until `directory` is deleted."""
    import shutil

    real = shutil.which(COMPILER)
    if real is None:
        return
    os.makedirs(f"{directory}/made")
    os.makedirs(f"{directory}/bin")
    with open(f"{directory}/bin/{COMPILER}", "w") as file:
        file.write(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" "{real}" "{directory}/made" "$@"\n')
    os.chmod(file.name, 0o755)
    os.environ["PATH"] = os.pathsep.join([f"{directory}/bin", os.environ.get("PATH", "")])


def key_of(arguments: list[str]) -> tuple[str, str] | None:
    """What tells a call apart, and the file that it makes; None: not a call that makes one file of one source."""
    import hashlib

    if arguments.count("-o") != 1 or arguments[-1] == "-o":
        return None
    made = arguments[arguments.index("-o") + 1]
    sources = [each for each in arguments if each.endswith((".cpp", ".h")) and each != made]
    if len([each for each in sources if each.endswith(".cpp")]) != 1 or not made.endswith((".so", ".o")):
        return None
    digest = hashlib.sha256()
    for each in arguments:
        if each in sources and os.path.isfile(each):
            with open(each, "rb") as file:
                digest.update(file.read())
        elif each != made:
            digest.update(each.encode())
        digest.update(b"\0")
    return digest.hexdigest(), made


def main(real: str, kept: str, arguments: list[str]) -> int:
    """Compile, or copy; returns the compiler's status."""
    found = key_of(arguments)
    if found is None or not os.path.isdir(kept):
        os.execv(real, [real, *arguments])
    path, made = f"{kept}/{found[0]}", found[1]
    if os.path.exists(path):
        copy(path, made)
        return 0
    status = os.spawnv(os.P_WAIT, real, [real, *arguments])
    if status == 0:
        copy(made, f"{path}.{os.getpid()}")
        os.replace(f"{path}.{os.getpid()}", path)
    return abs(status)


def copy(one: str, other: str) -> None:
    """A new file, which can be run as the first."""
    with open(one, "rb") as source, open(other, "wb") as target:
        target.write(source.read())
    os.chmod(other, os.stat(one).st_mode & 0o777)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
