import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from raytune_rl.data.collate import MicroBatch, collate
from raytune_rl.protocol.columns import Ragged
from tests.columns import collate_rows

ROWS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17]]
MASKS = [[0, 0, 1, 1], [0, 1, 0], [0, 0, 0, 1, 0, 1]]


def arrays(rows, dtype):
    return [np.array(row, dtype=dtype) for row in rows]


def make(layout, rows=ROWS, masks=MASKS):
    return collate(arrays(rows, np.int32), arrays(masks, bool), layout=layout, pad_token_id=3)


def test_padded_layout():
    batch = make("padded")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 3, 3], [9, 10, 11, 3, 3, 3], [12, 13, 14, 15, 16, 17]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch.position_ids.tolist() == [list(range(6))] * 3
    assert batch.predict_index.tolist() == [1, 2, 6, 14, 16]


def test_packed_layout():
    batch = make("packed")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]]
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5]]
    assert batch.predict_index.tolist() == [1, 2, 4, 9, 11]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_targets_follow_the_state_that_predicts_them(layout):
    batch = make(layout)
    assert batch.targets.tolist() == [7, 8, 10, 15, 17]
    assert batch.row_of.tolist() == [0, 0, 1, 2, 2]
    assert batch.n_rows == 3
    # The token right after the predicting position, in the flat input, is the target.
    assert batch.input_ids.flatten()[batch.predict_index + 1].tolist() == batch.targets.tolist()
    for tensor in (batch.input_ids, batch.position_ids, batch.predict_index, batch.targets, batch.row_of):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_no_rows_make_a_dummy_with_no_loss_tokens(layout):
    batch = make(layout, [], [])
    assert batch.input_ids.tolist() == [[3]]
    assert batch.n_rows == 0
    assert len(batch.predict_index) == len(batch.targets) == len(batch.row_of) == 0
    assert (batch.attention_mask is None) == (layout == "packed")


def test_rows_are_taken_from_ragged_columns():
    tokens, masks = Ragged.from_rows(ROWS, np.int32), Ragged.from_rows(MASKS, bool)
    batch = collate_rows(tokens, masks, [2, 0], layout="packed", pad_token_id=3)
    assert batch.input_ids.tolist() == [ROWS[2] + ROWS[0]]
    assert batch.targets.tolist() == [15, 17, 7, 8]


def test_read_only_rows_from_the_object_store_are_copied():
    tokens = np.array(ROWS[0], dtype=np.int64)
    tokens.flags.writeable = False
    batch = collate([tokens], [np.array(MASKS[0], bool)], layout="packed", pad_token_id=3)
    batch.input_ids[0, 0] = 99
    assert tokens[0] == 5


def test_a_loss_token_that_nothing_predicts_is_refused():
    with pytest.raises(ValueError, match="row 0 marks its first token"):
        make("padded", [[1, 2]], [[1, 0]])


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="row 1 has 2 tokens and a loss mask of 3"):
        make("padded", [[1], [1, 2]], [[0], [0, 1, 1]])


def tiny_qwen2(attention):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return Qwen2ForCausalLM(config).eval()


def log_probs(model, batch: MicroBatch) -> torch.Tensor:
    hidden = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    states = hidden.flatten(0, 1)[batch.predict_index]
    return model.lm_head(states).log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_and_packed_give_the_log_probs_of_each_row_alone(attention):
    model = tiny_qwen2(attention)
    alone = torch.cat([log_probs(model, make("padded", [r], [m])) for r, m in zip(ROWS, MASKS, strict=True)])
    for layout in ("padded", "packed"):
        torch.testing.assert_close(log_probs(model, make(layout)), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_and_packed_give_the_gradient_of_the_rows_one_by_one(attention):
    def gradient(batches):
        model = tiny_qwen2(attention)
        loss = -sum(log_probs(model, batch).sum() for batch in batches) / sum(map(sum, MASKS))
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, alone = gradient([make("padded", [r], [m]) for r, m in zip(ROWS, MASKS, strict=True)])
    for layout in ("padded", "packed"):
        found = gradient([make(layout)])
        assert found[0] == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(found[1], alone, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_packed_batch_do_not_see_each_other(attention):
    model = tiny_qwen2(attention)
    changed = [[40, 41, 42, 43], *ROWS[1:]]
    before, after = (log_probs(model, make("packed", rows)) for rows in (ROWS, changed))
    torch.testing.assert_close(before[2:], after[2:], atol=1e-6, rtol=0)
    assert (before[:2] - after[:2]).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_dummy_runs_through_the_model(layout):
    assert log_probs(tiny_qwen2("sdpa"), make(layout, [], [])).shape == (0,)
