"""The doctor's checks of a run's files: manifests, semantic ids, validation, lists and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import (
    FOLDERS,
    IN_PROGRESS,
    Manifest,
    load_manifest,
    package_versions,
    read_json,
    read_shards,
    require,
    rerun_command,
    sha256_file,
    stage_folder,
)
from genrec.columns import (
    CERTIFIED,
    COMPLETION,
    ITEM_INDEX,
    PROMPT,
    PROMPT_SHA256,
    RANK,
    ROW_ID,
    TASK,
    TEMPLATE,
)
from genrec.decoding.item_tokens import item_tokens
from genrec.evaluation.doctor import Check, Verdict, not_run
from genrec.evaluation.probes import K, Sample
from genrec.modeling import ABOUT, encode_prompts, encode_rows
from genrec.prompts import PromptRenderer
from genrec.quantizers.quality import collision_rate, level_usage
from genrec.recommend import MODEL_STAGES, Recommender
from genrec.semantic_ids import TITLES, SemanticIds, map_kind
from genrec.tasks.families import SEQUENTIAL
from genrec.tasks.sequential import history_prompt
from genrec.title_ids import ItemMap, TitleIds

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

# Validation curve. NDCG@10 of 500 to 1,500 rows moves by some percent of itself by chance.
RISING = 0.02
LONG_PAST = 0.5  # the best measurement lies in the first half of the steps …
FALLEN = 0.9  # … and the last is worse than this share of it

# Semantic ids. Uniform use would give a first-level code 1 / codebook_size of the items.
USED_LOOK = 0.5  # of the first level's codes
LARGEST_LOOK, LARGEST_BAD = 0.05, 0.3
LARGEST_RATIO = 5.0  # … and so many times the uniform share

_TITLES_FIT: Verdict = ("ok", "every item has a title of its own", "")
_FITTING: Verdict = ("ok", "every file is the one its stage wrote, from what lies there", "")


def check_manifests(run_dir: Path | str) -> Check:
    """Whether every finished stage is whole, matches its inputs, and was made by one set of code.

    `genrec.artifacts.require` compares sizes and recorded hashes; here every file is read, too.
    """
    broken: dict[str, str] = {}
    versions: dict[str, dict[str, str]] = {}
    unfinished = [s for s in FOLDERS if (stage_folder(run_dir, s) / IN_PROGRESS).exists()]
    for stage in FOLDERS:
        try:
            if load_manifest(run_dir, stage) is None:
                continue
            manifest = require(run_dir, stage)
        except ValueError as error:
            broken[stage] = str(error)
            continue
        versions[stage] = manifest.versions
        if changed := _changed_files(run_dir, stage, manifest):
            broken[stage] = f"{', '.join(changed)} changed since the stage finished"
    mixed, now = {}, package_versions()
    for package in sorted({name for found in versions.values() for name in found}):
        found = sorted({v[package] for v in versions.values() if package in v})
        # A package that isn't here now can't change what is done from here on.
        if found != [now.get(package, found[0])]:
            mixed[package] = f"{' and '.join(found)} (now {now.get(package, 'absent')})"
    details = {"broken": broken, "unfinished": unfinished, "mixed_versions": mixed}
    stages = len({*versions, *broken})
    value, verdict = f"{stages} finished stages", _FITTING
    if unfinished or mixed:
        value += f"; unfinished: {', '.join(unfinished)}" if unfinished else ""
        value += "".join(f"; {name} {found}" for name, found in mixed.items())
        verdict = (
            "look",
            "stages made by different code (or half made) may not fit together, nor with this one",
            "finish what is unfinished; serve and rerun in the environment of the stages",
        )
    if broken:
        value += f"; broken: {', '.join(broken)}"
        stage = next(stage for stage in FOLDERS if stage in broken)
        meaning = f"what is served was not made from what lies there ({broken[stage]})"
        verdict = ("bad", meaning, f"restore the files, or {rerun_command(run_dir, stage)}")
    return Check("manifests", value, *verdict, details)


def _changed_files(run_dir: Path | str, stage: str, manifest: Manifest) -> list[str]:
    folder = stage_folder(run_dir, stage)
    return [n for n, o in manifest.outputs.items() if sha256_file(folder / n) != o["sha256"]]


def check_semantic_ids(run_dir: Path | str) -> Check:
    """Collisions, used codes, collapse of the first level, and whether models know this map."""
    folder, name = stage_folder(run_dir, "quantize"), "semantic ids"
    if not (folder / "items.parquet").exists():
        return not_run(name, "quantize has not finished", f"genrec quantize --run_dir {run_dir}")
    again = rerun_command(run_dir, "quantize")
    if map_kind(folder) == TITLES:
        return _check_titles(run_dir, folder, again)
    codes = (
        pl.read_parquet(folder / "items.parquet", glob=False).sort(ITEM_INDEX)["codes"].to_numpy()
    )
    sizes = np.array(read_json(folder / "semantic_ids.json")["codebook_sizes"])
    # Read without SemanticIds, which refuses what is to be measured here.
    known = np.clip(codes, 0, sizes - 1)
    usage, collisions = level_usage(known, sizes.tolist()), collision_rate(codes)
    largest = float(np.bincount(known[:, 0]).max() / len(codes))
    used = " / ".join(f"{u['used']} of {u['size']}" for u in usage)
    value = f"{collisions:.1%} collide; used codes {used}; largest first code holds {largest:.1%}"
    verdict: Verdict = ("ok", "every item has a SID of its own, spread over the codes", "")
    uniform = LARGEST_RATIO / sizes[0]
    if largest > max(LARGEST_LOOK, uniform) or usage[0]["used"] < USED_LOOK * usage[0]["size"]:
        advice = f"a smaller codebook_size, or other vectors, then {again}"
        verdict = ("look", "the first level is used unevenly", advice)
    if largest > max(LARGEST_BAD, uniform):
        advice = f"standardise the vectors or use more restarts (n_init), then {again}"
        verdict = ("bad", "the codebook collapsed: the first level says little", advice)
    try:
        if strangers := _strangers(run_dir, SemanticIds.load(folder)):
            value += f"; not the map of {', '.join(strangers)}"
            advice = f"restore the model's map, or {rerun_command(run_dir, strangers[0])}"
            verdict = ("bad", "the model's tokens stand for other items than the map says", advice)
    except ValueError as error:  # collisions, codes outside their codebook, a changed file
        verdict = ("bad", str(error), f"restore the map, or {again}")
    details = {"collision_rate": collisions, "levels": usage, "largest_first_code": largest}
    return Check(name, value, *verdict, details)


def _check_titles(run_dir: Path | str, folder: Path, again: str) -> Check:
    """Whether the titles of a title index are one for each item, and models know this map."""
    name, verdict = "semantic ids", _TITLES_FIT
    facts = read_json(folder / "quality.json")["titles"]
    value = f"titles as names: {facts['numbered']:,} numbered, {facts['shortened']:,} cut, "
    value += f"{facts['untitled']:,} missing; the longest has {facts['longest_bytes']} bytes"
    try:
        if strangers := _strangers(run_dir, TitleIds.load(folder)):
            value += f"; not the map of {', '.join(strangers)}"
            advice = f"restore the model's map, or {rerun_command(run_dir, strangers[0])}"
            verdict = ("bad", "the model knows items by other titles than the map says", advice)
    except ValueError as error:
        verdict = ("bad", str(error), f"restore the map, or {again}")
    return Check(name, value, *verdict, {"titles": facts})


def _strangers(run_dir: Path | str, semantic_ids: ItemMap) -> list[str]:
    """Model stages that were trained on another map."""
    about = {s: stage_folder(run_dir, s) / "model" / ABOUT for s in MODEL_STAGES}
    return [
        stage
        for stage, path in about.items()
        if path.exists() and not semantic_ids.descends_from(read_json(path)["semantic_ids_sha256"])
    ]


def check_curve(run_dir: Path | str) -> Check:
    """Whether validation was still rising when training ended, or had long stopped."""
    name, curves = "validation curve", {}
    for stage in MODEL_STAGES:
        path = stage_folder(run_dir, stage) / "validation.json"
        if path.exists() and (entries := read_json(path)):
            curves[stage] = [(entry["step"], entry[f"ndcg@{K}"]) for entry in entries]
    if "sft" not in curves:
        return not_run(name, "sft has no validation.json", "train sft with eval_rows above 0")
    steps, values = np.array(curves["sft"], dtype=np.float64).T
    at = int(values.argmax())
    value = f"best NDCG@{K} {values[at]:.4f} at step {steps[at]:.0f} of {steps[-1]:.0f}"
    value += f", last {values[-1]:.4f}" if at < len(values) - 1 else ""
    verdict = _curve_verdict(steps, values, at)
    if "grpo" in curves:
        before, after = curves["grpo"][0][1], max(v for _, v in curves["grpo"])
        value += f"; grpo {before:.4f} → {after:.4f}"
        if verdict[0] == "ok" and after <= before * (1 + RISING):
            advice = "rerun grpo with more max_steps or a higher learning_rate, or serve sft"
            verdict = ("look", "grpo moved validation by no more than chance", advice)
    return Check(name, value, *verdict, {"ndcg": curves})


def _curve_verdict(steps: FloatArray, values: FloatArray, at: int) -> Verdict:
    if values[at] == 0:
        advice = "check prompts, learning_rate and the number of epochs, then rerun sft"
        return "bad", "no validation target was ever in the top 10: nothing was learned", advice
    if len(values) == 1:
        return (
            "look",
            "one measurement says nothing of the course",
            "rerun sft measuring more often",
        )
    if at == len(values) - 1 and values[at] > values[:-1].max() * (1 + RISING):
        meaning = "still rising when training ended: it was cut short"
        return "look", meaning, "rerun sft with more num_train_epochs"
    if steps[at] < LONG_PAST * steps[-1] and values[-1] < FALLEN * values[at]:
        meaning = "the best was long past when training ended (its weights are the ones kept)"
        return "look", meaning, "rerun sft with a lower learning_rate, more dropout or fewer epochs"
    return "ok", "training ended about where validation stopped rising", ""


def stored_lists(
    run_dir: Path | str, k: int
) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_], int]:
    """Lists of the recommend stage.

    Returns:
        Items ``# (n_rows, K)``, lengths and certificates ``# (n_rows,)``, distinct prompts. Rows
        that were asked for and have no list are empty ones.
    """
    folder = stage_folder(run_dir, "recommend")
    columns = [ROW_ID, RANK, ITEM_INDEX, CERTIFIED, PROMPT_SHA256]
    table = read_shards(folder, "recommendations").select(columns)
    place = (
        pl.read_parquet(folder / "rows.parquet", glob=False).select(ROW_ID).with_row_index("_row")
    )
    table = table.join(place, on=ROW_ID)
    items = np.full((len(place), max(K, k)), -1, dtype=np.int64)
    rows = table["_row"].to_numpy()
    items[rows, table[RANK].to_numpy() - 1] = table[ITEM_INDEX].to_numpy()
    certified = np.zeros(len(place), dtype=bool)
    certified[rows] = table[CERTIFIED].to_numpy()
    return items[:, :K], (items >= 0).sum(1), certified, table[PROMPT_SHA256].n_unique()


def check_prompts(
    run_dir: Path | str, recommender: Recommender | None, valid: Sample | None, train: Sample | None
) -> Check:
    """Whether serving renders what was trained on, and no prompt holds its answer.

    Without a recommender (the model didn't load) only the templates are compared.
    """
    name, folder = "prompts", stage_folder(run_dir, "build_dataset")
    manifest = load_manifest(run_dir, "build_dataset")
    if manifest is None:
        command = f"genrec build_dataset --run_dir {run_dir}"
        return not_run(name, "build_dataset has not finished", command)
    again = f"{rerun_command(run_dir, 'build_dataset')}, then retrain"
    now, then = PromptRenderer(folder / "prompts").sha256(), manifest.metrics.get("prompts_sha256")
    details: dict[str, Any] = {"templates_sha256": {"trained": then, "now": now}}
    if then not in (None, now):
        value = f"templates were {then[:12]} in training, they are {now[:12]} now"
        meaning = "the model is asked in words that it was not trained on"
        return Check(
            name, value, "bad", meaning, f"restore {folder / 'prompts'}, or {again}", details
        )
    if recommender is None or valid is None or train is None:
        return not_run(name, "the templates are unchanged, but the model did not load")
    missing = [n for n in ("train", "valid") if not (folder / f"{n}.parquet").exists()]
    if missing:
        return not_run(name, f"{folder} lacks {', '.join(missing)}.parquet", again)
    rows = pl.read_parquet(folder / "train.parquet", glob=False).filter(pl.col(TASK) == SEQUENTIAL)
    compared, broken = _not_prefix(recommender, train, rows)
    served = float((rows[TEMPLATE] == recommender.template).sum() / max(1, len(rows)))
    problems = {
        "prompts differ from the stored ones": _stored_differ(valid, folder),
        "training rows don't go on from the served prompt": broken,
        "prompts hold their target": _leaks(recommender, valid),
        "training rows were found": "no" if compared == 0 else 0,
        f"training rows use the serving template {recommender.template}": 0 if served else "no",
    }
    details |= {"problems": problems, "compared": compared, "serving_template_share": served}
    value = (
        f"{len(valid.prompts)} prompts equal the stored ones, {compared} training rows go on from "
        f"them, none holds its target; {served:.0%} of training is the serving template"
    )
    verdict: Verdict = ("ok", "training and serving see the same text", "")
    if wrong := [f"{count} {what}" for what, count in problems.items() if count]:
        value = "; ".join(wrong)
        verdict = ("bad", "training and serving don't see the same text, or see the answer", again)
    return Check(name, value, *verdict, details)


def _stored_differ(sample: Sample, folder: Path) -> int:
    """Rows whose prompt is not the one that build_dataset stored."""
    stored = pl.read_parquet(folder / "valid.parquet", columns=[ROW_ID, PROMPT], glob=False)
    prompt_of = dict(stored.filter(pl.col(ROW_ID).is_in(sample.row_ids)).iter_rows())
    pairs = zip(sample.row_ids, sample.prompts, strict=True)
    return sum(prompt_of.get(row_id) != prompt for row_id, prompt in pairs)


def _not_prefix(recommender: Recommender, sample: Sample, rows: pl.DataFrame) -> tuple[int, int]:
    """Training rows compared, and how many are not the served prompt's tokens + the target's.

    The prompt is rendered with the row's own template: templates may be several.
    """
    tokenizer = recommender.tokenizer
    written = item_tokens(tokenizer, recommender.semantic_ids)
    codes = written.trie.codes()[sample.targets].tolist()
    lengths = written.trie.path_lengths()[sample.targets]
    # With a training row per item, its id carries the target's place in the history.
    ids = zip(sample.row_ids, sample.histories, strict=True)
    names = [(row_id, f"{row_id}#{len(history)}") for row_id, history in ids]
    wanted = rows.filter(pl.col(ROW_ID).is_in([name for pair in names for name in pair]))
    made = {row[ROW_ID]: row for row in wanted.iter_rows(named=True)}
    compared = wrong = 0
    for pair, history, target, length in zip(names, sample.histories, codes, lengths, strict=True):
        if (row := made.get(pair[0]) or made.get(pair[1])) is None:
            continue  # a dataset may hold a part of the rows
        sids = recommender.sids[history].tolist()
        prompt = history_prompt(recommender.renderer, row[TEMPLATE], sids)
        served = encode_prompts(tokenizer, [prompt])[0]
        served += [written.token_ids[level][code] for level, code in enumerate(target[:length])]
        text = ([row[PROMPT]], [row[COMPLETION]])
        row_ids = encode_rows(tokenizer, *text, written.last)["input_ids"][0]
        compared, wrong = compared + 1, wrong + (row_ids != served)
    return compared, wrong


def _leaks(recommender: Recommender, sample: Sample) -> int:
    """Prompts that hold the SID of a target which the history doesn't hold."""
    triples = zip(sample.prompts, sample.targets, sample.histories, strict=True)
    return sum(
        recommender.sids[target] in prompt and target not in history
        for prompt, target, history in triples
    )
