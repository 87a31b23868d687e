import signal

import pytest

from raytune_rl.protocol.rewards import Unscored
from raytune_rl.rewards import accuracy
from raytune_rl.rewards.accuracy import MathAccuracy

RIGHT = [
    (r"so it is \boxed{72}", "72"),
    (r"$5$ apples, then $6$, so \boxed{72}", "72"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{0.5}", r"$\frac{1}{2}$"),
    (r"\boxed{\frac{2}{4}}", "1/2"),
    (r"\boxed{x^2+2x+1}", "$(x+1)^2$"),
    (r"\boxed{72}", r"The sum is 70 + 2. \boxed{72}"),
    ("<think>70 + 2</think><answer>72</answer>", "72"),
    ("<think>70 + 2</think><answer> 72 </answer>", "<answer>72</answer>"),
    ("<answer>\n72\n</answer>", "<think>no</think>\n<answer>\n72\n</answer>"),
    ("<answer>72</answer> or <answer>73</answer>", "72"),
    (r"<answer>\boxed{1,234}</answer>", "1234"),
    (r"\boxed{72\text{ cm}}", "72"),
]
WRONG = [
    (r"\boxed{73}", "72"),
    (r"\boxed{\frac{1}{3}}", "0.5"),
    ("72", "72"),  # neither LaTeX nor a tag
    ("the answer is 72", "72"),
    ("<answer>73</answer>", "<answer>72</answer>"),
    ("<answer>73</answer> or <answer>72</answer>", "72"),
    (r"<answer>73</answer> \boxed{72}", "72"),  # the tag is the answer, whatever stands outside
    ("<answer></answer>", "72"),
    ("", "72"),
    (r"\boxed{}", "72"),
    (r"\boxed{\frac{}{", "72"),
    (r"\boxed{-72}", "72"),
]


@pytest.mark.parametrize(("completion", "solution"), RIGHT)
def test_right_answers(completion, solution):
    assert MathAccuracy()([completion], [solution]) == [1.0]


@pytest.mark.parametrize(("completion", "solution"), WRONG)
def test_wrong_answers(completion, solution):
    assert MathAccuracy()([completion], [solution]) == [0.0]


@pytest.mark.parametrize("solution", ["no mathematics here", "", r"\boxed{}", "<answer>?</answer>"])
def test_a_solution_that_cannot_be_parsed_is_named_and_no_zero(solution):
    (score,) = MathAccuracy()([r"\boxed{72}"], [solution])
    assert isinstance(score, Unscored)
    assert score.kind == "invalid"
    assert repr(solution) in score.message


def test_a_row_without_a_solution_leaves_the_others_alone():
    right, missing, wrong = MathAccuracy()([r"\boxed{1}"] * 3, ["1", None, "2"])
    assert (right, wrong) == (1.0, 0.0)
    assert isinstance(missing, Unscored)


def test_an_expression_that_takes_too_long_is_stopped_and_the_timer_is_off_afterwards(monkeypatch):
    reward = MathAccuracy()
    monkeypatch.setattr(accuracy, "SAMPLE_CPU_LIMIT_S", 0.05)
    slow, quick = reward([r"\boxed{" + r"\frac{1}{2}+" * 3000 + "1}", r"\boxed{72}"], ["72", "72"])
    assert isinstance(slow, Unscored)
    assert slow.kind == "timeout"
    assert quick == 1.0
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


@pytest.mark.parametrize("solution", [72, 72.0, "72"])
def test_a_solution_may_be_a_number(solution):
    assert MathAccuracy()([r"\boxed{72}"], [solution]) == [1.0]


def test_a_solution_that_is_neither_text_nor_number_says_so():
    (found,) = MathAccuracy()([r"\boxed{72}"], [["72"]])
    assert "is a list, not a text or a number" in found.message
