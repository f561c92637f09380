"""A client process of the load test: runs its share of the requests and prints what came, as JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hybridgen
from hybridgen.core import Completion
from hybridgen.serving.unix.messages import completion_to_wire, sampling_from_wire

PROMPTS = [
    "import os\n",
    "def read(path):\n",
    "class Reader:\n    def",
    "# é ü 漢字 🙂\n",
    "for i in range(",
    "x = [1, 2,",
]


def case(number: int) -> tuple[Any, dict[str, Any]]:
    """Request `number` of the load test: a prompt, and sampling fields as the wire has them."""
    prompt: Any = PROMPTS[number % len(PROMPTS)]
    if number % 7 == 3:
        prompt = [100 + number % 50, 17, 300]
    fields: dict[str, Any] = {"max_new_tokens": 4 + number % 23, "logprobs": number % 3, "seed": number}
    if number % 4 == 1:
        fields |= {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    if number % 5 == 2:
        fields["stop"] = ["\n\n", "self"]
    if number % 6 == 4:
        fields |= {"logit_bias": {"13": "-inf", "17": 0.5}, "repetition_penalty": 1.3}
    if number % 9 == 8:
        fields |= {"temperature": 1.1, "n": 2}
    return prompt, fields


def run(client: hybridgen.Client, number: int) -> Completion:
    prompt, wire = case(number)
    params = sampling_from_wire(wire)
    if number % 2:
        return client.generate(prompt, params)
    texts: dict[int, str] = {}
    ends: dict[int, Completion] = {}
    for event in client.stream(prompt, params):
        texts[event.choice] = texts.get(event.choice, "") + event.text
        if event.completion is not None:
            ends[event.choice] = event.completion
    if any(texts[choice] != end.text for choice, end in ends.items()):
        raise SystemExit(f"the stream of request {number} did not join to its text")
    return ends[0]


def main() -> None:
    path, start, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with hybridgen.Client(Path(path)) as client:
        for number in range(start, start + count):
            record = {"number": number, "completion": completion_to_wire(run(client, number))}
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
