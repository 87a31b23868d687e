"""Lets a loaded language model answer conversations, for generative reward models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raytune_rl.errors import RewardError
from raytune_rl.rewards.judge_answers import JudgeAnswer, JudgeChoice, RequestConfig, Spoken

# Of an answer where the request names no limit and the model has none.
LONGEST = 2048


class JudgeEngine:
    """Answers batches of conversations by the model's own `generate`. ms-swift's PtEngine in what it takes.

    Args:
        model: A causal language model of Transformers, on its device.
        template: Writes conversations, see `workers.judge.JudgeTemplate`.
    """

    def __init__(self, model: Any, template: Any = None, **kwargs: Any) -> None:
        if template is None:
            raise RewardError("an engine of a reward model plugin needs template=, the one that it was given")
        self.model, self.template = model, template

    def infer(
        self, infer_requests: Sequence[Any], request_config: RequestConfig | None = None, **kwargs: Any
    ) -> list[JudgeAnswer]:
        """Answers conversations, `{"messages": [...]}` each, in their order. To one that leaves the model no
        room the answer is empty, and its finish_reason "length".
        """
        asked = request_config or RequestConfig()
        prompts = [self.template.prompt(request) for request in infer_requests]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        answers = [JudgeAnswer([JudgeChoice(Spoken(""), "length")] * asked.n) for _ in prompts]
        # Prompts of like length share a batch, and so little padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        order = [i for i in order if longest is None or len(prompts[i]) < longest]
        while order:
            room = self._room(len(prompts[order[0]]), asked, longest)
            size = 1
            while size < len(order) and self._fits(len(prompts[order[size]]), room, size + 1, asked.n):
                size += 1
            members, order = order[:size], order[size:]
            room = self._room(len(prompts[members[-1]]), asked, longest)
            for number, answer in zip(
                members, self._answer([prompts[i] for i in members], room, asked), strict=True
            ):
                answers[number] = answer
        return answers

    def _fits(self, prompt: int, room: int, rows: int, each: int) -> bool:
        return rows * each * (prompt + room) <= 4 * self.template.max_tokens

    def _room(self, prompt: int, asked: RequestConfig, longest: int | None) -> int:
        """Most tokens of an answer."""
        left = LONGEST if longest is None else longest - prompt
        return min(asked.max_tokens or LONGEST, left)

    def _answer(self, prompts: Sequence[Sequence[int]], room: int, asked: RequestConfig) -> list[JudgeAnswer]:
        import torch

        tokenizer, device = self.template.tokenizer, next(self.model.parameters()).device
        width = max(map(len, prompts))
        stops = list(self.template.stop_token_ids)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
        ids = torch.full((len(prompts), width), pad, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left: answers begin at the same column
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode(), torch.random.fork_rng(enabled=asked.seed is not None):
            if asked.seed is not None:
                torch.manual_seed(asked.seed)
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=room, eos_token_id=stops, pad_token_id=pad,
                num_return_sequences=asked.n, tokenizer=tokenizer, **self._drawn(asked),
            )[:, width:]  # fmt: skip
        choices = [self._choice(row, set(stops)) for row in out.tolist()]
        return [JudgeAnswer(choices[i * asked.n : (i + 1) * asked.n]) for i in range(len(prompts))]

    def _drawn(self, asked: RequestConfig) -> Mapping[str, Any]:
        """Arguments of `generate`; all of them, so that the model's generation_config decides nothing."""
        common = {"repetition_penalty": asked.repetition_penalty or 1.0}
        if asked.stop:
            common["stop_strings"] = list(asked.stop)  # type: ignore[assignment]
        if not asked.temperature:
            if asked.n > 1:
                raise RewardError(
                    "a judge's greedy answers are all the same: give RequestConfig a temperature"
                )
            return {**common, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            **common,
            "do_sample": True,
            "temperature": asked.temperature,
            "top_p": asked.top_p or 1.0,
            "top_k": max(asked.top_k or 0, 0),
        }

    def _choice(self, ids: Sequence[int], stops: set[int]) -> JudgeChoice:
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        text = self.template.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return JudgeChoice(Spoken(text), "length" if end is None else "stop")
