"""What is read of a finished output of vLLM."""

from itertools import repeat
from types import SimpleNamespace

import pytest


def test_each_token_has_the_log_prob_that_it_was_sampled_with() -> None:
    from vllm.logprobs import append_logprobs_for_next_position, create_sample_logprobs

    from raytune_rl.workers.vllm_engine import to_sampled

    flat = create_sample_logprobs(flat_logprobs=True)
    for token, others in ((5, []), (7, [9]), (5, [])):  # the sampled one first, then the likeliest if asked
        ids = [token, *others]
        append_logprobs_for_next_position(flat, ids, [-token / 10, -0.1], repeat(None), 3, len(others))
    found = to_sampled(SimpleNamespace(token_ids=[5, 7, 5], logprobs=flat, finish_reason="stop", text=""))
    assert found.tokens.tolist() == [5, 7, 5]
    assert found.logprobs.tolist() == pytest.approx([-0.5, -0.7, -0.5])
    nothing = create_sample_logprobs(flat_logprobs=True)
    found = to_sampled(SimpleNamespace(token_ids=[], logprobs=nothing, finish_reason=None, text=""))
    assert (found.tokens.tolist(), found.logprobs.tolist(), found.finish_reason) == ([], [], "abort")
