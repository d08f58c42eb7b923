"""Training data: rendered anew for each epoch, alike on every process and after a resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from genrec.modeling import add_sid_tokens, encode_prompts, train_tokenizer
from genrec.prompts import PromptRenderer
from genrec.tasks.families import FAMILIES
from genrec.tasks.instruction_rows import InstructionRows, RowWriter
from genrec.tasks.mixing import Plan, plan
from genrec.tasks.rendering import ItemTexts, render_rows
from genrec.tasks.rows import item_rows
from genrec.tasks.sequential import explode, sequential_rows
from genrec.training_data import EpochRows, EpochSampler, estimated_lengths, sample_texts

N_EPOCHS, BATCH = 3, 4


@dataclass(frozen=True)
class Items:
    """What `item_rows` reads of its sources."""

    texts: ItemTexts
    item_ids: pl.Series


@dataclass(frozen=True)
class Data:
    """A file of rows, the rows, and the tokenizer that encodes them."""

    path: Path
    rows: InstructionRows
    tokenizer: object
    sid_ids: set[int]

    def epochs(self, mixture: Plan | None = None) -> EpochRows:
        mixture = mixture or plan(self.rows.table["task"], N_EPOCHS)
        lengths = estimated_lengths(self.path)
        return EpochRows(self.rows, mixture, lengths, self.tokenizer, self.sid_ids)


def make(tiny, folder: Path, bos: bool = False) -> Data:
    shop = tiny.shop(n_users=12)
    texts = ItemTexts.of(shop.catalog, shop.semantic_ids)
    renderer, ids = PromptRenderer(), shop.semantic_ids.item_ids
    names = ["sequential", "title_to_sid", "sid_to_title"]
    path = folder / "train.parquet"
    writer = RowWriter(path, names, ids, pl.String())
    for table in (
        sequential_rows(shop.splits.train[:6]),
        sequential_rows(explode(shop.splits.train[6:])),
        *(item_rows(FAMILIES[name], Items(texts, ids), pl.String()) for name in names[1:]),
    ):
        writer.write(render_rows(table, texts, renderer))
    writer.close()
    tokenizer = tiny.tokenizer(bos) if bos else train_tokenizer(sample_texts(path), 1000)
    tokens = add_sid_tokens(tokenizer, shop.semantic_ids)
    rows = InstructionRows.read(path, ids, texts, renderer, 0, None)
    return Data(path, rows, tokenizer, {t for level in tokens for t in level})


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory) -> Data:
    return make(tiny, tmp_path_factory.mktemp("rows"))


def everything(rows: EpochRows) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All rows of the current epoch, encoded."""
    made = rows.__getitems__(range(len(rows)))
    return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in made]


def test_an_epoch_is_the_file_with_its_templates(data: Data):
    rows = data.epochs()
    file = pl.read_parquet(data.path)
    assert len(rows) == len(file)
    encoded = {}
    for prompt, completion in file.select("prompt", "completion").iter_rows():
        start = encode_prompts(data.tokenizer, [prompt])[0]
        rest = data.tokenizer(completion, add_special_tokens=False)["input_ids"]
        end = [] if rest[-1] in data.sid_ids else [data.tokenizer.eos_token_id]
        encoded[tuple(start + rest + end)] = tuple([-100] * len(start) + rest + end)
    assert dict(everything(rows)) == encoded


def test_epochs_change_templates_and_keep_the_rows(data: Data):
    mixture = plan(data.rows.table["task"], N_EPOCHS)
    rows = data.epochs(mixture)
    seen, templates = [], []
    for epoch in range(N_EPOCHS):
        rows.set_epoch(epoch)
        seen.append(everything(rows))
        at, epochs = mixture.slice(epoch)
        text = data.rows.render(at, epochs)
        prompts = {tuple(ids) for ids in encode_prompts(data.tokenizer, text["prompt"].to_list())}
        shown = {tuple(i for i, n in zip(*row, strict=True) if n == -100) for row in seen[-1]}
        assert shown == prompts
        templates.append(dict(zip(at.tolist(), text["template"], strict=True)))
    for one, two in ((0, 1), (1, 2)):
        assert all(templates[one][row] != templates[two][row] for row in range(len(rows)))
        assert seen[one] != seen[two]
    completions = [sorted(tuple(t for t in labels if t != -100) for _, labels in epoch)
                   for epoch in seen]  # fmt: skip
    assert completions[0] == completions[1] == completions[2]


def test_an_epoch_does_not_depend_on_how_one_got_there(data: Data):
    through, straight = data.epochs(), data.epochs()
    for epoch in range(3):
        through.set_epoch(epoch)
        everything(through)
    straight.set_epoch(2)
    assert everything(through) == everything(straight)
    straight.set_epoch(0)
    assert everything(straight) == everything(data.epochs())
    straight.set_epoch(7)  # later ones repeat the last
    assert straight.epoch == 2 and everything(straight) == everything(through)


def test_single_rows_and_batches_are_the_same(data: Data):
    rows = data.epochs()
    batch = rows.__getitems__([5, 0, 5])
    assert batch == [rows[5], rows[0], rows[5]]
    for place in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[place]


@pytest.mark.parametrize("epoch", range(N_EPOCHS))
def test_places_have_their_length_in_every_epoch(data: Data, epoch: int):
    rows = data.epochs()
    rows.set_epoch(epoch)
    real = np.array([len(ids) for ids, _ in everything(rows)])
    estimated = np.array(rows.lengths)
    assert (np.diff(estimated) >= 0).all() and len(estimated) == len(real)
    assert (real / estimated > 0.3).all() and (real / estimated < 3).all()
    assert np.corrcoef(real, estimated)[0, 1] > 0.8
    uneven = plan(data.rows.table["task"], N_EPOCHS, {"sequential": [1, 0.2], "title_to_sid": [2]})
    rows = data.epochs(uneven)
    rows.set_epoch(epoch)
    assert len(rows) == uneven.length == len(everything(rows))


def test_estimated_lengths_are_near_the_truth(data: Data):
    estimated = estimated_lengths(data.path)
    file = pl.read_parquet(data.path)
    real = [
        len(data.tokenizer(p + c, add_special_tokens=False)["input_ids"])
        for p, c in file.select("prompt", "completion").iter_rows()
    ]
    ratio = estimated / np.array(real)
    assert len(estimated) == len(file) and (ratio > 1 / 3).all() and (ratio < 3).all()


def test_estimates_by_hand(tmp_path):
    path = tmp_path / "train.parquet"
    pl.DataFrame(
        {"prompt": ["x" * 40 + "<a_1><b_22>", "", "ü" * 8], "completion": ["<c_3>", "<a_1>", "<A>"]}
    ).write_parquet(path)
    # SIDs, a quarter of the other bytes, one for the end.
    assert estimated_lengths(path).tolist() == [3 + 10 + 1, 1 + 0 + 1, 0 + 19 // 4 + 1]


def test_texts_for_a_tokenizer(data: Data):
    texts = sample_texts(data.path)
    assert len(set(texts)) == len(texts)
    assert not any("<a_" in text for text in texts)
    file = pl.read_parquet(data.path)
    title = file.filter(pl.col("task") == "sid_to_title")["completion"][0]
    assert title in texts and sample_texts(data.path) == texts


def test_the_longest_row_is_that_of_any_epoch(data: Data):
    later = 0
    for row in range(20):  # one row, three times
        rows = data.epochs(Plan(np.full(3, row), np.arange(3), 3))
        lengths = []
        for epoch in range(3):
            rows.set_epoch(epoch)
            lengths.append(len(rows[0]["input_ids"]))
        assert rows.longest() == max(lengths)
        later += max(lengths) > lengths[0]
    assert later  # else this test shows nothing


@pytest.mark.parametrize("bos", [False, True])
def test_the_served_prompt_is_a_prefix_of_the_training_row(tiny, tmp_path, bos: bool):
    """Of the whole-history rows that an epoch trains, at every item of the history."""
    data = make(tiny, tmp_path, bos)
    rows = data.epochs()
    table, sids = data.rows.table, data.rows.texts.sids
    sequential = np.flatnonzero((table["task"] == "sequential").to_numpy())
    for epoch in range(2):
        number = np.full(len(sequential), epoch)
        text = data.rows.render(sequential, number)
        encoded = rows._encoded(sequential, number)
        for row, template, made in zip(sequential, text["template"], encoded, strict=True):
            history, targets = table["history"][int(row)], table["targets"][int(row)]
            for place in range(len(targets)):
                before = [*history, *targets[:place]]
                said = "".join(sids[int(i)] for i in before)
                served = data.rows.renderer.render(template, sids={"history": said})
                (prompt,) = encode_prompts(data.tokenizer, [served])
                assert made["input_ids"][: len(prompt)] == prompt
                assert set(made["labels"][len(prompt) :]) == set(made["input_ids"][len(prompt) :])


# ------------------------------------------------------------------- samplers and data loaders


def sampler(rows: EpochRows, grouped: bool = False, seed: int = 0) -> EpochSampler:
    return EpochSampler(rows, BATCH, seed, grouped)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_sampler_gives_every_place_once_in_a_new_order(data: Data, grouped: bool):
    rows = data.epochs()
    sample = sampler(rows, grouped)
    orders = []
    for epoch in range(N_EPOCHS):
        sample.set_epoch(epoch)
        assert rows.epoch == epoch  # it takes the dataset along
        orders.append(list(sample))
        assert sorted(orders[-1]) == list(range(len(rows))) and len(sample) == len(rows)
        assert list(sample) == orders[-1]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    again = sampler(data.epochs(), grouped)
    again.set_epoch(2)
    assert list(again) == orders[2]
    assert list(sampler(data.epochs(), grouped, seed=1)) != orders[0]


def test_grouped_batches_hold_rows_of_similar_length(data: Data):
    rows = data.epochs()
    lengths = np.array([len(ids) for ids, _ in everything(rows)])

    def spread(grouped: bool) -> float:
        order = list(sampler(rows, grouped))
        batches = [lengths[order[i : i + BATCH]] for i in range(0, len(order), BATCH)]
        return float(np.mean([batch.max() - batch.min() for batch in batches]))

    assert spread(True) < 0.5 * spread(False)


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in batch)
    padded = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch]
    return {"input_ids": torch.tensor(padded)}


def loader(data: Data, process: int = 0, n_processes: int = 1, workers: int = 0):
    """The data loader of one process, prepared as the trainer does."""
    rows = data.epochs()
    plain = DataLoader(
        rows, batch_size=BATCH, sampler=sampler(rows), collate_fn=collate, num_workers=workers
    )
    return rows, prepare_data_loader(
        plain, torch.device("cpu"), n_processes, process, put_on_device=False
    )


def batches(loaded, epoch: int) -> list[list[list[int]]]:
    loaded.set_epoch(epoch)
    return [batch["input_ids"].tolist() for batch in loaded]


def test_the_data_loader_goes_through_the_epochs(data: Data):
    rows, loaded = loader(data)
    seen = [batches(loaded, epoch) for epoch in range(N_EPOCHS)]
    for epoch, found in enumerate(seen):
        rows.set_epoch(epoch)
        wanted = sorted(ids for ids, _ in everything(rows))
        assert sorted(tuple(np.trim_zeros(row, "b")) for b in found for row in b) == [
            tuple(np.trim_zeros(ids, "b")) for ids in wanted
        ]
    fresh = loader(data)[1]
    assert batches(fresh, 2) == seen[2]


def test_a_resumed_loader_goes_on_where_it_was(data: Data):
    whole = batches(loader(data)[1], 1)
    resumed = skip_first_batches(loader(data)[1], 3)
    assert batches(resumed, 1) == whole[3:]


def test_two_processes_share_an_epoch(data: Data):
    alone, _ = loader(data)
    for epoch in (0, 2):
        parts = [batches(loader(data, process, 2)[1], epoch) for process in (0, 1)]
        assert len(parts[0]) == len(parts[1])
        alone.set_epoch(epoch)
        wanted = {tuple(np.trim_zeros(ids, "b")) for ids, _ in everything(alone)}
        found = [
            {tuple(np.trim_zeros(row, "b")) for batch in part for row in batch} for part in parts
        ]
        assert found[0] | found[1] == wanted
        assert len(found[0] & found[1]) <= BATCH  # the last batch is filled up


def test_worker_processes_are_refused_before_they_hang(data: Data):
    with pytest.raises(ValueError, match="dataloader_num_workers=1: leave it at 0"):
        batches(loader(data, workers=1)[1], 0)
