"""VllmEngine against exhaustive scoring and against TorchEngine; needs vLLM (CPU or GPU build)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality  # noqa: E402

from genrec.decoding import vllm_engine  # noqa: E402
from genrec.decoding.beam import NORMALIZERS, BeamResult  # noqa: E402
from genrec.decoding.torch_engine import TorchEngine  # noqa: E402
from genrec.decoding.trie import SidTrie  # noqa: E402
from genrec.decoding.vllm_engine import SidLogitsProcessor, VllmEngine  # noqa: E402

TOLERANCE = 1e-3
CPU = torch.device("cpu")


class Setup(SimpleNamespace):
    """Engines over one checkpoint and catalogue."""

    codes: np.ndarray
    ids: list[list[int]]
    trie: SidTrie
    prompts: list[list[int]]
    model: Any
    engine: VllmEngine
    torch_engine: TorchEngine


@pytest.fixture(scope="module")
def setup(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """The one LLM of this module; its checkpoint's generation config is odd on purpose."""
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = tmp_path_factory.mktemp("checkpoint")
    model = deepcopy(reference.tiny_model())
    model.generation_config.update(top_k=1, temperature=7.0, repetition_penalty=5.0, do_sample=True)
    model.save_pretrained(folder)
    codes, ids = reference.random_codes(0, 60, 3), reference.sid_token_ids(3)
    trie = SidTrie.build(codes)
    made = Setup(
        codes=codes,
        ids=ids,
        trie=trie,
        prompts=reference.random_prompts(5, 9, longest=70),  # from a part of a block to several
        model=model,
        engine=VllmEngine(folder, trie, ids, batch_size=4, dtype="float32", enforce_eager=True),
        torch_engine=TorchEngine(model, trie, ids, 0),
    )
    yield made
    # An LLM that is collected later would tear down the state that it shares with the next one.
    made.engine.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(params=NORMALIZERS)
def normalized(request: pytest.FixtureRequest, setup: Setup) -> Iterator[Setup]:
    """The same engines under each normaliser."""
    setup.engine.normalizer = request.param
    theirs = TorchEngine(setup.model, setup.trie, setup.ids, 0, request.param)
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
    assert done == [4, 4, 1]


@pytest.mark.parametrize(("k", "width"), [(1, 1), (3, 5), (5, 20)])
def test_narrow_beams_equal_the_torch_engine(normalized: Setup, k: int, width: int):
    s = normalized
    theirs = s.torch_engine.search(s.prompts, k, width)
    assert_agree(s.engine.search(s.prompts, k, width), theirs)


def test_filters(normalized: Setup):
    s, n = normalized, len(normalized.codes)
    rng = np.random.default_rng(0)
    seen = [rng.choice(n, size, replace=False) for size in (0, 1, 5, 20, 40, 0, 9, 9, 30)]
    view = s.trie.allow(rng.choice(n, n // 2, replace=False))
    candidates = [None, *(rng.choice(n, 10 + 4 * row, replace=False) for row in range(8))]
    for what in (
        {"seen": seen},
        {"view": view},
        {"candidates": candidates},
        {"seen": seen, "view": view},
    ):
        for k, width in ((5, 8), (5, n)):
            theirs = s.torch_engine.search(s.prompts, k, width, **what)
            assert_agree(s.engine.search(s.prompts, k, width, **what), theirs)


def test_score_equals_the_torch_engine(normalized: Setup):
    s = normalized
    items = s.torch_engine.search(s.prompts, 4, 10).items
    items[:, -1] = items[:, 0]  # an item may be asked for twice
    difference = s.engine.score(s.prompts, items) - s.torch_engine.score(s.prompts, items)
    assert np.abs(difference).max() <= TOLERANCE


def test_results_repeat(setup: Setup):
    first = setup.engine.search(setup.prompts, 5, 10)
    setup.engine.llm.reset_prefix_cache()
    again = setup.engine.search(setup.prompts[::-1], 5, 10)
    assert (first.items == again.items[::-1]).all()
    assert np.abs(first.scores - again.scores[::-1]).max() <= TOLERANCE


def test_wrong_requests_are_refused(setup: Setup):
    search, prompts = setup.engine.search, setup.prompts
    nothing, everything = np.arange(0), np.arange(len(setup.codes))
    with pytest.raises(ValueError, match="k=6 must lie between 1 and beam_width=5"):
        search(prompts, 6, 5)
    with pytest.raises(ValueError, match="seen has 1 entries for 9"):
        search(prompts, 1, 5, [nothing])
    with pytest.raises(ValueError, match="prompt 7 has no allowed item left"):
        search(prompts, 1, 5, [nothing] * 7 + [everything, nothing])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        search([[70], []], 1, 5)
    with pytest.raises(ValueError, match="prompt 1 with its item needs 129 tokens.*holds 128"):
        search([[70], [70] * 126], 1, 5)
    with pytest.raises(ValueError, match="prompts hold tokens 70..96; the model has 96"):
        search([[70], [96]], 1, 5)
    with pytest.raises(ValueError, match="another trie"):
        search(prompts, 1, 5, view=SidTrie.build(setup.codes).everything())
    with pytest.raises(ValueError, match="there are 0"):
        setup.engine.score(prompts, np.full((9, 1), -1))
    assert search([], 3, 5).items.shape == (0, 3)


def test_other_requests_never_run(setup: Setup):
    for extra in (None, {}, {"other": 1}, {"genrec_children": [0, "full", 0, 1]}):
        params = SamplingParams(max_tokens=1, detokenize=False, extra_args=extra)
        with pytest.raises(Exception, match="only its engine's requests"):  # vLLM's own class
            setup.engine.llm.generate([{"prompt_token_ids": [70]}], params, use_tqdm=False)
    again = setup.engine.search(setup.prompts, 5, 10)  # and the engine goes on
    assert_agree(again, setup.torch_engine.search(setup.prompts, 5, 10))


@pytest.mark.parametrize(
    ("token", "value", "error", "message"),
    [
        (None, float("nan"), ValueError, "NaN"),
        (70, -1.0, RuntimeError, "isn't an allowed child"),
        (1, -1.0, RuntimeError, "isn't an allowed child"),
    ],
)
def test_answers_are_checked(
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    token: int | None,
    value: float,
    error: type[Exception],
    message: str,
):
    generate = setup.engine.llm.generate
    wrong = token if token != 1 else setup.ids[2][0]  # a SID token, but of another level

    def tampered(*args: Any, **options: Any) -> Any:
        outputs = generate(*args, **options)
        flat = outputs[-1].outputs[0].logprobs
        flat.logprobs[1] = value
        flat.token_ids[1] = flat.token_ids[1] if wrong is None else wrong
        return outputs

    monkeypatch.setattr(setup.engine.llm, "generate", tampered)
    with pytest.raises(error, match=message):
        setup.engine.search(setup.prompts, 5, 10)


# The processor alone.


def processor_config(setup: Setup, folder: Path) -> SimpleNamespace:
    path = folder / "sids.npz"
    vllm_engine._write_sid_file(path, setup.trie, [np.array(ids) for ids in setup.ids])
    return SimpleNamespace(
        additional_config=vllm_engine._SidFile(str(path)),
        model_config=SimpleNamespace(get_vocab_size=lambda: 96),
    )


@pytest.fixture
def processor(setup: Setup, tmp_path: Path) -> SidLogitsProcessor:
    return SidLogitsProcessor(processor_config(setup, tmp_path), CPU, False)


def wanted(
    processor: SidLogitsProcessor,
    level: int,
    node: int = 0,
    normalizer: str = "full",
    keep: int = 99,
    score: float = 0.0,
    allowed: Any = None,
) -> SamplingParams:
    """Parameters of a request; by default every child is allowed."""
    if allowed is None:
        allowed = np.ones(processor.tensors.widest[level], dtype=bool)
    request = [level, normalizer, node, keep, score, np.packbits(allowed).tobytes()]
    return SamplingParams(extra_args={"genrec_children": request})


def join(processor: SidLogitsProcessor, *rows: SamplingParams, at: int = 0) -> None:
    added = [(at + row, params, None, []) for row, params in enumerate(rows)]
    processor.update_state(BatchUpdate(at + len(rows), [], added, []))


def children(setup: Setup, level: int, node: int) -> list[int]:
    start = setup.trie.children[level]
    codes = setup.trie.tokens[level][start[node] : start[node + 1]]
    return [setup.ids[level][code] for code in codes]


def expected(setup: Setup, logits: torch.Tensor, level: int, node: int, normalizer: str) -> Any:
    legal = children(setup, level, node)
    over = {"full": slice(None), "level": setup.ids[level], "trie": legal}[normalizer]
    row = torch.full_like(logits, -torch.inf)
    row[legal] = logits[legal] - logits[over].logsumexp(0)
    return row


def test_rows_of_many_kinds(setup: Setup, processor: SidLogitsProcessor):
    kinds = [(1, 2, "full"), (0, 0, "trie"), (2, 3, "level"), (1, 0, "full"), (2, 1, "trie")]
    join(processor, *[wanted(processor, *kind) for kind in kinds])
    logits = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * 3
    got = processor.apply(logits.clone())
    for row, kind in enumerate(kinds):
        torch.testing.assert_close(got[row], expected(setup, logits[row], *kind))


def test_rows_leave_and_move(setup: Setup, processor: SidLogitsProcessor):
    nodes = [4, 3, 2, 1]
    join(processor, *[wanted(processor, 1, node) for node in nodes])
    swap, one_way = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
    processor.update_state(None)
    processor.update_state(BatchUpdate(3, [1], [], [(3, 1, one_way), (0, 2, swap)]))
    logits = torch.randn(3, 96)
    got = processor.apply(logits.clone())
    for row, node in enumerate([2, 1, 4]):
        torch.testing.assert_close(got[row], expected(setup, logits[row], 1, node, "full"))


def test_only_allowed_children_remain(setup: Setup, processor: SidLogitsProcessor):
    legal = children(setup, 0, 0)
    allowed = np.arange(len(legal)) % 2 == 1
    join(processor, wanted(processor, 0, allowed=allowed))
    logits = torch.randn(1, 96)
    got = processor.apply(logits.clone())[0]
    true = expected(setup, logits[0], 0, 0, "full")
    finite = np.array(legal)[allowed]
    assert set(got.isfinite().nonzero().flatten().tolist()) == set(finite)
    torch.testing.assert_close(got[finite], true[finite])  # a filter changes no score


def test_ties_at_the_cut_go_to_the_smaller_sid(setup: Setup, processor: SidLogitsProcessor):
    legal = children(setup, 0, 0)
    join(processor, wanted(processor, 0, keep=2), wanted(processor, 0, keep=2, score=-1e4))
    logits = torch.zeros(2, 96)
    logits[:, legal[-1]] = 1e-5  # better, but not once it is added to a score of −10,000
    got = processor.apply(logits).isfinite()
    assert set(got[0].nonzero().flatten().tolist()) == {legal[0], legal[-1]}
    assert set(got[1].nonzero().flatten().tolist()) == {legal[0], legal[1]}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_passes_through_to_be_refused(processor: SidLogitsProcessor, sign: float):
    join(processor, wanted(processor, 0, keep=2))
    logits = torch.full((1, 96), float(np.copysign(np.nan, sign)))
    assert processor.apply(logits).isnan().sum() == 2


def test_the_processor_fails_closed(processor: SidLogitsProcessor):
    logits = torch.zeros(1, 96)
    with pytest.raises(RuntimeError, match="1 rows of logits, but instructions for rows"):
        processor.apply(logits)
    with pytest.raises(ValueError, match="only its engine's requests"):
        join(processor, SamplingParams())
    join(processor, wanted(processor, 0))
    with pytest.raises(RuntimeError, match="logits over 95 tokens, the model has 96"):
        processor.apply(torch.zeros(1, 95))
    with pytest.raises(RuntimeError, match="2 rows of logits"):
        processor.apply(torch.zeros(2, 96))
    none = np.zeros(processor.tensors.widest[1], dtype=bool)
    for params, message in (
        (wanted(processor, 1, 0, allowed=none), "allows no child"),
        (wanted(processor, 1, 10_000), "a parent that level 1 doesn't have"),
        (wanted(processor, 0, 1), "a parent that level 0 doesn't have"),
        (wanted(processor, 1, -1), "a parent that level 1 doesn't have"),
        (wanted(processor, 3, allowed=none), "names level 3 of 3"),
        (wanted(processor, 1, 0, allowed=np.ones(90, dtype=bool)), "need 1 bytes per request"),
    ):
        join(processor, params)
        with pytest.raises(RuntimeError, match=message):
            processor.apply(logits)
    for bad in (wanted(processor, 0, normalizer="sum"), wanted(processor, 0, keep=0)):
        with pytest.raises(ValueError, match="no such request"):
            join(processor, bad)


def test_the_processor_needs_its_engine():
    config = SimpleNamespace(additional_config={})
    with pytest.raises(RuntimeError, match="only inside a VllmEngine"):
        SidLogitsProcessor(config, CPU, False)


# Construction.


def test_versions():
    for version in ("0.31.0", "0.31.2rc1", "0.32.0+cpu"):
        vllm_engine._check_version(version)
    for version in ("0.30.9", "0.33.0", "1.31.0", "dev"):
        with pytest.raises(RuntimeError, match=rf"vLLM {version}.*supports vllm>=0.31,<0.33"):
            vllm_engine._check_version(version)


def test_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="V1 runner"):
        vllm_engine.prepare_environment(None)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    if vllm_engine.prepare_environment(None):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with pytest.raises(ValueError, match="both set the KV cache"):
            vllm_engine.prepare_environment(2**30)


def test_tensor_parallelism_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check = vllm_engine._check_tensor_parallel
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6}')
    for size in (0, -2, 4):
        with pytest.raises(ValueError, match=f"size={size} must be a divisor.* 6 attention heads"):
            check(tmp_path, size, True)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    check(tmp_path, 1, True)
    with pytest.raises(ValueError, match="size=3 on CPU.*VLLM_CPU_OMP_THREADS_BIND"):
        check(tmp_path, 3, True)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    check(tmp_path, 2, True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check(tmp_path, 2, False)
    with pytest.raises(ValueError, match="size=3 needs as many GPUs; 2 are visible"):
        check(tmp_path, 3, False)


def test_wrong_arguments_are_refused_before_a_model_is_loaded(setup: Setup, tmp_path: Path):
    with pytest.raises(ValueError, match="holds no config.json"):
        VllmEngine(tmp_path, setup.trie, setup.ids)
    with pytest.raises(ValueError, match="normalizer='sum'"):
        VllmEngine(tmp_path, setup.trie, setup.ids, "sum")  # type: ignore[arg-type]
