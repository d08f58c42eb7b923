"""What a record holds, held against the run that it was made from."""

from __future__ import annotations

import hashlib

import polars as pl
import pytest

from genrec.artifacts import sha256_file
from genrec.audit.custody import AuditKey, read_log
from genrec.audit.records import ExplainedRun, build_records
from genrec.chains import Chain, read_chains


@pytest.fixture(scope="module")
def records(audited_run):
    return read_log(audited_run / "audit")


def test_a_record_per_explained_list(audited_run, records):
    chains = read_chains(audited_run / "explanations" / "chains.jsonl")
    assert [r["row_id"] for r in records] == sorted({c.row_id for c in chains})
    assert len(records) == 6


def test_input_is_what_the_prompt_showed(audited_run, records):
    rows = pl.read_parquet(audited_run / "data" / "test.parquet")
    log = pl.read_parquet(audited_run / "data" / "interactions.parquet")
    cut = 0
    for record in records:
        row = rows.filter(pl.col("row_id") == record["row_id"]).row(0, named=True)
        earlier = log.filter(pl.col("user_id") == row["user_id"]).sort("position")["item_id"][:-1]
        given = record["input"]
        history = [entry["item_id"] for entry in given["history"]]
        assert history == earlier.to_list()[-5:]
        assert given["truncated"] == len(earlier) - len(history)
        assert set(given["set_aside_item_ids"]) == set(earlier) - set(history)
        sids = "".join(entry["sid"] for entry in given["history"])
        prompt = f"Bought so far, oldest first: {sids}"
        assert given["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
        assert given["prompt_tokens"] > 3 * len(history)
        cut += given["truncated"]
    assert cut > 0


def test_lists_and_chains_are_those_of_the_stages(audited_run, records):
    lists = pl.read_parquet(audited_run / "recommendations" / "recommendations-*.parquet")
    chains = {
        (c.row_id, c.item_id): c for c in read_chains(audited_run / "explanations" / "chains.jsonl")
    }
    for record in records:
        stored = lists.filter(pl.col("row_id") == record["row_id"]).sort("rank")
        for name in ("item_id", "rank", "score", "sid"):
            assert [item[name] for item in record["items"]] == stored[name].to_list()
        for item in record["items"]:
            chain = chains.get((record["row_id"], item["item_id"]))
            assert (item["chain"] is None) == (item["rank"] > 5)  # --k 5 of lists of 6
            if item["chain"] is not None:
                assert Chain.from_json(item["chain"]) == chain
        assert record["checks"]["score_difference"] == {"passed": 5, "failed": 0, "undefined": 0}


def test_users_are_pseudonyms(audited_run, records):
    key = AuditKey.load(audited_run / "audit.key")
    rows = dict(
        pl.read_parquet(audited_run / "data" / "test.parquet")
        .select("row_id", "user_id")
        .iter_rows()
    )
    for record in records:
        user = rows[record["row_id"]]
        assert record["user"] == {"pseudonym": key.pseudonym(user), "key_id": key.key_id}
    text = (audited_run / "audit" / "audit.jsonl").read_text()
    assert not any(f'"{user}"' in text for user in rows.values())


def test_artefacts_are_the_files_that_decide(audited_run, records):
    files = records[0]["artefacts"]["files"]
    assert {
        "data/catalog.parquet", "data/test.parquet", "semantic_ids/items.parquet",
        "dataset/prompts/sequential/seen/01.jinja", "sft/model/model.safetensors",
        "sft/model/tokenizer.json", "recommendations/recommendations-0000000000-0000000013.parquet",
        "explanations/chains.jsonl",
    } <= set(files)  # fmt: skip
    for name, sha256 in files.items():
        assert sha256_file(audited_run / name) == sha256
    assert records[0]["decoding"]["filter_rule"].startswith("items that the user had before")


def test_a_list_from_another_prompt_is_refused(audited_run):
    run = ExplainedRun.load(audited_run)
    lists = run.lists.with_columns(pl.lit("0" * 16).alias("prompt_sha256"))
    other = ExplainedRun(run.run_dir, run.manifests, run.rows, lists, run.chains, run.catalog)
    with pytest.raises(ValueError, match="made from prompt 0000"):
        build_records(other, AuditKey(b"k" * 32), "2026-01-01T00:00:00+00:00")
