"""Grammars that may take without end are read in a process of their own first.

llguidance limits most of what reading a grammar takes, and not all: expressions that are intersected, large divisors
and long chains of rules run for minutes, or through the stack, which ends the process. Neither can be stopped inside.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from hybridgen.errors import SamplingError, shown
from hybridgen.sampling.grammar_trial_worker import SECONDS

PLAIN_CHARS = 8192
"""Schemas up to here need no trial, where no key of theirs is one of these."""
_KEYS = re.compile(r'"(?:pattern|multipleOf|allOf|\$ref|\$dynamicRef)"')
PLAIN_REPEATS = 200
"""Of a regular expression."""
_REPEATS = re.compile(r"[*+?{]")
WAIT = 20.0
"""Seconds by the clock, where the machine has other things to do."""


def needs_trial(kind: str, text: str) -> bool:
    """Whether a grammar is of a kind that could take long."""
    if kind == "json_schema":
        return len(text) > PLAIN_CHARS or _KEYS.search(text) is not None or "\\u" in text
    if kind == "regex":
        return len(_REPEATS.findall(text)) > PLAIN_REPEATS
    return kind == "grammar"


def try_apart(kind: str, text: str) -> None:
    """Read a grammar in a process that may be ended.

    Raises:
        SamplingError: it took too much time, memory or depth.
    """
    if not sys.executable:
        raise SamplingError(f"{kind} of this kind is tried by another process, and there is no Python (sys.executable)")
    what = f"{kind}={shown(text, 60)} cannot be kept to"
    worker = Path(__file__).with_name("grammar_trial_worker.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAYON_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, "-P", str(worker), kind],  # -P: the file's directory is not one to import from
            input=text.encode("utf-8", "surrogatepass"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=WAIT,
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SamplingError(f"{what}: reading it was ended after {WAIT:g} s; make it simpler") from None
    except OSError as error:
        raise SamplingError(f"{what}: the process that tries it does not start ({error})") from error
    if ended.returncode == -signal.SIGPROF:
        raise SamplingError(f"{what}: reading it takes over {SECONDS:g} s of processor time; make it simpler")
    if ended.returncode < 0:
        raise SamplingError(f"{what}: reading it takes too much memory or goes too deep; make it simpler")
