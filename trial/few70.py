"""int4 of one row with the sizes of a 70B: other cuts of the kernel for few rows.

    python trial/few70.py OUTPUT.json
"""

import builtins
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, "benchmarks")
import quantised as q
import torch

from hybridgen.kernels.linear import int4_few
from hybridgen.kernels.linear import quantised_few_kernels as few

Form = int4_few.Form

SHAPES = [q.Shape("qkv", 10240, 8192), q.Shape("gate_up", 57344, 8192), q.Shape("down", 8192, 28672)]
TILES = [
    few.FewTile(8, 2, 1, 128), few.FewTile(4, 4, 1, 168), few.FewTile(16, 1, 1, 64), few.FewTile(8, 1, 1, 96),
    Form(8, 3, 5), Form(8, 2, 6), Form(8, 2, 4), Form(4, 6, 5), Form(4, 4, 6), Form(16, 1, 6),
]
results = []
with torch.no_grad():
    for inputs, rows, form, outputs in ((4096, 1, "int4", 1000), (4096, 3, "int4 symmetric", 520), (14336, 8, "int4", 520), (2176, 5, "int4", 96)):
        weight = q.weight_of(form, q.Shape("check", outputs, inputs), "cuda", torch.bfloat16)
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        bias = torch.randn(outputs, device="cuda").bfloat16()
        wanted = x.double() @ weight.dequantise(torch.float32).double().T + bias.double()
        poison = [torch.full((rows, outputs), torch.nan, device="cuda") for _ in range(8)]
        del poison
        out = int4_few.product(x, weight.data, weight.scales, weight.zeros, bias, 128)
        error = float((out.double() - wanted).norm() / wanted.norm())
        other = sum(not torch.equal(out, int4_few.product(x, weight.data, weight.scales, weight.zeros, bias, 128)) for _ in range(300))
        print(f"few70: check {form} {outputs} x {inputs}, {rows} rows: error {error:.2e}, {other} of 300 repeats differ", flush=True)
    made = {}
    for shape in SHAPES:
        first = q.weight_of("int4", q.Shape(shape.name, 512, shape.inputs), "cuda", torch.bfloat16)
        data = torch.randint(-(2**31), 2**31, (shape.outputs, shape.inputs // 8), dtype=torch.int32, device="cuda")
        scales = torch.full((shape.outputs, shape.inputs // 128), 0.002, dtype=torch.bfloat16, device="cuda")
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8, device="cuda")
        x = torch.randn(1, shape.inputs, device="cuda").bfloat16()
        copies = [(data, scales, zeros), (data.clone(), scales.clone(), zeros.clone())]
        made[shape.name] = x, copies * (1 if shape.outputs > 30000 else 2)
    calls = [(shape, tile) for shape in SHAPES for tile in TILES]

    def call(pair, number=0):
        shape, tile = pair
        x, copies = made[shape.name]
        if isinstance(tile, Form):
            return int4_few.product(x, *copies[number], None, 128, form=tile)
        return few.few_product(x, *copies[number], None, 128, tile)

    def compiled(pair):
        try:
            call(pair)
        except Exception as error:
            return type(error).__name__
        return None

    for tile in TILES:
        if isinstance(tile, Form):
            int4_few._kernel(tile, 0)
    with ThreadPoolExecutor(8) as pool:
        problems = dict(zip(calls, pool.map(compiled, calls), strict=True))
    getattr(builtins, "take_turn", lambda: None)()
    for shape in SHAPES:
        wanted = call((shape, TILES[0])).double()
        found = []
        for tile in TILES:
            pair = shape, tile
            if problems[pair]:
                print("few70:", shape.name, tuple(tile), problems[pair], flush=True)
                continue
            apart = float((call(pair).double() - wanted).norm() / wanted.norm())
            count = len(made[shape.name][1])
            took = q.times([lambda n=n, pair=pair: call(pair, n) for n in range(count)], "cuda") * 1e6
            found.append((round(took, 2), type(tile).__name__ + str(tuple(tile)), apart))
        found.sort()
        size = sum(t.nbytes for t in made[shape.name][1][0])
        results.append({"shape": shape.name, "bytes": size, "times": found})
        Path(sys.argv[1]).write_text(json.dumps(results))
        print(f"few70: {shape.name}, {size / 4.36e6:.1f} us at the ceiling: " + "; ".join(f"{t} {k}" for t, k, _ in found), flush=True)
        print("       apart at most", max(a for _, _, a in found), flush=True)
