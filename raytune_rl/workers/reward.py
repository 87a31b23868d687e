"""The reward worker: scores completions that lie in the object store and gives scalars back.

A plain class; `ray.remote(RewardWorker)` makes it an actor. The functions themselves run in child processes
of the actor (see `rewards.sandbox`), so a reward that hangs or crashes leaves the actor alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytune_rl.data.media_table import Medium, count_media, media_of
from raytune_rl.errors import DeadlineExceededError, RewardError
from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.rewards import RewardBatch, Scores, take_rows, with_completions
from raytune_rl.protocol.rows import RowsOf
from raytune_rl.rewards.sandbox import Sandbox
from raytune_rl.workers.leftovers import name_semaphores, name_sockets
from raytune_rl.workers.probed import Probed

# Texts of a batch are megabytes at most; a node that does not hand them over in this time is gone.
FETCH_LIMIT_S = 120.0


class RewardWorker(Probed):
    """Scores completions with named reward functions.

    Args:
        names: Registry names, in the order of `--reward_funcs`.
        plugin_files: Files of `--external_plugins`.
        config_dict: All settings of the run.
        timeout_s: Seconds that a reward function may take for one completion.
        max_workers: Child processes of this worker.
        memory_limit_bytes: Address space of a child; `None` for no limit.

    Raises:
        RewardError: A function or plugin cannot be loaded.
    """

    def __init__(
        self,
        names: Sequence[str],
        plugin_files: Sequence[str],
        config_dict: dict[str, Any],
        timeout_s: float,
        max_workers: int = 1,
        memory_limit_bytes: int | None = None,
    ) -> None:
        name_semaphores()
        name_sockets()
        self._sandbox = Sandbox(
            names, plugin_files, config_dict, timeout_s, max_workers, memory_limit_bytes=memory_limit_bytes
        )

    def score(
        self,
        texts_ref: Any,
        rows: Sequence[int],
        columns_ref: Any,
        column_rows: Sequence[int],
        extra: dict[str, Any],
        dialogues_ref: Any = None,
        tokens_ref: Any = None,
        media_ref: Any = None,
        limit_s: float | None = None,
    ) -> Scores:
        """Scores the completions `rows`.

        Args:
            texts_ref: Completions, list of str: the list, an ObjectRef to it, or `[ObjectRef]`. (Ray replaces
                an ObjectRef that is itself an argument of a remote call by its value; inside a list it stays
                one.) Or `RowsOf` several such lists, with a place for each of `rows`.
            rows: Which completions to score, in this order.
            columns_ref: The data set's columns, one entry a prompt, `dict[str, list]`, or a reference to
                them. Rewards see "messages", the prompt's turns, with the completion as the last one.
            column_rows: For each entry of `rows`, the prompt it belongs to.
            extra: The driver's metadata: lists with one entry for each of `rows` (`prompt_id`, ...), and
                values for all of them (`trainer_state`, a `TrainerState`).
            dialogues_ref: Of conversations of several turns, in the same ways as texts: `{"messages",
                "rollout_infos"}` each, in the order of the completions. Rewards see both columns.
            tokens_ref: {"tokens", "loss_mask"} of the completions, in the same ways as texts. Rewards see
                "response_token_ids", what the model sampled.
            media_ref: Columns of `data.media_table`, one entry a prompt. Rewards see "images", "videos" and
                "audios", as far as the prompts have them: of each completion a list of {"path", "bytes"},
                one of which is None; a video given as its frames is a list of these.
            limit_s: Seconds that the functions have for it in all. What they leave over has failed.

        Returns:
            The scores, row `i` of them for `rows[i]`.

        Raises:
            RewardError: Lengths do not fit, a required column is missing, or a data set column has the name
                of a metadata column.
            DeadlineExceededError: The object store did not hand the texts or columns over.
        """
        if len(rows) != len(column_rows):
            raise RewardError(f"{len(rows)} completions but {len(column_rows)} column rows.")
        chosen: list[str] = [texts[row] for texts, row in _read(texts_ref, rows, "completions")]
        columns: dict[str, list[Any]] = _fetch(columns_ref, "data set columns")
        clash = sorted(columns.keys() & extra.keys())
        if clash:
            raise RewardError(
                f"Data set columns have names under which reward functions receive the run's own values: "
                f"{', '.join(clash)}. Rename them (for instance with --columns)."
            )
        selected = take_rows(columns, column_rows)
        if dialogues_ref is not None:
            dialogues = [found[row] for found, row in _read(dialogues_ref, rows, "dialogues")]
            for name in ("messages", "rollout_infos"):
                selected[name] = [dialogue[name] for dialogue in dialogues]
        elif "messages" in selected:
            selected["messages"] = with_completions(selected["messages"], chosen)
        if dialogues_ref is None:
            selected["rollout_infos"] = [{} for _ in rows]
        if tokens_ref is not None:
            found_tokens = _read(tokens_ref, rows, "tokens")
            selected["response_token_ids"] = [
                found["tokens"][row][found["loss_mask"][row]].tolist() for found, row in found_tokens
            ]
        if media_ref is not None:
            columns_of_media: Columns = _fetch(media_ref, "media")
            of_prompt = {row: media_of(columns_of_media, row) for row in set(column_rows)}
            for modality in count_media(columns_of_media).modalities:
                selected[f"{modality}s"] = [
                    [_as_reward_sees(medium) for medium in of_prompt[row] if medium.modality == modality]
                    for row in column_rows
                ]
        batch = RewardBatch(chosen, {**selected, **extra})
        return self._sandbox.score(batch.texts, batch.columns, limit_s)

    def labels(self) -> tuple[str, ...]:
        """Names for metrics, one a function."""
        return self._sandbox.labels

    def ping(self) -> bool:
        """Answers as soon as the worker is free."""
        return True

    def close(self) -> None:
        """Ends the child processes."""
        self._sandbox.close()


def _as_reward_sees(medium: Medium) -> Any:
    files = [
        {"path": file.path, "bytes": None if file.data is None else bytes(file.data)} for file in medium.files
    ]
    return files if medium.as_frames else files[0]


def _read(source: Any, rows: Sequence[int], what: str) -> list[tuple[Any, int]]:
    """The object of each row, and where in it the row lies."""
    if not isinstance(source, RowsOf):
        found = _fetch(source, what)
        return [(found, row) for row in rows]
    objects = [_fetch(ref, what) for ref in source.refs]
    return [(objects[number], row) for number, row in source.places]


def _fetch(value: Any, what: str) -> Any:
    import ray

    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], ray.ObjectRef):
        value = value[0]
    if not isinstance(value, ray.ObjectRef):
        return value
    try:
        return ray.get(value, timeout=FETCH_LIMIT_S)
    except ray.exceptions.GetTimeoutError as error:
        raise DeadlineExceededError(
            f"Reward worker: the object store did not hand over the {what} within {FETCH_LIMIT_S:g} s."
        ) from error
