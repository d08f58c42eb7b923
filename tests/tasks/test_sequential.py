"""Sequential rows: nothing after the prompt's moment can change a byte of it."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.splits import leave_one_out
from genrec.modeling import add_sid_tokens, encode_prompts, encode_rows
from genrec.prompts import PromptRenderer
from genrec.tasks.sequential import explode, history_prompt, sequential_rows

N_ITEMS = 9
SCHEMA = ["row_id", "user_id", "task", "template", "prompt", "completion", "target_item_id"]


@pytest.fixture(scope="module")
def renderer() -> PromptRenderer:
    return PromptRenderer()


def log_of(sequences: list[list[int]], users: list | None = None) -> pl.DataFrame:
    lengths = [len(s) for s in sequences]
    index = np.concatenate([np.array(s, dtype=np.int32) for s in sequences])
    return pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(len(sequences)) if users is None else users, lengths),
            "item_index": index,
            "timestamp": pl.Series([None] * len(index), dtype=pl.Int64),
            "position": np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        }
    )


def split_rows(pairs: list[tuple[list[int], int, int]], users=None) -> pl.DataFrame:
    """Rows of (history, target, supervise_from)."""
    return pl.DataFrame(
        {
            "row_id": [f"train-{i:06}" for i in range(len(pairs))],
            "user_id": [f"u{i}" for i in range(len(pairs))] if users is None else users,
            "history_item_index": pl.Series([p[0] for p in pairs], dtype=pl.List(pl.Int32)),
            "target_item_index": pl.Series([p[1] for p in pairs], dtype=pl.Int32),
            "supervise_from": pl.Series([p[2] for p in pairs], dtype=pl.Int32),
        }
    )


sequences = st.lists(st.integers(0, N_ITEMS - 1), min_size=3, max_size=16)


@settings(max_examples=60, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=4), st.data())
def test_what_comes_later_changes_no_byte_of_a_prompt(tiny, renderer, logs, data):
    semantic_ids = tiny.sids(N_ITEMS)
    cut = [data.draw(st.integers(1, len(s) - 1)) for s in logs]
    others = [
        s[:c]
        + data.draw(st.lists(st.integers(0, N_ITEMS - 1), min_size=len(s) - c, max_size=len(s) - c))
        for s, c in zip(logs, cut, strict=True)
    ]

    def prompts(sequences: list[list[int]]) -> dict[str, list[tuple[str, str]]]:
        """Per user: (prompt, completion) of every position of every split, in order of time."""
        splits = leave_one_out(log_of(sequences), N_ITEMS, max_history=4)
        tables = [explode(splits.train), splits.valid, splits.test]
        made = [sequential_rows(t, semantic_ids, renderer, "sequential/seen/01") for t in tables]
        table = pl.concat(made)
        return {
            user: list(zip(part["prompt"], part["completion"], strict=True))
            for (user,), part in table.group_by("user_id", maintain_order=True)
        }

    before, after = prompts(logs), prompts(others)
    for user, position in enumerate(cut):
        assert len(before[user]) == len(logs[user])
        # The prompt for the item at `position` sees the items before it alone.
        same = position + 1
        assert [p for p, _ in before[user][:same]] == [p for p, _ in after[user][:same]]
        assert before[user][:position] == after[user][:position]


@settings(max_examples=60, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=4))
def test_no_prompt_contains_its_target_unless_it_was_bought_before(tiny, renderer, logs):
    semantic_ids = tiny.sids(N_ITEMS)
    splits = leave_one_out(log_of(logs), N_ITEMS, max_history=5)
    sids = semantic_ids.sids().to_list()
    for table in (explode(splits.train), splits.valid, splits.test):
        rows = sequential_rows(table, semantic_ids, renderer)
        for row, index in zip(rows.iter_rows(named=True), table["target_item_index"], strict=True):
            assert row["completion"] == sids[index]
            assert row["target_item_id"] == semantic_ids.item_ids[index]
            known = row["target_item_id"] in row["history_item_ids"]
            assert (row["completion"] in row["prompt"]) == known


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=16), min_size=1, max_size=5
    ),
    st.integers(1, 6),
)
def test_explode_covers_each_supervised_item_once(logs, max_history: int):
    train = leave_one_out(log_of(logs), N_ITEMS, max_history).train
    rows = explode(train)
    assert rows["row_id"].n_unique() == len(rows)
    for user, sequence in enumerate(logs):
        length = len(sequence) - 2 if len(sequence) >= 3 else len(sequence)
        mine = rows.filter(pl.col("user_id") == user)
        assert mine["target_item_index"].to_list() == sequence[:length]
        for place, history in enumerate(mine["history_item_index"].to_list()):
            assert len(history) <= max_history
            assert history == sequence[place - len(history) : place]
        assert (mine["supervise_from"] == mine["history_item_index"].list.len()).all()


def test_explode_by_hand():
    rows = explode(split_rows([([1, 2], 3, 1), ([], 4, 0)]))
    assert rows["row_id"].to_list() == ["train-000000#1", "train-000000#2", "train-000001#0"]
    assert rows["history_item_index"].to_list() == [[1], [1, 2], []]
    assert rows["target_item_index"].to_list() == [2, 3, 4]
    assert rows.schema["supervise_from"] == pl.Int32
    assert rows.columns == split_rows([([], 1, 0)]).columns


@pytest.mark.parametrize("bos", [False, True])
def test_the_served_prompt_is_a_token_prefix_of_the_training_row(tiny, renderer, bos: bool):
    semantic_ids = tiny.sids(N_ITEMS)
    tokenizer = tiny.tokenizer(bos)
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    sid_set = {t for level in token_ids for t in level}
    sids = semantic_ids.sids().to_list()
    pairs = [([3, 1, 4, 1, 5], 2, 0), ([6, 5], 3, 1), ([], 0, 0), ([7, 7, 8], 7, 3)]
    names = renderer.names("sequential") + renderer.names("sequential", "unseen")
    for template in names:
        for split in (split_rows(pairs), explode(split_rows(pairs))):
            rows = sequential_rows(split, semantic_ids, renderer, template)
            encoded = encode_rows(tokenizer, rows["prompt"], rows["completion"], sid_set)
            for row, ids, labels in zip(
                split.iter_rows(named=True), encoded["input_ids"], encoded["labels"], strict=True
            ):
                items = [*row["history_item_index"], row["target_item_index"]]
                start = row["supervise_from"]
                for place in range(start, len(items)):
                    served = history_prompt(renderer, template, [sids[i] for i in items[:place]])
                    (prompt,) = encode_prompts(tokenizer, [served])
                    target = [
                        token_ids[level][c]
                        for level, c in enumerate(semantic_ids.codes[items[place]])
                    ]
                    assert ids[: len(prompt)] == prompt
                    assert ids[len(prompt) : len(prompt) + 3] == target
                    assert labels[len(prompt) : len(prompt) + 3] == target
                    if place == start:
                        assert set(labels[: len(prompt)]) == {-100}
                assert len(ids) == len(prompt) + 3  # the last place is the end: no EOS


def test_rows_keep_their_order_ids_and_types(tiny, renderer):
    for strings in (False, True):
        semantic_ids = tiny.sids(N_ITEMS, strings=strings)
        users = pl.Series(["b", None, "a"])
        split = split_rows([([1, 2], 3, 2), ([], 4, 0), ([8], 8, 1)], users)
        rows = sequential_rows(split, semantic_ids, renderer, seed=4)
        assert rows.columns == [*SCHEMA, "history_item_ids"]
        assert rows["row_id"].to_list() == split["row_id"].to_list()
        assert rows["user_id"].to_list() == ["b", None, "a"]
        ids = semantic_ids.item_ids.to_list()
        assert rows["target_item_id"].to_list() == [ids[3], ids[4], ids[8]]
        assert rows["history_item_ids"].to_list() == [[ids[1], ids[2]], [], [ids[8]]]
        assert rows.schema["history_item_ids"] == pl.List(semantic_ids.item_ids.dtype)
        shuffled = sequential_rows(split[[2, 0, 1]], semantic_ids, renderer, seed=4)
        assert shuffled.sort("row_id").equals(
            rows.sort("row_id")
        )  # no row depends on its neighbours


def test_two_rows_that_share_a_prompt_keep_their_own_targets(tiny, renderer):
    semantic_ids = tiny.sids(N_ITEMS)
    rows = sequential_rows(
        split_rows([([1, 2], 3, 2), ([1, 2], 4, 2)]), semantic_ids, renderer, "sequential/seen/01"
    )
    assert rows["prompt"].n_unique() == 1
    assert rows["target_item_id"].to_list() == [103, 104]
    assert rows["completion"].n_unique() == 2


def test_no_rows_and_no_history(tiny, renderer):
    semantic_ids = tiny.sids(N_ITEMS)
    one = sequential_rows(split_rows([([], 4, 0)]), semantic_ids, renderer, "sequential/seen/01")
    assert "<" not in one["prompt"][0] and one["history_item_ids"].to_list() == [[]]
    none = sequential_rows(split_rows([([], 4, 0)])[:0], semantic_ids, renderer)
    assert none.schema == one.schema and len(none) == 0
    assert pl.concat([one, none]).equals(one)


def test_a_template_with_text_behind_the_history_is_refused(tiny, tmp_path):
    path = tmp_path / "sequential" / "seen" / "01.jinja"
    path.parent.mkdir(parents=True)
    path.write_text("{{ history }} What next?")
    with pytest.raises(ValueError, match="must end with the history"):
        sequential_rows(
            split_rows([([1], 2, 0), ([1], 2, 1)]), tiny.sids(N_ITEMS), PromptRenderer(tmp_path)
        )
