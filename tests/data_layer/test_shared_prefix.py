import numpy as np
import pytest

from raytune_rl.data.common_prefix import common_prefix
from raytune_rl.data.shared_prefix import collate_shared


def arrays(rows, dtype=np.int32):
    return [np.array(row, dtype=dtype) for row in rows]


def test_what_is_shared_stands_once():
    rows = arrays([[5, 6, 1, 2], [9, 9, 4], [5, 6, 3]])
    masks = arrays([[0, 0, 1, 1], [0, 1, 0], [0, 0, 1]], bool)
    micro = collate_shared(rows, masks, [7, 8, 7], [2, 2, 2], pad_token_id=0)
    assert micro.input_ids.tolist() == [[5, 6, 1, 2, 3, 9, 9, 4]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    assert micro.shared == ((2, 2, 1), (3,))
    assert micro.attention_mask is None
    # In the order of the rows, and the first token of both answers is predicted from the same state.
    assert micro.predict_index.tolist() == [1, 2, 5, 1]
    assert micro.targets.tolist() == [1, 2, 9, 3]
    assert micro.row_of.tolist() == [0, 0, 1, 2]
    assert micro.row_ends.tolist() == [3, 7, 4]
    assert micro.n_rows == 3


def test_loss_tokens_may_be_shared():
    rows, masks = arrays([[5, 6, 1], [5, 6, 2]]), arrays([[0, 1, 1], [0, 1, 0]], bool)
    micro = collate_shared(rows, masks, [0, 0], [2, 2], pad_token_id=0)
    assert micro.predict_index.tolist() == [0, 1, 0]
    assert micro.targets.tolist() == [6, 1, 6]


def test_only_what_is_the_same_is_shared():
    rows, masks = arrays([[5, 6, 1], [5, 7, 2]]), arrays([[0, 0, 1]] * 2, bool)
    assert collate_shared(rows, masks, [0, 0], [2, 2], pad_token_id=0).shared == ((1, 2, 2),)
    rows = arrays([[4, 6, 1], [5, 6, 2]])
    assert collate_shared(rows, masks, [0, 0], [2, 2], pad_token_id=0).shared == ((3,), (3,))


def test_the_longest_common_beginning():
    rows = arrays([[1, 2, 3, 4], [1, 2, 3], [1, 2, 9, 9]])
    assert common_prefix(rows) == 2 == common_prefix(rows[:2], 9)
    assert common_prefix(rows, 1) == 1
    assert common_prefix(arrays([[1], [1, 2]]), 5) == 0


def test_no_rows_make_a_dummy():
    micro = collate_shared([], [], [], [], pad_token_id=3)
    assert micro.input_ids.tolist() == [[3]]
    assert micro.shared == ((1,),)
    assert micro.n_rows == 0 == len(micro.predict_index) == len(micro.row_ends)


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match="marks its first token"):
        collate_shared(arrays([[1, 2]]), arrays([[1, 0]], bool), [0], [1], pad_token_id=0)
