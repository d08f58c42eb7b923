"""The README's commands: Make targets by dry run, recipe commands and the snippet on a tiny CSV."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from genrec.artifacts import read_shards
from genrec.columns import (
    BRAND,
    CATEGORIES,
    DESCRIPTION,
    ITEM_ID,
    PRICE,
    RATING,
    TIMESTAMP,
    TITLE,
    USER_ID,
)
from genrec.data.synthetic import synthetic_shop

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
SMALL = {
    "embed": {"dim": 8},
    "quantize": {"codebook_size": 8},
    "build_dataset": {"max_rows": ["title_to_sid=20", "sid_to_title=20"]},
    "sft": {"size": "tiny", "vocab_size": 300, "num_train_epochs": 1, "eval_rows": 10,
            "max_steps": 6, "warmup_steps": 2, "save_strategy": "no"},
    "recommend": {"beam_width": 20},
    "evaluate": {"samples": 50},
    "explain": {"num_rows": 5},
}  # fmt: skip


assert {command[0] for command in COMMANDS} <= {"genrec", "accelerate", "make", "python"}


def targets() -> list[str]:
    named = re.findall(r"`?\bmake ([a-z-]+)", README)
    return sorted(set(named))


@pytest.mark.parametrize("target", targets())
def test_make_target_exists(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("install", "quickstart", "test", "test-vllm", "lint"):
        assert re.search(rf"^{target}\s+\w", done.stdout, flags=re.M), done.stdout


@pytest.fixture(scope="module")
def own_csv(tmp_path_factory) -> tuple[Path, Path]:
    """A shop as two CSV files in the columns of the own-csv example, and small configs."""
    folder = tmp_path_factory.mktemp("own")
    shop = synthetic_shop(n_users=80, n_items=50, seed=1)
    (folder / "files").mkdir()
    when = pl.from_epoch(pl.col(TIMESTAMP), time_unit="s").dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    shop.interactions.select(
        pl.col(USER_ID).alias("customer"), pl.col(ITEM_ID).alias("sku"), when.alias("ordered_at"),
        pl.col(RATING).alias("stars"),
    ).write_csv(folder / "files" / "orders.csv")  # fmt: skip
    shop.catalog.select(
        pl.col(ITEM_ID).alias("sku"), pl.col(TITLE).alias("name"), pl.col(BRAND).alias("maker"),
        pl.col(CATEGORIES).list.join(" > ").alias("category"), pl.col(PRICE).alias("price"),
        pl.col(DESCRIPTION).alias("text"),
    ).write_csv(folder / "files" / "products.csv")  # fmt: skip
    (folder / "configs").mkdir()
    for path in (ROOT / "recipes" / "configs" / "own-csv").glob("*.yaml"):
        values = yaml.safe_load(path.read_text()) | SMALL.get(path.stem, {})
        (folder / "configs" / path.name).write_text(yaml.safe_dump(values))
    return folder / "files", folder / "configs"


@pytest.fixture(scope="module")
def run_dir(own_csv, tmp_path_factory) -> Path:
    """The README's pipeline command on that shop."""
    files, configs = own_csv
    command = next(list(c) for c in COMMANDS if c[:2] == ["genrec", "pipeline"])
    run = tmp_path_factory.mktemp("run") / "mine"
    values = {"--configs": str(configs), "--run_dir": str(run), "--data_dir": str(files)}
    for flag, value in values.items():
        command[command.index(flag) + 1] = value
    start = [sys.executable, "-c", "from genrec.cli import main; main()"]
    done = subprocess.run([*start, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Report page:" in done.stdout and "item-kNN" in done.stdout
    assert "INFO genrec.artifacts: audit: done" in done.stderr
    assert re.search(r"recommended to", done.stdout)
    return run


def test_pipeline_skips_what_is_done(genrec, run_dir, own_csv):
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("manifest.json")}
    assert len(before) == 9  # all stages but grpo, which own-csv leaves out
    files, configs = own_csv
    again = ["genrec", "pipeline", "--configs", str(configs), "--run_dir", str(run_dir)]
    done = genrec(*again[1:], "--data_dir", str(files))
    assert done.returncode == 0, done.stderr[-2000:]
    assert before == {p: p.stat().st_mtime_ns for p in run_dir.rglob("manifest.json")}


@pytest.mark.parametrize("verb", ["trace", "audit verify", "audit replay"])
def test_commands_on_a_run(genrec, run_dir, verb):
    words = ["genrec", *verb.split()]
    (command,) = [c for c in COMMANDS if c[: len(words)] == words]
    command = [str(run_dir) if word == "runs/quickstart" else word for word in command]
    done = genrec(*command[1:])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip()


def test_doctor(genrec, run_dir):
    done = genrec("doctor", "--run_dir", str(run_dir), "--rows", "10")
    # 1: it says that something is bad, as it may of a model of six steps.
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert (run_dir / "doctor.json").is_file()


def test_evaluation_commands(genrec, run_dir, tmp_path):
    """Somebody's lists, all baselines, and a comparison, in the README's words."""
    lists = read_shards(run_dir / "recommendations", "recommendations")
    lists.select("row_id", "item_id", "rank").write_csv(tmp_path / "lists.csv")
    rule = str(json.loads((run_dir / "recommendations" / "manifest.json").read_text())
               ["config"]["filter_seen"]).lower()  # fmt: skip
    values = {
        "runs/quickstart": str(run_dir), "genrec=runs/quickstart": f"genrec={run_dir}",
        "lists.csv": str(tmp_path / "lists.csv"), "results/mine": str(tmp_path / "mine"),
        "my model=results/mine": f"my model={tmp_path / 'mine'}", "false": rule,
        "results/both": str(tmp_path / "both"),
    }  # fmt: skip
    words = ("--recommendations", "baselines", "compare")
    named = [next(c for c in COMMANDS if w in c) for w in words]
    for command in named:
        done = genrec(*(values.get(word, word) for word in command[1:]))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        if "baselines" in command:
            assert "SASRec" in done.stdout and "BERT4Rec" in done.stdout
    scores = json.loads((tmp_path / "mine" / "metrics.json").read_text())["systems"]["my model"]
    own = json.loads((run_dir / "evaluation" / "metrics.json").read_text())["systems"]["genrec"]
    assert scores["NDCG@10"]["value"] == own["NDCG@10"]["value"]
    assert (tmp_path / "both" / "comparison.html").is_file()


def test_lora_on_a_pretrained_model(genrec, run_dir, own_csv, tiny, tmp_path):
    """The README's way to LoRA, with a tiny local model in place of the hub's, on CPU."""
    run, base = tmp_path / "lora", tmp_path / "base"
    tiny.lm(512, tied=True, context=256).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    for folder in ("data", "embeddings", "semantic_ids"):
        shutil.copytree(run_dir / folder, run / folder)
    files, configs = own_csv
    until, launch, recommend = (list(c) for c in COMMANDS if "runs/lora" in c)
    cpu = "--use_cpu true --bf16 false --dtype float32 --max_steps 2 --eval_rows 5".split()
    small = configs / "recommend.yaml"
    values = {
        "runs/lora": str(run), "path/to/your/files": str(files), "Qwen/Qwen3-0.6B": str(base),
        "recipes/configs/own-csv": str(configs),
        "recipes/configs/own-csv/recommend.yaml": str(small),
    }  # fmt: skip
    for command in (until, launch, recommend):
        command[:] = [values.get(word, word) for word in command]
    for done in (
        genrec(*until[1:]),
        subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *launch[2:], *cpu],
            cwd=ROOT, capture_output=True, text=True,
        ),
        genrec(*recommend[1:]),
    ):  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (run / "sft" / "adapter" / "adapter_config.json").is_file()
    lists = read_shards(run / "recommendations", "recommendations")
    assert lists["rank"].max() == 10


def test_python_snippet(run_dir, capsys):
    (snippet,) = [block for kind, block in BLOCKS if "recommender.recommend(history" in block]
    catalog = pl.read_parquet(run_dir / "data" / "catalog.parquet")
    ids = catalog[ITEM_ID].to_list()
    snippet = snippet.replace("runs/quickstart", str(run_dir))
    snippet = re.sub(r"\[.*?\]", repr(ids[:2]), snippet)
    exec(compile(snippet, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(any(title in line for title in catalog[TITLE]) for line in lines)


def test_decoding_snippet(run_dir):
    (snippet,) = [block for kind, block in BLOCKS if "engine.search(prompts" in block]
    values: dict = {}
    snippet = snippet.replace("runs/quickstart", str(run_dir)).replace("range(100)", "range(20)")
    exec(compile(snippet, "README.md", "exec"), values)
    items, prices = values["result"].items, values["catalog"]["price"]
    assert items.shape == (2, 5) and (items[0] >= 0).all()
    real = items[items >= 0]
    assert all(price < 30 for price in prices[real.tolist()])
    assert (items[1] < 20).all()


def test_lists_for_users_plan_and_export(genrec, run_dir, tmp_path):
    """Batch generation on a table, its estimate, and a bundle, in the README's words."""
    ids = pl.read_parquet(run_dir / "data" / "catalog.parquet")[ITEM_ID].to_list()
    users = pl.DataFrame({"user_id": ["a", "b"], "history": [ids[:3], []]})
    users.write_parquet(tmp_path / "users.parquet")
    values = {
        "runs/mine": str(run_dir), "runs/quickstart": str(run_dir),
        "users.parquet": str(tmp_path / "users.parquet"), "lists/today": str(tmp_path / "today"),
        "lists/remembered": str(tmp_path / "remembered"),
        "bundles/quickstart": str(tmp_path / "bundle"),
    }  # fmt: skip
    said = {}
    for command in (c for c in COMMANDS if c[1] in ("plan", "export") or "--users" in c):
        done = genrec(*(values.get(word, word) for word in command[1:]))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        said[" ".join(command[1:3])] = done.stdout
    assert list(said) == [
        "plan --model",
        "recommend --run_dir",
        "export --run_dir",
        "export --verify",
    ]
    assert "users/s" in said["plan --model"]
    lists = read_shards(tmp_path / "today" / "recommendations", "recommendations")
    assert lists.group_by("user_id").len()["len"].to_list() == [10, 10]
    remembered = read_shards(tmp_path / "remembered" / "recommendations", "recommendations")
    assert remembered.group_by("user_id").len()["len"].to_list() == [10, 10]
    assert (tmp_path / "bundle" / "model" / "config.json").is_file()


def test_quantizer_snippet():
    (snippet,) = [block for kind, block in BLOCKS if kind == "python" and "vectors" in block]
    values: dict = {}
    exec(compile(snippet, "README.md", "exec"), values)
    assert values["codes"].shape == (2000, 3) and values["report"].rate_before > 0
    assert len({tuple(row) for row in values["codes"].tolist()}) == 2000


def test_a_later_catalogue(genrec, run_dir, own_csv, tmp_path):
    """The README's three commands, on the same files without one product and with a new one."""
    files, configs = own_csv
    later = tmp_path / "files"
    later.mkdir()
    orders = pl.read_csv(files / "orders.csv")
    gone = orders["sku"].value_counts().sort("count", "sku")["sku"][0]
    orders.filter(pl.col("sku") != gone).write_csv(later / "orders.csv")
    products = pl.read_csv(files / "products.csv").filter(pl.col("sku") != gone)
    new = products[:1].with_columns(sku=pl.lit("BRAND-NEW"), name=pl.lit("A brand-new thing"))
    pl.concat([products, new]).write_csv(later / "products.csv")
    run = tmp_path / "next"
    prepare = ["genrec", "prepare", "--config", str(configs / "prepare.yaml")]
    commands = [[*prepare, "--run_dir", str(run), "--data_dir", str(later)]]
    commands += [list(c) for c in COMMANDS if "runs/next" in c]
    assert [c[1] for c in commands] == ["prepare", "embed", "quantize", "recommend"]
    places = {"runs/next": str(run), "runs/mine": str(run_dir)}
    for command in commands:
        done = genrec(*(places.get(word, word) for word in command[1:]))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    columns = ["item_id", "sid"]
    old, now = (
        pl.read_parquet(r / "semantic_ids" / "items.parquet", columns=columns)
        for r in (run_dir, run)
    )
    assert set(old["item_id"]) - set(now["item_id"]) == {gone}
    assert set(now["item_id"]) - set(old["item_id"]) == {"BRAND-NEW"}
    kept = old.join(now, "item_id", suffix="_now")
    assert len(kept) == len(old) - 1 and (kept["sid"] == kept["sid_now"]).all()
    assert now.filter(pl.col("item_id") == "BRAND-NEW")["sid"][0] not in set(old["sid"])
    lists = read_shards(run / "recommendations", "recommendations")
    assert gone not in set(lists["item_id"])


def test_no_placeholder_is_left():
    assert not re.findall(r"^[A-Z_]{6,}$", README, flags=re.M)


def test_every_recipe_command_names_a_recipe():
    for command in COMMANDS:
        if command[0] == "genrec":
            assert (ROOT / "recipes" / f"{command[1]}.py").is_file()
        if command[0] == "accelerate":
            assert (ROOT / command[2]).is_file()
            assert (ROOT / command[command.index("--config") + 1]).is_file()
