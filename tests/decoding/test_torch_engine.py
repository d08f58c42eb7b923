"""TorchEngine against exhaustive scoring by plain forward passes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from genrec.decoding import torch_engine, trie_tensors
from genrec.decoding.beam import NORMALIZERS
from genrec.decoding.forward import Forward
from genrec.decoding.lm_head import SidHead
from genrec.decoding.sampling import LevelSampling
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation.probes import exhaustive_scores

TOLERANCE = 5e-5  # sums of up to four log-probabilities of some −10 each, in fp32


class Case:
    """A catalogue, a model on it, and true scores on demand."""

    def __init__(
        self,
        reference: Any,
        seed: int = 0,
        kind: str = "qwen3",
        normalizer: str = "full",
        n_items: int = 25,
        n_levels: int = 3,
        model: PreTrainedModel | None = None,
        **options: Any,
    ) -> None:
        self.reference, self.normalizer = reference, normalizer
        self.codes = reference.random_codes(seed, n_items, n_levels)
        self.n = len(self.codes)
        self.ids = reference.sid_token_ids(n_levels)
        self.model = model or reference.tiny_model(kind, seed % 3)
        self.trie = SidTrie.build(self.codes)
        self.prompts = reference.random_prompts(seed, 5)
        self.engine = TorchEngine(self.model, self.trie, self.ids, 0, normalizer, **options)

    def truth(self) -> np.ndarray:
        """Level log-probabilities of all items, (n, items, L)."""
        return self.reference.exhaustive(
            self.model, self.prompts, self.codes, self.ids, self.normalizer
        )


cases = dict(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["qwen3", "llama"]),
    normalizer=st.sampled_from(NORMALIZERS),
    n_items=st.integers(1, 30),
    n_levels=st.integers(1, 4),
)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@given(**{name: value for name, value in cases.items() if name != "normalizer"})
@settings(deadline=None, max_examples=12)
def test_full_width_equals_exhaustive_scoring(reference: Any, normalizer: str, **what: Any):
    case = Case(reference, normalizer=normalizer, batch_size=2, **what)
    truth = case.truth()
    result = case.engine.search(case.prompts, case.n, case.n)
    reference.assert_same_lists(result.items, result.scores, truth.sum(-1), TOLERANCE)
    own = np.take_along_axis(truth, result.items[:, :, None], axis=1)
    assert np.abs(own - result.level_log_probs).max() < TOLERANCE
    assert result.certified.all()


@given(data=st.data(), **cases)
@settings(deadline=None, max_examples=20)
def test_filters_at_full_width(reference: Any, data: st.DataObject, **what: Any):
    case = Case(reference, **what)
    rows = st.integers(0, case.n - 1)
    allow = np.unique(data.draw(st.lists(rows, min_size=1)))
    seen = [np.array(data.draw(st.lists(rows)), dtype=int) for _ in case.prompts]
    truth = case.truth().sum(-1)
    truth[:, np.setdiff1d(np.arange(case.n), allow)] = -np.inf
    for row, gone in enumerate(seen):
        truth[row, gone] = -np.inf
    k = min(4, case.n)
    view = case.trie.allow(allow)
    if np.isneginf(truth).all(1).any():
        with pytest.raises(ValueError, match="no allowed item left"):
            case.engine.search(case.prompts, k, case.n, seen, view)
        return
    result = case.engine.search(case.prompts, k, case.n, seen, view)
    reference.assert_same_lists(result.items, result.scores, truth, TOLERANCE)
    assert result.certified.all()


@given(data=st.data(), **cases)
@settings(deadline=None, max_examples=30)
def test_candidates_of_single_users(reference: Any, data: st.DataObject, **what: Any):
    """Some users may get a few items only, less what they have seen; others may get all."""
    case = Case(reference, **what)
    rows = st.lists(st.integers(0, case.n - 1))
    wanted = [data.draw(st.none() | rows) for _ in case.prompts]
    seen = [np.array(data.draw(rows), dtype=int) for _ in case.prompts]
    view = case.trie.allow(np.unique(data.draw(st.lists(st.integers(0, case.n - 1), min_size=1))))
    truth = case.truth().sum(-1)
    truth[:, ~view.mask()] = -np.inf
    for row, (only, gone) in enumerate(zip(wanted, seen, strict=True)):
        truth[row, gone] = -np.inf
        if only is not None:
            truth[row, np.setdiff1d(np.arange(case.n), only)] = -np.inf
    candidates = [None if only is None else np.array(only, dtype=int) for only in wanted]
    k = min(4, case.n)

    def found():
        return case.engine.search(case.prompts, k, case.n, seen, view, candidates=candidates)

    if np.isneginf(truth).all(1).any():
        with pytest.raises(ValueError, match="no allowed item left"):
            found()
    else:
        result = found()
        reference.assert_same_lists(result.items, result.scores, truth, TOLERANCE)


SAMPLERS = [None, LevelSampling(2.0), LevelSampling(2.0, 0.8, replacement=True)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_wide_levels_are_searched_a_few_beams_at_a_time(
    reference: Any, normalizer: str, sampler: Any, monkeypatch: pytest.MonkeyPatch
):
    case = Case(reference, n_items=60, normalizer=normalizer)
    seen = [np.arange(row) for row in range(5)]
    candidates = [None, np.arange(20), None, np.arange(7), np.arange(30, 45)]

    def found():
        return case.engine.search(case.prompts, 3, 6, seen, candidates=candidates, sampler=sampler)

    whole = found()
    for at_once in (1, 80):
        monkeypatch.setattr(trie_tensors, "_CELLS_AT_ONCE", at_once)
        part = found()
        assert (part.items == whole.items).all() and (part.certified == whole.certified).all()
        assert (part.scores == whole.scores).all()
        assert (part.level_log_probs == whole.level_log_probs).all()
        if sampler is not None:
            assert (part.sample.log_probs == whole.sample.log_probs).all()
            if not sampler.replacement:
                # Vectorised exp and log differ in a last bit from one shape to the next.
                np.testing.assert_allclose(part.sample.keys, whole.sample.keys, rtol=1e-12)
                np.testing.assert_allclose(
                    part.sample.threshold, whole.sample.threshold, rtol=1e-12
                )


@given(k=st.integers(1, 4), wider=st.integers(0, 4), **cases)
@settings(deadline=None, max_examples=40)
def test_narrow_beams(reference: Any, k: int, wider: int, **what: Any):
    case = Case(reference, **what)
    result = case.engine.search(case.prompts, k, k + wider)
    truth = case.truth().sum(-1)
    sure = result.certified
    reference.assert_same_lists(result.items[sure], result.scores[sure], truth[sure], TOLERANCE)
    for items, scores, true in zip(result.items, result.scores, truth, strict=True):
        found = items[items >= 0]
        assert len(set(found)) == len(found) == min(k, case.n)  # distinct, and never too few
        assert np.abs(true[found] - scores[items >= 0]).max() < TOLERANCE
        assert (np.diff(scores[items >= 0]) <= 0).all()


def test_narrow_beams_are_sometimes_certified_and_sometimes_not(reference: Any):
    case = Case(reference, seed=0, n_items=100, normalizer="level")
    prompts = reference.random_prompts(0, 30)
    shares = [case.engine.search(prompts, 2, width).certified.mean() for width in (2, 8, 20)]
    assert 0 <= shares[0] < shares[1] < shares[2] <= 1


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_score_equals_the_search(reference: Any, normalizer: str):
    case = Case(reference, normalizer=normalizer, n_items=40, batch_size=3)
    result = case.engine.search(case.prompts, 6, 10)
    got = case.engine.score(case.prompts, result.items)
    assert np.abs(got - result.level_log_probs).max() < TOLERANCE
    everything = np.tile(np.arange(case.n), (len(case.prompts), 1))
    assert np.abs(case.engine.score(case.prompts, everything) - case.truth()).max() < TOLERANCE


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_many_items_are_scored_in_parts(reference: Any, monkeypatch, normalizer: str):
    case = Case(reference, normalizer=normalizer, n_items=40, batch_size=3)
    everything = np.tile(np.arange(case.n), (len(case.prompts), 1))
    whole = case.engine.score(case.prompts, everything)
    widths, prefills = [], []
    append, start = Forward.append, Forward.__init__
    monkeypatch.setattr(
        Forward, "append", lambda self, ids, a: (widths.append(ids.shape[1]), append(self, ids, a))
    )
    monkeypatch.setattr(
        Forward, "__init__", lambda self, *args: (prefills.append(1), start(self, *args))[1]
    )
    monkeypatch.setattr(torch_engine, "_SCORED_AT_ONCE", 600)
    parts = case.engine.score(case.prompts, everything)
    assert max(widths) < 12 and len(set(widths)) > 1
    assert len(prefills) == -(-len(case.prompts) // 3)  # the parts share what was prefilled
    np.testing.assert_allclose(parts, whole, atol=TOLERANCE)
    assert case.engine.score(case.prompts, everything[:, :0]).shape == (len(everything), 0, 3)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_texts_behind_a_shared_prompt_equal_whole_prompts(reference: Any, monkeypatch, kind: str):
    case = Case(reference, n_items=40, batch_size=6)
    model = reference.tiny_model(kind)
    engine = TorchEngine(model, case.engine.trie, case.ids, 0, batch_size=6)
    prompts = reference.random_prompts(1, 5)
    texts = [reference.random_prompts(seed, 3, 6) for seed in range(5)]  # of unequal lengths
    whole = [[*p, *text] for p, own in zip(prompts, texts, strict=True) for text in own]
    true, seen = engine.search(whole, 4, 8), [np.array([row]) for row in range(len(whole))]
    filtered = engine.search(whole, 4, 8, seen)
    tokens: list[int] = []
    run = SidHead.states

    def states(head: SidHead, **inputs: Any) -> torch.Tensor:
        tokens.append(inputs["input_ids"].numel())
        return run(head, **inputs)

    monkeypatch.setattr(SidHead, "states", states)
    found = 0
    for rows, ids, behind in engine.branches(prompts, texts, 8):
        before = len(tokens)
        at = (rows[:, None] * 3 + np.arange(3)).ravel()
        assert [whole[row] for row in at] == ids and len(rows) <= 2
        for want, own in ((true, None), (filtered, [seen[row] for row in at]), (true, None)):
            got = engine.search(ids, 4, 8, own, prefilled=behind)
            assert got.items.tolist() == want.items[at].tolist()
            np.testing.assert_allclose(got.scores, want.scores[at], atol=TOLERANCE)
        scores = engine.score(ids, got.items, prefilled=behind)
        np.testing.assert_allclose(scores, got.level_log_probs, atol=TOLERANCE)
        assert set(tokens[before:]) <= {len(at) * width for width in (4, 6, 8)}  # beams alone
        found += len(rows)
    assert found == len(prompts)


def test_batch_composition_and_padding_change_nothing(reference: Any):
    case = Case(reference, n_items=60)
    prompts = reference.random_prompts(7, 12, longest=30)
    seen = [np.arange(row) for row in range(12)]
    together = case.engine.search(prompts, 5, 10, seen)
    for size, order in ((1, np.arange(12)), (5, np.random.default_rng(0).permutation(12))):
        engine = TorchEngine(case.model, case.trie, case.ids, 0, batch_size=size)
        other = engine.search([prompts[i] for i in order], 5, 10, [seen[i] for i in order])
        assert (other.items == together.items[order]).all()
        assert np.abs(other.scores - together.scores[order]).max() < TOLERANCE
        assert (other.certified == together.certified[order]).all()
    other_pad = TorchEngine(case.model, case.trie, case.ids, 77).search(prompts, 5, 10, seen)
    assert (other_pad.items == together.items).all()
    assert (other_pad.scores == together.scores).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_ties_go_to_the_smaller_sid(reference: Any, normalizer: str):
    model = deepcopy(reference.tiny_model())
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    case = Case(reference, model=model, normalizer=normalizer, n_items=40)
    result = case.engine.search(case.prompts, 7, case.n)
    truth = case.truth().sum(-1).astype(np.float64).round(5)
    assert (result.items == reference.ranking(truth, case.codes)[:, :7]).all()
    if normalizer != "trie":
        assert len(np.unique(result.scores)) == 1
        assert (result.items == np.lexsort(case.codes.T[::-1])[:7]).all()


def test_many_levels_and_one_item(reference: Any):
    codes = np.unique(np.random.default_rng(0).integers(0, 2, (12, 40)), axis=0)
    model, ids = reference.tiny_model(), reference.sid_token_ids(40)
    prompts = reference.random_prompts(0, 3)
    engine = TorchEngine(model, SidTrie.build(codes), ids, 0)
    truth = reference.exhaustive(model, prompts, codes, ids, "full").sum(-1)
    result = engine.search(prompts, len(codes), len(codes))
    reference.assert_same_lists(result.items, result.scores, truth, 2e-4)  # a sum of 40 terms
    one = TorchEngine(model, SidTrie.build(codes[:1]), ids, 0, "trie").search(prompts, 2, 3)
    assert one.items.tolist() == [[0, -1]] * 3
    assert one.scores[:, 0].tolist() == [0.0] * 3  # its only child has probability 1
    assert one.certified.all()


def test_the_models_generation_config_has_no_say(reference: Any):
    case = Case(reference, n_items=40)
    plain = case.engine.search(case.prompts, 5, 10)
    model = deepcopy(case.model)
    odd = dict(top_k=1, top_p=0.1, temperature=7.0, repetition_penalty=5.0, num_beams=3)
    model.generation_config.update(**odd, do_sample=True, eos_token_id=case.ids[0][0])
    other = TorchEngine(model, case.trie, case.ids, 0).search(case.prompts, 5, 10)
    assert (other.items == plain.items).all()
    assert (other.scores == plain.scores).all()


def test_training_mode_is_put_aside_and_restored(reference: Any):
    case = Case(reference, n_items=40)
    plain = case.engine.search(case.prompts, 5, 10)
    model = deepcopy(case.model).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    result = TorchEngine(model, case.trie, case.ids, 0).search(case.prompts, 5, 10)
    assert model.training
    assert (result.scores == plain.scores).all()


def odd_model(kind: str) -> PreTrainedModel:
    """Models that don't attend by mask and position over all that is before."""
    torch.manual_seed(0)
    size = dict(vocab_size=96, initializer_range=0.3)
    if kind == "mpt":  # ALiBi: biases by distance in the row
        attention = {"attn_impl": "torch", "alibi": True}
        return MptForCausalLM(
            MptConfig(vocab_size=96, d_model=32, n_heads=2, n_layers=2, max_seq_len=64,
                      attn_config=attention, initializer_range=0.3)
        ).eval()  # fmt: skip
    if kind == "rwkv":  # recurrent
        return RwkvForCausalLM(
            RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, context_length=64)
        ).eval()
    layers = [[["global", "local"], 1]]
    return GPTNeoForCausalLM(
        GPTNeoConfig(**size, hidden_size=32, num_layers=2, num_heads=2, attention_types=layers,
                     max_position_embeddings=64, window_size=4)
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message"),
    [("mpt", "can't be decoded"), ("rwkv", "can't be decoded"), ("gpt-neo", "local or chunked")],
)
def test_models_that_attend_otherwise_are_refused(reference: Any, kind: str, message: str):
    codes, ids = reference.random_codes(0, 20, 3), reference.sid_token_ids(3)
    with pytest.raises(ValueError, match=message):
        engine = TorchEngine(odd_model(kind), SidTrie.build(codes), ids, 0)
        engine.search(reference.random_prompts(0, 3), 2, 5)


def test_views_come_and_go_on_one_engine(reference: Any):
    case = Case(reference, n_items=60)
    plain = case.engine.search(case.prompts, 5, 10)
    gone = np.unique(plain.items[:, 0])
    view = case.trie.deny(gone)
    filtered = case.engine.search(case.prompts, 5, 10, view=view)
    assert not np.isin(filtered.items, gone).any()
    assert (case.engine.score(case.prompts, plain.items) == case.engine.score(
        case.prompts, plain.items
    )).all()  # fmt: skip
    for again in (view, case.trie.everything(), None):
        expected = filtered if again is view else plain
        got = case.engine.search(case.prompts, 5, 10, view=again)
        assert (got.items == expected.items).all() and (got.scores == expected.scores).all()


def test_progress_and_no_prompts(reference: Any):
    case = Case(reference, batch_size=2)
    done: list[int] = []
    case.engine.search(case.prompts, 1, 5, progress=done.append)
    assert done == [2, 2, 1]
    empty = case.engine.search([], 3, 5)
    assert empty.items.shape == (0, 3)
    assert empty.level_log_probs.shape == (0, 3, 3)


def test_wrong_requests_are_refused(reference: Any):
    case = Case(reference, n_items=20)
    search = case.engine.search
    everything = np.arange(case.n)
    with pytest.raises(ValueError, match="k=6 must lie between 1 and beam_width=5"):
        search(case.prompts, 6, 5)
    with pytest.raises(ValueError, match="k=0"):
        search(case.prompts, 0, 5)
    with pytest.raises(ValueError, match="seen has 1 entries for 5"):
        search(case.prompts, 1, 5, [everything])
    with pytest.raises(ValueError, match="prompt 3 has no allowed item left"):
        search(case.prompts, 1, 5, [everything[:0]] * 3 + [everything] + [everything[:2]])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        search([[70], []], 1, 5)
    with pytest.raises(ValueError, match="prompt 1 with its item needs 129 tokens.*holds 128"):
        search([[70] * 125, [70] * 126], 1, 5)
    assert search([[70] * 125], 1, 5).items.shape == (1, 1)
    with pytest.raises(ValueError, match="there are 0"):
        case.engine.score(case.prompts, np.full((5, 1), -1))
    with pytest.raises(ValueError, match="candidates has 2 entries for 5 prompts"):
        case.engine.search(case.prompts, 1, 5, candidates=[None, None])
    with pytest.raises(ValueError, match="there are 0.."):
        case.engine.search(case.prompts, 1, 5, candidates=[np.array([case.n])] * 5)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("where", ["one_sid_token", "everywhere"])
def test_nan_is_refused(reference: Any, normalizer: str, where: str):
    model = deepcopy(reference.tiny_model("llama"))
    case = Case(reference, model=model, normalizer=normalizer, n_items=40)
    rows = slice(None) if where == "everywhere" else case.ids[1][int(case.codes[0, 1])]
    with torch.no_grad():
        model.lm_head.weight[rows] = -torch.nan
    with pytest.raises(ValueError, match="NaN"):
        case.engine.search(case.prompts, 3, case.n)


def test_models_without_full_attention_are_refused(reference: Any):
    trie, ids = SidTrie.build(np.array([[0], [1]])), [[1, 2]]
    size = dict(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    chunked = Qwen3ForCausalLM(Qwen3Config(**size))
    chunked.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        TorchEngine(chunked, trie, ids, 0)
    TorchEngine(Qwen3ForCausalLM(Qwen3Config(**size, sliding_window=4)), trie, ids, 0)


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gemma2"])
def test_a_sliding_window_that_holds_prompt_and_item_changes_nothing(reference: Any, kind: str):
    size = dict(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
        max_position_embeddings=128, sliding_window=23,
    )  # fmt: skip
    torch.manual_seed(0)
    model = {
        "mistral": lambda: MistralForCausalLM(MistralConfig(**size)),
        "qwen3": lambda: Qwen3ForCausalLM(
            Qwen3Config(**size, use_sliding_window=True, max_window_layers=1)
        ),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**size, query_pre_attn_scalar=16)),
    }[kind]().eval()
    case = Case(reference, model=model, normalizer="trie")
    case.prompts = [(p * 20)[:n] for p, n in zip(case.prompts, [20, 3, 20, 1, 9], strict=True)]
    result, truth = case.engine.search(case.prompts, 5, 25), case.truth().sum(-1)
    reference.assert_same_lists(result.items, result.scores, truth, 2 * TOLERANCE)
    with pytest.raises(ValueError, match="needs 24 tokens, .* sliding window or context holds 23"):
        case.engine.search([[70] * 21], 5, 25)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_codes_of_unequal_length_count_up_to_their_end_mark(reference: Any, normalizer: str):
    """A title index: codes are token ids, padded with the end mark, which then costs nothing."""
    end, longest, vocab = 7, 5, reference.tiny_model().config.vocab_size
    rng = np.random.default_rng(0)
    titles = {tuple(rng.integers(8, 12, rng.integers(1, longest + 1))) for _ in range(40)}
    codes = np.array([[*t, *[end] * (longest + 1 - len(t))] for t in sorted(titles)])
    lengths = np.array([len(t) for t in sorted(titles)])
    assert len(set(lengths)) > 2 and any(
        a[: len(b)] == b for a in titles for b in titles if a != b
    )  # some title is the beginning of another
    ids = [list(range(vocab))] * codes.shape[1]
    model, prompts = reference.tiny_model(), reference.random_prompts(1, 4)
    engine = TorchEngine(model, SidTrie.build(codes, end), ids, 0, normalizer)
    truth = reference.exhaustive(model, prompts, codes, ids, normalizer)
    truth[:, np.arange(codes.shape[1]) > lengths[:, None]] = 0.0
    result = engine.search(prompts, len(codes), len(codes))
    reference.assert_same_lists(result.items, result.scores, truth.sum(-1), TOLERANCE)
    padding = np.arange(codes.shape[1]) > lengths[result.items][:, :, None]
    assert padding.any() and (result.level_log_probs[padding] == 0).all()
    narrow = engine.search(prompts, 3, 4)
    assert (narrow.items[narrow.certified] == result.items[narrow.certified, :3]).all()
    # Given items are scored alike, and the whole catalogue at once.
    every = np.tile(np.arange(len(codes)), (len(prompts), 1))
    np.testing.assert_allclose(engine.score(prompts, every), truth, atol=TOLERANCE)
    np.testing.assert_allclose(
        exhaustive_scores(engine, prompts[0]), truth[0].sum(-1), atol=10 * TOLERANCE
    )


def test_one_long_title_does_not_make_every_search_as_deep(reference, monkeypatch):
    end, vocab = 7, reference.tiny_model().config.vocab_size
    titles = [[8], [9, 8], [9, 10], [11] * 12]
    codes = np.array([[*t, *[end] * (13 - len(t))] for t in titles])
    trie = SidTrie.build(codes, end)
    engine = TorchEngine(reference.tiny_model(), trie, [list(range(vocab))] * 13, 0)
    prompts = reference.random_prompts(0, 2)
    whole = engine.search(prompts, 4, 4)
    steps = []
    plain = Forward.append
    monkeypatch.setattr(
        Forward, "append", lambda self, *args: (steps.append(1), plain(self, *args))[1]
    )
    few = engine.search(prompts, 3, 4, view=trie.deny(np.array([3])))
    assert len(steps) == 2  # two tokens are put in, the end mark after them is read off
    for row in range(2):
        kept = whole.items[row] != 3
        assert few.items[row].tolist() == whole.items[row][kept].tolist()
        np.testing.assert_allclose(few.scores[row], whole.scores[row][kept], atol=TOLERANCE)
        np.testing.assert_allclose(
            few.level_log_probs[row], whole.level_log_probs[row][kept], atol=TOLERANCE
        )
    assert few.certified.all() and few.level_log_probs.shape == (2, 3, 13)
