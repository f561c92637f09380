"""Clients of an OpenAI-compatible server for `serving_mix.py`: many connections of one process, a request on each.

python benchmarks/http_load.py URL FILE FIRST STEP

FILE has the bodies, one a line; this process has every STEP-th from FIRST on. It connects for each, writes a line,
waits for one, sends, reads every answer to its end, and writes one line of JSON: tokens as the answers count them,
answers that were no success, seconds of CPU, and when the last request was sent and the last answer ended
(`time.monotonic`, which all processes share).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def answered(connection: Connection, host: str, body: bytes) -> tuple[int, bytes, float]:
    """Send a request; returns the status and the body of the answer, chunks put together, and when it was sent."""
    reader, writer = connection
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    sent = time.monotonic()
    answer = await reader.read(-1)
    writer.close()
    told, _, content = answer.partition(b"\r\n\r\n")
    return int(told.split(b" ", 2)[1]), content, sent


def tokens_of(content: bytes) -> int:
    """Tokens that an answer counts: its usage, which a stream has in its last event."""
    start = content.rfind(b'"completion_tokens"')
    return int(content[start:].split(b":", 1)[1].split(b",", 1)[0])


async def load(url: str, bodies: list[bytes]) -> dict[str, float]:
    """Connect, wait for the word, and ask."""
    place = urlsplit(url)
    connections = [await asyncio.open_connection(place.hostname, place.port, limit=2**26) for _ in bodies]
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    answers = await asyncio.gather(
        *(answered(each, place.netloc, body) for each, body in zip(connections, bodies, strict=True))
    )
    end = time.monotonic()
    good = [content for status, content, _ in answers if status == 200 and b'"error"' not in content[-400:]]
    return {
        "tokens": sum(map(tokens_of, good)),
        "failed": len(answers) - len(good),
        "cpu_seconds": time.process_time(),
        "sent": max(sent for _, _, sent in answers),
        "end": end,
    }


def main() -> None:
    url, path, first, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    bodies = path.read_bytes().splitlines()[first::step]
    print(json.dumps(asyncio.run(load(url, bodies))), flush=True)


if __name__ == "__main__":
    main()
