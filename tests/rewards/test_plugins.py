import importlib.util
import sys
import textwrap
from pathlib import Path

import pytest

from raytune_rl.errors import RewardError
from raytune_rl.rewards.judge import rm_plugins
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.rewards.registry import build, orms

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin.py"


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    before, modules, path = dict(orms), set(sys.modules), list(sys.path)
    judges = dict(rm_plugins)
    yield
    orms.clear()
    orms.update(before)
    rm_plugins.clear()
    rm_plugins.update(judges)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("raytune_rl_plugin_"):
            del sys.modules[name]


@pytest.fixture
def plugin(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


def test_ms_swift_3_style(plugin):
    # The imports of a 3.x example file: most of them are there for other examples in the same file.
    file = plugin("""
        from typing import List
        from swift.llm import PtEngine, RequestConfig, Template, to_device
        from swift.llm.infer.protocol import ChatCompletionResponse
        from swift.plugin import ORM, orms, rm_plugins
        from swift.plugin.multi_turn import MultiTurnScheduler, multi_turns
        from swift.plugin.rm_plugin import DefaultRMPlugin
        from swift.utils import get_logger

        logger = get_logger()

        class Longer(ORM):
            def __call__(self, completions, target, **kwargs) -> List[float]:
                return [float(len(text) >= goal) for text, goal in zip(completions, target)]

        class Tips(MultiTurnScheduler):
            pass

        class MyRM(DefaultRMPlugin):
            def __init__(self, model, template):
                super().__init__(model, template)

        class MyTemplate(Template):
            pass

        orms['longer'] = Longer
        rm_plugins['mine'] = MyRM
        multi_turns['tips'] = Tips
    """)
    load_plugins([file])
    (longer,) = build(["longer"], {})
    assert longer(["ab", "a"], {"target": [2, 2], "messages": [None, None]}) == [1.0, 0.0]
    assert rm_plugins["mine"](None, None).template is None
    with pytest.raises(RewardError, match=r"`swift.llm.Template`"):
        sys.modules["raytune_rl_plugin_mine"].MyTemplate(None)


def test_ms_swift_4_style_class_async_and_function(plugin):
    file = plugin("""
        import asyncio
        from swift.rewards import AsyncORM, ORM, orms
        from swift.rewards.orm import MathAccuracy

        class Sync(ORM):
            def __call__(self, completions, **kwargs):
                return [1.0] * len(completions)

        class Async(AsyncORM):
            async def __call__(self, completions, **kwargs):
                return list(await asyncio.gather(*(self.one(text) for text in completions)))

            async def one(self, text):
                await asyncio.sleep(0)
                return float(len(text))

        def plain(completions, **kwargs):
            return [0.5 for _ in completions]

        class Stricter(MathAccuracy):
            pass

        orms.update(sync=Sync, plain=plain, stricter=Stricter)
        orms['async'] = Async
    """)
    load_plugins([file])
    functions = build(["sync", "async", "plain", "stricter"], {})
    assert [f.is_async for f in functions] == [False, True, False, False]
    assert functions[0](["a", "b"], {}) == [1.0, 1.0]
    assert functions[2](["a"], {}) == [0.5]
    assert functions[3]([r"\boxed{2}"], {"solution": ["2"]}) == [1.0]


def test_no_swift_is_left_behind(plugin):
    load_plugins([plugin("import swift.rewards\nswift.rewards.orms['x'] = len\n")])
    assert not [name for name in sys.modules if name == "swift" or name.startswith("swift.")]
    assert importlib.util.find_spec("swift") is None
    assert orms["x"] is len


def test_an_installed_ms_swift_is_used_and_its_registrations_are_taken_over(plugin, tmp_path, monkeypatch):
    package = tmp_path / "site" / "swift" / "rewards"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "orms = {'accuracy': 'theirs', 'old': 'theirs'}\nclass ORM: real = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    ours = orms["accuracy"]
    try:
        load_plugins([plugin("from swift.rewards import ORM, orms\nassert ORM.real\norms['new'] = len\n")])
    finally:
        for name in [name for name in sys.modules if name == "swift" or name.startswith("swift.")]:
            del sys.modules[name]
    assert orms["new"] is len
    assert orms["accuracy"] is ours


def test_files_beside_a_plugin_can_be_imported(plugin):
    plugin("ANSWER = 42", "beside_the_plugin.py")
    load_plugins(
        [plugin("from swift.rewards import orms\nfrom beside_the_plugin import ANSWER\norms['a'] = ANSWER\n")]
    )
    assert orms["a"] == 42


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef broken(:\n    pass\n", r"mine\.py:2: invalid syntax"),
        ("x = 1\n\nimport no_such_module\n", r"mine\.py:3: ModuleNotFoundError: .*no_such_module"),
        ("import json\njson.loads('{')\n", r"mine\.py:2: JSONDecodeError"),
        ("raise SystemExit(1)\n", r"mine\.py:1: SystemExit"),
    ],
)
def test_a_plugin_that_cannot_be_imported_names_file_and_line(plugin, text, message):
    with pytest.raises(RewardError, match=message):
        load_plugins([plugin(text)])
    assert not [name for name in sys.modules if name.startswith("swift")]


def test_a_plugin_that_is_not_there(tmp_path):
    with pytest.raises(RewardError, match=r"there is no file .*nowhere\.py"):
        load_plugins([tmp_path / "nowhere.py"])


def test_replacing_a_function_is_said(plugin, caplog):
    load_plugins([plugin("from swift.rewards import orms\norms['format'] = len\n")])
    assert "replaces the reward function `format`" in caplog.text


@pytest.mark.parametrize(
    ("completion", "solution", "score"),
    [
        (r"\boxed{4}", "$4$", 1.0),
        ("<think>2+2</think><answer>4</answer>", "<answer>4</answer>", 1.0),
        ("<answer>a red cube</answer>", "<answer> a red cube </answer>", 1.0),
        ("<answer>a red cube</answer>", "a red cube", 1.0),
        ("<answer>a red ball</answer>", "<answer>a red cube</answer>", 0.0),
        ("<answer>5</answer>", "<answer>4</answer>", 0.0),
    ],
)
def test_the_example(completion, solution, score):
    load_plugins([EXAMPLE])
    (function,) = build(["external_r1v_acc"], {})
    assert function([completion], {"solution": [solution]}) == [score]
