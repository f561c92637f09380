"""Tools: what the model is told of them, calls that it makes of its own accord, and calls that are forced.

A call of the model's own is read by the tokenizer's response template. A forced one (`tool_choice` of `required` or of
a function) is written as JSON by a grammar, as vLLM does it, so that it needs no template: the arguments of the one
function, or a list of calls.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from hybridgen.core import Completion, FinishReason
from hybridgen.errors import shown
from hybridgen.serving.http.errors import ApiError
from hybridgen.serving.http.fields import Body
from hybridgen.serving.http.jobs import new_id
from hybridgen.serving.http.text import Text

logger = logging.getLogger(__name__)


class Tools:
    """The tools of a request."""

    told: list[dict[str, Any]]
    """What the template is given."""
    choice: Any
    """`tool_choice` as it came."""

    def __init__(self, text: Text, body: Body) -> None:
        """Check `tools`, `tool_choice` and `parallel_tool_calls`.

        Raises:
            ApiError: one has no such form, or calls could not be read.
        """
        tools = body.items("tools")
        functions = [_function(index, tool) for index, tool in enumerate(tools)]
        self.choice = body.values.get("tool_choice", "auto")
        self._text = text
        self._forced = _forced(functions, self.choice)
        self._one = isinstance(self.choice, dict)
        self._most = 1 if not body.switch("parallel_tool_calls", True) else None
        self.told = [] if self.choice == "none" else tools
        if self.told and not self._forced and getattr(text.tokenizer, "response_template", None) is None:
            raise ApiError(
                "the model's tokenizer has no response_template, so its tool calls cannot be read; leave tools out, or "
                "force a call by tool_choice",
                param="tools",
                code="unsupported_parameter",
            )

    @property
    def read(self) -> bool:
        """Whether the answer is known only when it is complete."""
        return bool(self.told)

    def form(self, other: dict[str, Any], param: str) -> dict[str, Any]:
        """The sampling field that forces a call; none where none is forced.

        Args:
            other: what the field `param` asks for already.

        Raises:
            ApiError: the answer is to have another form too.
        """
        if not self._forced:
            return {}
        if other:
            raise ApiError(f"{param} and a forced call exclude each other; give one of them", param=param)
        if self._one:
            return {"json_schema": self._forced[0][1]}
        calls: dict[str, Any] = {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [_call_schema(name, parameters) for name, parameters in self._forced]},
            **_definitions(self._forced),
        }
        return {"json_schema": calls if self._most is None else {**calls, "maxItems": self._most}}

    def message(self, completion: Completion, prompt: list[int]) -> dict[str, Any]:
        """The message in a completion."""
        if not self.read:
            return {"role": "assistant", "content": completion.text}
        if not self._forced:
            return _parsed(self._text, completion, prompt, self.told)
        try:
            found = json.loads(completion.text)
        except ValueError:  # it met its limit
            if completion.finish_reason is not FinishReason.LENGTH:
                logger.warning("a forced call is no JSON: it ended by %s", completion.finish_reason)
            return {"role": "assistant", "content": completion.text}
        calls = [{"name": self._forced[0][0], "arguments": found}] if self._one else found
        return {"role": "assistant", "content": None, "tool_calls": [_call(each) for each in calls]}


def _function(index: int, tool: Any) -> tuple[str, dict[str, Any]]:
    """Name of a tool, and the schema of its arguments."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(f"tools[{index}] is {shown(tool, 60)}; give functions with a name", param="tools")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object"}
    if not isinstance(parameters, dict):
        raise ApiError(f"tools[{index}] has parameters={shown(parameters, 60)}; give a JSON schema", param="tools")
    return function["name"], parameters


def _forced(functions: list[tuple[str, dict[str, Any]]], choice: Any) -> list[tuple[str, dict[str, Any]]]:
    """The functions of which one must be called; empty where none must."""
    if choice in ("auto", "none"):
        return []
    if choice == "required":
        if not functions:
            raise ApiError("tool_choice=required needs tools; give some", param="tool_choice")
        return functions
    name = None
    if isinstance(choice, dict) and choice.get("type") == "function":
        inside = choice.get("function", choice)
        name = inside.get("name") if isinstance(inside, dict) else None
    if name is None:
        raise ApiError(
            f"tool_choice={shown(choice, 60)}; give auto, none, required, or a function by its name",
            param="tool_choice",
            code="unsupported_parameter",
        )
    found = [function for function in functions if function[0] == name]
    if not found:
        raise ApiError(f"tool_choice names {shown(name)}, which is none of tools", param="tool_choice")
    return found[:1]


def _definitions(functions: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What the schemas refer to (`#/$defs/...`), for the root of the one that holds them all.

    Raises:
        ApiError: two of them mean different things by one name.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in ("$defs", "definitions"):
        for function, parameters in functions:
            table = parameters.get(key) or {}
            if not isinstance(table, dict):
                raise ApiError(
                    f"the function {shown(function)} has {key}={shown(table)}; give an object", param="tools"
                )
            for name, schema in table.items():
                if found.setdefault(key, {}).setdefault(name, schema) != schema:
                    raise ApiError(
                        f"the function {shown(function)} has another {key}/{name} than one before it; rename it, or "
                        "force one function by its name",
                        param="tools",
                    )
    return found


def _call_schema(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _parsed(text: Text, completion: Completion, prompt: list[int], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The message in a completion, read by the tokenizer's own template; plain text where it cannot be."""
    plain = {"role": "assistant", "content": completion.text}
    try:
        found = text.tokenizer.parse_response(list(completion.token_ids), prefix=list(prompt), tools=tools)
    except Exception as error:  # the checkpoint's template meets whatever the model wrote
        logger.warning("a message could not be read by the response template: %s", type(error).__name__)
        return plain
    if not isinstance(found, dict):
        return plain
    message: dict[str, Any] = {"role": "assistant", "content": found.get("content")}
    for name in ("reasoning_content", "thinking"):
        if found.get(name):
            message["reasoning_content"] = found[name]
    calls = [call for call in found.get("tool_calls") or () if isinstance(call, dict)]
    if calls:
        message["tool_calls"] = [_call(each) for each in calls]
    elif message["content"] is None:
        message["content"] = ""
    return message


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": new_id("call"),
        "type": "function",
        "function": {"name": str(function.get("name", "")), "arguments": arguments},
    }


def message_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message as the deltas of a stream: each call is one, with its index."""
    parts: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        parts.append({"reasoning_content": message["reasoning_content"]})
    if message.get("content"):
        parts.append({"content": message["content"]})
    for index, call in enumerate(message.get("tool_calls", ())):
        parts.append({"tool_calls": [{"index": index, **call}]})
    return parts
