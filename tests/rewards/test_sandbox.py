import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import TrainerState
from raytune_rl.rewards.sandbox import GIVE_UP_AFTER, Sandbox

# The first word of a completion says what its reward does.
PLUGIN = """
import asyncio, copy, json, os, pickle, sys, time
from concurrent.futures import ThreadPoolExecutor
from swift.rewards import AsyncORM, ORM, orms

def act(text):
    if text == "raise":
        raise ValueError("not today")
    if text == "hang":
        while True:
            time.sleep(3600)
    if text == "hang in C":
        sum(range(10**15))
    if text == "crash":
        os._exit(3)
    if text == "exit":
        sys.exit(1)
    if text == "memory":
        bytearray(64 << 30)
    return {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None}.get(text, 1.0)

class Act(ORM):
    def __call__(self, completions, **kwargs):
        return [act(text) for text in completions]

class AsyncAct(AsyncORM):
    def __init__(self):
        self.loop = None

    async def __call__(self, completions, **kwargs):
        self.loop = self.loop or asyncio.get_running_loop()
        assert self.loop is asyncio.get_running_loop()
        return await asyncio.gather(*(self.one(text) for text in completions))

    async def one(self, text):
        if text == "hang":
            await asyncio.sleep(3600)
        if text == "block":
            time.sleep(3600)
        return act(text)

def echo(completions, value, **kwargs):
    return value

class Borrows(ORM):
    def __init__(self, args=None, **kwargs):
        super().__init__(args)
        from swift.rewards.orm import MathAccuracy
        self.accuracy = MathAccuracy()

    def __call__(self, completions, solution, **kwargs):
        return self.accuracy(completions, solution)

def step(completions, value, trainer_state, **kwargs):
    return [act(text) * (v + trainer_state.global_step) for text, v in zip(completions, value, strict=True)]

def process(completions, **kwargs):
    return [os.getpid()] * len(completions)

def surroundings(completions, **kwargs):
    heavy = [name for name in ("torch", "ray", "numpy", "transformers") if name in sys.modules]
    assert not heavy, heavy
    assert os.environ["OMP_NUM_THREADS"] == "1"
    return [1.0] * len(completions)

def numpy_numbers(completions, **kwargs):
    import numpy
    return numpy.arange(len(completions), dtype=numpy.float32)

def one_for_all(completions, **kwargs):
    return [1.0]

def too_many(completions, **kwargs):
    return [1.0] * (len(completions) + 1)

def a_number(completions, **kwargs):
    return 1.0

def a_set(completions, **kwargs):
    return {0.0, 1.0, 2.0}

def a_dict(completions, **kwargs):
    return dict.fromkeys(completions, 1.0)

def a_generator(completions, **kwargs):
    return (1.0 for _ in completions)

def a_text(completions, **kwargs):
    return "1" * len(completions)

def nothing(completions, **kwargs):
    pass

def in_a_loop(completions, **kwargs):
    return [time.sleep(0.1) or 1.0 for _ in completions]

def all_at_once(completions, **kwargs):
    time.sleep(0.1 * len(completions))
    return [1.0] * len(completions)

def pooled(completions, **kwargs):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda _: time.sleep(0.2) or 1.0, completions))

class Throttled(AsyncORM):
    async def __call__(self, completions, **kwargs):
        gate = asyncio.Semaphore(1)
        async def one(text):
            async with gate:
                await asyncio.sleep(0.1)
            return 1.0
        return await asyncio.gather(*(one(text) for text in completions))

def sleeps(completions, **kwargs):
    time.sleep(3600)

def uses_a_list(completions, **kwargs):
    assert isinstance(completions, list)
    assert completions == ["a", "b"] and [*completions, "c"] == ["a", "b", "c"]
    assert json.dumps(completions) == '["a", "b"]'
    assert type(pickle.loads(pickle.dumps(completions))) is list
    assert type(copy.deepcopy(completions)) is list
    assert completions[0] == "a" and completions[-1:] == ["b"] and list(reversed(completions)) == ["b", "a"]
    return [1.0, 1.0]

orms.update(one_for_all=one_for_all, too_many=too_many, a_number=a_number, a_set=a_set, a_dict=a_dict)
orms.update(a_generator=a_generator, a_text=a_text, nothing=nothing, in_a_loop=in_a_loop, pooled=pooled)
orms.update(all_at_once=all_at_once, throttled=Throttled, sleeps=sleeps, uses_a_list=uses_a_list)
orms.update(borrows=Borrows, act=Act, async_act=AsyncAct)
orms.update(step=step, echo=echo, process=process, surroundings=surroundings, numpy_numbers=numpy_numbers)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "acts.py"
    path.write_text(PLUGIN)
    return str(path)


@pytest.fixture(scope="module")
def sandbox(plugin):
    sandbox = Sandbox(["act", "process"], [plugin], {}, timeout_s=1.0)
    yield sandbox
    sandbox.close()


@pytest.fixture
def make(plugin):
    made = []

    def build(*names, timeout_s=1.0, **options):
        made.append(Sandbox(names, [plugin], {}, timeout_s, **options))
        return made[-1]

    yield build
    for sandbox in made:
        sandbox.close()


def test_fast_path(sandbox):
    scores = sandbox.score(["fine", "none", "fine"], {"solution": ["a", "b", "c"]})
    np.testing.assert_array_equal(scores.values[:, 0], [1.0, np.nan, 1.0])
    assert scores.values.dtype == np.float64
    assert scores.failures == ()
    assert scores.functions == ("act", "process")
    assert scores.labels == ("Act", "process")
    assert scores.slow_path == (None, None)
    assert len(scores.seconds) == 2


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ("raise", "exception", r"ValueError: not today (acts.py:"),
        ("exit", "exception", "SystemExit"),
        ("hang", "timeout", "no answer within 1 s"),
        ("hang in C", "timeout", "no answer within 1 s"),
        ("crash", "crash", "exit code 3"),
        ("nan", "invalid", "returned nan"),
        ("inf", "invalid", "returned inf"),
        ("text", "invalid", "returned a str, not a number"),
    ],
)
def test_one_bad_sample_costs_itself_and_the_next_batch_works(sandbox, bad, kind, message):
    scores = sandbox.score(["fine", "fine", bad, "fine"], {})
    np.testing.assert_array_equal(scores.values[:, 0], [1.0, 1.0, np.nan, 1.0])
    (failure,) = scores.failures
    assert (failure.row, failure.function, failure.kind) == (2, "act", kind)
    assert message in failure.message
    assert scores.failure_counts() == {("act", kind): 1}
    assert np.isfinite(scores.values[:, 1]).all()
    after = sandbox.score(["fine"], {})
    assert after.values[0, 0] == 1.0
    assert after.failures == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_for_all", "returned 1 values for 3 completions"),
        ("too_many", "returned 4 values for 3 completions"),
        ("a_number", "returned a float, not a list of 3 numbers"),
        ("a_set", "returned a set, not a list of 3 numbers"),
        ("a_dict", "returned a dict, not a list of 3 numbers"),
        ("a_generator", "returned a generator, not a list of 3 numbers"),
        ("a_text", "returned a str, not a list of 3 numbers"),
        ("nothing", "returned a NoneType, not a list of 3 numbers"),
    ],
)
def test_what_is_no_list_of_one_entry_a_completion_rewards_none_of_them(make, name, message):
    """A function that returns one value for many would, asked for each alone, look right."""
    scores = make(name).score(["a", "b", "c"], {})
    assert np.isnan(scores.values).all()
    assert [(f.row, f.function, f.kind, f.message) for f in scores.failures] == [
        (row, name, "invalid", message) for row in range(3)
    ]
    assert scores.slow_path == (None,)


@pytest.mark.parametrize("name", ["in_a_loop", "all_at_once", "pooled", "throttled"])
def test_a_batch_may_take_as_many_limits_as_it_has_completions(make, name):
    scores = make(name, timeout_s=0.5).score(["a"] * 8, {})
    assert scores.slow_path == (None,), "it took more than one limit, and no completion did"
    assert scores.values[:, 0].tolist() == [1.0] * 8
    assert scores.seconds[0] > 0.5


def test_a_function_that_hangs_is_given_up_and_says_so(make):
    sandbox = make("act", "all_at_once", timeout_s=0.2)
    scores = sandbox.score(["hang"] * 20, {})
    messages = [f.message for f in scores.failures]
    assert len(messages) == 20
    assert [m == "no answer within 0.2 s" for m in messages] == [True] * GIVE_UP_AFTER + [False] * 15
    assert "not tried: the function is given up, as the first 5 samples" in messages[-1]
    assert np.isfinite(scores.values[:, 1]).all()


def test_the_whole_call_is_bounded_whatever_the_functions_do(make):
    sandbox = make("sleeps", "format", timeout_s=60.0)
    scores = sandbox.score(["a"] * 20, {}, limit_s=2.0)
    assert np.isnan(scores.values[:, 0]).all()
    assert {f.kind for f in scores.failures} == {"timeout"}
    assert "not tried: " in scores.failures[-1].message
    assert (scores.values[:, 1] == 0.0).all(), "the other function had its share"


def test_children_start_where_the_temporary_folder_has_a_long_name(plugin, tmp_path):
    """As a cluster's job directories have: their sockets would not fit."""
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    script = tmp_path / "script.py"
    script.write_text(
        "from raytune_rl.rewards.sandbox import Sandbox\n"
        f"sandbox = Sandbox(['act'], [{str(plugin)!r}], {{}}, timeout_s=30.0)\n"
        "print(sandbox.score(['fine'], {}).failures)\n"
        "sandbox.close()\n"
    )
    ended = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "TMPDIR": str(long)},
    )
    assert (ended.stdout.strip(), ended.returncode) == ("()", 0), ended.stderr


def test_one_that_hangs_leaves_time_for_those_behind_it(make):
    """Its own limit may be longer than the whole call's."""
    scores = make("act", timeout_s=100.0).score(["fine", "hang", "fine", "fine"], {}, limit_s=8.0)
    assert [f.row for f in scores.failures] == [1]
    assert np.isfinite(scores.values[[0, 2, 3], 0]).all()


def test_completions_are_a_list_like_any_other(make):
    assert make("uses_a_list", timeout_s=20.0).score(["a", "b"], {}).failures == ()


def test_several_bad_samples_of_each_kind(sandbox):
    texts = ["crash", "fine", "hang", "raise", "crash", "nan", "fine"]
    scores = sandbox.score(texts, {})
    np.testing.assert_array_equal(np.isfinite(scores.values[:, 0]), [text == "fine" for text in texts])
    assert [(f.row, f.kind) for f in scores.failures] == [
        (0, "crash"), (2, "timeout"), (3, "exception"), (4, "crash"), (5, "invalid"),
    ]  # fmt: skip
    assert "crash" in scores.slow_path[0]


def test_a_dead_child_is_replaced(sandbox):
    before = sandbox.score(["fine"], {}).values[0, 1]
    assert sandbox.score(["fine"], {}).values[0, 1] == before
    sandbox.score(["crash"], {})
    assert sandbox.score(["fine"], {}).values[0, 1] != before


def test_a_child_that_dies_while_idle_costs_nothing(sandbox):
    pid = int(sandbox.score(["fine"], {}).values[0, 1])
    os.kill(pid, signal.SIGKILL)
    scores = sandbox.score(["fine"], {})
    assert scores.failures == ()
    assert scores.values[0, 1] != pid


def test_async(make):
    sandbox = make("async_act")
    scores = sandbox.score(["fine", "hang", "fine", "raise", "hang", "nan"], {})
    np.testing.assert_array_equal(scores.values[:, 0], [1.0, np.nan, 1.0, np.nan, np.nan, np.nan])
    kinds = [(f.row, f.kind) for f in scores.failures]
    assert kinds == [(1, "timeout"), (3, "exception"), (4, "timeout"), (5, "invalid")]
    np.testing.assert_array_equal(sandbox.score(["fine"] * 3, {}).values[:, 0], 1.0)


def test_an_async_sample_that_blocks_the_loop_costs_itself(make, monkeypatch):
    monkeypatch.setattr("raytune_rl.rewards.sandbox._GRACE_S", 0.5)
    scores = make("async_act", timeout_s=0.5).score(["fine", "block"], {})
    np.testing.assert_array_equal(scores.values[:, 0], [1.0, np.nan])
    assert scores.failures[0].kind == "timeout"


def test_several_children(make):
    scores = make("act", "echo", max_workers=2).score(
        ["hang", "fine", "hang", "fine"], {"value": [1, 2, 3, 4]}
    )
    np.testing.assert_array_equal(scores.values[:, 0], [np.nan, 1.0, np.nan, 1.0])
    np.testing.assert_array_equal(scores.values[:, 1], [1, 2, 3, 4])


def test_children_are_light(make):
    assert make("surroundings", "accuracy", timeout_s=10.0).score(["x"], {"solution": ["1"]}).failures == ()


def test_the_starting_program_is_not_imported_again(plugin, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(f"""
print("main runs")
from raytune_rl.rewards.sandbox import Sandbox
from raytune_rl.protocol.rewards import TrainerState
sandbox = Sandbox(["act"], [{plugin!r}], {{}}, 5.0)
print(sandbox.score(["fine"], {{}}).values)
sandbox.close()
""")
    output = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert output == "main runs\n[[1.]]\n"


def test_children_die_with_their_parent(plugin, tmp_path):
    script = f"""
from raytune_rl.rewards.sandbox import Sandbox
from raytune_rl.protocol.rewards import TrainerState
sandbox = Sandbox(["process", "act"], [{plugin!r}], {{}}, 3600.0)
print(int(sandbox.score(["fine"], {{}}).values[0, 0]), flush=True)
sandbox.score(["hang in C"], {{}})
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        os.kill(child, 0)
        parent.kill()
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")


def test_memory_limit(make):
    scores = make("act", timeout_s=10.0, memory_limit_bytes=2 << 30).score(["fine", "memory"], {})
    assert scores.values[0, 0] == 1.0
    (failure,) = scores.failures
    assert failure.kind == "exception"
    assert "MemoryError" in failure.message


def test_numpy_rewards_are_numbers(make):
    np.testing.assert_array_equal(
        make("numpy_numbers", timeout_s=20.0).score(["a"] * 3, {}).values[:, 0], [0, 1, 2]
    )


def test_a_constructor_may_import_from_swift(make):
    scores = make("borrows", timeout_s=20.0).score([r"\boxed{2}", r"\boxed{3}"], {"solution": ["2", "2"]})
    assert scores.values[:, 0].tolist() == [1.0, 0.0]


def test_a_missing_column_is_an_error_not_a_failed_sample(make):
    with pytest.raises(RewardError, match=r"`echo` needs the column value; the rows have: solution"):
        make("echo").score(["a"], {"solution": ["1"]})


def test_columns_have_to_fit(sandbox):
    with pytest.raises(RewardError, match="`value` has 2 entries for 1 completions"):
        sandbox.score(["a"], {"value": [1, 2]})
    with pytest.raises(RewardError, match="called `completions`"):
        sandbox.score(["a"], {"completions": ["a"]})


def test_a_value_for_the_whole_batch_reaches_every_sample(make):
    columns = {"value": [1, 2], "trainer_state": TrainerState(global_step=5, max_steps=9)}
    sandbox = make("step")
    np.testing.assert_array_equal(sandbox.score(["a", "b"], columns).values[:, 0], [6, 7])
    slow = sandbox.score(["a", "raise"], columns)
    np.testing.assert_array_equal(slow.values[:, 0], [6, np.nan])


def test_an_empty_batch(sandbox):
    scores = sandbox.score([], {})
    assert scores.values.shape == (0, 2)
    assert scores.failures == ()


def test_errors_of_names_and_plugins_reach_the_caller(tmp_path):
    with pytest.raises(RewardError, match=r"`acuracy`. Did you mean accuracy"):
        Sandbox(["acuracy"], [], {}, 1.0)
    broken = tmp_path / "broken.py"
    broken.write_text("\nimport no_such_module\n")
    with pytest.raises(RewardError, match=r"broken\.py:2: ModuleNotFoundError"):
        Sandbox(["format"], [str(broken)], {}, 1.0)


def test_hostile_mathematics_costs_its_sample_and_not_the_batch():
    hostile = [
        "<answer>9^(9^9^9)</answer>",
        r"\boxed{9^{9^{9^9}}}",
        r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
        r"\boxed{" + r"\frac{1}{2}+" * 8500 + "1}",  # 100 kB
    ]
    texts = [r"\boxed{3}", *hostile, "<answer>3</answer>", r"\boxed{4}"]
    sandbox = Sandbox(["accuracy", "format"], [], {}, timeout_s=1.5, max_workers=2)
    scores = sandbox.score(texts, {"solution": ["3"] * len(texts)})
    sandbox.close()
    assert scores.values[[0, 5, 6], 0].tolist() == [1.0, 1.0, 0.0]
    assert not (scores.values[1:5, 0] == 1.0).any()
    assert {failure.row for failure in scores.failures} == set(np.flatnonzero(np.isnan(scores.values[:, 0])))
    assert all(failure.kind == "timeout" for failure in scores.failures)
    assert {1, 2, 4} <= {failure.row for failure in scores.failures}
    assert (scores.values[:, 1] == 0.0).all()
