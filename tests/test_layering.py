"""Imports point one way: each part of the package imports only from parts above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "genrec"
ORDER = [
    "columns", "item_lists", "item_index", "artifacts", "normalizers", "page", "svg", "metrics",
    "data", "embedding", "quantizers", "semantic_ids", "map_extension", "chains", "prompts",
    "title_ids", "sid_texts", "tasks", "chain_reader", "prompt_format", "title_index", "sharding",
    "modeling", "adapters", "averaging", "training_data", "decoding", "supervised_head",
    "sft_trainer", "reasoning", "grounding", "rewards", "chain_rewards", "advantages",
    "rollout_groups", "group_losses", "rollouts", "reasoning_rollouts", "bundle", "warm_start",
    "teachers", "list_shaping", "engine_options", "recommend", "recommend_in_words", "rating",
    "generation", "planning", "server", "evaluation", "explain", "audit", "config", "cli",
]  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth of the code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def test_every_part_has_a_place():
    assert {part(path) for path in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_up(path):
    if part(path) == "__init__":
        return
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("genrec.")}
    below = {p for p in parts if ORDER.index(p) > ORDER.index(part(path))}
    assert not below, f"{path.name} imports {below}, which come after {part(path)}"
    assert "recipes" not in {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_heavy_packages_stay_where_they_belong(path):
    roots = {name.split(".")[0] for name in imported(path)}
    if not path.name.startswith("vllm_"):  # the engines on vLLM, and what runs in its worker
        assert "vllm" not in roots
    if path.name != "ray_executor.py":
        assert "ray" not in roots
    # Those that are TRL's trainers or answer for them; config uses its argument parser alone.
    if part(path) not in ("rollouts", "supervised_head", "sft_trainer", "config"):
        assert "trl" not in roots
    light = (
        "columns",
        "item_lists",
        "item_index",
        "artifacts",
        "page",
        "svg",
        "metrics",
        "data",
        "quantizers",
    )
    if part(path) in (*light, "normalizers", "semantic_ids"):
        banned = {"transformers", "trl", "peft"}
        if not path.name.startswith("rqvae"):  # the one quantizer that is trained by gradients
            banned.add("torch")
        assert not roots & banned
    if part(path) != "server":
        assert not roots & {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"}
    if path.name == "trie.py":
        assert not roots & {"torch", "transformers"}


RECIPES = sorted((PACKAGE.parent / "recipes").glob("*.py"))


@pytest.mark.parametrize("path", [*FILES, *RECIPES], ids=lambda p: p.name)
def test_file_names_are_no_patterns(path):
    """A run folder may be called ``run[1]``; Polars would look for ``run1`` then."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "read_parquet_schema", f"{path.name}: it takes patterns alone"
            if node.func.attr in ("read_parquet", "scan_parquet", "read_csv", "scan_csv"):
                named = [keyword.arg for keyword in node.keywords]
                assert "glob" in named, f"{path.name}:{node.lineno}: glob=False is missing"
