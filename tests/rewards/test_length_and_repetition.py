"""Rewards by length and by repetition, against their formulas worked by hand."""

import math

import pytest

from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import Unscored
from raytune_rl.rewards.registry import build
from raytune_rl.rewards.repetition import words


def reward(name, **config):
    (function,) = build([name], {"max_completion_length": 100, **config})
    return function


def test_cosine_pays_for_short_right_answers_and_for_long_wrong_ones():
    right, wrong = r"\boxed{4}", r"\boxed{5}"
    function = reward("cosine")
    assert (function.label, function.required) == ("CosineReward", ("solution", "completion_tokens"))
    tokens = [0, 25, 50, 100, 250]

    def values(text, **config):
        columns = {"solution": ["4"] * 5, "completion_tokens": tokens}
        return reward("cosine", **config)([text] * 5, columns)

    quarter = (1 - math.cos(math.pi / 4)) / 2
    assert values(right) == pytest.approx([1.0, 1 - 0.5 * quarter, 0.75, 0.5, 0.5])
    assert values(wrong) == pytest.approx([-0.5, -0.5 + 0.5 * quarter, -0.25, 0.0, 0.0])
    own = {
        "cosine_min_len_value_correct": 3.0,
        "cosine_max_len_value_correct": 2.0,
        "cosine_min_len_value_wrong": -3.0,
        "cosine_max_len_value_wrong": -2.0,
        "cosine_max_len": 50,
    }
    assert values(right, **own) == pytest.approx([3.0, 2.5, 2.0, 2.0, 2.0])
    assert values(wrong, **own) == pytest.approx([-3.0, -2.5, -2.0, -2.0, -2.0])


def test_cosine_says_what_accuracy_could_not_score():
    (value,) = reward("cosine")(["x"], {"solution": [None], "completion_tokens": [3]})
    assert isinstance(value, Unscored)


@pytest.mark.parametrize(
    ("text", "n", "value"),
    [
        ("", 3, 0.0),
        ("a b", 3, 0.0),
        ("a b c", 3, 0.0),
        ("a b c a b c", 3, -0.25),  # abc bca cab abc: 3 of 4
        ("A b a B a b", 2, -0.6),  # ab ba ab ba ab: 2 of 5
        ("no no no no", 1, -0.75),
        ("好好好好", 2, -2 / 3),  # a sentence without blanks is not one word
        ("我说好,我说好", 3, -0.2),
    ],
)
def test_repetition_counts_what_comes_again(text, n, value):
    assert reward("repetition", repetition_n_grams=n)([text], {}) == pytest.approx([value])
    halved = reward("repetition", repetition_n_grams=n, repetition_max_penalty=-0.5)
    assert halved([text], {}) == pytest.approx([value / 2])


def test_words_in_scripts_with_and_without_blanks():
    assert words("The CAT 我们 are\nhere ไป") == ["the", "cat", "我", "们", "are", "here", "ไ", "ป"]
    assert words("<think>東京tower</think>") == ["<think>", "東", "京", "tower</think>"]


def test_soft_overlong_grows_within_the_cache():
    tokens = {"completion_tokens": [0, 80, 90, 99, 100, 130]}
    function = reward("soft_overlong", soft_cache_length=20)
    assert function([""] * 6, tokens) == pytest.approx([0, 0, -0.5, -0.95, -1, -2.5])
    earlier = reward("soft_overlong", soft_cache_length=20, soft_max_length=90)
    assert earlier([""] * 6, tokens) == pytest.approx([0, -0.5, -1, -1.45, -1.5, -3])


@pytest.mark.parametrize("cache", [None, 100, 200])
def test_soft_overlong_needs_room(cache):
    with pytest.raises(RewardError, match=r"`soft_overlong`: --soft_cache_length is .*between 1 and 99"):
        reward("soft_overlong", soft_cache_length=cache)
