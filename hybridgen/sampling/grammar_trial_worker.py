"""The process that reads a grammar first. Run as a file, with the kind of the grammar; its text comes from stdin.

It prints nothing. Its parent looks only at whether it ends by itself and in time.
"""

from __future__ import annotations

import re
import resource
import signal
import sys
import threading

SECONDS = 0.4
"""Of processor time. Grammars that people write take a tenth of it."""
MEMORY = 2**30
"""Bytes."""
STACK = 2**21
"""Bytes: a quarter of what a thread has where the grammar is used."""
_SPECIAL = re.compile(r""" "(?:\\.|[^"\\])*" | /(?:\\.|[^/\\])*/ | (<[^<>\s]+>) """, re.VERBOSE)


def _read(kind: str, text: str) -> None:
    import llguidance

    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends this process
    matcher = llguidance.LLMatcher
    if kind == "json_schema":
        grammar = matcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
    elif kind == "regex":
        grammar = matcher.grammar_from_regex(text)
    else:  # the vocabulary of bytes has no special tokens
        grammar = matcher.grammar_from_lark(_SPECIAL.sub(lambda found: '"x"' if found[1] else found[0], text))
    started = matcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
    if not started.is_error():
        started.deep_copy().compute_bitmask()


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    thread = threading.Thread(
        target=_read, args=(sys.argv[1], sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    )
    thread.start()
    thread.join()
