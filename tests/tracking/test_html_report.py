import json
import re
from typing import Any

from raytune_rl.tracking.files import json_line
from raytune_rl.tracking.html_report import keep, most_changed, write_report
from raytune_rl.tracking.plots import write_plots
from raytune_rl.tracking.run_dir import RunDir


def row(step: int, prompt: str, completion: str, reward: float | None, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": prompt,
        "completion": completion,
        "tokens": len(completion),
        "rewards": {"Accuracy": reward},
        "reward": reward,
        "advantage": 0.5,
        "finish_reason": "stop",
        **more,
    }


def test_most_changed_compares_a_prompts_first_and_last_step() -> None:
    rows = [
        row(1, "up", "bad", 0.0),
        row(1, "up", "worse", -1.0),
        row(2, "up", "ignored", 9.0),
        row(3, "up", "good", 1.0),
        row(1, "down", "fine", 1.0),
        row(3, "down", "poor", 0.5),
        row(3, "down", "none", None),
        row(1, "once", "x", 5.0),
        row(1, "what is it?", "a cat", 1.0, media=["cat.png"]),
        row(3, "what is it?", "a dog", 0.0, media=["dog.png"]),
    ]
    changed = most_changed(rows)
    assert [(c.prompt, c.change) for c in changed] == [("up", 1.5), ("down", -0.5)]
    assert (changed[0].first["completion"], changed[0].last["completion"]) == ("bad", "good")


def test_a_long_run_keeps_best_worst_and_newest() -> None:
    rows = [row(i, "p", "c", float(i % 10)) for i in range(90)] + [row(90, "p", "c", None)]
    kept = keep(rows, most=30)
    assert len(kept) <= 30
    assert kept == sorted(kept, key=lambda r: r["step"])
    assert sum(r["reward"] == 9.0 for r in kept) >= 9
    assert kept[-1]["reward"] is None
    assert keep(rows, most=91) == rows
    long = [row(i, "p", "c" * 99, float(i)) for i in range(90)]
    assert 20 <= len(keep(long, characters=3000)) <= 30, "long completions: fewer of them"


def test_the_page_holds_everything_and_executes_nothing(run: RunDir) -> None:
    hostile = "</script><script>alert(1)</script> <b>bold</b>"
    run.write_args({"model": "m<odel>", "hub_token": "secret"})
    run.logging_jsonl.write_text(
        "".join(
            json_line({"global_step/max_steps": f"{s}/3", "reward": s / 3, "loss": 1.0}) for s in (1, 2, 3)
        )
    )
    rows = [row(1, "a question", hostile, 0.0), row(3, "a question", "an answer", 1.0)]
    run.completions_jsonl.write_text("".join(map(json_line, rows)))
    write_plots(run)
    page = write_report(run, {"status": "finished"}).read_text(encoding="utf-8")

    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data.group(1)) == rows
    assert page.count("<script") == 2
    assert "<b>bold" not in page
    assert "m&lt;odel&gt;" in page
    assert "secret" not in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the file must need nothing else"


def test_an_empty_run_has_a_page_too(run: RunDir) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert "None were kept" in page
    assert "Nothing was logged" in page
