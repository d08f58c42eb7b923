"""SASRec as surrogate: row losses and gradients against plain loops, batches, the recipe."""

from __future__ import annotations

import json
import runpy
import sys

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional as F

from genrec.artifacts import Stage, load_manifest, write_parquet
from genrec.cli import recipes_folder
from genrec.evaluation import surrogate
from genrec.evaluation.sequential import SequentialSettings, SequentialTransformer
from genrec.evaluation.surrogate import RowBatches, RowLosses, score_rows
from genrec.tasks.pruning import mean_gradient

N_ITEMS = 20
SASREC = SequentialSettings(dim=8, layers=2, heads=2, dropout=0.3)


@pytest.fixture(scope="module")
def rows(tiny) -> pl.DataFrame:
    """Windows of several lengths, and one that supervises a first item only."""
    train = tiny.shop(n_users=12, n_items=N_ITEMS).splits.train
    lone = train.head(1).with_columns(
        pl.lit("train-lone").alias("row_id"),
        pl.lit([], dtype=pl.List(pl.Int32)).alias("history_item_index"),
        pl.lit(0, dtype=pl.Int32).alias("supervise_from"),
    )
    return pl.concat([train.head(5), lone, train.tail(-5)])


@pytest.fixture(scope="module")
def model() -> SequentialTransformer:
    torch.manual_seed(0)
    made = SequentialTransformer(N_ITEMS, 12, SASREC)
    with torch.no_grad():  # N(0, .02) leaves all scores alike
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def plain_loss(model: SequentialTransformer, row: dict) -> torch.Tensor:
    """Mean loss of a row's supervised items, one row at a time and without padding."""
    ids = torch.tensor([*row["history_item_index"], row["target_item_index"]])
    first = max(row["supervise_from"], 1)  # the first item has nothing before it
    if first >= len(ids):
        return torch.zeros(())
    hidden = model(ids[None, :-1])[0]
    return F.cross_entropy(model.logits(hidden)[first - 1 :], ids[first:])


def test_scores_equal_a_plain_loop(model, rows):
    table, facts = score_rows(model, rows, effort_weight=0.5, damping=1.0)
    assert table["row_id"].to_list() == rows["row_id"].to_list()
    losses = RowLosses(model).eval()
    named = dict(model.named_parameters())
    last = [named[name.removeprefix("model.")] for name in losses.last_layer()]
    assert len(last) == 14 and sum(p.numel() for p in last) < 700  # not the other layer's
    for at, row in enumerate(rows.iter_rows(named=True)):
        loss = plain_loss(model, row)
        assert table["loss"][at] == pytest.approx(loss.item(), abs=1e-4)
        if not loss.requires_grad:
            assert table["row_id"][at] == "train-lone" and table["effort"][at] == 0.0
            continue
        # The tied layer's role as output only: a copy of its weights takes the gradient.
        ids = torch.tensor([*row["history_item_index"], row["target_item_index"]])
        first = max(row["supervise_from"], 1)
        output = model.items.weight[:N_ITEMS].detach().clone().requires_grad_()
        logits = F.linear(model(ids[None, :-1])[0], output, model.bias)
        again = F.cross_entropy(logits[first - 1 :], ids[first:])
        slopes = torch.autograd.grad(again, [*last, output, model.bias])
        expected = torch.cat([s.flatten() for s in slopes]).norm().item()
        assert table["effort"][at] == pytest.approx(expected, rel=1e-3)
    assert facts["damping"] >= 1.0 and facts["residual"] <= 1e-3
    spread = table["score"].max() - table["score"].min()
    assert 0 <= table["score"].min() and 0 < spread <= 1.5


def test_influence_equals_a_dense_solve(model, rows):
    table, facts = score_rows(model, rows, damping=1.0, max_iterations=200)
    losses = RowLosses(model).eval()
    batches, names = RowBatches.of(rows, losses), losses.last_layer()
    gradient = mean_gradient(losses, batches, names)
    shapes = {name: dict(losses.named_parameters())[name] for name in names}

    def mean_loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([p.numel() for p in shapes.values()])
        chosen = {n: v.view(p.shape) for v, (n, p) in zip(parts, shapes.items(), strict=True)}
        total = sum(torch.func.functional_call(losses, chosen, b).sum() for b in batches)
        return total / rows.height

    flat = torch.cat([p.detach().flatten() for p in shapes.values()])
    damped = torch.autograd.functional.hessian(mean_loss, flat)
    damped = damped.double() + facts["damping"] * torch.eye(len(flat))
    vector = torch.linalg.solve(damped, gradient.double())
    last = [dict(model.named_parameters())[n.removeprefix("model.")] for n in names]
    expected = []
    for row in rows.iter_rows(named=True):
        loss = plain_loss(model, row)
        slopes = torch.autograd.grad(loss, last) if loss.requires_grad else [vector * 0]
        slope = torch.cat([s.flatten() for s in slopes]).double()
        expected.append(float(slope @ vector) / rows.height)
    assert np.abs(expected).max() > 0
    scale = np.abs(expected).max()
    assert np.allclose(table["influence"].to_numpy(), expected, atol=5e-3 * scale)


def test_batches_hold_every_row_once_and_stay_small(model, rows, monkeypatch):
    whole = RowBatches.of(rows, RowLosses(model))
    (ids, supervised), *more = list(whole)
    assert not more and ids.shape == supervised.shape
    # Lists by hand: the order of the batches leads back to the split.
    for at, row in zip(range(len(ids)), whole.order, strict=True):
        items = [*rows["history_item_index"][int(row)], rows["target_item_index"][int(row)]]
        assert ids[at].tolist() == items + [N_ITEMS + 1] * (ids.shape[1] - len(items))
        places = range(rows["supervise_from"][int(row)], len(items))
        assert supervised[at].nonzero().flatten().tolist() == list(places)
    monkeypatch.setattr(surrogate, "_CELLS", 3 * whole.cells_per_row)
    parts = list(whole)
    assert [len(p[0]) for p in parts] == [3] * (rows.height // 3) + [rows.height % 3] * bool(
        rows.height % 3
    )
    joined = [r[r != N_ITEMS + 1].tolist() for p in parts for r in p[0]]
    assert joined == [r[r != N_ITEMS + 1].tolist() for r in ids]
    monkeypatch.setattr(surrogate, "_CELLS", 1)  # a row that alone is too large still gets scored
    assert [len(p[0]) for p in whole] == [1] * rows.height


def test_scores_do_not_depend_on_batches_but_on_the_seed_of_the_curvature(model, rows, monkeypatch):
    table, _ = score_rows(model, rows, damping=1.0)
    monkeypatch.setattr(surrogate, "_CELLS", 4000)
    small, _ = score_rows(model, rows, damping=1.0)
    for name in ("influence", "effort", "loss"):
        scale = table[name].abs().max()
        assert np.allclose(table[name], small[name], atol=2e-3 * scale)
    part = [
        score_rows(model, rows, damping=1.0, curvature_rows=5, seed=s)[0]["influence"].to_list()
        for s in (0, 0, 1)
    ]
    assert part[0] == part[1] != part[2]


def test_a_sample_of_rows(model, rows):
    whole = RowBatches.of(rows, RowLosses(model))
    part = whole.sample(6, seed=0)
    assert len(part.order) == 6 == len(set(part.order.tolist()))
    (ids, _), *_ = list(part)
    for at, row in enumerate(part.order):
        assert ids[at][ids[at] != N_ITEMS + 1][-1] == rows["target_item_index"][int(row)]
    assert whole.sample(rows.height, seed=0) is whole


def test_bert4rec_is_refused():
    bert = SequentialTransformer(N_ITEMS, 6, SequentialSettings(causal=False, dim=8, layers=1))
    with pytest.raises(ValueError, match="must be SASRec"):
        RowLosses(bert)


# The recipe. --------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tiny, tmp_path):
    shop = tiny.shop(n_users=40, n_items=N_ITEMS)
    stage = Stage(tmp_path / "run", "prepare", {})
    assert not stage.is_done()
    write_parquet(stage.folder / "catalog.parquet", shop.catalog)
    write_parquet(stage.folder / "interactions.parquet", shop.interactions)
    for name in ("train", "valid", "test"):
        write_parquet(stage.folder / f"{name}.parquet", getattr(shop.splits, name))
    stage.finish(rows=shop.interactions.height)
    return tmp_path / "run"


@pytest.fixture
def prune(monkeypatch):
    recipe = recipes_folder() / "prune.py"
    module = runpy.run_path(str(recipe), run_name="prune")

    def run(run_dir, *flags: str) -> None:
        small = ["--dim", "16", "--layers", "1", "--max_epochs", "3"]
        monkeypatch.setattr(sys, "argv", [str(recipe), "--run_dir", str(run_dir), *small, *flags])
        module["main"]()

    return run


def test_recipe_writes_scores_and_kept_rows(run_dir, prune, capsys):
    flags = ("--methods", "dealrec", "loss", "--shares", "0.25", "0.5")
    prune(run_dir, *flags)
    folder = run_dir / "pruning"
    train = pl.read_parquet(run_dir / "data" / "train.parquet")
    scores = pl.read_parquet(folder / "scores.parquet")
    assert scores.columns == ["row_id", "influence", "effort", "loss", "score"]
    assert scores["row_id"].equals(train["row_id"])
    half = round(0.5 * train.height)
    kept = pl.read_parquet(folder / "kept-loss-0.5.parquet")
    highest = scores.sort("loss", descending=True).head(half)["row_id"]
    assert kept.columns == ["row_id"] and set(kept["row_id"]) == set(highest)
    assert kept["row_id"].is_sorted()  # the order of train.parquet
    dealrec = pl.read_parquet(folder / "kept-dealrec-0.25.parquet")
    assert dealrec.height == round(0.25 * train.height) == dealrec["row_id"].n_unique()
    assert set(dealrec["row_id"]) <= set(train["row_id"])
    manifest = load_manifest(run_dir, "prune")
    assert manifest.rows == train.height
    assert manifest.metrics["kept_rows"]["kept-loss-0.5.parquet"] == half
    assert json.dumps(manifest.metrics)  # plain numbers
    assert not (folder / "surrogate.pt").exists()
    assert not (run_dir / "test_reads.jsonl").exists()  # test was not looked at
    written = (folder / "scores.parquet").stat().st_mtime_ns
    prune(run_dir, *flags)  # complete: skipped
    assert (folder / "scores.parquet").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="shares"):
        prune(run_dir, "--shares", "0.3")
    prune(run_dir, *flags, "--overwrite", "true")
    assert pl.read_parquet(folder / "scores.parquet").equals(scores)  # same seed, same scores


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shares", "0"), "share=0"),
        (("--shares", "1.2"), "share=1.2"),
        (("--shares", "0.1", "0.1"), "distinct"),
        (("--methods", "best"), "best"),
        (("--groups", "0"), "groups=0"),
        (("--damping", "0"), "damping=0"),
        (("--effort_weight", "-1"), "effort_weight=-1"),
        (("--heads", "3"), "heads"),
        (("--dim", "15"), "dim=15"),
    ],
)
def test_recipe_refuses_settings_before_it_reads(prune, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        prune(tmp_path / "missing", *flags)
