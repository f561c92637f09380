"""Which files of the package does a request enter between the call of `generate()` and its completion, by mode?

A model is generated with once; the files whose functions the second call enters are listed, on all threads. The fewer
there are, the less a reader has to open to follow a request.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from common import report

import hybridgen

PACKAGE = Path(hybridgen.__file__).parent
MODES = ("eager", "jit", "graph", "hybrid")


def entered(engine: hybridgen.Engine, prompt: Any, **fields: Any) -> list[str]:
    """Files that a second `generate()` enters, relative to the package, sorted."""
    engine.generate(prompt, **fields)
    files: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        engine.generate(prompt, **fields)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    paths = (Path(name) for name in files)
    return sorted(str(path.relative_to(PACKAGE)) for path in paths if path.is_relative_to(PACKAGE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager", "hybrid"])
    parser.add_argument("--smoke", action="store_true", help="mode eager alone, for the tests")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found: dict[str, list[str]] = {}
    for mode in ["eager"] if args.smoke else args.modes:
        with hybridgen.Engine.load(None, mode=mode, max_batch=4, max_context=256, compile_cache=False) as engine:
            found[mode] = entered(engine, "def f(", max_new_tokens=8)
        print(f"{mode}: {len(found[mode])} files")
        for name in found[mode]:
            print(f"  {name}")
    report({"counts": {mode: len(names) for mode, names in found.items()}, "files": found}, args.output)


if __name__ == "__main__":
    main()
