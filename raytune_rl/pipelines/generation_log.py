"""What a generation tells: its metrics, its completions, and that there was nothing to learn from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.advantages import AdvantageResult
from raytune_rl.config import RLHFConfig
from raytune_rl.groups.fleet import read_dialogues, read_media_names, read_texts
from raytune_rl.pipelines import report
from raytune_rl.pipelines.collect import Collected
from raytune_rl.pipelines.experience import Experience
from raytune_rl.pipelines.lifecycle import Origin
from raytune_rl.protocol.data import PromptSet
from raytune_rl.runtime.wait import Pending, fetch
from raytune_rl.tracking.completions import CompletionLog


class GenerationLog:
    """Keeps completions.jsonl and counts generations that teach nothing.

    Args:
        config: Of the run.
        origin: Where the run starts.
        prompts: What completions are of.
        say: Tells the user a sentence.
    """

    NO_SIGNAL = "in no group do two completions have different rewards"

    def __init__(
        self, config: RLHFConfig, origin: Origin, prompts: PromptSet, say: Callable[[str], None]
    ) -> None:
        self._config, self._prompts, self._say = config, prompts, say
        self._completions = CompletionLog(origin.run_dir, resume_step=origin.resume_step)
        self.silent = int(origin.state.get("generations_without_signal", 0))

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on counting from."""
        return {"generations_without_signal": self.silent}

    def has_signal(self, experience: Experience) -> bool:
        """Whether any group has completions of different rewards."""
        return bool(experience.informative())

    def tell(
        self, step: int, collected: Collected, compared: AdvantageResult, kl: NDArray[np.float64] | None
    ) -> Mapping[str, float]:
        """The metrics of a generation; if asked, writes every completion down.

        Args:
            step: The first optimizer step that trains on it, from 1.
            collected: The generation.
            compared: Its advantages.
            kl: With the KL in the reward: each completion's, nats.
        """
        kept = collected.kept
        told = {**report.batch_metrics(kept, compared), **collected.metrics}
        if kl is not None:
            told["kl"] = float(kl.sum()) / max(sum(t.completion_tokens for t in kept.batch), 1)
        if not self.has_signal(kept):
            self.silent += 1
            if self.silent == 1:
                self._say(
                    f"Note: step {step}: {self.NO_SIGNAL}, so the rewards teach nothing; further such "
                    "generations are only counted."
                )
        if self._config.log_completions:
            timeout = self._config.step_timeout
            prompts = fetch(Pending(self._prompts.texts, "the object store", "reading prompts", timeout))
            for part, of in ((kept, compared), (collected.replaced, None)):
                if part is not None:
                    texts, dialogues = read_texts(part.batch, timeout), read_dialogues(part.batch, timeout)
                    media = read_media_names(part.batch, timeout)
                    rows = report.completion_rows(step, part, prompts, texts, of, dialogues, media)
                    self._completions.write(rows)
        return told
