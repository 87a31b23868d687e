"""Tools and the calls of them, in OpenAI's form whatever wrote them down."""

from __future__ import annotations

from typing import Any

from raytune_rl.data.conversation import FormatError, parse_text


def tool_call(call: Any) -> dict[str, Any]:
    """One call: `{"type": "function", "function": {"name", "arguments"}}`, arguments as an object.

    Raises:
        FormatError: It has no name.
    """
    if isinstance(call, str):
        call = parse_text(call, "tool_call")
    if isinstance(call, dict):
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            arguments = function.get("arguments", function.get("parameters"))
            if isinstance(arguments, str):
                # Chat templates write the arguments with `tojson`: as text they would come out quoted twice.
                arguments = parse_text(arguments, "arguments") if arguments.strip() else {}
            identity = {"id": call["id"]} if call.get("id") is not None else {}
            return {
                **identity,
                "type": "function",
                "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
            }
    raise FormatError("a tool call needs a name and arguments")


def calls_of(turn: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The calls that a turn makes under `tool_calls` or, in OpenAI's older form, `function_call`; both keys
    are taken out of it.

    Raises:
        FormatError: They are no calls, or there are both keys.
    """
    asked, older = turn.pop("tool_calls", None), turn.pop("function_call", None)
    if asked and older:
        raise FormatError("a turn has both 'tool_calls' and 'function_call'; keep one of them")
    if isinstance(asked, str):
        asked = parse_text(asked, "tool_calls") if asked.strip() else None
    if older:
        return (tool_call(older),)
    if not asked:
        asked = ()
    if not isinstance(asked, list | tuple):
        raise FormatError(f"'tool_calls' is {asked!r:.80}; it is a list of calls")
    return tuple(tool_call(call) for call in asked)


def tools_of(value: Any, column: str) -> tuple[dict[str, Any], ...]:
    """The schemas of a column of tools: a list, one of them, or the text of either. OpenAI's older
    `functions`, schemas without their `{"type": "function"}`, are given it.

    Raises:
        FormatError: They are no schemas.
    """
    tools = (parse_text(value, column) if value.strip() else []) if isinstance(value, str) else value
    tools = [tools] if isinstance(tools, dict) else tools
    if isinstance(tools, list | tuple):
        found = [parse_text(tool, column) if isinstance(tool, str) else tool for tool in tools]
        if all(isinstance(tool, dict) for tool in found):
            return tuple(_wrapped(tool) for tool in found)
    raise FormatError(f"{column!r} must be a list of tool schemas")


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    bare = isinstance(tool.get("name"), str) and "type" not in tool and "function" not in tool
    return {"type": "function", "function": tool} if bare else tool
