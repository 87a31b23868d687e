"""Reward functions of your own, for --external_plugins. Also loads in ms-swift 4.x, unchanged.

    raytune-rl rlhf ... --external_plugins examples/plugin.py --reward_funcs external_r1v_acc format

Try them first, without a model:

    raytune-rl reward-check --dataset rows.jsonl --external_plugins plugin.py --reward_funcs external_gsm8k

`completions` are the generated texts; every column of the data set arrives by its name, one entry a
completion. Return one number a completion, or None where the reward does not apply.
"""

import ast
import re

from swift.rewards import ORM, orms

NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
CODE = re.compile(r"<think>.*?</think>\s*<answer>.*?```python\n(.*?)```\s*</answer>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class MultiModalAccuracy(ORM):
    """1 if math-verify finds completion and solution equal, or if their <answer>s are the same text."""

    def __call__(self, completions, solution, **kwargs):
        return [
            float(equal_as_mathematics(text, gold) or answer(text) == answer(gold))
            for text, gold in zip(completions, solution, strict=True)
        ]


def equal_as_mathematics(text, gold):
    from math_verify import parse, verify

    return verify(parse(gold), parse(text))


def answer(text):
    """The content of <answer>...</answer>, or the whole text where there is none."""
    match = ANSWER.search(text)
    return (match[1] if match else text).strip()


class GSM8K(ORM):
    """1 if the last number of the completion is the one after `####` in the data set's `answer`.

    For rows as GSM8K has them: {"question": ..., "answer": "... #### 72"}. None, no reward at all, where a
    row has no such number.
    """

    def __call__(self, completions, answer, **kwargs):
        golds = [last_number(gold.rpartition("####")[2]) for gold in answer]
        return [
            None if gold is None else float(last_number(text) == gold)
            for text, gold in zip(completions, golds, strict=True)
        ]


def last_number(text):
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "").rstrip(".")) if found else None


class CodeFormat(ORM):
    """1 for `<think>...</think><answer>...```python ... ```</answer>` whose code Python can parse, else 0.

    Nothing is executed. A reward that runs code needs a sandbox against that code, too.
    """

    def __call__(self, completions, **kwargs):
        return [float(parses(CODE.fullmatch(text))) for text in completions]


def parses(match):
    try:
        return match is not None and bool(ast.parse(match[1]).body)
    except (SyntaxError, ValueError):
        return False


orms["external_r1v_acc"] = MultiModalAccuracy
orms["external_gsm8k"] = GSM8K
orms["external_code_format"] = CodeFormat
