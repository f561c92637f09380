"""What a type checker and an editor know of a call's result; mypy looks at it."""

from typing import Any, assert_type

import hybridgen
from hybridgen import Completion

CHAT = [{"role": "user", "content": "x"}]


def one_prompt_gives_one_completion(engine: hybridgen.Engine, client: hybridgen.Client) -> None:
    assert_type(hybridgen.generate("m", "x"), Completion)
    assert_type(hybridgen.generate("m", [1, 2], max_new_tokens=3), Completion)
    assert_type(hybridgen.generate("m", CHAT), Completion)
    assert_type(engine.generate("x", temperature=1.0), Completion)
    assert_type(client.generate("x"), Completion)


async def asynchronously_too(client: hybridgen.AsyncClient) -> None:
    assert_type(await client.generate("x"), Completion)
    assert_type(await client.generate(["x"]), list[Completion])


def a_list_gives_a_list(engine: hybridgen.Engine, client: hybridgen.Client) -> None:
    assert_type(hybridgen.generate("m", ["x", "y"], errors="return"), list[Completion])
    assert_type(hybridgen.generate("m", [[1, 2], [3]]), list[Completion])
    assert_type(hybridgen.generate("m", [CHAT, CHAT]), list[Completion])
    assert_type(engine.generate(("x", "y")), list[Completion])
    assert_type(client.generate(["x"]), list[Completion])


def of_anything_else_it_does_not_know(prompts: Any) -> None:
    assert_type(hybridgen.generate("m", prompts), Any)
