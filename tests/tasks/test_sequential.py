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
from genrec.tasks.rendering import ItemTexts, render_rows
from genrec.tasks.sequential import check_template, explode, history_prompt, sequential_rows

N_ITEMS = 9
SCHEMA = {
    "row_id": pl.String,
    "user_id": pl.String,
    "task": pl.String,
    "target_kind": pl.String,
    "targets": pl.List(pl.Int32),
    "history": pl.List(pl.Int32),
}


@pytest.fixture(scope="module")
def renderer() -> PromptRenderer:
    return PromptRenderer()


def texts_of(semantic_ids) -> ItemTexts:
    titles = pl.Series([f"Thing {i}" for i in range(semantic_ids.n_items)])
    nothing = pl.Series([None] * len(titles), dtype=pl.String)
    return ItemTexts(semantic_ids.sids(), titles, nothing, pl.Series([True] * len(titles)))


def rendered(split, semantic_ids, renderer, template=None, seed=0) -> pl.DataFrame:
    """Rows of a split, with item ids and text."""
    rows = sequential_rows(split)
    return render_rows(rows, texts_of(semantic_ids), renderer, seed, template=template)


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

    def prompts(sequences: list[list[int]]) -> dict[int, list[tuple[str, str]]]:
        """Per user: (prompt, completion) of every position of every split, in order of time."""
        splits = leave_one_out(log_of(sequences), N_ITEMS, max_history=4)
        tables = [explode(splits.train), splits.valid, splits.test]
        made = [rendered(t, semantic_ids, renderer, "sequential/seen/01") for t in tables]
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
        rows = rendered(table, semantic_ids, renderer)
        for row, index in zip(rows.iter_rows(named=True), table["target_item_index"], strict=True):
            assert row["completion"] == sids[index]
            assert row["targets"] == [index]
            assert (row["completion"] in row["prompt"]) == (index in row["history"])


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
        assert mine["target_position"].to_list() == list(range(length))
        for place, history in enumerate(mine["history_item_index"].to_list()):
            assert len(history) <= max_history
            assert history == sequence[place - len(history) : place]
        assert (mine["supervise_from"] == mine["history_item_index"].list.len()).all()
    # What a whole-history row supervises is what its single rows do.
    whole = sequential_rows(train)
    assert whole["targets"].explode().to_list() == rows["target_item_index"].to_list()


def test_explode_by_hand():
    rows = explode(split_rows([([1, 2], 3, 1), ([], 4, 0)]))
    assert rows["row_id"].to_list() == ["train-000000#1", "train-000000#2", "train-000001#0"]
    assert rows["history_item_index"].to_list() == [[1], [1, 2], []]
    assert rows["target_item_index"].to_list() == [2, 3, 4]
    assert rows.schema["supervise_from"] == pl.Int32
    assert rows.columns == split_rows([([], 1, 0)]).columns
    moved = split_rows([([1, 2], 3, 1)]).with_columns(target_position=pl.lit(7, pl.Int32))
    assert explode(moved)["target_position"].to_list() == [6, 7]


def test_rows_by_hand():
    rows = sequential_rows(split_rows([([1, 2, 3], 4, 2), ([], 5, 0), ([6, 7], 8, 0)]))
    assert rows.schema == SCHEMA
    assert rows["history"].to_list() == [[1, 2], [], []]
    assert rows["targets"].to_list() == [[3, 4], [5], [6, 7, 8]]
    assert set(rows["task"]) == {"sequential"} and set(rows["target_kind"]) == {"sids"}


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
            rows = rendered(split, semantic_ids, renderer, template)
            encoded = encode_rows(
                tokenizer, rows["prompt"].to_list(), rows["completion"].to_list(), sid_set
            )
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
        rows = rendered(split, semantic_ids, renderer, seed=4)
        assert rows.columns == [*SCHEMA, "template", "prompt", "completion"]
        assert rows["row_id"].to_list() == split["row_id"].to_list()
        assert rows["user_id"].to_list() == ["b", None, "a"]
        assert rows["targets"].to_list() == [[3], [4], [8]]
        assert rows["history"].to_list() == [[1, 2], [], [8]]
        shuffled = rendered(split[[2, 0, 1]], semantic_ids, renderer, seed=4)
        assert shuffled.sort("row_id").equals(
            rows.sort("row_id")
        )  # no row depends on its neighbours


def test_two_rows_that_share_a_prompt_keep_their_own_targets(tiny, renderer):
    semantic_ids = tiny.sids(N_ITEMS)
    rows = rendered(
        split_rows([([1, 2], 3, 2), ([1, 2], 4, 2)]), semantic_ids, renderer, "sequential/seen/01"
    )
    assert rows["prompt"].n_unique() == 1
    assert rows["targets"].to_list() == [[3], [4]]
    assert rows["completion"].to_list() == semantic_ids.sids().gather([3, 4]).to_list()


def test_no_rows_and_no_history(tiny, renderer):
    semantic_ids = tiny.sids(N_ITEMS)
    one = rendered(split_rows([([], 4, 0)]), semantic_ids, renderer, "sequential/seen/01")
    assert "<" not in one["prompt"][0] and one["history"].to_list() == [[]]
    none = rendered(split_rows([([], 4, 0)])[:0], semantic_ids, renderer)
    assert none.schema == one.schema and len(none) == 0
    assert pl.concat([one, none]).equals(one)


@pytest.mark.parametrize(
    "text", ["{{ history }} What next?", "{{ history | length }}: {{ history }}", "Nothing."]
)
def test_a_template_that_does_not_end_with_the_history_is_refused(tiny, tmp_path, text: str):
    path = tmp_path / "sequential" / "seen" / "01.jinja"
    (tmp_path / "sequential" / "completion").mkdir(parents=True)
    path.parent.mkdir()
    path.write_text(text)
    (tmp_path / "sequential" / "completion" / "01.jinja").write_text("{{ targets }}")
    renderer = PromptRenderer(tmp_path)
    rows = split_rows([([1], 2, 0), ([1], 2, 1)])
    with pytest.raises(ValueError, match="must end with the history"):
        rendered(rows, tiny.sids(N_ITEMS), renderer)
    with pytest.raises(ValueError, match="must end with the history"):
        check_template(renderer, "sequential/seen/01")


def test_the_shipped_templates_pass_the_check(renderer):
    for name in renderer.names("sequential") + renderer.names("sequential", "unseen"):
        check_template(renderer, name)
