"""search and reason on a tiny run: tables, chains, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from genrec import recommend_in_words
from genrec.artifacts import Stage, read_json
from genrec.chains import read_chains
from genrec.decoding.free_text import SampledText, TextSampling
from genrec.embedding.lsa import fit_lsa, item_texts
from genrec.grounding import TextGrounder
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender

FAMILIES = (
    "sequential",
    "query_search",
    "intention_search",
    "preference_recommendation",
    "reasoning_recommendation",
    "sids_to_title",
)
HOSTILE = "[red]tea[/] \x1b[31m <a_1>"


def make_run(tiny, run: Path, families: tuple[str, ...], strings: bool = False) -> Path:
    shop = tiny.shop(strings=strings)
    titles = pl.Series("title", [HOSTILE, *shop.catalog["title"][1:]])
    shop = replace(shop, catalog=shop.catalog.with_columns(titles))
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    model = tiny.lm(len(tokenizer), context=512)
    tiny.save_run(run, shop, model, tokenizer, 6, families)
    stage = Stage(run, "embed", {"method": "lsa"}, ["prepare"])
    assert not stage.is_done()
    lsa, vectors = fit_lsa(item_texts(shop.catalog), 8)
    lsa.save(stage.folder)
    np.save(stage.folder / "item_embeddings.npy", vectors)
    stage.finish(rows=len(vectors))
    return run


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    return make_run(tiny, tmp_path_factory.mktemp("run") / "run", FAMILIES)


@pytest.fixture(scope="module")
def untrained(tiny, tmp_path_factory) -> Path:
    return make_run(tiny, tmp_path_factory.mktemp("run") / "run", ("sequential",), strings=True)


def listed(said: str) -> list[str]:
    """Item ids of the printed table."""
    table = said.partition("rank ")[2]
    lines = [line.split() for line in table.partition("Chain ")[0].splitlines()]
    return [line[1] for line in lines if len(line) > 2 and line[0].isdigit()]


def test_a_search_prints_what_the_model_finds(trained, in_process):
    recommender = Recommender.load(trained)
    ids = [str(i) for i in recommender.catalog["item_id"]]
    said = in_process("search", trained, "--query", "red hat", "--k", "20")
    assert "“red hat”, by the model" in said and "log p" in said
    assert listed(said) == [str(r.item_id) for r in recommender.search("red hat", 20)]
    assert "[red]tea" not in said and "(red)tea" in said and "\x1b" not in said  # escaped
    history = recommender.catalog["item_id"].to_list()[2:4]
    said = in_process("search", trained, "--query", "red hat", "--history", *ids[2:4], "--k", "3")
    assert "by the model, after 2 items" in said
    assert listed(said) == [str(r.item_id) for r in recommender.search("red hat", 3, history)]
    flags = ("--history", *ids[2:4], "--k", "20", "--filter_seen", "true")
    assert set(listed(in_process("search", trained, "--query", "hat", *flags))) == {
        *ids[:2], *ids[4:],
    }  # fmt: skip


def test_grounding_prints_the_nearest_items(untrained, in_process):
    """It needs no model that was trained to search."""
    said = in_process("search", untrained, "--query", "steel tea pot", "--ground", "true")
    assert "nearest by text" in said and "distance" in said
    expected = TextGrounder.load(untrained).ground(["steel tea pot"], 10)
    ids = pl.read_parquet(untrained / "data" / "catalog.parquet")["item_id"]
    assert listed(said) == [str(ids[int(i)]) for i in expected.items[0]]
    flags = ("--ground", "true", "--popularity", "30", "--history", str(ids[2]))
    said = in_process("search", untrained, "--query", "steel tea pot", *flags, "--k", "20")
    assert "rescaled distance" in said and str(ids[2]) in listed(said)
    said = in_process(
        "search", untrained, "--query", "tea", *flags, "--filter_seen", "true", "--k", "20"
    )
    assert len(listed(said)) == 19 and str(ids[2]) not in listed(said)


def test_the_model_writes_and_the_nearest_items_are_printed(trained, in_process, monkeypatch):
    recommender, grounder = Recommender.load(trained), TextGrounder.load(trained)
    history = recommender.catalog["item_id"].to_list()[2:5]
    rows, asked = recommender.rows_of(history), []

    def writes(model, tokenizer, prompts, *args, **settings):
        asked.extend(tokenizer.batch_decode(prompts))
        return [[SampledText((), " steel tea pot", "eos")] for _ in prompts]

    monkeypatch.setattr(recommend_in_words, "sample_texts", writes)
    (made,) = recommend_in_words.recommend_in_words(recommender, grounder, [history], 4)
    assert asked == recommender.family_prompts("sids_to_title", [rows])
    everything = grounder.ground(["steel tea pot"], len(recommender.catalog)).items[0]
    near = [int(i) for i in everything if i not in rows]
    assert made.text == "steel tea pot" and made.items.tolist() == near[:4]
    few = np.array(near[5:8])
    (made,) = recommend_in_words.recommend_in_words(
        recommender, grounder, [history], 4, allowed=few
    )
    assert made.items.tolist() == near[5:8] and len(made.distances) == 3
    flags = ("--write", "true", "--history", *map(str, history), "--k", "3")
    said = in_process("search", trained, *flags, "--filter_seen", "true")
    assert "“steel tea pot”, written by the model, nearest by text" in said
    ids = [str(recommender.catalog["item_id"][i]) for i in near[:3]]
    assert listed(said) == ids


def test_what_is_written_are_the_likeliest_tokens(trained):
    recommender, grounder = Recommender.load(trained), TextGrounder.load(trained)
    histories = [recommender.catalog["item_id"].to_list()[2:5]]
    made = [
        recommend_in_words.recommend_in_words(
            recommender, grounder, histories, 3,
            sampling=TextSampling(temperature=1e-3, max_tokens=4, seed=seed),
        )[0].text
        for seed in (0, 1)
    ]  # fmt: skip
    ids = encode_prompts(
        recommender.tokenizer,
        recommender.family_prompts("sids_to_title", [recommender.rows_of(histories[0])]),
    )
    with torch.no_grad():
        first = recommender.engine.model(torch.tensor(ids)).logits[0, -1].argmax()
    assert made[0] == made[1]
    assert made[0].startswith(recommender.tokenizer.decode([int(first)]).strip())


def test_reasoning_prints_the_list_and_its_chains(trained, in_process):
    flags = ("--user", "u3", "--chains", "3", "--max_tokens", "20", "--k", "5")
    said = in_process("reason", trained, *flags)
    assert "user u3; history, oldest first:" in said and "log p ≥" in said
    assert len(listed(said)) == 5
    for number in (1, 2, 3):
        assert f"Chain {number} (length), for " in said
    assert "steps_read NO" in said and "citations_in_history" in said and "\x1b" not in said
    again = in_process("reason", trained, *flags)
    assert again.partition("Loading")[0] == said.partition("Loading")[0]  # a bar has its times
    more = ("--split", "valid", "--exact", "true", "--seed", "1")
    other = in_process("reason", trained, *flags, *more)
    assert "valid-" in other and "log p ≥" not in other and len(listed(other)) == 5
    assert other.partition("Loading")[0] != said.partition("Loading")[0]


def test_chains_of_many_rows_are_measured(trained, in_process, tmp_path):
    out = tmp_path / "reasoned"
    flags = ("--rows", "4", "--chains", "2", "--max_tokens", "12", "--k", "3", "--samples", "50")
    said = in_process("reason", trained, *flags, "--output_dir", str(out))
    chains = read_chains(out / "chains.jsonl")
    lists = pl.read_parquet(out / "lists.parquet")
    found = read_json(out / "faithfulness.json")
    assert found["chains"] == len(chains) == lists.height == 12 and found["lists"] == 4
    assert lists.select("row_id", "item_id").rows() == [(c.row_id, c.item_id) for c in chains]
    assert {c.rationale_origin for c in chains} == {"before"}
    # A model that was trained on nothing writes no step, and its chains say so.
    assert found["verdicts"]["steps_read"] == {"share": 0.0, "checked": 12}
    assert "not met: steps_read >= 0.95" in said and "chain_support" in said
    assert [t["rule"] for t in found["thresholds"]] == found["settings"]["thresholds"]
    support = [c.check("chain_support").value for c in chains]
    assert None not in support and found["figures"]["chain_support"]["n"] == 12
    assert {"truncated", "other_chain"} == set(found["figures"]["chain_support"]["controls"])
    fails = ("--rows", "4", "--output_dir", str(out))
    assert "exists; name a new folder" in in_process("reason", trained, *fails, fails=True)
    assert "belong together" in in_process("reason", trained, "--rows", "4", fails=True)


def test_reasoning_follows_the_rule_of_the_run(trained, in_process, monkeypatch):
    """Without the flag, what the user has is left out where the run was validated so."""
    asked = []

    class Asked(ValueError):
        pass

    def reason(self, histories, k, chains, sampling, seen, *more):
        asked.append(seen)
        raise Asked("enough")

    monkeypatch.setattr(Recommender, "reason", reason)
    init = Recommender.__init__
    for rule in (True, False):
        monkeypatch.setattr(
            Recommender,
            "__init__",
            lambda self, *args, rule=rule: init(self, *args[:8], rule, *args[9:]),
        )
        for flags in ((), ("--filter_seen", "true"), ("--filter_seen", "false")):
            assert "enough" in in_process("reason", trained, *flags, fails=True)
    assert [seen is not None for seen in asked] == [True, True, False, False, True, False]


def test_what_search_and_reason_refuse(trained, untrained, in_process):
    def refused(name: str, run: Path, *flags: str) -> str:
        return in_process(name, run, *flags, fails=True)

    assert "says nothing; give some words" in refused("search", trained, "--query", " ")
    assert "says nothing; give some words" in refused("search", trained)
    said = refused("search", untrained, "--query", "hat")
    assert "not trained on 'query_search' (but on sequential)" in said and "--tasks" in said
    said = refused("search", trained, "--query", "hat", "--history", "nothing")
    assert "history names 'nothing', which is not in the catalogue (ids look like" in said
    said = refused("search", trained, "--query", "zzz qqq", "--ground", "true")
    assert "knows no word of 'zzz qqq'" in said
    said = refused("search", trained, "--query", "hat", "--popularity", "2")
    assert "write: the model writes the text" in refused("search", trained, "--write", "true")
    assert "model_name_or_path belong to --ground true" in said
    assert "k=0 must be at least 1" in refused("search", trained, "--query", "hat", "--k", "0")
    for name, flags in (("search", ("--query", "hat")), ("reason", ())):
        said = refused(name, trained, *flags, "--beam_width", "0")
        assert "beam_width=0 must be at least k=10" in said
        said = refused(name, trained, *flags, "--k", "10000000000")
        assert "k=10,000,000,000 exceeds the 20 items of the catalogue" in said
    assert "'prepare' has not finished" in refused("search", trained / "no", "--query", "hat")
    said = refused("reason", trained, "--user", "nobody")
    assert "user 'nobody' has no row in the test split; users look like" in said
    assert "chains=0 must be at least 1" in refused("reason", trained, "--chains", "0")
    assert "temperature=0.0 must be" in refused("reason", trained, "--temperature", "0")
    assert "split='train' is not known" in refused("reason", trained, "--split", "train")
    before = (untrained / "test_reads.jsonl").exists()
    said = refused("reason", untrained, "--user", "u3")
    assert "not trained on 'reasoning_recommendation'" in said
    assert (untrained / "test_reads.jsonl").exists() == before is False


def test_an_edited_profile_gives_another_list(trained, in_process):
    recommender = Recommender.load(trained)
    rows = pl.read_parquet(trained / "data" / "test.parquet")
    said = in_process("steer", trained, "--k", "20", "--filter_seen", "false")
    assert "Profile from the history: " in said and "Edited profile" not in said
    user = said.partition("user ")[2].partition(";")[0]
    own = said.partition("Profile from the history: ")[2].partition("\n")[0].strip()
    flags = ("--user", user, "--k", "5")
    edited = in_process("steer", trained, *flags, "--profile", "Is drawn to <a_1> [red]hats[/].")
    assert own[:40] in edited and "Edited profile: Is drawn to ‹a_1› (red)hats(/)." in edited
    row = rows.filter(pl.col("user_id").cast(pl.String) == user)
    ids = recommender.catalog["item_id"]
    history = [ids[int(i)] for i in row["history_item_index"][0]]
    first = recommender.recommend_by_profile(history, own, 5)
    second = recommender.recommend_by_profile(history, "Is drawn to <a_1> [red]hats[/].", 5)
    assert [r.score for r in first] != [r.score for r in second]  # the words are read
    kept = len({r.item_id for r in first} & {r.item_id for r in second})
    assert f"{kept} of 5 items stay" in edited
    told = edited.partition("Edited profile")[2].splitlines()
    assert [line.split()[2] for line in told if line[:4].strip().isdigit()] == [
        str(r.item_id) for r in second
    ]


def test_what_steer_refuses(trained, untrained, in_process):
    def refused(run: Path, *flags: str) -> str:
        return in_process("steer", run, *flags, fails=True)

    assert "not trained on 'preference_recommendation'" in refused(untrained)
    assert "says nothing; give some words" in refused(trained, "--profile", " ")
    assert "k=0 must be at least 1" in refused(trained, "--k", "0")
    assert "exceeds the 20 items" in refused(trained, "--k", "21", "--beam_width", "30")
    assert "user 'nobody' has no row" in refused(trained, "--user", "nobody")
    recommender = Recommender.load(trained)
    item = recommender.catalog["item_id"][0]
    with pytest.raises(ValueError, match="profiles were learned beside"):
        recommender.recommend_by_profile([item], "Likes hats.")
    with pytest.raises(ValueError, match="says nothing"):
        recommender.recommend_by_profile([item] * 4, " ")
