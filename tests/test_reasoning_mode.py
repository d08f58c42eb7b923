"""Reasoning mode and search: merging by hand, prefixes of training rows, and every bad input."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from genrec.artifacts import Stage
from genrec.bundle.parts import trained_families
from genrec.chain_reader import ChainReader
from genrec.chains import Chain
from genrec.decoding.free_text import SampledText, TextSampling
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.modeling import add_sid_tokens, encode_prompts, encode_rows, resize_embeddings
from genrec.prompts import PromptRenderer, default_folder
from genrec.reasoning import (
    REASONING,
    Merged,
    decision_marker,
    marker_ids,
    merge,
    sample_chains,
    search_with_chains,
)
from genrec.recommend import Recommender
from genrec.tasks.attributes import AttributeIndex, item_attributes
from genrec.tasks.families import FAMILIES
from genrec.tasks.reasoning import reasoning_slots, step_texts
from genrec.tasks.rendering import ItemTexts, render_rows, served_prompts
from genrec.tasks.texts import written_renderer

MAX_HISTORY = 6
CHAINS = TextSampling(max_tokens=20, seed=1)


@pytest.fixture(scope="module")
def shop(tiny):
    return tiny.shop(max_history=MAX_HISTORY)


@pytest.fixture(scope="module")
def world(tiny, shop):
    """(model, tokenizer, recommender) of a random model that claims to know all families."""
    model, tokenizer, token_ids = tiny.sid_lm(shop.semantic_ids)
    model = tiny.lm(len(tokenizer), context=1024)
    for parameter in model.parameters():
        parameter.data *= 2.0 if parameter.ndim > 1 else 1.0
    return model, tokenizer, recommender_of(shop, model, tokenizer, token_ids)


def recommender_of(shop, model, tokenizer, token_ids, **settings) -> Recommender:
    trie = SidTrie.build(shop.semantic_ids.codes)
    engine = TorchEngine(model, trie, token_ids, tokenizer.pad_token_id, batch_size=8)
    known = {"families": FAMILIES, "trained_on_target": False, **settings}
    return Recommender(
        shop.catalog, shop.semantic_ids, PromptRenderer(), "sequential/seen/01", tokenizer, engine,
        MAX_HISTORY, "sft", **known,
    )  # fmt: skip


def taught_rows(shop, histories: list[list[int]], template: str | None = None) -> pl.DataFrame:
    """Training rows of `reasoning_recommendation` for histories whose target is item 0."""
    index = AttributeIndex.build(item_attributes(shop.catalog), len(shop.catalog))
    slots = reasoning_slots(pl.Series(histories, dtype=pl.List(pl.Int32)), index)
    ids = pl.Series("row_id", [f"r{i}" for i in range(len(histories))])
    texts = step_texts(slots, written_renderer(), ids, sids=shop.semantic_ids.sids())
    rows = texts.select(pl.all().name.prefix("step_")).with_columns(
        ids,
        pl.lit(REASONING).alias("task"),
        pl.Series("history", histories, dtype=pl.List(pl.Int32)),
        pl.Series("targets", [[0]] * len(histories), dtype=pl.List(pl.Int32)),
    )
    texts = ItemTexts.of(shop.catalog, shop.semantic_ids)
    return render_rows(rows.drop_nulls(), texts, PromptRenderer(), template=template)


class Writes(torch.nn.Module):
    """A model that writes a given text, whatever it is asked."""

    def __init__(self, script: list[int], first: int, vocab_size: int) -> None:
        super().__init__()
        self.script, self.first = script, first
        self.embeddings = torch.nn.Embedding(vocab_size, 4)
        from transformers import GPT2Config

        self.config = GPT2Config(
            vocab_size=vocab_size, n_positions=2048, bos_token_id=None, eos_token_id=None
        )
        self.dtype = torch.float32

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, position_ids=None, past_key_values=None, logits_to_keep=0, **_):
        position = position_ids
        if position is None:
            position = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        at = (position - self.first + 1).clamp(0, len(self.script) - 1)
        logits = torch.full((*at.shape, self.config.vocab_size), -50.0)
        logits.scatter_(-1, torch.tensor(self.script)[at].unsqueeze(-1), 50.0)
        keep = logits_to_keep
        return SimpleNamespace(logits=logits[:, keep] if torch.is_tensor(keep) else logits)


def sentencepiece_like():
    """A tokenizer that puts "▁" before words and before the text, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    words = [path.read_text() for path in default_folder().rglob("*.jinja")]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=list("0123456789“”"),
    )  # fmt: skip
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-like"])
def test_prompt_and_chain_are_a_token_prefix_of_the_training_row(shop, world, kind):
    """What the search sees is what the row has before its item, if the model writes the row."""
    model, tokenizer, recommender = world
    if kind == "sentencepiece-like":
        tokenizer = sentencepiece_like()
        token_ids = add_sid_tokens(tokenizer, shop.semantic_ids)
        resized = copy.deepcopy(model)
        resize_embeddings(resized, tokenizer)
        recommender = recommender_of(shop, resized, tokenizer, token_ids)
    histories = [[0, 2, 4, 6], [1, 3, 5, 2], [4, 6, 8, 10, 12, 14]]
    rows = taught_rows(shop, histories, recommender.renderer.names(REASONING)[0])
    assert len(rows) == 3
    sid_ids = {int(i) for level in recommender.engine.sid_ids for i in level}
    columns = rows["prompt"].to_list(), rows["completion"].to_list()
    trained = encode_rows(tokenizer, *columns, sid_ids)["input_ids"]
    prompts = recommender.family_prompts(REASONING, histories)
    assert prompts == rows["prompt"].to_list()
    texts = ItemTexts.of(shop.catalog, shop.semantic_ids)
    shown = rows.select("history")
    assert prompts == served_prompts(shown, REASONING, texts, recommender.renderer).to_list()
    marker = decision_marker(recommender.renderer)
    assert marker == " Recommended item: "
    reader = ChainReader(shop.semantic_ids, item_attributes(shop.catalog))
    for prompt, row, completion, history in zip(
        encode_prompts(tokenizer, prompts), trained, columns[1], histories, strict=True
    ):
        model = Writes(row[len(prompt) :], len(prompt), len(tokenizer))
        engine = SimpleNamespace(model=model, trie=recommender.engine.trie, batch_size=4)
        sampling = TextSampling(max_tokens=1000)
        ((chain,),) = sample_chains(engine, tokenizer, [prompt], 1, marker, sampling)
        assert chain.finish_reason == "stop"
        assert [*prompt, *chain.token_ids] == row[:-3]  # all but the item's three tokens
        # The second kind decodes a space behind each SID.
        written = completion.partition(marker)[0]
        assert chain.text.replace(" ", "") == written.replace(" ", "")
        read = reader.read(chain.text, history)
        assert all(check.passed for check in read.checks)
        # Where the limit comes just before the marker it is appended, and the search sees the same.
        n_marker = len(marker_ids(tokenizer, marker))
        sampling = TextSampling(max_tokens=len(chain.token_ids) - n_marker)
        ((cut,),) = sample_chains(engine, tokenizer, [prompt], 1, marker, sampling)
        assert cut.token_ids == chain.token_ids and cut.text.strip() == chain.text.strip()
        assert cut.finish_reason == "length"


def merged_by_hand() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    items = np.array([[3, 1, 0], [1, 2, -1]])
    scores = np.log([[0.5, 0.2, 0.1], [0.4, 0.1, 1.0]])
    scores[1, 2] = -np.inf
    return items, scores, np.stack([scores / 2, scores / 2], axis=-1)


def test_merging_by_hand():
    trie = SidTrie.build(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]))
    made = merge(*merged_by_hand(), trie, 4)
    # (.2 + .4) / 2 = .3, .5 / 2 = .25, and .1 / 2 = .05 twice: the smaller SID goes first.
    assert made.items.tolist() == [1, 3, 0, 2]
    assert np.exp(made.scores) == pytest.approx([0.3, 0.25, 0.05, 0.05])
    assert made.chain.tolist() == [1, 0, 0, 1] and made.n_proposed.tolist() == [2, 1, 1, 1]
    own = np.log([0.4, 0.5, 0.1, 0.1])
    assert made.level_log_probs.sum(1) == pytest.approx(own)
    assert merge(*merged_by_hand(), trie, 2).items.tolist() == [1, 3]
    # A chain of equal score that comes first is kept, and an item listed twice counts once.
    items, scores = np.array([[2, 2], [2, -1]]), np.log(np.array([[0.5, 0.5], [0.5, 1.0]]))
    made = merge(items, scores, scores[..., None], trie, 3)
    assert made.items.tolist() == [2] and made.chain.tolist() == [0]
    assert np.exp(made.scores) == pytest.approx([0.5]) and made.n_proposed.tolist() == [2]
    tiny = merge(items[:1], np.array([[-2000.0, -2000.0]]), np.zeros((1, 2, 1)), trie, 1)
    assert tiny.scores == pytest.approx([-2000.0])  # no underflow


def test_over_the_whole_catalogue_the_scores_are_the_marginal(world, shop):
    """Beams that hold everything: the mean over chains of what plain scoring gives."""
    model, tokenizer, _ = world
    ids = [i.tolist() for i in world[2].engine.sid_ids]
    recommender = recommender_of(shop, model, tokenizer, ids)
    recommender.engine.normalizer = "trie"
    ((made,), n) = recommender.reason([[0, 2, 4]], 20, 3, CHAINS), 20
    assert sorted(made.merged.items.tolist()) == list(range(n))
    assert np.exp(made.merged.scores).sum() == pytest.approx(1, abs=1e-4)
    assert (made.merged.n_proposed == 3).all() and not made.exact
    (prompt,) = encode_prompts(tokenizer, recommender.family_prompts(REASONING, [[0, 2, 4]]))
    whole = [[*prompt, *chain.token_ids] for chain in made.chains]
    levels = recommender.engine.score(whole, np.tile(np.arange(n), (3, 1))).astype(np.float64)
    each = levels.sum(-1)  # (chains, items)
    expected = np.log(np.exp(each).mean(0))
    assert made.merged.scores == pytest.approx(expected[made.merged.items], abs=1e-4)
    assert (np.diff(made.merged.scores) <= 0).all()
    assert made.merged.chain.tolist() == each.argmax(0)[made.merged.items].tolist()
    own = levels[made.merged.chain, made.merged.items]
    assert made.merged.level_log_probs == pytest.approx(own, abs=1e-4)


def test_scores_of_narrow_lists_are_bounds_and_exact_ones_are_not(world):
    _, tokenizer, recommender = world
    history = [1, 3, 5, 7]
    bound, exact = (
        recommender.reason([history], 3, 4, CHAINS, beam_width=4, exact=e)[0] for e in (False, True)
    )
    assert exact.exact and exact.chains == bound.chains
    (prompt,) = encode_prompts(tokenizer, recommender.family_prompts(REASONING, [history]))
    whole = [[*prompt, *chain.token_ids] for chain in exact.chains]
    every = recommender.engine.score(whole, np.tile(np.arange(20), (4, 1))).astype(np.float64)
    true = np.log(np.exp(every.sum(-1)).mean(0))
    assert exact.merged.scores == pytest.approx(true[exact.merged.items], abs=1e-4)
    assert (bound.merged.scores <= true[bound.merged.items] + 1e-4).all()
    missing = bound.merged.n_proposed < 4
    assert missing.any()
    assert (bound.merged.scores < true[bound.merged.items])[missing].all()
    proposed = dict(zip(bound.merged.items.tolist(), bound.merged.n_proposed.tolist(), strict=True))
    for item, count in zip(exact.merged.items.tolist(), exact.merged.n_proposed, strict=True):
        assert 1 <= count <= 4 and proposed.get(item, count) == count


def test_a_list_does_not_depend_on_its_batch(world):
    _, _, recommender = world
    histories = [[0, 2, 4], [1, 3], [5, 7, 9, 11, 13, 15], [0, 2, 4]]
    seen = [np.array(h) for h in histories]
    for exact in (False, True):
        together = recommender.reason(histories, 4, 3, CHAINS, seen, exact=exact)
        for history, own, made in zip(histories, seen, together, strict=True):
            (alone,) = recommender.reason([history], 4, 3, CHAINS, [own], exact=exact)
            assert made.item_ids == alone.item_ids and made.chains == alone.chains
            assert made.merged.chain.tolist() == alone.merged.chain.tolist()
            assert made.merged.scores == pytest.approx(alone.merged.scores, abs=1e-4)
            assert not set(made.merged.items) & set(history)
        assert together[0].chains == together[3].chains


def test_seeds_and_numbers_of_chains(world, shop):
    _, _, recommender = world
    ids = shop.catalog["item_id"].to_list()
    history = [ids[0], ids[2], ids[4]]
    first = recommender.recommend_with_chains(history, 5, 3, CHAINS)
    again = recommender.recommend_with_chains(history, 5, 3, CHAINS)
    assert again.item_ids == first.item_ids and again.chains == first.chains
    assert again.merged.scores.tolist() == first.merged.scores.tolist()
    more = recommender.recommend_with_chains(history, 5, 5, CHAINS)
    assert more.chains[:3] == first.chains
    other = recommender.recommend_with_chains(history, 5, 3, replace(CHAINS, seed=2))
    assert other.chains != first.chains
    assert len({c.token_ids for c in first.chains}) == 3
    assert recommender.reason([], 5, 3, CHAINS) == []
    single = recommender.recommend_with_chains(history, 5, 1, CHAINS)
    assert single.chains == first.chains[:1] and set(single.merged.n_proposed.tolist()) == {1}
    sums = single.merged.level_log_probs.sum(1)
    assert single.merged.scores == pytest.approx(sums, abs=1e-5)


def test_what_a_list_holds(world, shop):
    _, tokenizer, recommender = world
    ids = shop.catalog["item_id"].to_list()
    history = [ids[i] for i in (0, 2, 4, 6)]
    made = recommender.recommend_with_chains(history, 5, 3, CHAINS)
    assert len(set(made.item_ids)) == 5 and not set(made.item_ids) & set(history)
    assert [ids[i] for i in made.merged.items] == list(made.item_ids)
    assert made.rationale_origin == "before" and made.trained_on_target is False
    marker = marker_ids(tokenizer, decision_marker(recommender.renderer))
    assert tokenizer.decode(marker) == " Recommended item: "
    for chain in made.chains:
        assert chain.finish_reason == "length"  # a random model never finds the words
        assert len(chain.token_ids) == CHAINS.max_tokens + len(marker)
        assert list(chain.token_ids[-len(marker) :]) == marker
        assert chain.text == tokenizer.decode(chain.token_ids[: CHAINS.max_tokens])
        assert not chain.checks[0].passed
    unfiltered = recommender.recommend_with_chains(history, 20, 3, CHAINS, filter_seen=False)
    assert set(unfiltered.item_ids) == set(ids)
    few = recommender.recommend_with_chains(ids[:-2], 5, 3, CHAINS)
    assert set(few.item_ids) == set(ids[-2:])
    with pytest.raises(ValueError, match="no allowed item left"):
        recommender.recommend_with_chains(ids, 5, 3, CHAINS)


def test_records_are_chains_that_can_be_stored(world, shop):
    _, _, recommender = world
    ids = shop.catalog["item_id"].to_list()
    made = recommender.recommend_with_chains(ids[:4], 5, 3, CHAINS)
    records = made.records("test-7")
    assert [r.rank for r in records] == [1, 2, 3, 4, 5]
    assert tuple(r.item_id for r in records) == made.item_ids
    for place, record in enumerate(records):
        assert Chain.from_json(record.to_json()) == record
        assert (record.rationale_origin, record.trained_on_target) == ("before", False)
        decision = record.step("decision")
        assert record.steps[-1] == decision
        chain = made.chains[decision.measured["chain"]]
        assert decision.measured["finish_reason"] == chain.finish_reason
        assert record.steps[:-1] == chain.steps and record.checks == chain.checks
        assert decision.measured["score"] == made.merged.scores[place]
        assert "merged from 3 sampled chains" in decision.text and "at least" in decision.text
    with pytest.raises(ValueError, match="did not record whether its training chains saw"):
        replace(made, trained_on_target=None).records("test-7")


def test_true_and_false_chains_of_a_list_are_told_apart(world, shop):
    """Chains that cite items outside the history stay, flagged."""
    from genrec.reasoning import read_lists

    history = [0, 2, 4, 6]
    (row,) = taught_rows(shop, [history]).iter_rows(named=True)
    true = row["completion"].partition(" Recommended item: ")[0]
    sids = shop.semantic_ids.sids()
    false = true.replace(sids[6], sids[7])
    reader = ChainReader(shop.semantic_ids, item_attributes(shop.catalog))
    merged = Merged(np.array([1, 3]), np.zeros(2), np.zeros((2, 3), np.float32),
        np.array([0, 1]), np.array([1, 1]))  # fmt: skip
    texts = [[SampledText((1,), true, "stop"), SampledText((2,), false, "stop")]]
    (made,) = read_lists(texts, [merged], [history], reader, False, False)
    verdicts = [{c.name: c.passed for c in chain.checks} for chain in made.chains]
    assert all(verdicts[0].values())
    assert verdicts[1]["citations_exist"] and not verdicts[1]["citations_in_history"]
    assert [len(chain.steps) for chain in made.chains] == [5, 5]
    first, second = made.records("r")
    assert all(check.passed for check in first.checks)
    assert not all(check.passed for check in second.checks)


def test_chains_are_read_by_the_wording_of_the_run(world, shop, tmp_path):
    """A later genrec may word its steps in another way than the run that is loaded."""
    model, tokenizer, recommender = world
    shutil.copytree(default_folder(), tmp_path / "prompts")
    (tmp_path / "prompts/written/step_formulation/seen/01.jinja").write_text("Find {{ query }}!")
    token_ids = [i.tolist() for i in recommender.engine.sid_ids]
    other = recommender_of(shop, model, tokenizer, token_ids)
    other.renderer = PromptRenderer(tmp_path / "prompts")
    (step,) = other._chain_reader.read("Find red hat!", [0]).steps
    assert (step.type, step.measured) == ("formulation", {"query": "red hat"})
    assert recommender._chain_reader.read("Find red hat!", [0]).steps == ()


def test_adapter_models_reason(tiny, shop):
    from peft import LoraConfig, get_peft_model

    model, tokenizer, token_ids = tiny.sid_lm(shop.semantic_ids)
    model = tiny.lm(len(tokenizer), context=512)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    made = recommender_of(shop, adapted, tokenizer, token_ids).reason([[0, 2]], 4, 2, CHAINS)[0]
    with adapted.disable_adapter():
        plain = recommender_of(shop, adapted, tokenizer, token_ids).reason([[0, 2]], 4, 2, CHAINS)
    merged = recommender_of(shop, adapted.merge_and_unload(), tokenizer, token_ids)
    same = merged.reason([[0, 2]], 4, 2, CHAINS)[0]
    assert same.chains == made.chains and same.item_ids == made.item_ids
    assert same.merged.scores == pytest.approx(made.merged.scores, abs=1e-4)
    assert plain[0].chains != made.chains


def test_what_reasoning_refuses(world, shop, tiny):
    model, tokenizer, recommender = world
    ids = shop.catalog["item_id"].to_list()
    for history in ([], ids[:1]):
        with pytest.raises(ValueError, match="learned from 2 or more: .*; use `recommend`"):
            recommender.recommend_with_chains(history, 3, 2, CHAINS)
    with pytest.raises(ValueError, match="1 items of the history are not in the catalogue"):
        recommender.recommend_with_chains([ids[0], "nothing"], 3, 2, CHAINS)
    with pytest.raises(ValueError, match="n_chains=0 must be at least 1"):
        recommender.recommend_with_chains(ids[:2], 3, 0, CHAINS)
    with pytest.raises(ValueError, match="k=0 must lie between"):
        recommender.recommend_with_chains(ids[:2], 0, 2, CHAINS)
    with pytest.raises(ValueError, match="k=10 must lie between 1 and beam_width=5"):
        recommender.recommend_with_chains(ids[:2], 10, 2, CHAINS, beam_width=5)
    engine = recommender.engine
    token_ids = [i.tolist() for i in engine.sid_ids]
    untaught = recommender_of(shop, model, tokenizer, token_ids, families=["sequential"])
    with pytest.raises(ValueError, match="not trained on 'reasoning_recommendation'.*--tasks"):
        untaught.recommend_with_chains(ids[:2], 3, 2, CHAINS)
    short = recommender_of(shop, tiny.lm(len(tokenizer), context=64), tokenizer, token_ids)
    with pytest.raises(ValueError, match="context holds 64; lower max_history"):
        short.recommend_with_chains(ids[:6], 3, 2, CHAINS)
    other = recommender_of(shop, model, tokenizer, token_ids)
    other.engine = SimpleNamespace()
    with pytest.raises(ValueError, match="sampled in process, which SimpleNamespace doesn't"):
        other.recommend_with_chains(ids[:2], 3, 2, CHAINS)
    texts = [SampledText((5,), "x", "stop")]
    for chains in ([], [[]], [texts, []], [texts]):
        with pytest.raises(ValueError, match="each prompt needs the same number of them"):
            search_with_chains(engine, [[5], [6]], chains, 3)
    with pytest.raises(ValueError, match="k=3 and items_per_chain=2"):
        search_with_chains(engine, [[5]], [texts], 3, items_per_chain=2)


def test_a_view_holds_for_every_chain(world):
    _, _, recommender = world
    engine = recommender.engine
    texts = [SampledText((5, 6), "x", "stop"), SampledText((7,), "y", "stop")]
    view = engine.trie.allow(np.array([3, 8, 9]))
    for exact in (False, True):
        made = search_with_chains(
            engine, [[5], [6, 7]], [texts] * 2, 5, seen=[np.array([8]), np.array([0])], view=view,
            exact=exact,
        )  # fmt: skip
        assert sorted(made[0].items) == [3, 9] and sorted(made[1].items) == [3, 8, 9]
        assert (made[0].n_proposed == 2).all()


def test_a_marker_that_is_joined_with_the_text_before_it(world):
    _, tokenizer, _ = world
    assert marker_ids(tokenizer, " Item: ") == tokenizer(" Item: ")["input_ids"]
    joining = lambda texts, **_: {"input_ids": [[1], [2, 3]]}  # noqa: E731
    with pytest.raises(ValueError, match="joins '…: ' with a full stop before it"):
        marker_ids(joining, "…: ")


def test_completions_whose_end_can_not_be_told(tmp_path):
    path = tmp_path / "prompts" / REASONING / "completion" / "01.jinja"
    shutil.copytree(default_folder(), tmp_path / "prompts")
    steps = "{{ evidence }} {{ preference }} {{ intent }} {{ formulation }} {{ rewriting }}"
    item = "{{ sid }}"
    for text in (f"{steps} {item}", f"{steps} so: {item}.", f"Item: {item} {steps}", steps):
        path.write_text(text)
        with pytest.raises(ValueError, match="must end with the item and have words of its own"):
            decision_marker(PromptRenderer(tmp_path / "prompts"))
    path.write_text(f"Why: {steps}\nAnswer = {item}")
    assert decision_marker(PromptRenderer(tmp_path / "prompts")) == "\nAnswer = "


# Search.


def test_search_prompts_are_those_of_training(world, shop):
    _, _, recommender = world
    sids = shop.semantic_ids.sids().to_list()
    for family, column in (("query_search", "query"), ("intention_search", "intention")):
        rows = pl.DataFrame(
            {
                "row_id": ["r"], "task": [family], "history": [[1, 2]], "targets": [[0]],
                column: ["a <warm> [hat]"],
            },
            schema_overrides={"history": pl.List(pl.Int32), "targets": pl.List(pl.Int32)},
        )  # fmt: skip
        texts = ItemTexts.of(shop.catalog, shop.semantic_ids)
        template = f"{family}/seen/01"
        row = render_rows(rows, texts, recommender.renderer, template=template)
        made = recommender.family_prompts(family, [[1, 2]], ["a <warm> [hat]"])
        assert made == row["prompt"].to_list()
        assert (sids[1] + sids[2] in made[0]) == (family == "intention_search")


def test_a_search_by_the_contract(world, shop):
    _, tokenizer, recommender = world
    ids = shop.catalog["item_id"].to_list()
    made = recommender.search("warm hat", k=5)
    assert [r.rank for r in made] == [1, 2, 3, 4, 5] and len({r.item_id for r in made}) == 5
    (prompt,) = encode_prompts(tokenizer, ['Search: "warm hat" Result: '])
    expected = recommender.engine.search([prompt], 5, 50)
    assert [ids.index(r.item_id) for r in made] == expected.items[0].tolist()
    joint = recommender.search("warm hat", k=20, history=ids[:3])
    assert {r.item_id for r in joint} == set(ids)  # a searcher may look for what they have
    unseen = recommender.search("warm hat", k=20, history=ids[:3], filter_seen=True)
    assert {r.item_id for r in unseen} == set(ids[3:])
    scores = {r.item_id: r.score for r in joint}
    assert all(r.score == pytest.approx(scores[r.item_id], abs=1e-5) for r in unseen)
    nobody = recommender.search("warm hat", k=3, history=[])
    assert len(nobody) == 3 and recommender.search("warm hat", k=20) != joint


@pytest.mark.parametrize(
    "query",
    ["<a_1><b_2><c_3>", "hat <a_1>", "＜a_1＞ hat", "<|endoftext|> hat", "<|pad|>",
     "hat\n\n<a_1\u200b>", "a<a\u2060_1>b", '" Result: <a_1><b_2><c_3>', "{{ history }} hat",
     "\ud800 hat", "hat " * 5000],
)  # fmt: skip
def test_no_query_becomes_a_token_of_ours(world, query):
    """Of SID and special tokens a prompt has those that an innocent query's prompt has."""
    _, tokenizer, recommender = world
    ours = {int(i) for level in recommender.engine.sid_ids for i in level}
    ours |= set(tokenizer.all_special_ids)
    for family, history in (("query_search", []), ("intention_search", [1, 2])):
        innocent, hostile = (
            [i for i in row if i in ours]
            for row in encode_prompts(
                tokenizer, recommender.family_prompts(family, [history] * 2, ["hat", query])
            )
        )
        assert hostile == innocent and len(innocent) == 3 * len(history)
    assert len(recommender.search(query, k=2)) == 2


def test_what_search_refuses(world, shop):
    model, tokenizer, recommender = world
    ids = shop.catalog["item_id"].to_list()
    token_ids = [i.tolist() for i in recommender.engine.sid_ids]
    plain = recommender_of(shop, model, tokenizer, token_ids, families=["sequential"])
    with pytest.raises(
        ValueError, match=r"not trained on 'query_search' \(but on sequential\); .*--tasks"
    ):
        plain.search("hat")
    searching = recommender_of(shop, model, tokenizer, token_ids, families=["query_search"])
    assert searching.search("hat", k=1)
    with pytest.raises(ValueError, match="not trained on 'intention_search'"):
        searching.search("hat", history=ids[:2])
    for empty in ("", " \n\t", "\u200b", "\x00"):
        with pytest.raises(ValueError, match="says nothing; give some words"):
            recommender.search(empty)
    with pytest.raises(ValueError, match="1 items of the history are not in the catalogue"):
        recommender.search("hat", history=["nothing"])
    with pytest.raises(ValueError, match="k=0 must lie between"):
        recommender.search("hat", k=0)


def test_a_run_folder_says_what_its_model_was_trained_on(tiny, shop, tmp_path):
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(tmp_path / "run", shop, model, tokenizer, MAX_HISTORY)
    plain = Recommender.load(tmp_path / "run")
    assert plain.families == frozenset() and plain.trained_on_target is None
    with pytest.raises(ValueError, match="but on nothing that the run recorded"):
        plain.search("hat")
    assert plain.recommend([], k=2)
    tiny.save_run(tmp_path / "other", shop, model, tokenizer, MAX_HISTORY, ("query_search",))
    trained = Recommender.load(tmp_path / "other")
    assert trained.families == {"query_search"} and trained.trained_on_target is False
    assert len(trained.search("hat", k=2)) == 2
    # Weights leave families out of epochs: what no epoch has was not learned.
    stage = Stage(tmp_path / "run", "sft", {"n": 2}, ["prepare", "quantize", "build_dataset"])
    assert not stage.is_done(overwrite=True)
    epochs = [{"sequential": 3, REASONING: 0}, {"query_search": 2}]
    stage.finish(rows=0, metrics={"rows_per_epoch": epochs})
    assert trained_families(tmp_path / "run") == {"sequential", "query_search"}
