"""MXFP4 experts of gpt-oss-20b for one and eight tokens: turns.

    python trial/experts.py OUTPUT.json
"""

import builtins
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, "benchmarks")
import experts as e
import torch

from hybridgen.kernels.linear.experts_few import FewTile as T
from hybridgen.kernels.linear.experts_launch import experts_on_cuda

USUAL = T(4, 1)
GATES = [
    T(4, 1, 0, 1, True), T(4, 1, 168, 4), T(4, 1, 168, 4, True), T(4, 1, 168, 2), T(4, 1, 168, 3), T(8, 1, 128, 6),
    T(8, 1, 128, 6, True), T(8, 1, 128, 3), T(8, 1, 64, 1), T(8, 1, 64, 1, True), T(4, 1, 0, 4), T(4, 1, 0, 6),
    T(8, 1, 128, 2), T(4, 1, 80, 1),
]
DOWNS = [T(4, 1, 168, 2), T(8, 1, 128, 3), T(8, 1, 64, 1), T(4, 1, 128, 1), T(4, 1, 80, 1), T(4, 1, 168, 4), T(8, 1, 128, 2)]
PAIRS = [(USUAL, USUAL)] + [(g, USUAL) for g in GATES] + [(USUAL, d) for d in DOWNS]
PAIRS += [(T(4, 1, 168, 4), T(4, 1, 168, 2)), (T(4, 1, 168, 4, True), T(4, 1, 168, 2)), (T(8, 1, 128, 6, True), T(8, 1, 128, 3))]
shape = next(one for one in e.SHAPES if one.kind == "mxfp4")
results = []
with torch.no_grad():
    copies = [e.random_weights(shape, torch.bfloat16, "cuda", seed) for seed in range(2)]
    givens = {rows: [e.routed(shape, rows, torch.bfloat16, "cuda", 1000 * rows + n) for n in range(e.CALLS)] for rows in (1, 8)}

    def call(pair, rows, number):
        return experts_on_cuda(*givens[rows][number], *copies[number % 2].flat(), few_tiles=pair)

    def compiled(pair):
        try:
            call(pair, 1, 0)
            call(pair, 8, 0)
        except Exception as error:
            return type(error).__name__ + str(error)[:80]
        return None

    with ThreadPoolExecutor(8) as pool:
        problems = dict(zip(PAIRS, pool.map(compiled, PAIRS), strict=True))
    getattr(builtins, "take_turn", lambda: None)()
    for rows in (1, 8):
        found = []
        wanted = call(PAIRS[0], rows, 0).float()
        for pair in PAIRS:
            name = " ".join(str(tuple(map(int, tile))) for tile in pair)
            if problems[pair]:
                print("experts:", name, problems[pair], flush=True)
                continue
            e.poisoned(shape, rows, torch.bfloat16, "cuda")
            apart = float((call(pair, rows, 0).float() - wanted).norm() / wanted.norm())
            took = e.seconds([partial(call, pair, rows, n) for n in range(e.CALLS)], "cuda") * 1e6
            found.append((round(took, 2), name, apart))
        results.append({"rows": rows, "times": found})
        Path(sys.argv[1]).write_text(json.dumps(results))
        print(f"experts: {rows} tokens, usual {found[0][0]} us; apart at most {max(a for _, _, a in found):.1e}", flush=True)
        for took, name, _ in sorted(found):
            print(f"experts: {rows} tokens {took:7.2f} us {name}", flush=True)
