"""First slot: starts all at once, they measure in turns; then tests for what is left of the time.

    python trial/slot1.py SECONDS
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

begin = time.time()
seconds = float(sys.argv[1])
smoke = "smoke" in sys.argv
out = Path("/tmp/t")
out.mkdir(exist_ok=True)
PDL = {"TORCHINDUCTOR_ENABLE_PDL": "1"}
JOBS = {
    "kernel": ("../trial/int4.py /tmp/t/rows.json", {}),
    "70b": ("quantised.py --steps --models llama-3.1-70b:1 --kinds int4 --no-prefill --output /tmp/t/q70.json", {}),
    "oss": ("step_kernels.py --models gpt-oss-20b-mxfp4 --rows 1 --output /tmp/t/oss.json", {}),
    "osspdl": ("step_kernels.py --models gpt-oss-20b-mxfp4 --rows 1 --output /tmp/t/osspdl.json", PDL),
    "int4": ("step_kernels.py --models llama-3.1-8b-int4 --rows 64 --output /tmp/t/int4.json", {}),
    "int4pdl": ("step_kernels.py --models llama-3.1-8b-int4 --rows 64 --output /tmp/t/int4pdl.json", PDL),
    "loadint4": ("quantised_loading.py int4 --directory /tmp/t/ck1 --output /tmp/t/load-int4.json", {}),
    "loadw4": ("quantised_loading.py w4a16 --directory /tmp/t/ck2 --output /tmp/t/load-w4a16.json", {}),
}
if smoke:
    JOBS = {
        "70b": ("quantised.py --steps --smoke --kinds int4 --no-prefill", {}),
        "oss": ("step_kernels.py --smoke", {}),
        "osspdl": ("step_kernels.py --smoke", PDL),
        "loadint4": ("quantised_loading.py int4 --smoke", {}),
        "loadw4": ("quantised_loading.py w4a16 --smoke", {}),
    }
NAMES = ",".join(JOBS)
procs = {}
for name, (command, env) in JOBS.items():
    log = (out / f"log.{name}").open("w")
    full = {**os.environ, **env, "TURNS_UNTIL": str(begin + 75), "TORCHINDUCTOR_CACHE_DIR": f"/tmp/t/ind.{name}"}
    full |= {"TRITON_CACHE_DIR": f"/tmp/t/tri.{name}", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    script, *arguments = command.split()
    argv = [sys.executable, "trial/turn.py", name, NAMES, f"benchmarks/{script}", *arguments]
    procs[name] = subprocess.Popen(argv, env=full, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def show(name):
    lines = [line for line in (out / f"log.{name}").read_text().splitlines() if not line.startswith('{"prov')]
    print(f"--- {name}, {time.time() - begin:.0f} s, rc {procs[name].poll()}", flush=True)
    print("\n".join(line[:220] for line in lines[:42]), flush=True)


left = dict(procs)
while left and time.time() - begin < seconds:
    time.sleep(0.2)
    for name in [name for name, proc in left.items() if proc.poll() is not None]:
        left.pop(name)
        show(name)
for name, proc in left.items():
    os.killpg(proc.pid, signal.SIGKILL)
    show(name)
remaining = seconds - (time.time() - begin) - 2
if remaining > 12:
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "8", "-q", "-p", "no:cacheprovider", "-v"]
    tests += ["tests/gpu/test_quantised_kernels.py", "tests/gpu/test_experts_cuda.py"]
    log = (out / "log.tests").open("w")
    proc = subprocess.Popen(tests, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        proc.wait(remaining)
    except subprocess.TimeoutExpired:
        os.killpg(proc.pid, signal.SIGKILL)
    text = (out / "log.tests").read_text()
    print("tests: passed", text.count(" PASSED "), "failed", text.count(" FAILED "), flush=True)
    print("\n".join([line for line in text.splitlines() if "FAILED" in line or line.startswith("E  ")][:30]))
    print("\n".join(text.splitlines()[-3:]), flush=True)
print(f"slot ends after {time.time() - begin:.0f} s")
