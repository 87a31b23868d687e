import pytest

from raytune_rl.rewards.format import Format


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think>a</think> \n\t<answer>b</answer>", 1.0),
        ("<think>a\nb</think>\n<answer>c\nd</answer>", 1.0),
        ("<think></think><answer></answer>", 1.0),
        (
            "<think>a</think><answer>b</answer> <answer>c</answer>",
            1.0,
        ),  # lazy up to the very end, as ms-swift
        ("<think>a</think><answer>b</answer>\n", 0.0),
        ("<think>a</think><answer>b</answer>.", 0.0),
        (" <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think>so<answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think>", 0.0),
        ("<answer>b</answer>", 0.0),
        ("<Think>a</Think><answer>b</answer>", 0.0),
        ("x\n<think>a</think><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(completion, score):
    assert Format()([completion], solution=["ignored"]) == [score]
