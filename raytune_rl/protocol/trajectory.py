"""A prompt that is to be answered, and an answer as the controller knows it."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_rl.protocol.rows import RowPointer


@dataclass(frozen=True, slots=True)
class EpisodeRequest:
    """One prompt and the completions wanted of it.

    Attributes:
        prompt_id: The controller's number of the prompt, given back in the answer.
        row: Where the prompt lies in the prompt columns.
        seeds: One seed a completion; the same prompt, seed and weights give the same completion on any
            worker.
    """

    prompt_id: int
    row: int
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EpisodeFacts:
    """One completion in numbers, as the rollout worker reports it: no tokens.

    Attributes:
        prompt_id: From the request.
        sample: Index among the prompt's completions.
        row: Row in the returned columns and texts.
        prompt_tokens: Length of the prompt.
        completion_tokens: Sampled tokens, end tokens included.
        finish_reason: "stop" (ended by itself) or "length" (cut at the limit).
        version: Weight version that sampled it; where new weights came in between, that of its first token.
        other_tokens: Tokens behind the prompt that the model did not sample (several turns only).
        turns: Of the model.
        failure: Why a scheduler's hook ended the conversation early; empty if none did.
        newest_version: The weights of its last token; None: `version` sampled all of them.
    """

    prompt_id: int
    sample: int
    row: int
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    version: int
    other_tokens: int = 0
    turns: int = 1
    failure: str = ""
    newest_version: int | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One completion as the driver knows it: where it lies and how long it is.

    Attributes:
        prompt: Row in the prompt set.
        group: Number of the prompt within the batch; completions of one group are compared with each other.
        data: Where tokens, loss mask, log-probs and versions lie.
        text: Where the text lies.
        episode: The worker's report on it.
        media: Where its prompt's media lie; None if no prompt of the run has any.
        dialogue: Where the messages of its turns lie; None if the model has one turn only.
    """

    prompt: int
    group: int
    data: RowPointer
    text: RowPointer
    episode: EpisodeFacts
    media: RowPointer | None = None
    dialogue: RowPointer | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion, and of others between the model's turns."""
        return self.episode.prompt_tokens + self.episode.completion_tokens + self.episode.other_tokens
