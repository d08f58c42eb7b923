"""SASRec and BERT4Rec: what they learn, what they may see, and going on after a kill."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from genrec.data.splits import Splits, leave_one_out
from genrec.evaluation import sequential
from genrec.evaluation.sequential import (
    SequentialSettings,
    SequentialTransformer,
    Trained,
    recommend_sequential,
    train_sequential,
)
from genrec.item_lists import ItemLists, no_items
from genrec.metrics import hit_rate_at_k

N_ITEMS = 12
TINY = SequentialSettings(
    dim=32, layers=1, heads=2, dropout=0.1, learning_rate=1e-2, batch_size=32,
    max_epochs=25, patience=4,
)  # fmt: skip
SETTINGS = {
    "SASRec": TINY,
    "BERT4Rec": replace(TINY, causal=False, max_epochs=60, epochs_per_measurement=3),
}
NAMES = list(SETTINGS)


def lists_of(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int32)))


def split_of(sequences: list[list[int]], n_items: int = N_ITEMS, max_history: int = 20) -> Splits:
    log = pl.DataFrame(
        {
            "user_id": [f"u{u:03}" for u, s in enumerate(sequences) for _ in s],
            "item_index": pl.Series([i for s in sequences for i in s], dtype=pl.Int32),
            "position": pl.Series([p for s in sequences for p in range(len(s))], dtype=pl.Int32),
            "timestamp": pl.Series([None] * sum(map(len, sequences)), dtype=pl.Int64),
        }
    )
    return leave_one_out(log, n_items, max_history)


def cycles(n_users: int = 80, seed: int = 0) -> Splits:
    """Item i is followed by item i + 1, from any start."""
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(0, N_ITEMS, n_users), rng.integers(4, 12, n_users)
    pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
    return split_of([[(s + i) % N_ITEMS for i in range(n)] for s, n in pairs])


def train(splits: Splits, settings: SequentialSettings, seed: int = 0, **more) -> Trained:
    seen = no_items(splits.valid.height)
    return train_sequential(splits.train, splits.valid, seen, N_ITEMS, settings, seed, **more)


def history_of(rows: pl.DataFrame) -> ItemLists:
    return ItemLists.from_column(rows["history_item_index"])


@pytest.fixture(scope="module")
def trained() -> dict[str, Trained]:
    """One finished model of each kind."""
    return {name: train(cycles(), settings) for name, settings in SETTINGS.items()}


def fresh(name: str, max_length: int = 9, dropout: float = 0.1, seed: int = 0):
    torch.manual_seed(seed)
    settings = replace(SETTINGS[name], dropout=dropout, layers=2)
    model = SequentialTransformer(N_ITEMS, max_length, settings)
    with torch.no_grad():  # N(0, .02) leaves all scores alike
        for parameter in model.parameters():
            parameter.mul_(5).add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# Learning. ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_cycle_is_learned(trained, name):
    test = cycles().test
    model = trained[name].model
    lists = recommend_sequential(model, history_of(test), no_items(test.height), 3)
    assert hit_rate_at_k(lists, test["target_item_index"].to_numpy(), 1) > 0.9
    # And it is the last item that decides, not a start of a memorised sequence.
    unseen = lists_of(*[[(i - 2) % N_ITEMS, (i - 1) % N_ITEMS, i] for i in range(N_ITEMS)])
    found = recommend_sequential(model, unseen, no_items(N_ITEMS), 1)[:, 0]
    assert (found == (np.arange(N_ITEMS) + 1) % N_ITEMS).mean() > 0.9
    curve = trained[name].curve
    assert curve[-1]["loss"] < curve[0]["loss"] / 2
    assert trained[name].best["ndcg@10"] == max(entry["ndcg@10"] for entry in curve)


def test_only_supervised_places_are_learned():
    """Two windows of one sequence: the second supervises what the first did not."""
    splits = split_of([[0, 1, 2, 3, 4, 5, 6, 7, 8]], max_history=3)
    windows = sequential._Windows.of_rows(splits.train)
    counted = [int(i) for i in windows.sequences.values[windows.supervised]]
    assert windows.sequences.lengths.max() == 4 and sorted(counted) == list(range(7))


def test_batches_hold_each_usable_window_once():
    splits = split_of([[0], [1, 2], *[[i % N_ITEMS] * (3 + i % 7) for i in range(50)]])
    windows = sequential._Windows.of_rows(splits.train)
    batches = list(windows.batches(4, np.random.default_rng(0)))
    usable = np.flatnonzero(windows.sequences.lengths >= 2)
    assert sorted(np.concatenate(batches).tolist()) == usable.tolist()
    assert 0 < len(usable) < len(windows.sequences) and max(map(len, batches)) == 4
    other = list(windows.batches(4, np.random.default_rng(1)))
    assert [b.tolist() for b in batches] != [b.tolist() for b in other]


def test_the_losses_are_mean_cross_entropies_over_the_catalogue():
    splits = cycles(6)
    windows = sequential._Windows.of_rows(splits.train)
    rows = np.flatnonzero(windows.sequences.lengths >= 2)
    model = fresh("SASRec")
    terms = []
    with torch.no_grad():
        for row in rows:
            items = windows.sequences.take(np.array([row])).values
            for place in range(1, len(items)):  # one prefix at a time, without padding
                hidden = model(torch.from_numpy(items[None, :place]))[:, -1]
                terms.append(-model.logits(hidden).log_softmax(-1)[0, items[place]])
        found = sequential._next_item_loss(model, windows, rows)
    assert found.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)


def test_bert4rec_hides_supervised_items_and_always_one(monkeypatch):
    splits = split_of([[i % N_ITEMS for i in range(u, u + 9)] for u in range(40)], max_history=3)
    windows = sequential._Windows.of_rows(splits.train)
    rows = np.flatnonzero(windows.sequences.lengths >= 2)
    model = fresh("BERT4Rec")
    inputs = []
    monkeypatch.setattr(
        model, "forward", lambda ids: inputs.append(ids) or torch.zeros(*ids.shape, 32)
    )
    only_last = 0
    for seed in range(20):
        sequential._cloze_loss(model, windows, rows, np.random.default_rng(seed))
        hidden = (inputs[-1] == model.mask).numpy()
        assert (hidden.sum(axis=1) >= 1).all()
        last = np.zeros_like(hidden)
        last[np.arange(len(rows)), windows.sequences.lengths[rows] - 1] = True
        assert not (hidden & ~windows.flags(rows).numpy()).any()
        only_last += (hidden == last).all(axis=1).mean() / 20
    # Windows whose last alone is masked: a tenth by rule, more by chance (windows of one or two
    # supervised items), but by no means all.
    assert 0.1 < only_last < 0.95


# What a model may see. ----------------------------------------------------------------------------


def test_a_later_item_does_not_change_earlier_states():
    model = fresh("SASRec")
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = ids.clone()
    changed[0, 4:] = torch.tensor([9, model.padding])
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=1e-6, rtol=0)
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-2
    # In training mode, too (another path through the layers).
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.MultiheadAttention):
            module.p = module.dropout = 0.0
    torch.testing.assert_close(model(ids)[:, :4], model(changed)[:, :4], atol=1e-6, rtol=0)


def test_bert4rec_sees_both_sides_but_no_padding():
    model = fresh("BERT4Rec")
    ids = torch.tensor([[1, 2, model.mask, 4]])
    padded = torch.cat([ids, torch.full((1, 3), model.padding)], dim=1)
    other = ids.clone()
    other[0, 3] = 7
    with torch.no_grad():
        states = model(ids)
        torch.testing.assert_close(model(padded)[:, :4], states, atol=1e-4, rtol=0)
        assert (model(other)[:, 0] - states[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_a_history_matters(name):
    with torch.no_grad():
        model = fresh(name)
        one, other = (model(torch.tensor([ids])) for ids in ([1, 2, 3], [2, 1, 3]))
    assert (one[:, -1] - other[:, -1]).abs().max() > 1e-3


# Serving. -----------------------------------------------------------------------------------------


def scores_of(model: SequentialTransformer, history: list[int]) -> np.ndarray:
    """Scores of one history by itself."""
    ids = history[-model.room :]
    if not ids or not model.settings.causal:
        ids = [*ids, model.mask]
    with torch.no_grad():
        return model.logits(model(torch.tensor([ids]))[:, -1])[0].numpy()


@pytest.mark.parametrize("name", NAMES)
def test_lists_do_not_depend_on_the_batch(monkeypatch, name):
    model = fresh(name)
    rng = np.random.default_rng(0)
    rows = [
        rng.integers(0, N_ITEMS, n).tolist() for n in [0, 0, 1, 14, 9, 8, *rng.integers(0, 14, 30)]
    ]
    whole = recommend_sequential(model, lists_of(*rows), no_items(len(rows)), 5)
    for size in (1, 7):
        monkeypatch.setattr(sequential, "_SCORED_ROWS", size)
        again = recommend_sequential(model, lists_of(*rows), no_items(len(rows)), 5)
        for row, (one, two) in enumerate(zip(whole, again, strict=True)):
            scores = scores_of(model, rows[row])
            np.testing.assert_allclose(scores[one], scores[two], atol=1e-5)
    for row, items in enumerate(whole):  # against each history by itself, longest first, too
        scores = scores_of(model, rows[row])
        np.testing.assert_allclose(scores[items], np.sort(scores)[::-1][:5], atol=1e-5)
        assert len(set(items.tolist())) == 5


@pytest.mark.parametrize("name", NAMES)
def test_seen_items_are_left_out_and_only_items_are_named(name):
    model = fresh(name)
    with torch.no_grad():  # mask and padding would win everywhere
        model.items.weight[N_ITEMS:] = model.items.weight[:N_ITEMS].mean(dim=0) * 50
    everything = list(range(N_ITEMS))
    seen = lists_of([], [3, 4], everything[1:], everything)
    lists = recommend_sequential(model, lists_of([1, 2], [3, 4], [5], [0]), seen, N_ITEMS + 3)
    assert sorted(lists[0, :N_ITEMS].tolist()) == everything
    assert not {3, 4} & set(lists[1].tolist())
    assert sorted(lists[1, : N_ITEMS - 2].tolist()) == [i for i in everything if i not in (3, 4)]
    assert (lists[1, N_ITEMS - 2 :] == -1).all() and (lists[0, N_ITEMS:] == -1).all()
    assert lists[2].tolist() == [0] + [-1] * (N_ITEMS + 2)
    assert (lists[3] == -1).all()


def test_the_newest_items_count_where_a_history_is_too_long():
    for name in NAMES:
        histories = lists_of([9, 9, 9, 1, 2, 3], [1, 2, 3], [2, 3])
        one, two, three = recommend_sequential(fresh(name, 4), histories, no_items(3), 6).tolist()
        assert one == two != three


@pytest.mark.parametrize("name", NAMES)
def test_no_history_reaches_positions_that_training_never_saw(name):
    """Users of one length: every test history is longer than every training window."""
    splits = split_of([[(s + i) % N_ITEMS for i in range(6)] for s in range(N_ITEMS)] * 8)
    windows = ItemLists.from_column(splits.train["history_item_index"]).lengths + 1
    assert (history_of(splits.test).lengths > windows.max()).all()
    model = train(splits, SETTINGS[name]).model
    lists = recommend_sequential(model, history_of(splits.test), no_items(96), 1)
    assert hit_rate_at_k(lists, splits.test["target_item_index"].to_numpy(), 1) > 0.9


# Training again and going on. ---------------------------------------------------------------------

SHORT = {
    "SASRec": replace(TINY, max_epochs=4, dropout=0.3),
    "BERT4Rec": replace(TINY, causal=False, max_epochs=4, epochs_per_measurement=2, dropout=0.3),
}


def same(one: Trained, two: Trained) -> None:
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
    keys = ("epoch", "loss", "hr@10", "ndcg@10")
    assert [[e[k] for k in keys] for e in one.curve] == [[e[k] for k in keys] for e in two.curve]


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, name):
    splits, file = cycles(60), tmp_path / "training" / "state.pt"
    whole = train(splits, SHORT[name])
    calls = []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:  # in the middle of the second period: its steps are lost
            raise KeyboardInterrupt
        return recommend_sequential(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sequential, "recommend_sequential", killed)
        train(splits, SHORT[name], checkpoint=file)
    assert len(torch.load(file, weights_only=True)["curve"]) == 1
    torch.manual_seed(12345)  # whatever else was drawn in between
    same(whole, train(splits, SHORT[name], checkpoint=file))
    # A finished run is loaded: no step is taken.
    with monkeypatch.context() as patch:
        patch.setattr(sequential._Windows, "batches", lambda *_: pytest.fail("trained again"))
        same(whole, train(splits, SHORT[name], checkpoint=file))
    assert [path.name for path in file.parent.iterdir()] == ["state.pt"]


def test_a_kill_while_the_state_is_written_loses_one_period_only(tmp_path, monkeypatch):
    splits, file = cycles(60), tmp_path / "state.pt"
    whole = train(splits, SHORT["SASRec"])
    save, calls = torch.save, []

    def half(state, path):
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        train(splits, SHORT["SASRec"], checkpoint=file)
    same(whole, train(splits, SHORT["SASRec"], checkpoint=file))


@pytest.mark.parametrize("name", NAMES)
def test_a_higher_cap_goes_on_instead_of_starting_again(tmp_path, name):
    splits, file = cycles(60), tmp_path / "state.pt"
    settings = SHORT[name]
    first = train(splits, replace(settings, max_epochs=2), checkpoint=file)
    assert first.stopped == "cap" and first.curve[-1]["epoch"] == 2
    further = train(splits, settings, checkpoint=file)
    assert further.curve[: len(first.curve)] == first.curve
    same(further, train(splits, settings))


def test_another_seed_is_another_model():
    splits = cycles(40)
    settings = replace(SHORT["SASRec"], max_epochs=1)
    one, two = (train(splits, settings, seed) for seed in (0, 1))
    assert not torch.equal(one.model.items.weight, two.model.items.weight)
    same(one, train(splits, settings, 0))


@pytest.mark.parametrize("change", ["settings", "seed", "rows", "valid", "seen", "version"])
def test_a_state_of_something_else_is_refused(tmp_path, monkeypatch, change):
    """Of other rows also where there are as many."""
    file, settings = tmp_path / "state.pt", replace(SHORT["SASRec"], max_epochs=1)
    splits = cycles(30)
    train(splits, settings, checkpoint=file)
    rows, valid, seen, seed = splits.train, splits.valid, no_items(splits.valid.height), 0
    if change == "settings":
        settings = replace(settings, dropout=0.2)
    elif change == "seed":
        seed = 1
    elif change == "rows":
        rows = rows.with_columns((pl.col("target_item_index") + 1) % N_ITEMS)
    elif change == "valid":
        valid = valid.with_columns((pl.col("target_item_index") + 1) % N_ITEMS)
    elif change == "seen":
        seen = lists_of(*[[1]] * valid.height)
    else:
        monkeypatch.setattr(sequential, "TRAINING_VERSION", 2)
    with pytest.raises(ValueError, match="other settings or data, or was made by another version"):
        train_sequential(rows, valid, seen, N_ITEMS, settings, seed, file)


def test_training_stops_by_all_relevant_items():
    splits = cycles(30)
    targets = splits.valid["target_item_index"]
    anything = pl.Series(
        "relevant_item_index",
        [[item, *(i for i in range(N_ITEMS) if i != item)] for item in targets.to_list()],
        dtype=pl.List(pl.Int32),
    )
    found = train_sequential(
        splits.train, splits.valid.with_columns(anything), no_items(len(targets)), N_ITEMS,
        replace(TINY, max_epochs=1),
    )  # fmt: skip
    assert found.curve[0]["hr@10"] == 1 and found.curve[0]["ndcg@10"] == pytest.approx(1)


# Devices. -----------------------------------------------------------------------------------------


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sequential.compute_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="device=cuda, but torch finds no GPU; use device=auto"):
        train(cycles(30), TINY, device="cuda")
    with pytest.raises(ValueError, match="device='gpu' is not known; choose from auto, cpu, cuda"):
        train(cycles(30), TINY, device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kinds = [sequential.compute_device(name).type for name in ("auto", "cpu", "cuda")]
    assert kinds == ["cuda", "cpu", "cuda"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_state_made_on_a_gpu_goes_on_and_recommends_on_a_cpu(tmp_path, name):
    file, splits = tmp_path / "state.pt", cycles()
    short = replace(SETTINGS[name], max_epochs=6, dropout=0.0)
    train(splits, short, checkpoint=file, device="cuda")
    rest = train(splits, SETTINGS[name], checkpoint=file, device="cpu")
    assert rest.curve[0]["epoch"] < 6 < rest.curve[-1]["epoch"]
    history, seen = history_of(splits.test), no_items(splits.test.height)
    on_cpu = recommend_sequential(rest.model, history, seen, 1)
    assert hit_rate_at_k(on_cpu, splits.test["target_item_index"].to_numpy(), 1) > 0.9
    assert (recommend_sequential(rest.model.cuda(), history, seen, 1) == on_cpu).mean() > 0.95


def test_training_stops_when_nothing_improves_and_keeps_the_best(monkeypatch):
    quality = iter([0.125, 0.5, 0.25, 0.125, 0.375])  # the third measurement in vain is the last
    weights = []

    def measured(rank, k):
        return np.full(len(rank), next(quality))

    def remembered(model, *arguments):
        weights.append(model.items.weight.detach().clone())
        return recommend_sequential(model, *arguments)

    monkeypatch.setattr(sequential, "gains", measured)
    monkeypatch.setattr(sequential, "recommend_sequential", remembered)
    found = train(cycles(30), replace(TINY, max_epochs=50, patience=3))
    assert [entry["ndcg@10"] for entry in found.curve] == [0.125, 0.5, 0.25, 0.125, 0.375]
    assert found.best["epoch"] == 2 and found.stopped == "patience"
    assert torch.equal(found.model.items.weight, weights[1])
    assert not torch.equal(weights[1], weights[4]) and not found.model.training


def test_training_ends_at_the_last_epoch(monkeypatch):
    rising = iter(range(100))
    monkeypatch.setattr(sequential, "gains", lambda rank, k: np.full(len(rank), next(rising) / 100))
    settings = replace(TINY, max_epochs=4, epochs_per_measurement=2, patience=1)
    assert [e["epoch"] for e in train(cycles(30), settings).curve] == [2, 4]


def test_seen_items_are_left_out_of_validation_lists_too():
    splits = cycles(30)
    targets = lists_of(*[[item] for item in splits.valid["target_item_index"].to_list()])
    settings = replace(TINY, max_epochs=1)
    found = train_sequential(splits.train, splits.valid, targets, N_ITEMS, settings)
    assert found.curve[0]["hr@10"] == 0


# Settings and data. -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30, "heads": 4}, "dim=30 must be a multiple of heads=4"),
        ({"heads": 0}, "heads=0"),
        ({"layers": 0}, "layers=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"mask_share": 0.0}, "mask_share=0.0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"patience": 0}, "patience=0"),
        ({"epochs_per_measurement": 0}, "epochs_per_measurement=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
    ],
)
def test_impossible_settings_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SequentialSettings(), **changes)


def test_defaults_of_both_models():
    sasrec, bert4rec = SequentialSettings.of("SASRec"), SequentialSettings.of("BERT4Rec")
    assert sasrec.causal and not bert4rec.causal
    differ = {key for key, value in asdict(sasrec).items() if asdict(bert4rec)[key] != value}
    assert differ == {"causal", "max_epochs", "epochs_per_measurement"}
    assert "mask_share" in bert4rec.describe() and "mask_share" not in sasrec.describe()


def test_nothing_to_learn_from(monkeypatch):
    splits = cycles(30)
    with pytest.raises(ValueError, match="early stopping needs validation rows"):
        train_sequential(splits.train, splits.valid[:0], no_items(0), N_ITEMS, TINY)
    single = split_of([[1, 2, 3], [4, 5, 6]])  # one training item each
    with pytest.raises(ValueError, match="no training row has two items"):
        train(single, TINY)
    monkeypatch.setattr(sequential, "MAX_ITEMS", N_ITEMS - 1)
    with pytest.raises(ValueError, match="12 items needs more memory than a baseline should take"):
        train(splits, TINY)
