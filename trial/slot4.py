"""Fourth slot: all start at once, with tests beside them; they measure in turns while the tests stand still.

    python trial/slot4.py SECONDS
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
turns = Path(os.environ.setdefault("TURNS", "/tmp/t/turns4"))
turns.mkdir(exist_ok=True)
OSS = "step_kernels.py --models gpt-oss-20b-mxfp4 --rows 1 --output /tmp/t/"
STEPS = "quantised.py --steps --models llama-3.1-8b:64 --no-prefill --kinds "
LARGE = "quantised.py --steps --models llama-3.1-70b:1 --kinds int4 --no-prefill --output /tmp/t/q70few.json"
JOBS = {
    "int4": (STEPS + "int4 --output /tmp/t/steps-int4.json", {}),
    "kernelone": ("../trial/one.py /tmp/t/one.json", {"LIMIT": "90"}),
    "ossone": (OSS + "ossone.json", {"TRIAL": "one"}),
    "oss8": (OSS.replace("--rows 1", "--rows 8 --layers 8") + "oss8.json", {}),
    "oss8turns": (OSS.replace("--rows 1", "--rows 8 --layers 8") + "oss8turns.json", {"TRIAL": "turns"}),
    "kernelfew70": ("../trial/few70.py /tmp/t/few70.json", {}),
    "70bfew": (LARGE, {"TRIAL": "int4"}),
}
if smoke:
    JOBS = {"oss": ("step_kernels.py --smoke", {"TRIAL": "turns"})}
NAMES = ",".join([*JOBS, "tests"])
until = begin + 80
procs = {}
for name, (command, env) in JOBS.items():
    log = (out / f"log.{name}").open("w")
    full = {**os.environ, **env, "TURNS_UNTIL": str(until), "TORCHINDUCTOR_CACHE_DIR": f"/tmp/t/ind.{name}"}
    full |= {"TRITON_CACHE_DIR": f"/tmp/t/tri.{name}", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    script, *arguments = command.split()
    argv = [sys.executable, "trial/turn.py", name, NAMES, f"benchmarks/{script}", *arguments]
    procs[name] = subprocess.Popen(argv, env=full, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
tests = ["nice", sys.executable, "-m", "pytest", "-m", "gpu", "-n", "4", "-q", "-p", "no:cacheprovider", "-v", "-W", "ignore"]
tests += ["tests/gpu/test_quantised_kernels.py", "tests/gpu/test_experts_cuda.py"]
test_log = out / "log.tests"
with test_log.open("w") as log:
    tester = subprocess.Popen(tests, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def show(name):
    lines = [line for line in (out / f"log.{name}").read_text().splitlines() if not line.startswith('{"prov')]
    print(f"--- {name}, {time.time() - begin:.0f} s, rc {procs[name].poll()}", flush=True)
    print("\n".join(line[:240] for line in lines[:60]), flush=True)


left = dict(procs)
stopped = False
while left and time.time() - begin < seconds:
    time.sleep(0.2)
    if not stopped and (all((turns / one).exists() for one in JOBS) or time.time() > until - 1):
        if tester.poll() is None:
            os.killpg(tester.pid, signal.SIGSTOP)
        time.sleep(0.5)
        (turns / "tests").touch()
        stopped = True
        print(f"turns begin after {time.time() - begin:.0f} s", flush=True)
    for name in [name for name, proc in left.items() if proc.poll() is not None]:
        left.pop(name)
        show(name)
for name, proc in left.items():
    os.killpg(proc.pid, signal.SIGKILL)
    show(name)
if tester.poll() is None:
    os.killpg(tester.pid, signal.SIGCONT)
    try:
        tester.wait(max(1.0, seconds - (time.time() - begin)))
    except subprocess.TimeoutExpired:
        os.killpg(tester.pid, signal.SIGKILL)
text = test_log.read_text()
print("tests: passed", text.count(" PASSED "), "failed", text.count(" FAILED "), flush=True)
print("\n".join([line[:200] for line in text.splitlines() if "FAILED" in line or line.startswith("E  ")][:40]))
print("\n".join(text.splitlines()[-2:])[-400:], flush=True)
print(f"slot ends after {time.time() - begin:.0f} s")
