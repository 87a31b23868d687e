"""The records of a generation: its metrics, its completions, and that there was nothing to learn from it."""

from __future__ import annotations

from collections.abc import Callable

from raytune_rl.algorithms.credit.base import Credit, Credited
from raytune_rl.config import RLHFConfig
from raytune_rl.groups.fleet import read_dialogues, read_media_names, read_texts
from raytune_rl.pipelines import run_metrics
from raytune_rl.pipelines.collect import Collected
from raytune_rl.pipelines.run_state import RunState
from raytune_rl.protocol.data import PromptSet
from raytune_rl.runtime.wait import Pending, fetch
from raytune_rl.tracking.completions import CompletionLog


class GenerationLog:
    """Keeps completions.jsonl and counts generations that teach nothing.

    Args:
        config: Of the run.
        credit: Says whether there is anything to learn.
        completions: completions.jsonl.
        prompts: What completions are of.
        state: Of the run.
        say: Tells the user a sentence.
    """

    def __init__(
        self,
        config: RLHFConfig,
        credit: Credit,
        completions: CompletionLog,
        prompts: PromptSet,
        state: RunState,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._credit, self._prompts, self._say = config, credit, prompts, say
        self._completions, self._state = completions, state

    def tell(self, step: int, collected: Collected, credited: Credited) -> dict[str, float]:
        """The metrics of a generation; if asked, writes every completion down.

        Args:
            step: The first optimizer step that trains on it, from 1.
            collected: The generation.
            credited: What it earned.
        """
        kept = collected.kept
        metrics = {**run_metrics.batch_metrics(kept), **credited.metrics, **collected.metrics}
        if self._config.demonstrates:
            metrics["gkd/on_policy"] = float(not collected.demonstrated)
        if not self._credit.has_signal(kept):
            self._state.silent_generations += 1
            if self._state.silent_generations == 1:
                self._say(
                    f"Note: step {step}: {self._credit.no_signal}, so the rewards teach nothing; further "
                    f"such "
                    "generations are only counted."
                )
        if self._config.log_completions and not collected.demonstrated:
            timeout = self._config.step_timeout
            prompts = fetch(Pending(self._prompts.texts, "the object store", "reading prompts", timeout))
            for part, of in ((kept, credited.advantages), (collected.replaced, None)):
                if part is not None:
                    texts, dialogues = read_texts(part.batch, timeout), read_dialogues(part.batch, timeout)
                    media = read_media_names(part.batch, timeout)
                    rows = run_metrics.completion_rows(step, part, prompts, texts, of, dialogues, media)
                    self._completions.write(rows)
        return metrics
