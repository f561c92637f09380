"""Clients of an OpenAI-compatible server for `serving_http.py`: threads that ask, hang up, and may be killed.

python benchmarks/http_clients.py URL CLIENTS SECONDS SEED

What becomes of each request is one letter on standard output, written at once, so that it is kept when this process is
killed. It imports little, so that a process begins to ask as soon as it is started.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import threading
import time
from urllib.parse import urlsplit

OUTCOMES = {"started": "s", "finished": "f", "hung_up": "h", "refused": "r", "lost": "l"}
"""`refused`: an error in OpenAI's form. `lost`: the answer ended without its end and without an error."""
PROMPT = "def read(path):\n"


def connected(url: str) -> http.client.HTTPConnection:
    """A connection to the server."""
    place = urlsplit(url)
    return http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)


def post(connection: http.client.HTTPConnection, body: dict[str, object]) -> http.client.HTTPResponse:
    """Send a request for a completion; returns its answer, unread."""
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    return connection.getresponse()


def ask(url: str, until: float, draw: random.Random) -> None:
    """One request after the other until a time."""
    connection = connected(url)
    while time.time() < until:
        body = {"model": "demo", "prompt": PROMPT * draw.randint(1, 8), "max_tokens": draw.randint(1, 48)}
        stream, hangs_up = draw.random() < 0.8, draw.random() < 0.1
        _tell("started")
        try:
            outcome = answered(post(connection, {**body, "stream": stream}), stream, draw.randint(1, 20) * hangs_up)
        except (OSError, http.client.HTTPException):
            outcome = "lost"
        if outcome in ("hung_up", "lost"):
            connection.close()  # the next request opens it again
        _tell(outcome)


def answered(answer: http.client.HTTPResponse, stream: bool, lines: int) -> str:
    """Read an answer, of a stream only so many lines (0: all); returns what became of the request."""
    if answer.status != 200:
        return "refused" if json.loads(answer.read())["error"]["message"] else "lost"
    if not stream:
        return "finished" if json.loads(answer.read())["choices"][0]["finish_reason"] else "lost"
    last = b""
    for number, line in enumerate(answer, 1):
        if number == lines:
            return "hung_up"
        last = line.strip() or last
    if last == b"data: [DONE]":
        return "finished"
    return "refused" if b'"error"' in last else "lost"


def _tell(outcome: str) -> None:
    os.write(1, OUTCOMES[outcome].encode())


def main() -> None:
    url, clients, seconds, seed = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    until = time.time() + seconds
    threads = [
        threading.Thread(target=ask, args=(url, until, random.Random(f"{seed} {index}"))) for index in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
