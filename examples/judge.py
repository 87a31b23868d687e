r"""A language model as the reward: it compares each answer with the row's solution, in words.

    raytune-rl rlhf ... --reward_model Qwen/Qwen2.5-7B-Instruct --reward_model_plugin same_answer \
        --external_plugins examples/judge.py

`--reward_model_plugin genrm` needs no file: it grades how good an answer is. Here the judge is asked another
question; what it says is read in the same way, from the last `Reward: x`. The file loads in ms-swift, too.
"""

from swift.rewards import rm_plugins
from swift.rewards.rm_plugin import GenRMPlugin

ASKED = """Problem:
{problem}

Right answer:
{solution}

Answer of a student:
{answer}

Does the student come to the right answer? Compare in one or two sentences, then end with the line
`Reward: 1` if so and `Reward: 0` if not."""


class SameAnswer(GenRMPlugin):
    """Sees of every row its messages, the completion as the last one, and all columns of the data set."""

    def prepare_rm_inputs(self, inputs):
        return [{"messages": [{"role": "user", "content": question(row)}]} for row in inputs]


def question(row):
    *_, problem, answer = (message["content"] for message in row["messages"])
    return ASKED.format(problem=problem, solution=row["solution"], answer=answer)


rm_plugins["same_answer"] = SameAnswer
