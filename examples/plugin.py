"""Reward functions of your own, for --external_plugins. Also loads in ms-swift 4.x, unchanged.

    raytune-rl rlhf ... --external_plugins examples/plugin.py --reward_funcs external_r1v_acc format

`completions` are the generated texts; every column of the data set arrives by its name, one entry a
completion. Return one number a completion, or None where the reward does not apply.
"""

import re

from swift.rewards import ORM, orms

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


orms["external_r1v_acc"] = MultiModalAccuracy
