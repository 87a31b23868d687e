r"""A tool that the model may call, for --multi_turn_scheduler.

    raytune-rl rlhf ... --external_plugins examples/multi_turn.py \
        --multi_turn_scheduler calculator --max_turns 4

The model writes `<calc>6 * 7</calc>`, the scheduler answers with the value as a tool's message, and the model
goes on. What the scheduler adds is in the context and is not trained on. The file loads in ms-swift, too.
"""

import ast
import operator
import re

from swift.plugin.multi_turn import MultiTurnScheduler, multi_turns

CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


class Calculator(MultiTurnScheduler):
    """Works out the last <calc>...</calc> of every turn; a turn without one is the last."""

    def check_finished(self, infer_request, response_choice, current_turn):
        called = CALL.search(response_choice.message.content)
        return not called or super().check_finished(infer_request, response_choice, current_turn)

    def step(self, infer_request, response_choice, current_turn):
        *_, expression = CALL.findall(response_choice.message.content)
        infer_request.messages.append({"role": "tool", "content": answer(expression)})
        return {"infer_request": infer_request, "rollout_infos": {"calls": current_turn}}


def answer(expression):
    try:
        return f"{value(ast.parse(expression.strip(), mode='eval').body):g}"
    except (SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return "not a sum that can be worked out"


def value(node):
    if isinstance(node, ast.Constant):
        return float(node.value)
    operands = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
    return OPERATORS[type(node.op)](*map(value, operands))


multi_turns["calculator"] = Calculator
