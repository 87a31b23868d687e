import functools

import pytest

from raytune_rl.errors import RewardError
from raytune_rl.rewards.base import ORM
from raytune_rl.rewards.registry import build, orms


@pytest.fixture
def register(monkeypatch):
    return lambda name, entry: monkeypatch.setitem(orms, name, entry)


def test_built_in_functions_keep_order_and_the_labels_of_ms_swift():
    functions = build(["format", "accuracy"], {})
    assert [f.name for f in functions] == ["format", "accuracy"]
    assert [f.label for f in functions] == ["Format", "MathAccuracy"]
    assert functions[1].required == ("solution",)


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(
        RewardError, match=r"Unknown reward function `acuracy`. Did you mean accuracy\?.*external_plugins"
    ):
        build(["acuracy"], {})


def test_constructors_get_the_settings_they_name(register):
    class Takes:
        def __init__(self, args, cosine_max_len, untouched=7, **kwargs):
            self.seen = (args.beta, cosine_max_len, untouched)

        def __call__(self, completions, **kwargs):
            return [self.seen] * len(completions)

    register("takes", Takes)
    (function,) = build(["takes"], {"beta": 0.04, "cosine_max_len": 9, "untouched": None})
    assert function(["x"], {}) == [(0.04, 9, 7)]


def test_settings_reach_a_class_without_a_constructor_and_one_with_open_keywords(register):
    class Plain(ORM):
        def __call__(self, completions, **kwargs):
            return [self.args.beta] * len(completions)

    class Open(ORM):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

        def __call__(self, completions, **kwargs):
            return [self.args.beta] * len(completions)

    register("plain", Plain)
    register("open", Open)
    for function in build(["plain", "open"], {"beta": 0.04}):
        assert function(["x"], {}) == [0.04]


def test_a_constructor_that_wants_more_than_settings_is_an_error(register):
    class Takes:
        def __init__(self, tokenizer):
            pass

        def __call__(self, completions, **kwargs):
            return []

    register("takes", Takes)
    with pytest.raises(RewardError, match=r"`takes`.*requires `tokenizer`"):
        build(["takes"], {})


def test_a_constructor_that_raises_is_an_error_with_its_reason(register):
    class Broken:
        def __init__(self):
            raise KeyError("JUDGE_ENDPOINT")

    register("broken", Broken)
    with pytest.raises(RewardError, match=r"`broken`.*KeyError: 'JUDGE_ENDPOINT' \(test_registry.py:\d+\)"):
        build(["broken"], {})


def test_what_cannot_be_called_is_an_error(register):
    register("five", 5)
    with pytest.raises(RewardError, match="`five` is a int"):
        build(["five"], {})


def test_a_function_gets_only_the_columns_it_names(register):
    def lengths(completions, weight):
        return [len(text) * w for text, w in zip(completions, weight, strict=True)]

    register("lengths", lengths)
    (function,) = build(["lengths"], {})
    assert function.label == "lengths"
    assert function(["ab", "c"], {"weight": [1, 2], "solution": ["", ""]}) == [2, 2]


def test_sync_and_async_are_told_apart(register):
    class Waits:
        async def __call__(self, completions, **kwargs):
            return []

    async def waits(completions, **kwargs):
        return []

    register("waits_class", Waits)
    register("waits", waits)
    register("partial", functools.partial(waits, flag=1))
    assert [f.is_async for f in build(["waits_class", "waits", "partial", "format"], {})] == [
        True,
        True,
        True,
        False,
    ]
