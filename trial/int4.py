"""int4 of 64 rows: the kernel with wgmma beside the one in Triton; checks, repeats, times.

    python trial/int4.py OUTPUT.json
"""

import builtins
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, "benchmarks")
import json

import quantised as q
import torch

from hybridgen.kernels.linear import int4_rows_kernels as new_kernels

begin = time.time()
checking = True


def watch():
    time.sleep(float(os.environ.get("LIMIT", "60")))
    if checking:
        print("int4: gave up", flush=True)
        place = os.environ.get("TURN_FILE")
        if place:
            Path(place).touch()
        os._exit(1)


threading.Thread(target=watch, daemon=True).start()


plain = new_kernels.machine_code
new_kernels.machine_code = lambda defines, *rest: plain({**defines, "PATIENCE": "20000000u"}, *rest)
new_kernels.IS_ON = False  # `q.product` is the one before
device = torch.device("cuda")
torch.zeros(1, device=device)
kernel = new_kernels._kernel(new_kernels.MANY, 0)
new_kernels._kernel(new_kernels.FEW, 0)
print(
    f"int4: compiled after {time.time() - begin:.1f} s, {kernel.attribute('NUM_REGS')} registers, "
    f"{kernel.attribute('LOCAL_SIZE_BYTES')} bytes of local memory",
    flush=True,
)


def new(weight, x, splits, bias=None):
    return new_kernels.product(x, weight.data, weight.scales, weight.zeros, bias, weight.block.inputs, splits)


SPLITS = {"qkv": (5, 4), "out": (8, 4), "gate_up": (1,), "down": (8, 7)}
results = []
output = Path(sys.argv[1])
torch.manual_seed(0)
with torch.no_grad():
    made = {}
    good = True
    cases = [(q.Shape("odd", 1000, 4096), "int4", 37, (1, 3)), (q.Shape("small", 512, 256), "int4 symmetric", 64, (1, 2))]
    cases += [(q.Shape("few", 1000, 4096), "int4", 3, (1, 3)), (q.Shape("few", 512, 1024), "int4 symmetric", 8, (1, 2))]
    cases += [(q.SHAPES[0], "int4", 1, (0,))]
    cases += [(s, "int4", 64, SPLITS[s.name]) for s in q.SHAPES]
    for shape, form, rows, all_splits in cases:
        weight = made[shape.name] = q.weight_of(form, shape, "cuda", torch.bfloat16)
        x = torch.randn(rows, shape.inputs, device=device).bfloat16()
        wanted = x.double() @ weight.dequantise(torch.float32).double().T
        bias = torch.randn(shape.outputs, device=device).bfloat16() if rows != 64 else None
        if bias is not None:
            wanted += bias.double()
        for splits in all_splits:
            poison = [torch.full((8, rows, shape.outputs), torch.nan, device=device) for _ in range(2)]
            del poison
            out = new(weight, x, splits, bias)
            torch.cuda.synchronize()
            error = float((out.double() - wanted).norm() / wanted.norm())
            worst = float((out.double() - wanted).abs().max() / wanted.abs().max())
            other = sum(not torch.equal(out, new(weight, x, splits, bias)) for _ in range(300))
            good &= error < 6e-3 and other == 0
            print(f"int4: {shape.name} {form} {rows} rows {splits} splits: error {error:.2e}, worst {worst:.2e}, "
                  f"{other} of 300 repeats differ", flush=True)
            results.append({"shape": shape.name, "format": form, "rows": rows, "splits": splits, "error": error, "worst": worst, "other": other})
            output.write_text(json.dumps(results))
    checking = False
    print(f"int4: checks end after {time.time() - begin:.1f} s, {'good' if good else 'BAD'}", flush=True)
    weights_of = {}
    for shape in q.SHAPES:
        weight = made[shape.name]
        weights_of[shape.name] = [q.copy(weight) for _ in range(q.copies_of(list(weight.tensors().values()), "cuda"))]
    getattr(builtins, "take_turn", lambda: None)()
    total = [0.0, 0.0]
    for rows, shape in [(rows, shape) for rows in (64, 32, 16, 8, 1) for shape in q.SHAPES]:
        x = torch.randn(rows, shape.inputs, device=device).bfloat16()
        weights = weights_of[shape.name]
        before = q.times([lambda w=w: q.product(w, x) for w in weights], "cuda") * 1e6
        row = {"shape": shape.name, "rows": rows, "before_us": before, "us": {}}
        for splits in SPLITS[shape.name][: 9 if rows == 64 else 1] if rows > 8 else (0,):
            row["us"][splits] = q.times([lambda w=w, s=splits: new(w, x, s) for w in weights], "cuda") * 1e6
        results.append(row)
        output.write_text(json.dumps(results))
        if rows == 64:
            total[0] += before
            total[1] += min(row["us"].values())
        print(f"int4: {shape.name} {rows} rows: {before:.1f} us before, now " + ", ".join(f"{s} splits {t:.1f}" for s, t in row["us"].items()), flush=True)
    print(f"int4: all four {total[0]:.1f} us before, {total[1]:.1f} now; ends after {time.time() - begin:.1f} s", flush=True)
