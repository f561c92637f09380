"""int4 of 64 rows: the kernel with wgmma beside the one in Triton; checks, repeats, times.

    python trial/int4.py OUTPUT.json
"""

import builtins
import ctypes
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, "benchmarks")
import json

import quantised as q
import torch

from hybridgen.device.launcher import Launcher, device_of
from hybridgen.fused.persistent.program import Kernel, Program, machine_code
from hybridgen.kernels.linear import quantised_kernels as old
from hybridgen.kernels.linear.int4_rows_kernels import rows_image_kernel

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


class Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias", "x", "out")]
    _fields_ += [(name, ctypes.c_int) for name in ("rows", "outputs", "inputs", "columns", "group_steps", "splits")]


PROGRAM = Program(("hybridgen.kernels.linear",), "int4_rows.cu", (), "int4_rows")
SHARED = 6 * 2 * 16384
device = torch.device("cuda")
torch.cuda.init()
torch.zeros(1, device=device)
kernel = Kernel(machine_code({"PATIENCE": "100000000u"}, (9, 0), program=PROGRAM), SHARED, PROGRAM)
print(f"int4: compiled after {time.time() - begin:.1f} s, {kernel.attribute('NUM_REGS')} registers, "
      f"{kernel.attribute('LOCAL_SIZE_BYTES')} bytes of local memory", flush=True)
images = {}


def new(weight, x, splits, bias=None, adds=True):
    rows, inputs = x.shape
    outputs = weight.data.shape[0]
    if inputs not in images:
        images[inputs] = Launcher(rows_image_kernel, {"INPUTS": inputs, "OVERLAP": True, "num_warps": 4, "launch_pdl": True})
    image = torch.empty(64 * inputs // 2, dtype=torch.int32, device=device)
    images[inputs]((inputs // 128, 4, 1), (x.view(torch.int32), image, rows))
    out = torch.empty(rows, outputs, dtype=x.dtype, device=device)
    parts = out if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=device)
    a = Arguments(
        weight.data.data_ptr(), weight.scales.data_ptr(), 0 if weight.zeros is None else weight.zeros.data_ptr(),
        0 if bias is None else bias.data_ptr(), image.data_ptr(), parts.data_ptr(), rows, outputs, inputs,
        weight.scales.shape[1], max(1, weight.block.inputs // 128), splits,
    )
    blocks = -(-outputs // 256) * splits
    kernel.launch_early(blocks, 512, a, torch.cuda.current_stream().cuda_stream)
    if splits > 1:
        count = rows * outputs
        add = old._adder(splits, bias is not None, x.dtype, outputs, device_of(x))
        add((-(-count // 1024), 1, 1), (parts, x if bias is None else bias, out, count, outputs))
    return out


SPLITS = {"qkv": (5, 4), "out": (8, 4), "gate_up": (1,), "down": (8, 7)}
results = []
output = Path(sys.argv[1])
torch.manual_seed(0)
with torch.no_grad():
    made = {}
    good = True
    cases = [(q.Shape("odd", 1000, 4096), "int4", 37, (1, 3)), (q.Shape("small", 512, 256), "int4 symmetric", 64, (1, 2))]
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
    for shape in q.SHAPES:
        x = torch.randn(64, shape.inputs, device=device).bfloat16()
        weights = weights_of[shape.name]
        before = q.times([lambda w=w: q.product(w, x) for w in weights], "cuda") * 1e6
        row = {"shape": shape.name, "before_us": before, "us": {}}
        for splits in SPLITS[shape.name]:
            row["us"][splits] = q.times([lambda w=w, s=splits: new(w, x, s) for w in weights], "cuda") * 1e6
        results.append(row)
        output.write_text(json.dumps(results))
        total[0] += before
        total[1] += min(row["us"].values())
        print(f"int4: {shape.name}: {before:.1f} us before, now " + ", ".join(f"{s} splits {t:.1f}" for s, t in row["us"].items()), flush=True)
    print(f"int4: all four {total[0]:.1f} us before, {total[1]:.1f} now; ends after {time.time() - begin:.1f} s", flush=True)
