"""The rules of single data sets that are known by name: what ms-swift does with their rows.

The entries of `registered` say which has which.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from raytune_rl.data.rules import PLACEHOLDERS, Context, Fields, Rule, value, without


def _alpaca_zh(fields: Fields, _: Context) -> Fields:
    text = value(fields, "input")
    cut = text.removeprefix("输入：") if isinstance(text, str) else text
    return {**without(fields, "input"), "input": cut}


def _long_alpaca(fields: Fields, _: Context) -> Fields:
    name = "output" if value(fields, "output") is not None else "response"
    text = value(fields, name)
    cut = (
        text.removeprefix("Answer: ").strip()
        if isinstance(text, str) and text.startswith("Answer: ")
        else text
    )
    return {**without(fields, name), name: cut}


def _self_cognition(suffix: str = "", prefix: str = "") -> Rule:
    def make(fields: Fields, context: Context) -> Fields:
        chinese = str(value(fields, "tag")).lower() == "zh"
        texts = [str(value(fields, "query")) + suffix, prefix + str(value(fields, "response"))]
        for mark, values in zip(PLACEHOLDERS, (context.identity.name, context.identity.author), strict=True):
            if values:
                texts = [text.replace(mark, values[0 if chinese else -1]) for text in texts]
        return {**without(fields, "query", "response"), "query": texts[0], "response": texts[1]}

    more = ", and every answer begins with an empty thought" if prefix else ""
    says = f"--model_name and --model_author stand for {{{{NAME}}}} and {{{{AUTHOR}}}}{more}"
    return Rule(says, ("query", "response"), make, identity=True)


def _dolly(fields: Fields, _: Context) -> Fields:
    context = value(fields, "context")
    before = f"Here gives some useful information:\n{context}\n" if context else ""
    query = f"{before}{value(fields, 'instruction')}"
    return {**without(fields, "instruction", "context"), "query": query}


def _sql_context(fields: Fields, _: Context) -> Fields:
    pieces = (value(fields, "question"), value(fields, "context"))
    query = "\n".join(piece for piece in pieces if piece)
    return {
        **without(fields, "question", "context", "answer"),
        "query": query,
        "response": value(fields, "answer"),
    }


def _calls(text: Any) -> list[Fields]:
    return json.loads(text) if isinstance(text, str) else list(text)


def _schemas(text: Any) -> list[Fields]:
    """Tools as JSON schemas of OpenAI's form, which chat templates take."""
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in _calls(text)]


def _xlam(fields: Fields, _: Context) -> Fields:
    messages = [{"role": "user", "content": value(fields, "query")}]
    messages += [
        {"role": "tool_call", "content": json.dumps(call)} for call in _calls(value(fields, "answers"))
    ]
    rest = without(fields, "query", "answers", "tools")
    return {**rest, "messages": messages, "tools": _schemas(value(fields, "tools"))}


def _xlam_grpo(fields: Fields, context: Context) -> Fields:
    calls = _calls(value(fields, "answers"))
    call = calls[context.line % len(calls)]
    text = f"Action: {call['name']}\nAction Input: {json.dumps(call['arguments'])}"
    tools = _schemas(value(fields, "tools"))
    return {**without(fields, "answers", "tools"), "response": text, "solution": text, "tools": tools}


def _leetcode(fields: Fields, _: Context) -> Fields:
    text = str(value(fields, "code_with_problem"))
    at = text.find("```python")
    problem, code = text[:at].removeprefix("# "), text[at:].strip()
    rest = without(fields, "code_with_problem", "explanation_only")
    return {**rest, "query": problem, "response": f"{code}\n\n{value(fields, 'explanation_only')}"}


def _ms_bench(fields: Fields, _: Context) -> Fields | None:
    turns = value(fields, "conversations")
    turns = ast.literal_eval(turns) if isinstance(turns, str) else list(turns)
    if turns and turns[0] == {"from": "system", "value": "You are a helpful assistant."}:
        turns = turns[1:]
    marks = ("moss", "human:", "assistant:", "user:")
    if any(mark in str(turn["value"]).lower() for turn in turns for mark in marks):
        return None
    return {**without(fields, "conversations"), "messages": turns}


_FIREFLY = {
    "ProseGeneration", "MRC", "JinYongGeneration", "TextCorrection", "ClassicalChinese", "BELLE",
    "StoryGeneration", "Couplet", "Cot", "Dictionary", "Translation", "Program", "SentimentAnalyze", "OpenQA",
    "AncientPoem", "TextMatching", "NLI", "Summary", "KeywordRecognition", "ProductDesc", "LyricGeneration",
    "Composition", "MusicComment", "NER",
}  # fmt: skip


def _countdown(fields: Fields, _: Context) -> Fields:
    target = next(v for v in (value(fields, "target"), value(fields, "response")) if v is not None)
    query = (
        f"Using the numbers {list(value(fields, 'nums'))}, create an equation that equals {target}.\n"
        "You can use basic arithmetic operations (+, -, *, /) and each number can only be used once.\n"
        "Show your work in <think> </think> tags. And return the final equation and answer in <answer> "
        "</answer> tags, for example <answer> (1 + 2) / 3 * 4 = 4 </answer>."
    )
    return {**without(fields, "response", "target"), "target": target, "query": query}


def _guanaco(fields: Fields, _: Context) -> Fields | None:
    marks = r"(User:|User：|Assistant：|Assistant:|Asssistent:|Assistent:|Assistenz:)"
    pieces = re.split(marks, str(value(fields, "instruction") or ""))
    history: list[list[str]] = []
    if len(pieces) > 1:
        speakers, texts = pieces[1::2], pieces[2::2]
        expected = ["user" if number % 2 == 0 else "assis" for number in range(len(speakers))]
        alike = (s.lower().startswith(e[:3]) for s, e in zip(speakers, expected, strict=True))
        if not all(alike) or len(texts) % 2 or not all(texts):
            return None
        history = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    query = str(value(fields, "input")).removeprefix("User:").strip()
    rest = without(fields, "instruction", "input", "output")
    return {**rest, "history": history, "query": query, "response": value(fields, "output")}


def _science_qa(fields: Fields, _: Context) -> Fields:
    answer = value(fields, "choices")[value(fields, "answer")]
    response = f"{value(fields, 'solution')}\nSo the final answer is: {answer}"
    return {**without(fields, "question", "answer"), "query": value(fields, "question"), "response": response}


def _clevr(fields: Fields, _: Context) -> Fields:
    problem = value(fields, "problem") or value(fields, "query") or ""
    query = (
        f"{problem} Output the thinking process in <think> </think> and final answer (number) in <answer> "
        "</answer> tags."
    )
    return {**without(fields, "problem", "query"), "query": query}


def _geometry(fields: Fields, _: Context) -> Fields:
    rest = without(fields, "problem", "answer")
    answer = value(fields, "answer")
    return {**rest, "query": value(fields, "problem"), "response": answer, "solution": answer}


def _sudoku(fields: Fields, _: Context) -> Fields:
    def grid(text: str) -> str:
        return "\n".join(text[at : at + 9] for at in range(0, len(text), 9))

    puzzle = grid(str(value(fields, "question")).replace(".", "0"))
    query = (
        "Solve the following 9x9 Sudoku puzzle. Empty cells are marked with '0'. Provide the completed grid "
        f"as your answer.\n\nPuzzle:\n{puzzle}"
    )
    rest = without(fields, "question", "answer")
    return {**rest, "query": query, "response": grid(str(value(fields, "answer")))}


def _one_question(fields: Fields, context: Context) -> Fields:
    questions, answers = value(fields, "questions"), value(fields, "answers")
    at = context.line % len(questions)
    return {**without(fields, "questions", "answers"), "query": questions[at], "response": answers[at]}


def _question_turns(name: str, inner: str | None = None) -> Rule:
    """Turns of the form {question, answer}."""

    def make(fields: Fields, _: Context) -> Fields:
        turns = value(fields, name)
        turns = turns[inner] if inner else turns
        pairs = [
            (turn.get("question", turn.get("user")), turn.get("answer", turn.get("assistant")))
            for turn in turns
        ]
        messages = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return {**without(fields, name), "messages": messages}

    return Rule(f"the questions and answers of {name!r} are the conversation", (name,), make)


def _kept(test: Callable[[Fields], bool]) -> Callable[[Fields, Context], Fields | None]:
    return lambda fields, _: fields if test(fields) else None


ALPACA_ZH = Rule("the prefix 输入： of 'input' is taken off", ("input",), _alpaca_zh)
LONG_ALPACA = Rule("the prefix 'Answer: ' is taken off", (), _long_alpaca)
SELF_COGNITION = _self_cognition()
SELF_COGNITION_QWEN3 = _self_cognition(" /no_think", "<think>\n\n</think>\n\n")
SELF_COGNITION_EMPTY_THINK = _self_cognition("", "<think>\n\n</think>\n\n")
DOLLY = Rule("the context stands before the instruction", ("instruction", "context"), _dolly)
SQL_CONTEXT = Rule("the tables stand after the question", ("question", "context", "answer"), _sql_context)
XLAM = Rule("the answers are tool calls", ("query", "answers", "tools"), _xlam)
XLAM_GRPO = Rule(
    "one of the calls is the response and the solution, as 'Action: ...'",
    ("query", "answers", "tools"),
    _xlam_grpo,
)
LEETCODE = Rule("problem and code are taken apart", ("code_with_problem", "explanation_only"), _leetcode)
MS_BENCH = Rule(
    "the default system prompt is taken off",
    ("conversations",),
    _ms_bench,
    "conversations that name other models",
)
FIREFLY = Rule(
    "rows of some kinds are read", ("kind",), _kept(lambda f: value(f, "kind") in _FIREFLY), "other kinds"
)
NOT_TOXIC = Rule(
    "rows of toxic-dpo-v0.2 are not read",
    ("source",),
    _kept(lambda f: value(f, "source") != "toxic-dpo-v0.2"),
    "those of toxic-dpo-v0.2",
)
COUNTDOWN = Rule("every row is asked for an equation", ("nums",), _countdown)
GUANACO = Rule(
    "the earlier turns in 'instruction' are the history", ("instruction", "input", "output"), _guanaco,
    "turns that cannot be told apart",
)  # fmt: skip
SCIENCE_QA = Rule(
    "the solution and the right choice are the answer",
    ("question", "choices", "answer", "solution"),
    _science_qa,
)
CLEVR = Rule("every question asks for <think> and <answer> tags", (), _clevr)
GEOMETRY = Rule("the answer is the solution, too", ("problem", "answer"), _geometry)
SUDOKU = Rule("puzzle and answer are written as grids", ("question", "answer"), _sudoku)
ONE_QUESTION = Rule("one question of each row is read", ("questions", "answers"), _one_question)
QA_TURNS = _question_turns("qa")
CONVERSATION_DATA = _question_turns("conversations", "data")
CAULDRON = _question_turns("texts")
