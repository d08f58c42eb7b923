"""What a record holds, held against the run that it was made from."""

from __future__ import annotations

import hashlib
import json
import runpy
from dataclasses import replace
from pathlib import Path

import jsonschema
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.artifacts import sha256_file
from genrec.audit.custody import read_log
from genrec.audit.keys import AuditKey
from genrec.audit.payloads import open_store
from genrec.audit.recorded import RecordedRun
from genrec.audit.records import build_records, mask_chains, read_opened
from genrec.audit.schema import SCHEMA, SCHEMA_FILE, problem
from genrec.audit.verify import verify
from genrec.chains import Chain, read_chains


@pytest.fixture(scope="module")
def records(audited_run):
    """With their payloads."""
    return list(read_opened(audited_run / "audit"))


def test_records_fit_the_schema_and_hold_no_payload(audited_run, records):
    log = list(read_log(audited_run / "audit"))
    assert [problem(record) for record in log] == [None] * 14
    text = "".join(p.read_text() for p in sorted((audited_run / "audit").glob("audit-*.jsonl")))
    assert text.count("\n") == 14
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
    with open_store(audited_run / "audit") as store:
        for record in records:
            payload = store.get(record["record"])
            stated = {part: sealed.commitment for part, sealed in payload.items()}
            assert record["commitments"] == {"chains": None, **stated}
            assert stated.keys() >= {"identity", "input"}


def test_what_does_not_fit_the_schema_is_named(audited_run):
    record = next(read_log(audited_run / "audit"))
    assert "schema version 2, this genrec reads 3" in problem({**record, "schema": 2})
    assert "no schema version" in problem({"record": 1}) and SCHEMA == 3
    assert "at $: " in problem({**record, "extra": 1})
    wrong = {**record, "items": [{**record["items"][0], "score": "high"}]}
    assert 'at $.items[0].score: "high"' in problem(wrong)
    assert "fit the schema" in problem({**record, "log_id": "\ud800"})
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert problem({**record, "filters": deep})
    del wrong["artefacts"]
    assert problem(wrong)


VALUES = [None, True, 0, -1, 1.5, 10**30, "", "x", "a" * 64, "A" * 64, [], {}, [{}], {"x": 1}]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_two_validators_agree(audited_run, data):
    """The compiled one, which checks every record, and the Python one by the schema's authors."""
    record = next(read_log(audited_run / "audit"))
    place = record
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [v for v in (place.values() if isinstance(place, dict) else place)
                 if isinstance(v, dict | list) and v]  # fmt: skip
        place = data.draw(st.sampled_from(inner)) if inner else place
    if isinstance(place, list):
        place[data.draw(st.integers(0, len(place) - 1))] = data.draw(st.sampled_from(VALUES))
    else:
        name = data.draw(st.sampled_from([*place, "more"]))
        if name in place and data.draw(st.booleans()):
            del place[name]
        else:
            place[name] = data.draw(st.sampled_from(VALUES))
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    valid = jsonschema.Draft202012Validator(schema).is_valid(record)
    assert (problem(record) is None) == valid


def test_the_schema_says_nothing_of_members_together():
    """A record that follows others is checked member by member."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    alone = {"type", "properties", "additionalProperties", "required"}
    assert schema.keys() == alone | {"$schema", "$id", "title", "description", "$defs"}
    assert schema["required"] == list(schema["properties"])


def test_the_schema_is_one():
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema"]["const"] == SCHEMA
    assert schema["$id"].endswith(f":{SCHEMA}")


def test_texts_are_masked_and_ids_are_not():
    step = {"type": "evidence", "text": "seen 4111111111111111 by a@b.org", "cited_item_ids": []}
    chains = [None, {"steps": [step]}]
    assert mask_chains(chains, [4111111111111111]) == {"email": 1}
    assert step["text"] == "seen 4111111111111111 by [email]"
    assert mask_chains(chains, []) == {"card": 1}


def test_a_record_for_every_list(audited_run, records):
    asked = pl.read_parquet(audited_run / "recommendations" / "rows.parquet")["row_id"].to_list()
    assert [r["row_id"] for r in records] == asked and len(asked) == 14
    chains = read_chains(audited_run / "explanations" / "chains.jsonl")
    explained = {r["row_id"] for r in records if r["commitments"]["chains"] is not None}
    assert explained == {c.row_id for c in chains} and len(explained) == 6
    for record in records:
        if record["row_id"] not in explained:
            assert record["verdict"] == "not checked" and record["masked"] == {}
            assert not any(item["explained"] for item in record["items"])
            assert all(item["chain"] is None for item in record["items"])
            assert sum(sum(count.values()) for count in record["checks"].values()) == 0


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
        if record["commitments"]["chains"] is None:
            continue
        for item in record["items"]:
            assert item["explained"] == (item["chain"] is not None)
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
    assert {r["verdict"] for r in records} == {"passed", "not checked"}


def drawn(run: RecordedRun) -> list:
    return list(build_records(run, AuditKey(b"k" * 32), "2026-01-01T00:00:00+00:00"))


def test_a_list_from_another_prompt_is_refused(audited_run):
    run = RecordedRun.load(audited_run)
    assert len(drawn(run)) == 14
    rows = run.rows.with_columns(pl.col("history_item_index").list.reverse())
    with pytest.raises(ValueError, match="its list was made from prompt .* rerun recommend"):
        drawn(replace(run, rows=rows))


def test_lists_that_are_not_those_that_were_made_are_refused(copied):
    run = RecordedRun.load(copied)
    with pytest.raises(ValueError, match="holds lists of other rows than were asked for"):
        drawn(replace(run, rows=run.rows.reverse()))
    (path,) = (copied / "recommendations").glob("recommendations-*.parquet")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)  # of the same size: only the hash tells
    with pytest.raises(ValueError, match="was changed since its lists were made; restore it"):
        drawn(run)


def test_each_record_names_the_file_of_its_own_list_alone(tiny, tmp_path):
    """Else the size of a log would grow with the square of its lists."""
    shared = runpy.run_path(str(Path(__file__).resolve().parents[1] / "explain" / "conftest.py"))
    run = shared["make_listed_run"](tiny, tmp_path / "run", shard_size=5)
    shared["call_recipe"]("audit", "--run_dir", str(run), "--shard_size", "4")
    names = []
    for record in read_opened(run / "audit"):
        assert record["items"][0]["chain"] is None and not record["erased"]
        files = [n for n in record["artefacts"]["files"] if n.startswith("recommendations/rec")]
        names.append(files[0].rsplit("-", 2)[1])
        assert len(files) == 1
    assert [int(name) for name in names] == [0] * 5 + [5] * 5 + [10] * 4
    assert verify(run).findings == []
    assert "No list of this run is explained" in (run / "audit" / "report.html").read_text()
