"""What a record holds, held against the run that it was made from."""

from __future__ import annotations

import hashlib

import polars as pl
import pytest

from genrec.artifacts import sha256_file
from genrec.audit.custody import SCHEMA, read_log
from genrec.audit.keys import AuditKey
from genrec.audit.payloads import read_payloads
from genrec.audit.records import ExplainedRun, build_records, mask_chains, read_opened
from genrec.audit.schema import problem
from genrec.chains import Chain, read_chains


@pytest.fixture(scope="module")
def records(audited_run):
    """With their payloads."""
    return read_opened(audited_run / "audit")


def test_records_fit_the_schema_and_hold_no_payload(audited_run, records):
    log = read_log(audited_run / "audit")
    assert [problem(record) for record in log] == [None] * 6
    text = "".join(p.read_text() for p in sorted((audited_run / "audit").glob("audit-*.jsonl")))
    assert text.count("\n") == 6
    for record in records:
        for secret in (
            record["row_id"],
            record["input"]["prompt"],
            record["input"]["prompt_sha256"],
        ):
            assert secret not in text
        listed = {item["item_id"] for item in record["items"]}
        raw = log[record["record"]]
        history = {entry["item_id"] for entry in record["input"]["history"]}
        assert {item["item_id"] for item in raw["items"]} == listed
        assert not history & listed  # seen items are left out, so none of them is in the record
        assert raw["input"]["history_items"] == len(record["input"]["history"])
        assert raw["filters"][0]["removed_items"] == len(
            history | set(record["input"]["set_aside_item_ids"])
        )


def test_commitments_are_those_of_the_payloads(audited_run, records):
    for number, payload in read_payloads(audited_run / "audit").items():
        for part, sealed in payload.items():
            assert records[number]["commitments"][part] == sealed.commitment


def test_what_does_not_fit_the_schema_is_named(audited_run):
    record = read_log(audited_run / "audit")[0]
    assert "schema version 1, this genrec reads 2" in problem({**record, "schema": 1})
    assert "no schema version" in problem({"record": 1}) and SCHEMA == 2
    assert "$: " in problem({**record, "extra": 1})
    wrong = {**record, "items": [{**record["items"][0], "score": "high"}]}
    assert "at $.items[0].score: 'high'" in problem(wrong)
    del wrong["artefacts"]
    assert problem(wrong)


def test_texts_are_masked_and_ids_are_not():
    step = {"type": "evidence", "text": "seen 4111111111111111 by a@b.org", "cited_item_ids": []}
    chains = [None, {"steps": [step]}]
    assert mask_chains(chains, [4111111111111111]) == {"email": 1}
    assert step["text"] == "seen 4111111111111111 by [email]"
    assert mask_chains(chains, []) == {"card": 1}


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
    key = AuditKey.load(audited_run.with_name("run.custody") / "audit.key")
    rows = dict(
        pl.read_parquet(audited_run / "data" / "test.parquet")
        .select("row_id", "user_id")
        .iter_rows()
    )
    for record in records:
        user = rows[record["row_id"]]
        assert record["user"] == {"pseudonym": key.pseudonym(user), "key_id": key.key_id}
    text = "".join(p.read_text() for p in (audited_run / "audit").glob("audit-*.jsonl"))
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
    made = records[0]["artefacts"]
    assert made["tokenizer_sha256"] == files["sft/model/tokenizer.json"]
    assert made["catalogue_sha256"] == files["data/catalog.parquet"]
    assert made["lockfile"]["sha256"] == files["audit/environment.txt"]
    assert made["adapter_sha256"] is None and made["base_model"]["sha256"] is None
    assert [f["name"] for f in records[0]["filters"]] == ["seen"]
    assert {r["verdict"] for r in records} == {"passed"}


def test_a_list_from_another_prompt_is_refused(audited_run):
    run = ExplainedRun.load(audited_run)
    lists = run.lists.with_columns(pl.lit("0" * 16).alias("prompt_sha256"))
    other = ExplainedRun(run.run_dir, run.manifests, run.rows, lists, run.chains, run.catalog)
    with pytest.raises(ValueError, match="made from prompt 0000"):
        build_records(other, AuditKey(b"k" * 32), "2026-01-01T00:00:00+00:00")
