"""InWorkerEngine against exhaustive scoring and against TorchEngine; needs vLLM on a CPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("the in-worker engine runs on CPU only", allow_module_level=True)

from genrec.decoding import vllm_engine, vllm_inworker, vllm_worker  # noqa: E402
from genrec.decoding.beam import NORMALIZERS, BeamResult, normalize  # noqa: E402
from genrec.decoding.torch_engine import TorchEngine  # noqa: E402
from genrec.decoding.trie import SidTrie  # noqa: E402
from genrec.decoding.vllm_inworker import InWorkerEngine  # noqa: E402
from genrec.decoding.vllm_worker import CacheLimits, PagedBatch, PagedModel  # noqa: E402

TOLERANCE = 1e-4  # of fp32; the contract between engines is 1e-3
BLOCK = vllm_engine.CPU_BLOCK_SIZE


class Setup(SimpleNamespace):
    """Engines over one checkpoint and catalogue."""

    codes: np.ndarray
    ids: list[list[int]]
    trie: SidTrie
    prompts: list[list[int]]
    model: Any
    engine: InWorkerEngine
    torch_engine: TorchEngine

    @property
    def runner(self) -> Any:
        """vLLM's model runner, in this process."""
        (runner,) = self.engine.llm.collective_rpc(lambda worker: worker.model_runner)
        return runner

    def torch_on(self, trie: SidTrie, ids: list[list[int]]) -> TorchEngine:
        return TorchEngine(self.model, trie, ids, 0, self.engine.normalizer)

    def on(self, trie: SidTrie, ids: list[list[int]]) -> InWorkerEngine:
        """The same LLM over another catalogue."""
        other = _copy(self.engine)
        other.trie, other.sid_ids = trie, [torch.tensor(level) for level in ids]
        other._tensors = vllm_inworker.TrieTensors(trie, None, other.device)
        return other


def _copy(engine: InWorkerEngine) -> InWorkerEngine:
    other = InWorkerEngine.__new__(InWorkerEngine)
    other.__dict__.update(engine.__dict__)
    return other


@pytest.fixture(scope="module")
def setup(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """The one LLM of this module."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = tmp_path_factory.mktemp("checkpoint")
    model = deepcopy(reference.tiny_model())
    model.generation_config.update(top_k=1, temperature=7.0, repetition_penalty=5.0, do_sample=True)
    model.save_pretrained(folder)
    codes, ids = reference.random_codes(0, 60, 3), reference.sid_token_ids(3)
    trie = SidTrie.build(codes)
    # Prompts of less than a block to several, of whole blocks, and cut by the 64 tokens of a pass.
    prompts = reference.random_prompts(5, 9, longest=100) + [[70] * 32, [71] * 64, [72] * 31]
    made = Setup(
        codes=codes,
        ids=ids,
        trie=trie,
        prompts=prompts,
        model=model,
        engine=InWorkerEngine(
            folder, trie, ids, batch_size=5, dtype="float32", max_num_batched_tokens=64
        ),
        torch_engine=TorchEngine(model, trie, ids, 0),
    )
    yield made
    # An LLM that is collected later would tear down the state that it shares with the next one.
    made.engine.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(params=NORMALIZERS)
def normalized(request: pytest.FixtureRequest, setup: Setup) -> Iterator[Setup]:
    """The same engines under each normaliser."""
    theirs = TorchEngine(setup.model, setup.trie, setup.ids, 0, request.param)
    setup.engine.normalizer = request.param
    yield Setup(**{**vars(setup), "torch_engine": theirs})
    setup.engine.normalizer = "full"


def assert_agree(ours: BeamResult, theirs: BeamResult) -> None:
    """Equal lists, but for swaps of items whose scores differ by less than the tolerance."""
    assert ((ours.items == -1) == (theirs.items == -1)).all()
    real = theirs.items >= 0
    assert np.abs(ours.scores[real] - theirs.scores[real]).max() <= TOLERANCE
    same = ours.items == theirs.items
    both = same & real
    difference = ours.level_log_probs[both] - theirs.level_log_probs[both]
    assert np.abs(difference).max() <= TOLERANCE
    for row, column in np.argwhere(~same):
        other = np.flatnonzero(theirs.items[row] == ours.items[row, column])
        assert len(other) == 1
        assert abs(theirs.scores[row, other[0]] - theirs.scores[row, column]) <= TOLERANCE
    assert same.mean() > 0.95  # swaps are the exception
    assert (ours.certified == theirs.certified).all()


def test_full_width_equals_exhaustive_scoring(normalized: Setup, reference: Any):
    s, n = normalized, len(normalized.codes)
    truth = reference.exhaustive(s.model, s.prompts, s.codes, s.ids, s.engine.normalizer)
    done: list[int] = []
    result = s.engine.search(s.prompts, n, n, progress=done.append)
    reference.assert_same_lists(result.items, result.scores, truth.sum(-1), TOLERANCE)
    own = np.take_along_axis(truth, result.items[:, :, None], axis=1)
    assert np.abs(own - result.level_log_probs).max() <= TOLERANCE
    assert result.certified.all()
    assert done == [5, 5, 2]


@pytest.mark.parametrize(("k", "width"), [(1, 1), (3, 5), (5, 20)])
def test_narrow_beams_equal_the_torch_engine(normalized: Setup, k: int, width: int):
    s = normalized
    theirs = s.torch_engine.search(s.prompts, k, width)
    assert_agree(s.engine.search(s.prompts, k, width), theirs)


def test_filters(normalized: Setup):
    s, n = normalized, len(normalized.codes)
    rng = np.random.default_rng(0)
    sizes = (0, 1, 5, 20, 40, 0, 9, 9, 30, 0, 3, 8)
    seen = [rng.choice(n, size, replace=False) for size in sizes]
    view = s.trie.allow(rng.choice(n, n // 2, replace=False))
    candidates = [None, *(rng.choice(n, 10 + 3 * row, replace=False) for row in range(11))]
    for what in (
        {"seen": seen},
        {"view": view},
        {"candidates": candidates},
        {"seen": seen[:2] * 6, "view": view},
    ):
        for k, width in ((4, 8), (5, n)):
            theirs = s.torch_engine.search(s.prompts, k, width, **what)
            assert_agree(s.engine.search(s.prompts, k, width, **what), theirs)
    assert_agree(s.engine.search(s.prompts, 3, 9), s.torch_engine.search(s.prompts, 3, 9))


def test_titles_with_end_marks(normalized: Setup):
    s = normalized
    rng = np.random.default_rng(1)
    rows = {
        tuple(np.r_[rng.integers(1, 30, size), np.zeros(5 - size, dtype=int)])
        for size in rng.integers(1, 5, 40)
    }
    trie = SidTrie.build(np.array(sorted(rows)), end_code=0)
    ids = [rng.permutation(96)[:30].tolist()] * 5
    ours, theirs = s.on(trie, ids), s.torch_on(trie, ids)
    assert_agree(ours.search(s.prompts, 5, 12), theirs.search(s.prompts, 5, 12))
    items = np.tile(np.arange(len(rows)), (len(s.prompts), 1))
    difference = ours.score(s.prompts, items) - theirs.score(s.prompts, items)
    assert np.abs(difference).max() <= TOLERANCE


def test_score_equals_the_torch_engine(normalized: Setup):
    s = normalized
    items = s.torch_engine.search(s.prompts, 4, 10).items
    items[:, -1] = items[:, 0]  # an item may be asked for twice
    difference = s.engine.score(s.prompts, items) - s.torch_engine.score(s.prompts, items)
    assert np.abs(difference).max() <= TOLERANCE
    assert s.engine.score(s.prompts, items[:, :0]).shape == (12, 0, 3)


@given(
    seed=st.integers(0, 10_000),
    n_items=st.integers(1, 40),
    n_levels=st.integers(1, 5),
    width=st.integers(1, 12),
    batch_size=st.integers(1, 6),
    normalizer=st.sampled_from(NORMALIZERS),
)
@settings(deadline=None, max_examples=15)
def test_any_catalogue_and_any_batch(setup: Setup, reference: Any, **what: Any):
    codes = reference.random_codes(what["seed"], what["n_items"], what["n_levels"])
    ids, trie = reference.sid_token_ids(what["n_levels"]), SidTrie.build(codes)
    prompts = reference.random_prompts(what["seed"], 5, longest=70)
    ours = setup.on(trie, ids)
    ours.normalizer, ours.batch_size = what["normalizer"], what["batch_size"]
    theirs = TorchEngine(setup.model, trie, ids, 0, ours.normalizer)
    k = min(3, what["width"])
    found, expected = (
        ours.search(prompts, k, what["width"]),
        theirs.search(prompts, k, what["width"]),
    )
    real = expected.items >= 0
    assert ((found.items >= 0) == real).all()
    assert np.abs(found.scores[real] - expected.scores[real]).max() <= TOLERANCE
    assert (found.items == expected.items).mean() > 0.9


def test_results_repeat_whatever_the_batch(setup: Setup):
    first = setup.engine.search(setup.prompts, 5, 10)
    for batch_size, order in ((12, range(12)), (1, range(11, -1, -1)), (7, range(12))):
        other = _copy(setup.engine)
        other.batch_size = batch_size
        again = other.search([setup.prompts[row] for row in order], 5, 10)
        assert (first.items[list(order)] == again.items).all()
        assert np.abs(first.scores[list(order)] - again.scores).max() <= TOLERANCE


def test_only_the_columns_that_count_are_computed(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    model = PagedModel(setup.runner)
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    assert setup.engine.plain_head
    whole = setup.runner.model.compute_logits(hidden)
    job = setup.engine._job([], setup.engine._tensors)
    expected = {name: normalize(whole, job.sid_ids[1], name) for name in NORMALIZERS}

    def forbidden(hidden: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the whole vocabulary")

    with torch.inference_mode():
        for name in NORMALIZERS:
            got = model.columns(hidden, 1, job._replace(normalizer=name))
            torch.testing.assert_close(got, expected[name])
        monkeypatch.setattr(vllm_worker, "_LOGITS_AT_ONCE", 2 * 96)  # two rows at a time
        got = model.columns(hidden, 1, job)
        torch.testing.assert_close(got, expected["full"])
        monkeypatch.setattr(setup.runner.model, "compute_logits", forbidden)
        for name in ("level", "trie"):
            model.columns(hidden, 1, job._replace(normalizer=name))
        with pytest.raises(AssertionError, match="whole vocabulary"):
            model.columns(hidden, 1, job)


def test_capped_logits_are_computed_whole(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    plain = setup.runner.model.compute_logits
    monkeypatch.setattr(
        setup.runner.model, "compute_logits", lambda hidden: torch.tanh(plain(hidden))
    )
    with torch.inference_mode():
        model = PagedModel(setup.runner)
        assert not model.has_plain_head()
        hidden = torch.randn(2, 3, 32)
        job = setup.engine._job([], setup.engine._tensors)._replace(plain_head=False)
        got = model.columns(hidden, 0, job._replace(normalizer="level"))
        expected = torch.tanh(plain(hidden))[..., job.sid_ids[0]].log_softmax(-1)
    torch.testing.assert_close(got, expected)


# The KV cache.


def free_blocks(setup: Setup) -> int:
    core = setup.engine.llm.llm_engine.engine_core.engine_core
    return core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def test_nothing_is_kept_between_batches(setup: Setup):
    free, kept = free_blocks(setup), set(vars(setup.runner))
    caches = [cache.data_ptr() for cache in setup.runner.kv_caches]
    setup.engine.search(setup.prompts, 5, 10)
    assert free_blocks(setup) == free == setup.engine.limits.n_blocks
    assert set(vars(setup.runner)) == kept
    assert [cache.data_ptr() for cache in setup.runner.kv_caches] == caches
    assert not setup.runner.requests


def test_what_the_cache_held_before_does_not_matter(setup: Setup):
    expected = setup.engine.search(setup.prompts, 5, 10)
    for cache in setup.runner.kv_caches:
        cache[1:2000].fill_(torch.nan)
    found = setup.engine.search(setup.prompts, 5, 10)
    assert (found.items == expected.items).all()
    assert np.abs(found.scores - expected.scores).max() <= TOLERANCE


def test_only_the_blocks_that_were_asked_for_are_written(setup: Setup):
    most = setup.engine.limits.blocks(100, 10, 2) * 5  # five users at a time
    for cache in setup.runner.kv_caches:
        cache[1 + most :].fill_(7.0)
        cache[0].fill_(7.0)
    setup.engine.search(setup.prompts, 5, 10)
    for cache in setup.runner.kv_caches:
        assert (cache[1 + most :] == 7.0).all()
        assert (cache[0] == 7.0).all()


def test_blocks_of_a_user():
    limits = CacheLimits(100, 32)
    assert limits.blocks(64, 10, 0) == 2  # one level: no beam goes through the model
    assert limits.blocks(64, 10, 1) == 2 + 10
    assert limits.blocks(65, 10, 2) == 3 + 20  # 31 tokens behind the whole blocks, and 2 more
    assert limits.blocks(65, 10, 34) == 3 + 30


def test_a_small_cache_makes_small_batches_and_a_smaller_one_is_refused(setup: Setup):
    small = _copy(setup.engine)
    each = setup.engine.limits.blocks(max(map(len, setup.prompts)), 10, 2)
    small.limits = CacheLimits(3 * each - 1, BLOCK)
    done: list[int] = []
    found = small.search(setup.prompts, 5, 10, progress=done.append)
    assert done == [2] * 6
    assert_agree(found, setup.torch_engine.search(setup.prompts, 5, 10))
    small.limits = CacheLimits(each - 1, BLOCK)
    with pytest.raises(ValueError, match=r"holds 9 beams of the longest prompt, beam_width=10"):
        small.search(setup.prompts, 5, 10)
    items = np.tile(np.arange(len(setup.codes)), (12, 1))
    difference = small.score(setup.prompts, items) - setup.torch_engine.score(setup.prompts, items)
    assert np.abs(difference).max() <= TOLERANCE  # nine items at a time
    small.limits = CacheLimits(3, BLOCK)
    for ask in (lambda: small.search([[70] * 64], 1, 1), lambda: small.score([[70] * 64], [[0]])):
        with pytest.raises(ValueError, match=r"64 tokens needs 4 blocks of the KV cache.*has 3"):
            ask()


def test_a_batch_that_does_not_fit_writes_nothing(setup: Setup):
    model = PagedModel(setup.runner)
    model.limits = CacheLimits(10, BLOCK)
    with pytest.raises(RuntimeError, match="2 prompts with 5 beams each don't fit.*10 blocks"):
        PagedBatch(model, [[70] * 33, [70]], 5, 2)


def test_beams_stay_in_their_rows_where_they_can(setup: Setup):
    batch = PagedBatch(PagedModel(setup.runner), [[70] * 5, [71] * 7], 4, 3)
    copies: list[tuple[list[int], list[int]]] = []
    batch.model.copy_blocks = lambda source, target: copies.append(  # type: ignore[method-assign]
        ((source - batch.private).tolist(), (target - batch.private).tolist())
    )
    batch._leave_the_prompts(2)
    assert batch.rows.tolist() == [[0, 1], [4, 5]]
    assert copies.pop() == ([-2, -2, -1, -1], [0, 1, 4, 5])
    batch.depth = 1
    batch._follow(torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1]]))
    assert batch.rows.tolist() == [[1, 2, 0, 3], [4, 6, 7, 5]]
    assert copies.pop() == ([1, 1, 4, 4], [2, 3, 6, 7])
    batch._follow(torch.tensor([[3, 3], [2, 1]]))
    assert batch.rows.tolist() == [[3, 0], [7, 6]]
    assert copies.pop() == ([3], [0])


def test_passes_may_cut_sequences_anywhere(setup: Setup):
    model = PagedModel(setup.runner)
    outputs = []
    with torch.inference_mode():
        for most in (1, 3, 50, 1000):
            model.max_tokens = most
            batch = PagedBatch(model, [[70, 75, 80], [81] * 40, [90]], 2, 1)
            outputs.append(
                torch.cat(
                    [
                        batch.prefill().expand(-1, 2, -1),
                        batch.extend(
                            torch.tensor([[3, 4], [5, 6], [7, 8]]), torch.zeros(3, 2).long()
                        ),
                    ]
                )
            )
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


# What is refused.


def test_wrong_requests_are_refused(setup: Setup):
    search, prompts = setup.engine.search, setup.prompts
    nothing, everything = np.arange(0), np.arange(len(setup.codes))
    with pytest.raises(ValueError, match="k=6 must lie between 1 and beam_width=5"):
        search(prompts, 6, 5)
    with pytest.raises(ValueError, match="seen has 1 entries for 12"):
        search(prompts, 1, 5, [nothing])
    with pytest.raises(ValueError, match="prompt 7 has no allowed item left"):
        search(prompts, 1, 5, [nothing] * 7 + [everything] + [nothing] * 4)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        search([[70], []], 1, 5)
    with pytest.raises(ValueError, match="prompt 1 with its item needs 129 tokens.*holds 128"):
        search([[70], [70] * 126], 1, 5)
    with pytest.raises(ValueError, match="prompts hold tokens 70..96; the model has 96"):
        search([[70], [96]], 1, 5)
    with pytest.raises(ValueError, match="prompts hold tokens -1..70; the model has 96"):
        setup.engine.score([[70], [-1]], np.zeros((2, 1), dtype=int))
    with pytest.raises(ValueError, match="another trie"):
        search(prompts, 1, 5, view=SidTrie.build(setup.codes).everything())
    with pytest.raises(ValueError, match="there are 0"):
        setup.engine.score(prompts, np.full((12, 1), -1))
    assert search([], 3, 5).items.shape == (0, 3)
    assert setup.engine.score([], np.zeros((0, 2), dtype=int)).shape == (0, 2, 3)
    # And the engine goes on as before.
    assert_agree(search(prompts, 5, 10), setup.torch_engine.search(prompts, 5, 10))


def test_nan_weights_are_refused_and_leave_no_trace(setup: Setup):
    norm = setup.runner.model.model.norm.weight
    layer = setup.runner.model.model.layers[0].input_layernorm.weight
    for weight in (norm, layer):
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="NaN scores"):
            setup.engine.search(setup.prompts, 5, 10)
        with torch.no_grad():
            weight.copy_(saved)
        found = setup.engine.search(setup.prompts, 5, 10)
        assert_agree(found, setup.torch_engine.search(setup.prompts, 5, 10))


def test_a_search_beside_live_requests_is_refused(setup: Setup):
    llm = setup.engine.llm
    params = vllm_engine.vllm.SamplingParams(max_tokens=3, detokenize=False, temperature=0.0)
    llm.llm_engine.add_request("someone's", {"prompt_token_ids": [70, 71]}, params)
    with pytest.raises(RuntimeError, match="unfinished requests"):
        setup.engine.search(setup.prompts, 5, 10)
    with pytest.raises(RuntimeError, match="unfinished requests"):
        setup.engine.score(setup.prompts, np.zeros((12, 1), dtype=int))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert_agree(
        setup.engine.search(setup.prompts, 5, 10), setup.torch_engine.search(setup.prompts, 5, 10)
    )
    ids = llm.generate([{"prompt_token_ids": setup.prompts[0]}], params, use_tqdm=False)
    with torch.no_grad():
        logits = setup.model(torch.tensor([setup.prompts[0]])).logits[0, -1]
    assert ids[0].outputs[0].token_ids[0] == int(logits.argmax())  # and vLLM itself is unharmed


def test_wrong_arguments_are_refused_before_a_model_is_loaded(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def make(folder: Path = tmp_path, **options: Any) -> Any:
        return InWorkerEngine(folder, setup.trie, setup.ids, **options)

    with pytest.raises(ValueError, match="holds no config.json"):
        make()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="normalizer='sum'"):
        make(normalizer="sum")
    with pytest.raises(ValueError, match="batch_size=0"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="both set the KV cache"):
        make(kv_cache_memory_bytes=2**30)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING=1.*own process; unset"):
        make()
    monkeypatch.setattr(vllm_inworker, "prepare_environment", lambda size: False)
    with pytest.raises(RuntimeError, match="CPU only.*engine='vllm'"):
        make()
    monkeypatch.setattr(vllm_engine.vllm, "__version__", "0.33.0")
    with pytest.raises(RuntimeError, match=r"vLLM 0.33.0.*supports vllm>=0.31,<0.33"):
        make()


def fake_runner(setup: Setup, **changes: Any) -> SimpleNamespace:
    """The real runner's attributes, some of them replaced; None takes one away."""
    names = (*vllm_worker._RUNNER, "kv_cache_config")
    real = {name: getattr(setup.runner, name) for name in names}
    kept = {name: value for name, value in (real | changes).items() if value is not None}
    return SimpleNamespace(**kept)


def test_missing_internals_are_named(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    PagedModel(fake_runner(setup))
    for name in vllm_worker._RUNNER:
        with pytest.raises(RuntimeError, match=rf"lacks internals.*SimpleNamespace\.{name}"):
            PagedModel(fake_runner(setup, **{name: None}))
    group = SimpleNamespace(layer_names=[])
    with pytest.raises(RuntimeError, match="AttentionGroup.get_metadata_builder, .*kv_cache_spec"):
        PagedModel(fake_runner(setup, attn_groups=[[group]]))
    with pytest.raises(RuntimeError, match="AttentionGroup.get_metadata_builder"):
        PagedModel(fake_runner(setup, attn_groups=[]))
    with pytest.raises(RuntimeError, match="SimpleNamespace.compute_logits"):
        PagedModel(fake_runner(setup, model=SimpleNamespace()))

    @dataclasses.dataclass
    class Other:
        seq_lens: int

    monkeypatch.setattr(vllm_worker, "CommonAttentionMetadata", Other)
    with pytest.raises(RuntimeError, match="CommonAttentionMetadata.query_start_loc, "):
        PagedModel(setup.runner)


def test_other_models_and_devices_are_refused(setup: Setup):
    (group,) = setup.runner.attn_groups[0]
    config = setup.runner.vllm_config

    def with_spec(**changes: Any) -> Any:
        real = {name: getattr(group, name) for name in vllm_worker._GROUP}
        return [[SimpleNamespace(**(real | changes))]]

    def with_config(**changes: Any) -> Any:
        parts = ("parallel_config", "model_config", "scheduler_config")
        real = {name: getattr(config, name) for name in parts}
        none = {"lora_config": None, "speculative_config": None}
        return SimpleNamespace(**(real | none | changes))

    def plain(name: str, **changes: Any) -> SimpleNamespace:
        wanted = {
            "parallel_config": ("world_size", "data_parallel_size"),
            "model_config": ("is_multimodal_model", "uses_mrope"),
        }[name]
        real = {key: getattr(getattr(config, name), key) for key in wanted}
        return SimpleNamespace(**(real | changes))

    class OtherSpec(type(group.kv_cache_spec)):  # type: ignore[misc]  # as of MLA
        pass

    spec = group.kv_cache_spec
    other = object.__new__(OtherSpec)
    other.__dict__.update(spec.__dict__)
    for message, changes in (
        ("device cuda", {"device": torch.device("cuda")}),
        (
            "2 workers",
            {"vllm_config": with_config(parallel_config=plain("parallel_config", world_size=2))},
        ),
        (
            "1 workers",
            {
                "vllm_config": with_config(
                    parallel_config=plain("parallel_config", data_parallel_size=2)
                )
            },
        ),
        ("plain full attention", {"attn_groups": [[group], [group]]}),
        ("plain full attention", {"attn_groups": [[group, group]]}),
        ("plain full attention", {"attn_groups": with_spec(kv_cache_spec=other)}),
        (
            "windowed",
            {"attn_groups": with_spec(kv_cache_spec=dataclasses.replace(spec, sliding_window=8))},
        ),
        (
            "windowed",
            {
                "attn_groups": with_spec(
                    kv_cache_spec=dataclasses.replace(spec, attention_chunk_size=8)
                )
            },
        ),
        ("another size", {"attn_groups": with_spec(kernel_block_size=16)}),
        ("first axis", {"kv_caches": [torch.zeros(2, 5)]}),
        (
            "multimodal",
            {"vllm_config": with_config(model_config=plain("model_config", uses_mrope=True))},
        ),
        ("adapter", {"vllm_config": with_config(lora_config=object())}),
        ("adapter", {"vllm_config": with_config(speculative_config=object())}),
    ):
        with pytest.raises(RuntimeError, match=f"doesn't support.*{message}"):
            PagedModel(fake_runner(setup, **changes))
    PagedModel(fake_runner(setup, vllm_config=with_config()))
