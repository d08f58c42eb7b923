"""Tries with a hub among narrow nodes are expanded block by block; no list changes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from genrec.decoding import lm_head, trie_tensors
from genrec.decoding.beam import (
    NORMALIZERS,
    BeamResult,
    Beams,
    best_in_rows,
    code_log_probs,
    finish,
    rank_key,
    step,
)
from genrec.decoding.lm_head import HeadColumns, SidHead
from genrec.decoding.sampling import Draws, GumbelTopK, LevelSampling, Sampler
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import CatalogueView, SidTrie
from genrec.decoding.trie_tensors import LevelFilter, TrieTensors

CPU = torch.device("cpu")
HUB, N_HUB, N_FIRST = 11, 5000, 30
Filters = dict[str, Any]  # of a search: view, seen, candidates


@lru_cache
def hub_codes(below: int = 0) -> np.ndarray:
    """30 clusters, one with 5,000 items and the others with 1 to 6; each item a token of its own.

    `below`: 0, or a third level on which most nodes have one child and one has so many.
    """
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 7, N_FIRST)
    sizes[HUB] = N_HUB
    first = np.repeat(np.arange(N_FIRST), sizes)
    codes = np.column_stack([first, rng.permutation(len(first))])
    if below:
        codes = np.column_stack([codes, np.zeros(len(codes), dtype=int)])
        more = np.repeat(codes[first == 4][:1], below, axis=0)
        more[:, 2] += np.arange(1, below + 1)
        codes = np.concatenate([codes, more])
    return codes[rng.permutation(len(codes))].astype(np.int32)


@lru_cache
def logits_of(users: int, below: int = 0, quarters: bool = False) -> list[Tensor]:
    """Per level logits behind every prefix, (users, nodes above, codes)."""
    codes = hub_codes(below)
    trie = SidTrie.build(codes)
    rng = np.random.default_rng(users)
    made = []
    for level in range(trie.n_levels):
        above = len(trie.tokens[level - 1]) if level else 1
        # Wide levels share a row of logits, or the table would not fit.
        shape = (users, min(above, N_FIRST), int(codes[:, level].max()) + 1)
        table = rng.integers(-8, 1, shape) / 4 if quarters else 2 * rng.normal(size=shape)
        made.append(torch.from_numpy(table[:, np.arange(above) % shape[1]]).float())
    return made


def columns_of(logits: Tensor, normalizer: str) -> Tensor:
    """`normalize`'s columns: "full" with as much mass again outside the level."""
    if normalizer == "trie":
        return logits
    columns = logits.log_softmax(-1)
    return columns - np.log(2) if normalizer == "full" else columns


def search(
    trie: SidTrie,
    columns: Sequence[Tensor],
    normalizer: Any,
    k: int,
    width: int,
    view: CatalogueView | None = None,
    seen: Any = None,
    candidates: Any = None,
    sampler: Sampler | None = None,
) -> BeamResult:
    """The search by hand over tables (users, nodes above, codes)."""
    tensors = TrieTensors(trie, view, CPU)
    filters: Sequence[LevelFilter | None] = tensors.exclusions(seen, candidates) or [None] * 9
    users = len(columns[0])
    draws = None
    if sampler is not None:
        prompts = [[user] for user in range(users)]
        draws = Draws.start(sampler, trie.n_levels, prompts, width, CPU)
    beams = Beams.start(users, CPU, draws)
    rows = torch.arange(users).unsqueeze(1)
    for level, table in enumerate(columns):
        own = table[rows, beams.nodes] if level else table
        beams = step(tensors, level, beams, own, normalizer, filters[level], width)
    return finish(tensors, beams, k, np.arange(users))


def true_scores(trie: SidTrie, columns: Sequence[Tensor], normalizer: str) -> np.ndarray:
    """Scores of all items, (users, items): node by node, parent by parent."""
    total = np.zeros((len(columns[0]), trie.n_items))
    for level, table in enumerate(columns):
        starts = trie.children[level]
        parent = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        edge = table.double().numpy()[:, parent, trie.tokens[level]]
        if normalizer == "trie":
            over = np.logaddexp.reduceat(edge, starts[:-1], axis=1)
            edge = edge - over[:, parent]
        total += edge[:, trie.node_of_leaf(level, trie.leaf_of_item)]
    return total


def filters_of(trie: SidTrie, codes: np.ndarray, users: int, kind: str) -> Filters:
    """Filters that hold for some of the hub's items, of the narrow nodes', and of both."""
    rng = np.random.default_rng(5)
    hub, narrow = (np.flatnonzero((codes[:, 0] == HUB) == which) for which in (True, False))
    seen = [np.append(rng.choice(hub, 900), rng.choice(narrow, 9)) for _ in range(users)]
    seen[0] = narrow  # nothing but the hub is left, and beams are dead
    wanted: list[np.ndarray | None] = [
        np.append(rng.choice(hub, 700), rng.choice(narrow, 9)) for _ in range(users)
    ]
    wanted[-1] = None if users > 1 else wanted[-1]
    mask = rng.random(len(codes)) < 0.5
    mask[narrow[:4]] = True
    return {
        "none": {},
        "seen": {"seen": seen},
        "candidates": {"candidates": wanted},
        "view": {"view": trie.view(mask)},
        "few left": {"view": trie.allow(np.append(narrow[:2], hub[:1]))},
        "all": {"view": trie.view(mask), "seen": seen[::-1], "candidates": wanted},
    }[kind]


KINDS = ("none", "seen", "candidates", "view", "few left", "all")


def allowed_items(n_items: int, users: int, what: Filters) -> np.ndarray:
    """What each user may get, (users, items) bool."""
    allowed = np.ones((users, n_items), dtype=bool)
    for user in range(users):
        if (wanted := (what.get("candidates") or [None] * users)[user]) is not None:
            allowed[user] = np.isin(np.arange(n_items), wanted)
        if "seen" in what:
            allowed[user, what["seen"][user]] = False
        if "view" in what:
            allowed[user] &= what["view"].mask()
    return allowed


def one_length(n_children: np.ndarray, narrow: int) -> list[int]:
    """Of `_row_lengths`: pad every row to the longest."""
    return [int(n_children.max())]


def assert_same(made: BeamResult, wanted: BeamResult, tolerance: float) -> None:
    assert np.array_equal(made.items, wanted.items)
    assert np.array_equal(made.certified, wanted.certified)
    for name in ("scores", "level_log_probs", "pruned"):
        one, other = getattr(made, name), getattr(wanted, name)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("users", [1, 7])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_prefixes_kept_is_the_true_top_k(
    reference: Any, kind: str, normalizer: str, users: int
):
    codes = hub_codes()
    trie = SidTrie.build(codes)
    columns = [columns_of(table, normalizer) for table in logits_of(users)]
    what = filters_of(trie, codes, users, kind)
    allowed = allowed_items(len(codes), users, what)
    truth = np.where(allowed, true_scores(trie, columns, normalizer), -np.inf)
    result = search(trie, columns, normalizer, 20, N_FIRST + 10, **what)
    reference.assert_same_lists(result.items, result.scores, truth, 1e-5)
    assert result.certified.all()  # of the last level nothing counts as cut off


@pytest.mark.parametrize("users", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_ties_are_settled_as_everywhere(reference: Any, kind: str, users: int):
    """Quarters, so that thousands of items tie: lists are equal to the last bit."""
    codes = hub_codes()
    trie = SidTrie.build(codes)
    columns = logits_of(users, quarters=True)
    what = filters_of(trie, codes, users, kind)
    allowed = allowed_items(len(codes), users, what)
    truth = np.where(allowed, true_scores(trie, columns, "full"), -np.inf)
    k = min(20, int(allowed.sum(1).min()))
    result = search(trie, columns, "full", 20, N_FIRST + 10, **what)
    assert (result.items[:, :k] == reference.ranking(truth, codes)[:, :k]).all()
    assert (result.scores[:, :k] == -np.sort(-truth)[:, :k]).all()


@pytest.mark.parametrize("width", [3, 20])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_what_one_padded_rectangle_gives(
    kind: str, normalizer: str, width: int, monkeypatch: pytest.MonkeyPatch
):
    """Three levels, narrow and dead beams; bit for bit but for sums over a row's end."""
    codes = hub_codes(500)
    trie = SidTrie.build(codes)
    for quarters in (False, True):
        columns = [columns_of(table, normalizer) for table in logits_of(3, 500, quarters)]
        what = filters_of(trie, codes, 3, kind)
        made = search(trie, columns, normalizer, width, width, **what)
        with monkeypatch.context() as patch:
            patch.setattr(trie_tensors, "_row_lengths", one_length)
            whole = search(trie, columns, normalizer, width, width, **what)
        assert_same(made, whole, 2e-6 if normalizer == "trie" else 0.0)
        if width != 3:
            continue
        with monkeypatch.context() as patch:  # memory for a row at a time
            patch.setattr(trie_tensors, "_CELLS_AT_ONCE", 1)
            assert_same(search(trie, columns, normalizer, width, width, **what), made, 0.0)


SAMPLERS = [
    GumbelTopK(3),
    LevelSampling((1.0, 2.0, 0.5), 0.9, seed=1),
    LevelSampling(1.5, 0.7, replacement=True, seed=2),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["gumbel", "distinct", "replacement"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_draw_what_one_padded_rectangle_draws(
    kind: str, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
):
    codes = hub_codes(500)
    trie = SidTrie.build(codes)
    what = filters_of(trie, codes, 3, kind)
    columns = logits_of(3, 500)
    made = search(trie, columns, "trie", 12, 12, sampler=sampler, **what)
    monkeypatch.setattr(trie_tensors, "_row_lengths", one_length)
    whole = search(trie, columns, "trie", 12, 12, sampler=sampler, **what)
    assert_same(made, whole, 2e-6)
    assert made.sample is not None and whole.sample is not None
    for name in ("log_probs", "keys", "threshold"):
        one, other = getattr(made.sample, name), getattr(whole.sample, name)
        if one is None:
            assert other is None
        else:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5, err_msg=name)


def test_a_users_list_does_not_depend_on_the_batch():
    trie = SidTrie.build(hub_codes(500))
    columns = logits_of(7, 500)
    together = search(trie, columns, "trie", 10, 10)
    for user in (0, 6):
        alone = search(trie, [table[user : user + 1] for table in columns], "trie", 10, 10)
        assert np.array_equal(alone.items[0], together.items[user])
        assert np.array_equal(alone.level_log_probs[0], together.level_log_probs[user])


def test_nan_of_one_child_of_the_hub_surfaces():
    trie = SidTrie.build(hub_codes())
    first, second = (table.clone() for table in logits_of(1))
    hub = int(np.flatnonzero(trie.tokens[0] == HUB)[0])
    second[0, hub, trie.tokens[1][trie.children[1][hub] + 77]] = torch.nan
    for normalizer in ("full", "trie"):
        with pytest.raises(ValueError, match="NaN"):
            search(trie, [first, second], normalizer, 5, N_FIRST)


# Which beams go together.


def test_lengths_of_rows_by_hand():
    lengths = trie_tensors._row_lengths
    assert lengths(np.full(256, 470), 64) == [470]  # even
    assert lengths(np.array([400, 300, 200, 100]), 64) == [400]  # even enough
    assert lengths(np.array([1, 60, 2, 3]), 64) == [60]  # uneven, but narrow
    hub = np.append(np.full(29, 4), 1000)
    assert lengths(hub, 64) == [63, 125, 250, 500, 1000]
    assert lengths(hub, 1024) == [1000]


def test_blocks_hold_every_live_beam_once_in_a_row_that_fits():
    trie = SidTrie.build(hub_codes(500))
    tensors = TrieTensors(trie, None, CPU)
    rng = np.random.default_rng(0)
    for level in (1, 2):
        counts = np.diff(trie.children[level])
        nodes = torch.from_numpy(rng.integers(0, len(counts), 400))
        nodes[:3] = int(counts.argmax())
        live = torch.from_numpy(rng.random(400) < 0.7)
        blocks = tensors.blocks(level, nodes, live)
        rows = torch.cat([own for own, _ in blocks])
        assert torch.equal(rows.sort().values, live.nonzero().squeeze(1)) and len(blocks) > 1
        for own, length in blocks:
            n_children = counts[nodes[own].numpy()]
            assert (n_children <= length).all()
            assert (2 * n_children >= length).all() or length <= trie_tensors._NARROW["cpu"]
    assert tensors.blocks(2, nodes, torch.zeros(400, dtype=torch.bool)) == []


def test_an_even_level_is_one_block_in_order():
    codes = np.stack(np.meshgrid(np.arange(9), np.arange(80)), -1).reshape(-1, 2)
    tensors = TrieTensors(SidTrie.build(codes), None, CPU)
    nodes = torch.tensor([4, 4, 0, 8])
    ((rows, length),) = tensors.blocks(1, nodes, torch.tensor([True, False, True, True]))
    assert rows.tolist() == [0, 1, 2, 3] and length == 80


def test_filters_hold_for_a_node_that_several_beams_are_at():
    """Draws with replacement meet; what one may not get, none may."""
    trie = SidTrie.build(hub_codes())
    tensors = TrieTensors(trie, None, CPU)
    hub = int(np.flatnonzero(trie.tokens[0] == HUB)[0])
    gone = np.sort(trie.items[[trie.children[1][hub] + place for place in (0, 5, 4999)]])
    filters = tensors.exclusions([gone, np.array([], dtype=int)])
    assert filters is not None
    nodes = torch.tensor([hub, hub - 1, hub, hub, hub + 1])
    user = torch.tensor([0, 0, 0, 1, 0])
    child, exists = tensors.expand(1, nodes, N_HUB)
    allowed = tensors.allowed(1, child, filters[1], user) & exists
    out = exists & ~allowed
    assert [row.nonzero().flatten().tolist() for row in out] == [
        [0, 5, 4999],
        [],
        [0, 5, 4999],
        [],
        [],
    ]


def test_the_best_of_a_row_are_exact_whether_or_not_they_tie():
    rng = np.random.default_rng(1)
    for scores in (rng.normal(size=(40, 60)), rng.integers(-3, 0, (40, 60)) / 4.0):
        table = torch.from_numpy(scores).float()
        table[3, 5:] = -torch.inf  # fewer than are wanted
        nodes = torch.arange(60) + 100 * torch.arange(40).unsqueeze(1)
        for keep in (1, 7):
            made = best_in_rows(table, nodes, keep).sort(1).values
            key = rank_key(table, nodes)
            wanted = key.argsort(dim=1, descending=True)[:, :keep].sort(1).values
            dead = torch.isneginf(table.gather(1, wanted))
            assert torch.equal(made[~dead], wanted[~dead])
            assert torch.isneginf(table.gather(1, made)[dead]).all()


# The head's columns, where a level has many.


@dataclass
class Wide:
    """A tiny model whose last level has a token for each item."""

    model: LlamaForCausalLM
    codes: np.ndarray
    sid_ids: list[list[int]]
    prompts: list[list[int]]


@lru_cache
def wide(apart: bool = False) -> Wide:
    """400 items in 8 clusters, 330 of them in one; `apart`: tokens in no order."""
    rng = np.random.default_rng(4)
    first = np.append(np.full(330, 5), rng.integers(0, 8, 70))
    codes = np.column_stack([first, rng.permutation(400)])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    model.lm_head.bias = torch.nn.Parameter(torch.randn(512))
    ids = 100 + (rng.permutation(408) if apart else np.arange(408))
    prompts = [rng.integers(0, 100, n).tolist() for n in (3, 9, 5)]
    return Wide(model, codes, [ids[:8].tolist(), ids[8:].tolist()], prompts)


# (WIDE, _FEW): every column, chosen ones alone, and both by the length of the rows.
WAYS = {"all": (4, 10**9), "chosen": (4, 0), "both": (4, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_columns_asked_for_are_those_of_the_whole_head(
    normalizer: Any, way: str, apart: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    case = wide(apart)
    monkeypatch.setattr(lm_head, "WIDE", WAYS[way][0])
    monkeypatch.setattr(lm_head, "_FEW", WAYS[way][1])
    monkeypatch.setattr(lm_head, "_NUMBERS_AT_ONCE", 700)
    monkeypatch.setattr(lm_head, "_LOGITS_AT_ONCE", 1000)  # a table of the level is too large
    model = deepcopy(case.model).to(dtype)
    head = SidHead(model, [torch.tensor(ids) for ids in case.sid_ids], normalizer)
    rng = np.random.default_rng(0)
    with torch.inference_mode():
        states = torch.from_numpy(rng.normal(size=(2, 3, 32))).to(dtype)
        whole = head.columns(1, states)
        made = head.open_columns(1, states)
        assert isinstance(made, HeadColumns) and made.shape == whole.shape
        rows = torch.tensor([4, 0, 4, 2, 5])
        for length in (1, 90, 300):
            codes = torch.from_numpy(rng.integers(0, 400, (5, length)))
            wanted = whole.flatten(0, 1)[rows].gather(1, codes)
            got = made.pick(rows, codes)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


def test_a_narrow_level_is_a_table():
    case = wide()
    head = SidHead(case.model, [torch.tensor(ids) for ids in case.sid_ids], "trie")
    states = torch.zeros(1, 2, 32)
    assert torch.equal(head.open_columns(0, states), head.columns(0, states))
    assert isinstance(head.open_columns(1, states), Tensor)  # 400 codes are few


def test_a_table_that_the_normaliser_needs_is_kept(monkeypatch: pytest.MonkeyPatch):
    case = wide()
    monkeypatch.setattr(lm_head, "WIDE", 8)
    head = SidHead(case.model, [torch.tensor(ids) for ids in case.sid_ids], "level")
    states = torch.ones(1, 2, 32)
    assert torch.equal(head.open_columns(1, states), head.columns(1, states))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_engine_searches_and_scores_item_tokens_exactly(
    reference: Any, normalizer: Any, way: str, monkeypatch: pytest.MonkeyPatch
):
    case = wide()
    monkeypatch.setattr(lm_head, "WIDE", WAYS[way][0])
    monkeypatch.setattr(lm_head, "_FEW", WAYS[way][1])
    monkeypatch.setattr(lm_head, "_LOGITS_AT_ONCE", 1000)
    trie = SidTrie.build(case.codes)
    engine = TorchEngine(case.model, trie, case.sid_ids, 0, normalizer)
    truth = reference.exhaustive(case.model, case.prompts, case.codes, case.sid_ids, normalizer)
    seen = [np.arange(0, 400, 3), np.array([], dtype=int), np.arange(330, 400)]
    scores = truth.sum(-1)
    for user, gone in enumerate(seen):
        scores[user, gone] = -np.inf
    result = engine.search(case.prompts, 25, 30, seen)
    reference.assert_same_lists(result.items, result.scores, scores, 5e-5)
    items = np.stack([np.arange(300, 400)] * 3)
    np.testing.assert_allclose(engine.score(case.prompts, items), truth[:, items[0]], atol=5e-5)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_given_children_score_as_a_search_scores_them(normalizer: Any):
    trie = SidTrie.build(hub_codes(500))
    tensors = TrieTensors(trie, None, CPU)
    rng = np.random.default_rng(2)
    items = rng.integers(0, trie.n_items, (3, 50))
    columns = [columns_of(table, normalizer) for table in logits_of(3, 500)]
    leaf = trie.leaf_of_item[items]
    parents, total = torch.zeros(3, 50, dtype=torch.int64), torch.zeros(3, 50)
    for level, table in enumerate(columns):
        nodes = torch.from_numpy(trie.node_of_leaf(level, leaf))
        own = table[torch.arange(3).unsqueeze(1), parents] if level else table
        total += code_log_probs(tensors, level, parents, nodes, own, normalizer)
        parents = nodes
    truth = np.take_along_axis(true_scores(trie, columns, normalizer), items, axis=1)
    np.testing.assert_allclose(total.numpy(), truth, atol=1e-5)
