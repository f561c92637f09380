"""Runs a benchmark's main() with others beside it: starts together, measures in turns.

    python trial/turn.py NAME ALL,THE,NAMES SCRIPT ARGUMENTS...
"""

import fcntl
import os
import runpy
import sys
import time
from pathlib import Path

name, names, script, *arguments = sys.argv[1:]
PLACE = Path(os.environ.get("TURNS", "/tmp/t/turns"))
PLACE.mkdir(parents=True, exist_ok=True)
DEADLINE = float(os.environ["TURNS_UNTIL"])
held = None


def take_turn():
    global held
    if held is not None:
        return
    (PLACE / name).touch()
    begin = time.time()
    while time.time() < DEADLINE and not all((PLACE / one).exists() for one in names.split(",")):
        time.sleep(0.05)
    time.sleep(0.4 * names.split(",").index(name))
    held = open(PLACE / "lock", "w")
    fcntl.flock(held, fcntl.LOCK_EX)
    import threading

    def watch():
        time.sleep(30)
        print(f"turn: {name} takes too long", flush=True)
        os._exit(1)

    if not name.startswith("load"):
        threading.Thread(target=watch, daemon=True).start()
    print(f"turn: {name} waited {time.time() - begin:.1f} s", flush=True)


sys.path.insert(0, str(Path(script).parent))
sys.argv = [script, *arguments]
import hybridgen  # noqa: E402

import builtins  # noqa: E402

if os.environ.get("TRIAL") == "int4":
    from hybridgen.kernels.linear import int4_few

    int4_few.IS_ON = True
if os.environ.get("TRIAL") == "turns":
    from hybridgen.kernels.linear import experts_few, experts_launch

    tiles = experts_few.FewTile(4, 1, 168, 4, True), experts_few.FewTile(4, 1, 168, 2, True)
    products = experts_few.few_products
    experts_launch.few_products = lambda *args: products(*args[:8], tiles)
if os.environ.get("TRIAL") == "one":
    from hybridgen.kernels.linear import experts_one

    experts_one.IS_ON = True
builtins.take_turn = take_turn
os.environ["TURN_FILE"] = str(PLACE / name)
if name.startswith("kernel"):
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        (PLACE / name).touch()
elif name.startswith("load"):
    import quantised_loading

    own = quantised_loading.read_seconds

    def read_seconds(*args):
        take_turn()
        return own(*args)

    quantised_loading.read_seconds = read_seconds
    try:
        quantised_loading.main()
    finally:
        (PLACE / name).touch()
else:
    plain = hybridgen.Engine.generate

    def generate(self, *args, **kwargs):
        take_turn()
        return plain(self, *args, **kwargs)

    hybridgen.Engine.generate = generate
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        (PLACE / name).touch()
