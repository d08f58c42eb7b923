"""Samplers over the trie: their noise, their distributions against enumeration, and the engine."""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from genrec.decoding.beam import (
    NORMALIZERS,
    BeamResult,
    Beams,
    advance,
    finish,
)
from genrec.decoding.sampling import (
    Draws,
    GumbelTopK,
    LevelSampling,
    Sample,
    Sampler,
    check_sampler,
    given_maximum,
    gumbel,
    hash_nodes,
    mix,
    split_of,
    streams_of,
)
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.decoding.trie_tensors import TrieTensors

CPU = torch.device("cpu")
INF = float("inf")
# A small catalogue with unequal branches: root -> 0 (two items), 1 (one item), 2 (three items).
CODES = np.array([[2, 1], [0, 0], [1, 3], [2, 0], [0, 2], [2, 3]])
EDGE = [[0.5, 0.2, 0.3], [0.7, 0.3, 1.0, 0.1, 0.3, 0.6]]  # by node, in order of SIDs
N = 10_000


def draw(
    sampler: Sampler,
    k: int,
    n: int = N,
    codes: np.ndarray = CODES,
    edge: list[list[float]] = EDGE,
    seen: np.ndarray | None = None,
    allow: np.ndarray | None = None,
    width: int | None = None,
) -> BeamResult:
    """Lists of `n` prompts [0], [1], … for given edge probabilities."""
    trie = SidTrie.build(codes)
    tensors = TrieTensors(trie, None if allow is None else trie.allow(allow), CPU)
    dead = tensors.exclusions(None if seen is None else [seen] * n)
    prompts = [[i] for i in range(n)]
    draws = Draws.start(sampler, trie.n_levels, prompts, width or k, CPU)
    beams = Beams.start(n, CPU, draws)
    for level in range(trie.n_levels):
        nodes = beams.nodes if level else torch.zeros_like(beams.nodes)
        child, exists = tensors.expand(level, nodes)
        allowed = tensors.allowed(level, child, None if dead is None else dead[level]) & exists
        log_probs = torch.tensor(edge[level]).log()[child].masked_fill(~allowed, -torch.inf)
        beams = advance(tensors, level, beams, child, log_probs, width or k)
    return finish(tensors, beams, k, np.arange(n))


def path_probabilities(split: Any, allowed: set[int] | None = None) -> np.ndarray:
    """Probability of each item of the small catalogue when every node splits by `split`.

    Args:
        split: weights of a node's allowed children -> their probabilities.
        allowed: items that may be drawn.
    """
    allowed = set(range(len(CODES))) if allowed is None else allowed
    order = sorted(range(len(CODES)), key=lambda i: tuple(CODES[i]))
    weight = dict(zip(order, EDGE[1], strict=True))
    groups = {a: [i for i in order if CODES[i, 0] == a and i in allowed] for a in range(3)}
    alive = [a for a in range(3) if groups[a]]
    p = np.zeros(len(CODES))
    for a, share in zip(alive, split([EDGE[0][a] for a in alive]), strict=True):
        p[groups[a]] = share * np.array(split([weight[i] for i in groups[a]]))
    return p


def plain(weights: list[float]) -> list[float]:
    return [w / sum(weights) for w in weights]


def fits(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """P-value of a chi-square test; 0 if something impossible was observed."""
    possible = probabilities > 0
    if observed[~possible].sum():
        return 0.0
    expected = probabilities[possible] * observed.sum()
    return float(stats.chisquare(observed[possible], expected).pvalue)


def ordered_pairs(p: np.ndarray) -> np.ndarray:
    """P(first two of a sample without replacement), (items, items)."""
    pairs = p[:, None] * p[None, :] / (1 - p)[:, None]
    np.fill_diagonal(pairs, 0)
    return pairs


def count_pairs(items: np.ndarray, n_items: int = len(CODES)) -> np.ndarray:
    counts = np.zeros((n_items, n_items))
    np.add.at(counts, (items[:, 0], items[:, 1]), 1)
    return counts


# Noise.


def test_the_noise_is_splitmix64():
    # Reference outputs of the published generator for seed 1234567.
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = hash_nodes(torch.tensor([1234567]), torch.arange(4))
    assert [int(word) % (1 << 64) for word in got] == want


def test_the_noise_is_gumbel_along_nodes_and_along_streams():
    streams = torch.from_numpy(streams_of(0, [[i] for i in range(N)]))
    nodes = torch.arange(N)
    for words in (
        hash_nodes(streams[:1], nodes),
        hash_nodes(streams, nodes[:1]),
        mix(streams),
    ):
        assert stats.kstest(gumbel(words).numpy(), "gumbel_r").pvalue > 0.01
    # What differs in stream, level or node alone is uncorrelated.
    two = gumbel(hash_nodes(streams.unsqueeze(1), torch.arange(2))).numpy()
    assert abs(np.corrcoef(two.T)[0, 1]) < 4 / np.sqrt(N)
    ends = gumbel(torch.tensor([0, -1, 1 << 62, -(1 << 63), (1 << 63) - 1]))
    assert torch.isfinite(ends).all()
    assert ends.dtype == torch.float64


def test_streams_depend_on_seed_and_tokens_alone():
    a = streams_of(3, [[5, 6], [7], [5, 6]])
    assert a[0] == a[2] != a[1]
    assert (streams_of(3, [np.array([5, 6], dtype=np.int32), (7,)]) == a[:2]).all()
    assert (streams_of(4, [[5, 6], [7]]) != a[:2]).all()
    assert streams_of(3, [[5], [6]])[0] != streams_of(3, [[5, 6]])[0]
    assert len(streams_of(0, [])) == 0


# Splitting a node.


def test_a_node_is_split_by_hand():
    log_p = torch.tensor([[0.5, 0.25, 0.2, 0.05, 0.0]]).log()
    assert split_of(log_p, 1.0, 1.0).exp()[0].tolist() == pytest.approx([0.5, 0.25, 0.2, 0.05, 0])
    root = np.sqrt([0.5, 0.25, 0.2, 0.05])  # temperature 2
    got = split_of(log_p, 2.0, 1.0).exp()[0].tolist()
    assert got == pytest.approx([*(root / root.sum()), 0.0])
    for top_p, kept in ((0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.96, 4), (1, 4)):
        got = split_of(log_p, 1.0, top_p).exp()[0]
        assert (got > 0).sum() == kept
        want = np.array([0.5, 0.25, 0.2, 0.05])[:kept]
        assert got[:kept].tolist() == pytest.approx((want / want.sum()).tolist())
    # What a node's log-probabilities sum to doesn't matter: normalisers draw alike.
    assert torch.allclose(split_of(log_p - 7.0, 1.0, 1.0), split_of(log_p, 1.0, 1.0), atol=1e-6)


def test_ties_in_top_p_go_to_the_smaller_code():
    log_p = torch.tensor([[0.2, 0.4, 0.4], [0.25, 0.25, 0.5]]).log()
    assert (split_of(log_p, 1.0, 0.3) > -INF).tolist() == [
        [False, True, False],
        [False] * 2 + [True],
    ]
    assert (split_of(log_p, 1.0, 0.6) > -INF).tolist() == [[False, True, True], [True, False, True]]


def test_temperature_comes_before_top_p():
    log_p = torch.tensor([[0.6, 0.3, 0.1]]).log()
    assert (split_of(log_p, 0.5, 0.75) > -INF).sum() == 1  # .36 / .46 = .78
    assert (split_of(log_p, 1.0, 0.75) > -INF).sum() == 2


def test_dead_nodes_and_nan_in_a_split():
    log_p = torch.tensor([[-INF, -INF], [torch.nan, -1.0], [-3e38, -2e38]])
    for top_p in (1.0, 0.5):
        split = split_of(log_p, 1e-3, top_p)
        assert (split[0] == -INF).all()
        assert torch.isnan(split[1]).all()
        assert split[2].tolist() == pytest.approx([-1e41 if top_p == 1 else -INF, 0.0], rel=1e-6)


# Gumbels given their maximum.


def test_given_maximum_by_its_definition():
    rng = np.random.default_rng(0)
    noisy = rng.gumbel(size=(200, 5)) + rng.normal(size=(200, 5))
    maximum = rng.gumbel(size=(200, 1))
    got = given_maximum(torch.tensor(noisy), torch.tensor(maximum)).numpy()
    g, t = noisy.astype(np.longdouble), maximum.astype(np.longdouble)
    want = -np.log(np.exp(-t) - np.exp(-g.max(1, keepdims=True)) + np.exp(-g))
    assert np.abs(got - want).max() < 1e-12
    assert (got.max(1, keepdims=True) == maximum).all()
    assert (got.argsort(1) == noisy.argsort(1)).all()


def test_given_maximum_is_finite_where_the_definition_is_not():
    noisy = torch.tensor(
        [[-5e5, -4e5, 3.0], [900.0, 899.0, -INF], [-INF] * 3, [1.0, 2.0, 0.0]],
        dtype=torch.float64,
    )
    maximum = torch.tensor([[2000.0], [-2000.0], [1.0], [-INF]], dtype=torch.float64)
    got = given_maximum(noisy, maximum)
    assert not torch.isnan(got).any()
    assert got[0].tolist() == [-5e5, -4e5, 2000.0]
    assert got[1, 0] == -2000.0
    assert got[1, 1] == pytest.approx(-2000.0 - 0.0, abs=1e-9) and got[1, 2] == -INF
    assert (got[2] == -INF).all() and (got[3] == -INF).all()


# Distributions against enumeration.


def test_gumbel_top_k_is_a_sample_without_replacement():
    p = path_probabilities(plain)
    assert p.sum() == pytest.approx(1) and p[1] == pytest.approx(0.5 * 0.7)
    result = draw(GumbelTopK(), 2)
    assert fits(np.bincount(result.items[:, 0], minlength=6), p) > 0.01
    assert fits(count_pairs(result.items), ordered_pairs(p)) > 0.01
    assert fits(count_pairs(draw(GumbelTopK(seed=1), 2).items), ordered_pairs(p)) > 0.01


def test_a_wrong_distribution_would_be_noticed():
    """The chi-square tests of this file tell a sample from one that is a few per cent off."""
    p = path_probabilities(plain)
    off = p * np.linspace(0.9, 1.1, 6)
    items = draw(GumbelTopK(), 2).items
    assert fits(np.bincount(items[:, 0], minlength=6), off / off.sum()) < 1e-6
    assert fits(count_pairs(items), ordered_pairs(off / off.sum())) < 1e-6


def test_filters_renormalise_node_by_node_and_not_over_items():
    allowed = {0, 1, 2, 5}  # items 3 and 4 are filtered, one by the view and one as seen
    along_paths = path_probabilities(plain, allowed)
    over_items = path_probabilities(plain) * [i in allowed for i in range(6)]
    over_items /= over_items.sum()
    assert along_paths[1] == pytest.approx(0.5)  # the only one left below code 0
    assert over_items[1] == pytest.approx(0.35 / 0.82)
    result = draw(GumbelTopK(), 2, seen=np.array([3]), allow=np.array([0, 1, 2, 3, 5]))
    assert fits(np.bincount(result.items[:, 0], minlength=6), along_paths) > 0.01
    assert fits(count_pairs(result.items), ordered_pairs(along_paths)) > 0.01
    assert fits(np.bincount(result.items[:, 0], minlength=6), over_items) < 1e-6
    assert result.sample is not None
    assert np.exp(result.sample.log_probs) == pytest.approx(along_paths[result.items], rel=1e-5)
    # The score stays the declared one.
    assert np.exp(result.scores) == pytest.approx(path_probabilities(plain)[result.items], rel=1e-5)


def tempered(temperature: float) -> Any:
    return lambda weights: plain([w ** (1 / temperature) for w in weights])


@pytest.mark.parametrize("replacement", [False, True])
def test_a_temperature_per_level(replacement: bool):
    p = path_probabilities(tempered(2.0))
    assert abs(p - path_probabilities(plain)).max() > 0.02
    result = draw(LevelSampling(temperature=2.0, replacement=replacement), 2)
    assert fits(np.bincount(result.items[:, 0], minlength=6), p) > 0.01
    pairs = np.outer(p, p) if replacement else ordered_pairs(p)
    assert fits(count_pairs(result.items), pairs) > 0.01
    # By level: hot at the first, as the model has it below.
    first = np.array(tempered(3.0)(EDGE[0]))
    p = first[CODES[:, 0]] * [0.3, 0.7, 1.0, 0.1, 0.3, 0.6]
    assert p.sum() == pytest.approx(1)
    result = draw(LevelSampling(temperature=(3.0, 1.0), replacement=replacement), 1)
    assert fits(np.bincount(result.items[:, 0], minlength=6), p) > 0.01


def nucleus(top_p: float) -> Any:
    def split(weights: list[float]) -> list[float]:
        shares, kept, mass = plain(weights), set(), 0.0
        for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
            if mass < top_p:
                kept.add(i)
                mass += shares[i]
        return plain([s if i in kept else 0.0 for i, s in enumerate(shares)])

    return split


@pytest.mark.parametrize("replacement", [False, True])
def test_top_p_of_every_node(replacement: bool):
    p = path_probabilities(nucleus(0.75))
    assert (p > 0).sum() == 4  # codes 0 and 2; of the one both items, of the other two
    sampler = LevelSampling(top_p=0.75, replacement=replacement)
    result = draw(sampler, 2)
    assert fits(np.bincount(result.items[:, 0], minlength=6), p) > 0.01
    pairs = np.outer(p, p) if replacement else ordered_pairs(p)
    assert fits(count_pairs(result.items), pairs) > 0.01
    # Scores are those of the model, not of the nucleus.
    assert np.exp(result.scores) == pytest.approx(path_probabilities(plain)[result.items], rel=1e-5)
    by_level = draw(LevelSampling(top_p=(1.0, 0.01), replacement=replacement), 1)
    assert set(by_level.items.ravel()) == {1, 2, 5}  # the best of every first code
    assert fits(np.bincount(by_level.items.ravel())[[1, 2, 5]], np.array(EDGE[0])) > 0.01


def test_top_p_may_leave_a_short_list():
    result = draw(LevelSampling(top_p=0.75), 6, n=50)
    assert (result.items[:, 4:] == -1).all() and (result.items[:, :4] >= 0).all()
    assert np.isneginf(result.scores[:, 4:]).all()
    assert result.sample is not None
    assert np.isneginf(result.sample.log_probs[:, 4:]).all()
    assert result.sample.threshold is not None and np.isneginf(result.sample.threshold).all()
    assert result.sample.weights().sum(1) == pytest.approx(np.ones(50))
    more = draw(LevelSampling(top_p=0.75, replacement=True), 9, n=50)  # repeats fill it
    assert (more.items >= 0).all() and more.sample is not None and more.sample.keys is None


def test_without_settings_level_sampling_is_gumbel_top_k():
    a, b = draw(GumbelTopK(5), 3, n=100), draw(LevelSampling(seed=5), 3, n=100)
    assert (a.items == b.items).all()
    assert a.sample is not None and b.sample is not None
    assert (a.sample.keys == b.sample.keys).all()


# Importance weights.


@pytest.mark.parametrize("k", [1, 2, 4])
def test_importance_weights_are_unbiased(k: int):
    p = path_probabilities(plain)
    f = np.array([3.0, -1.0, 0.5, 10.0, 2.0, -4.0])
    result = draw(GumbelTopK(), k)
    assert result.sample is not None
    weights = result.sample.weights()
    for values in (f, np.ones(6)):
        estimates = (weights * values[result.items]).sum(1)
        error = estimates.std() / np.sqrt(len(estimates))
        assert abs(estimates.mean() - p @ values) < 3.5 * error
    # The plain mean over several is no such estimate.
    assert k == 1 or abs(f[result.items].mean() - p @ f) > 0.1


def test_weights_of_the_whole_catalogue_are_its_probabilities():
    result = draw(GumbelTopK(), 8, n=20)
    assert (np.sort(result.items, axis=1) == [-1, -1, 0, 1, 2, 3, 4, 5]).all()
    assert result.sample is not None
    p = np.where(result.items >= 0, path_probabilities(plain)[result.items], 0.0)
    assert result.sample.weights() == pytest.approx(p, rel=1e-5)


def test_weights_far_from_the_threshold():
    # Inclusion is all but certain (weight p), or tiny and known to many digits (weight exp(kappa)).
    sample = Sample(np.array([[-1.0, -500.0, -INF]]), np.zeros((1, 3)), np.array([-60.0]))
    assert sample.weights()[0] == pytest.approx([np.exp(-1.0), np.exp(-60.0), 0.0])
    assert sample.weights()[0, 1] > 0
    far = Sample(np.array([[-1e30, -2.0]]), np.zeros((1, 2)), np.array([-5.0]))
    certain = np.exp(-2.0) / -np.expm1(-np.exp(3.0))
    assert far.weights()[0] == pytest.approx([np.exp(-5.0), certain])
    with pytest.raises(ValueError, match="with replacement have no threshold"):
        Sample(np.zeros((1, 2))).weights()


def test_width_changes_nothing_and_the_threshold_is_the_next_key():
    all_of_them = draw(GumbelTopK(), 6, n=200)
    assert all_of_them.sample is not None and all_of_them.sample.keys is not None
    for k, width in itertools.product((1, 2, 5), (0, 1, 4)):
        some = draw(GumbelTopK(), k, n=200, width=k + width)
        assert (some.items == all_of_them.items[:, :k]).all()
        assert some.sample is not None and some.sample.keys is not None
        assert some.sample.keys == pytest.approx(all_of_them.sample.keys[:, :k], abs=1e-9)
        assert some.sample.threshold == pytest.approx(all_of_them.sample.keys[:, k], abs=1e-9)


def test_draws_with_replacement_do_not_depend_on_their_number():
    sampler = LevelSampling(replacement=True)
    many = draw(sampler, 9, n=50)
    assert (draw(sampler, 3, n=50).items == many.items[:, :3]).all()
    assert any(len(set(row)) < 9 for row in many.items)


# Properties.


@st.composite
def problems(draw_: st.DrawFn) -> tuple[np.ndarray, list[list[float]]]:
    n_levels = draw_(st.integers(1, 4))
    rows = draw_(st.sets(st.tuples(*[st.integers(0, 3)] * n_levels), min_size=1, max_size=30))
    codes = np.array(draw_(st.permutations(sorted(rows))))
    rng = np.random.default_rng(draw_(st.integers(0, 2**32 - 1)))
    sizes = [len(tokens) for tokens in SidTrie.build(codes).tokens]
    scales = [draw_(st.sampled_from([0.1, 3, 30])) for _ in sizes]
    # Down to e^-80, below which fp32 holds no normal number.
    depths = [
        rng.exponential(scale, n).clip(max=80) for scale, n in zip(scales, sizes, strict=True)
    ]
    return codes, [np.exp(-depth).tolist() for depth in depths]


def full_tree(trie: SidTrie, edge: list[Any], seed: int, prompt: list[int]) -> np.ndarray:
    """Perturbed log-probability of every leaf, computed node by node over the whole trie."""
    stream = torch.from_numpy(streams_of(seed, [prompt]))
    above, parent_log_p = gumbel(mix(stream)).numpy(), np.zeros(1)
    for level in range(trie.n_levels):
        own = mix(stream + torch.tensor([level + 1]) * (0xD1342543DE82EF95 - (1 << 64)))
        noise = gumbel(hash_nodes(own, torch.arange(len(trie.tokens[level])))).numpy()
        weight = np.array(edge[level], dtype=np.float32).astype(np.float64)
        keys, log_p = np.empty(len(noise)), np.empty(len(noise))
        for node, (start, stop) in enumerate(itertools.pairwise(trie.children[level])):
            part = slice(start, stop)
            log_p[part] = parent_log_p[node] + np.log(weight[part] / weight[part].sum())
            noisy = log_p[part] + noise[part]
            z = np.exp(-above[node]) - np.exp(-noisy.max())
            keys[part] = -np.log(z + np.exp(-noisy))
        above, parent_log_p = keys, log_p
    return above


@given(problems(), st.integers(1, 8), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_a_narrow_search_finds_the_largest_keys_of_the_whole_trie(
    problem: tuple, k: int, seed: int
):
    codes, edge = problem
    if max(map(max, (np.abs(np.log(e)) for e in edge))) > 40:
        return  # the reference's plain formula overflows there
    result = draw(GumbelTopK(seed), k, n=3, codes=codes, edge=edge)
    assert result.sample is not None and result.sample.keys is not None
    for row in range(3):
        keys = full_tree(SidTrie.build(codes), edge, seed, [row])
        order = np.argsort(-keys)
        found = result.items[row][result.items[row] >= 0]
        assert len(found) == len(set(found)) == min(k, len(codes))
        assert result.sample.keys[row, : len(found)] == pytest.approx(keys[order][:k], abs=1e-4)
        assert result.sample.threshold is not None
        rest = keys[order][k] if len(keys) > k else -INF
        assert result.sample.threshold[row] == pytest.approx(rest, abs=1e-4)


samplers = st.one_of(
    st.builds(GumbelTopK, st.integers(0, 9)),
    st.builds(
        LevelSampling,
        st.sampled_from([1e-3, 0.5, 1.0, 1e6]),
        st.sampled_from([1e-9, 0.5, 1.0]),
        st.booleans(),
        st.integers(0, 9),
    ),
)


@given(problems(), samplers, st.integers(1, 10), st.data())
@settings(deadline=None, max_examples=60)
def test_lists_hold_allowed_items_and_no_nan(
    problem: tuple, sampler: Sampler, k: int, data: st.DataObject
):
    codes, edge = problem
    rows = st.integers(0, len(codes) - 1)
    allow = np.array(data.draw(st.lists(rows, min_size=1)))
    seen = np.array(data.draw(st.lists(rows, max_size=4)), dtype=int)
    left = set(allow) - set(seen)
    if not left:
        with pytest.raises(ValueError, match="prompt 0 has no allowed item left"):
            draw(sampler, k, 3, codes, edge, seen, allow)
        return
    result = draw(sampler, k, 3, codes, edge, seen, allow)
    assert result.sample is not None
    again = draw(sampler, k, 3, codes, edge, seen, allow)
    assert (again.items == result.items).all() and (again.scores == result.scores).all()
    with_replacement = isinstance(sampler, LevelSampling) and sampler.replacement
    narrowed = isinstance(sampler, LevelSampling) and sampler.top_p != 1
    for row in range(3):
        real = result.items[row] >= 0
        items = result.items[row][real]
        assert set(items) <= left and real[0]
        assert (np.diff(real.astype(int)) <= 0).all()  # padding is at the end
        assert np.isfinite(result.scores[row][real]).all()
        assert np.isneginf(result.scores[row][~real]).all()
        assert (np.isfinite(result.sample.log_probs[row]) == real).all()
        if with_replacement:
            assert real.all()
            continue
        assert len(set(items)) == len(items)
        if not narrowed:
            assert len(items) == min(k, len(left))
        weights = result.sample.weights()[row]
        assert np.isfinite(weights).all() and ((weights >= 0) & (weights[~real].sum() == 0)).all()
        assert result.sample.keys is not None and result.sample.threshold is not None
        keys = result.sample.keys[row][real]
        assert (np.diff(keys) <= 0).all() and keys[-1] > result.sample.threshold[row]
    assert not result.certified.any()


def greedy(codes: np.ndarray, edge: list[list[float]]) -> int:
    """Item at the end of the path of best children, ties to the smaller code."""
    trie, node = SidTrie.build(codes), 0
    for level in range(trie.n_levels):
        start, stop = trie.children[level][node], trie.children[level][node + 1]
        node = start + int(np.argmax(np.log(np.array(edge[level][start:stop], dtype=np.float32))))
    return int(trie.items[node])


@pytest.mark.parametrize(
    "sampler", [LevelSampling(temperature=1e-3), LevelSampling(top_p=1e-9)], ids=["cold", "top_p"]
)
def test_cold_sampling_takes_the_greedy_path(sampler: LevelSampling):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        codes = np.unique(rng.integers(0, 4, (30, 3)), axis=0)
        sizes = [len(tokens) for tokens in SidTrie.build(codes).tokens]
        edge = [(rng.permutation(size) + 1.0).tolist() for size in sizes]  # no near ties
        for replacement in (False, True):
            result = draw(replace(sampler, replacement=replacement), 3, 2, codes, edge)
            assert (result.items[:, 0] == greedy(codes, edge)).all()
            if replacement:
                assert (result.items == greedy(codes, edge)).all()


def test_nan_surfaces():
    nan_below = [EDGE[0], [0.7, 0.3, 1.0, float("nan"), 0.3, 0.6]]
    nan_first = [[0.5, float("nan"), 0.3], EDGE[1]]
    for edge in (nan_below, nan_first):
        for sampler in (GumbelTopK(), LevelSampling(top_p=0.9), LevelSampling(replacement=True)):
            with pytest.raises(ValueError, match="NaN"):
                draw(sampler, 3, n=20, edge=edge)


# The engine.


class Case:
    """A catalogue, a model on it, and its engines."""

    def __init__(self, reference: Any, n_items: int = 40, n_levels: int = 3) -> None:
        self.codes = reference.random_codes(1, n_items, n_levels)
        self.ids = reference.sid_token_ids(n_levels)
        self.model = reference.tiny_model("llama", 1)
        self.trie = SidTrie.build(self.codes)
        self.prompts = reference.random_prompts(3, 9)
        self.seen = [np.arange(row) for row in range(9)]

    def engine(self, normalizer: str = "trie", **options: Any) -> TorchEngine:
        return TorchEngine(self.model, self.trie, self.ids, 0, normalizer, **options)


@pytest.fixture(scope="module")
def case(reference: Any) -> Case:
    return Case(reference)


SAMPLERS = [
    GumbelTopK(),
    LevelSampling((2.0, 1.0, 0.5), (1.0, 0.9, 1.0)),
    LevelSampling(1.5, 0.9, replacement=True),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["gumbel", "distinct", "replacement"])
def test_the_batch_changes_no_draw(case: Case, sampler: Sampler):
    together = case.engine().search(case.prompts, 5, 10, case.seen, sampler=sampler)
    assert together.sample is not None
    for size, order in ((1, np.arange(9)), (4, np.random.default_rng(0).permutation(9))):
        other = case.engine(batch_size=size).search(
            [case.prompts[i] for i in order], 5, 7, [case.seen[i] for i in order], sampler=sampler
        )
        assert (other.items == together.items[order]).all()
        assert np.abs(other.scores - together.scores[order]).max() < 2e-5
        assert other.sample is not None
        for mine, theirs in (
            (other.sample.log_probs, together.sample.log_probs),
            (other.sample.keys, together.sample.keys),
            (other.sample.threshold, together.sample.threshold),
        ):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine == pytest.approx(theirs[order], abs=1e-4)
    again = case.engine().search(case.prompts, 5, 10, case.seen, sampler=replace(sampler, seed=1))
    assert (again.items != together.items).any(1).mean() > 0.5


def test_the_engine_draws_by_its_own_probabilities(case: Case, reference: Any):
    """Through the model: keys are those of the whole trie, scores those of exhaustive scoring."""
    exact_levels = reference.exhaustive(case.model, case.prompts, case.codes, case.ids, "trie")
    exact = exact_levels.sum(-1)
    assert np.exp(exact).sum(1) == pytest.approx(np.ones(9), abs=1e-4)
    result = case.engine().search(case.prompts, 6, 6, sampler=GumbelTopK(3))
    own = np.take_along_axis(exact, result.items, axis=1)
    assert np.abs(own - result.scores).max() < 2e-5
    assert result.sample is not None
    assert np.abs(result.sample.log_probs - result.scores).max() < 2e-5
    for row, prompt in enumerate(case.prompts):
        edge = [np.empty(len(tokens)) for tokens in case.trie.tokens]
        for level, by_node in enumerate(edge):
            node = case.trie.node_of_leaf(level, case.trie.leaf_of_item)
            by_node[node] = np.exp(exact_levels[row, :, level])
        keys = np.sort(full_tree(case.trie, edge, 3, prompt))[::-1]
        assert result.sample.keys is not None and result.sample.threshold is not None
        assert result.sample.keys[row] == pytest.approx(keys[:6], abs=1e-3)
        assert result.sample.threshold[row] == pytest.approx(keys[6], abs=1e-3)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_level_sampling_draws_alike_and_scores_as_declared(case: Case, normalizer: str):
    sampler = LevelSampling(temperature=1.3, top_p=0.95, seed=2)
    result = case.engine(normalizer).search(case.prompts, 5, 5, sampler=sampler)
    under_trie = case.engine("trie").search(case.prompts, 5, 5, sampler=sampler)
    assert (result.items == under_trie.items).all()
    scores = case.engine(normalizer).score(case.prompts, result.items)
    assert np.abs(scores - result.level_log_probs).max() < 2e-5
    assert np.abs(scores.sum(-1) - result.scores).max() < 2e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["gumbel", "distinct", "replacement"])
def test_cuda_draws_as_the_cpu_does(case: Case, sampler: Sampler):
    on_cpu = case.engine().search(case.prompts, 5, 5, case.seen, sampler=sampler)
    engine = TorchEngine(deepcopy(case.model).cuda(), case.trie, case.ids, 0, "trie")
    on_gpu = engine.search(case.prompts, 5, 5, case.seen, sampler=sampler)
    assert (on_gpu.items == on_cpu.items).all()
    assert np.abs(on_gpu.scores - on_cpu.scores).max() < 1e-3
    assert on_gpu.sample is not None and on_cpu.sample is not None
    assert np.abs(on_gpu.sample.log_probs - on_cpu.sample.log_probs).max() < 1e-3


def test_without_a_sampler_nothing_changes(case: Case):
    plain_result = case.engine().search(case.prompts, 5, 10, case.seen)
    assert plain_result.sample is None
    assert (np.diff(plain_result.scores) <= 0).all()
    assert case.engine().search([], 3, 5, sampler=GumbelTopK()).items.shape == (0, 3)


def test_titles_end_where_they_end(reference: Any):
    """Codes of unequal length: what follows an end mark is forced and costs nothing."""
    end, longest = 7, 4
    rng = np.random.default_rng(0)
    titles = sorted({tuple(rng.integers(8, 11, rng.integers(1, longest + 1))) for _ in range(30)})
    codes = np.array([[*t, *[end] * (longest + 1 - len(t))] for t in titles])
    model = reference.tiny_model()
    ids = [list(range(model.config.vocab_size))] * codes.shape[1]
    engine = TorchEngine(model, SidTrie.build(codes, end), ids, 0, "trie")
    prompts = reference.random_prompts(1, 4)
    result = engine.search(prompts, len(codes), len(codes), sampler=GumbelTopK())
    assert (np.sort(result.items, axis=1) == np.arange(len(codes))).all()
    assert np.exp(result.scores).sum(1) == pytest.approx(np.ones(4), abs=1e-4)
    assert result.sample is not None
    assert np.abs(result.sample.log_probs - result.scores).max() < 1e-4
    padding = np.arange(longest + 1) > np.array([len(t) for t in titles])[result.items][:, :, None]
    assert (result.level_log_probs[padding] == 0).all()


def test_nan_of_the_model_is_refused(case: Case):
    model = deepcopy(case.model)
    with torch.no_grad():
        model.lm_head.weight[case.ids[1][int(case.codes[0, 1])]] = torch.nan
    engine = TorchEngine(model, case.trie, case.ids, 0, "trie")
    for sampler in SAMPLERS:
        with pytest.raises(ValueError, match="NaN"):
            engine.search(case.prompts, len(case.codes), len(case.codes), sampler=sampler)


# Refusals.


@pytest.mark.parametrize("normalizer", ["full", "level"])
def test_gumbel_top_k_needs_a_distribution_over_items(case: Case, normalizer: str):
    with pytest.raises(ValueError, match=rf"normalizer='{normalizer}' declares none.*'trie'"):
        case.engine(normalizer).search(case.prompts, 2, 2, sampler=GumbelTopK())


def test_settings_for_other_depths_are_refused(case: Case):
    for name in ("temperature", "top_p"):
        sampler = LevelSampling(**{name: (0.5, 0.5)})
        with pytest.raises(ValueError, match=rf"{name}=\(0.5, 0.5\) has 2 numbers for 3 levels"):
            case.engine().search(case.prompts, 2, 2, sampler=sampler)
    check_sampler(LevelSampling([1.0, 2, 3.0], [1, 0.5, 0.1]), "full", 3)


@pytest.mark.parametrize(
    "value", [0.0, -1.0, 1e-4, INF, float("nan"), "1", [], [1.0, 0.0], True, None]
)
def test_temperatures_that_are_none(value: Any):
    with pytest.raises(ValueError, match="temperature="):
        LevelSampling(temperature=value)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan"), "x", (), (0.5, 2.0), None])
def test_top_p_that_is_none(value: Any):
    with pytest.raises(ValueError, match="top_p="):
        LevelSampling(top_p=value)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 0.5, True, None])
@pytest.mark.parametrize("sampler", [GumbelTopK, LevelSampling])
def test_seeds_that_are_none(sampler: Any, seed: Any):
    with pytest.raises(ValueError, match="seed="):
        sampler(seed=seed)


def test_too_many_items_and_none_left(case: Case):
    with pytest.raises(ValueError, match="k=6 must lie between 1 and beam_width=5"):
        case.engine().search(case.prompts, 6, 5, sampler=GumbelTopK())
    everything = [np.arange(len(case.codes))] * 9
    for sampler in SAMPLERS:
        with pytest.raises(ValueError, match="no allowed item left"):
            case.engine().search(case.prompts, 2, 5, everything, sampler=sampler)
