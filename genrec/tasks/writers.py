"""Queries, intentions and preferences written by an LLM, behind an endpoint or on this machine.

Every answer goes into a SQLite file as it arrives, under a hash of model, settings and prompt: a
killed run resumes, and nothing is asked twice. What is asked holds facts of one item, or one
history, and never a target. What comes back is untrusted: it is cleaned and escaped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import polars as pl
from tqdm import tqdm

from genrec.columns import BRAND, CATEGORIES, DESCRIPTION, ITEM_INDEX, ROW_ID, TITLE
from genrec.data.cleaning import missing_title
from genrec.prompts import MAX_TEXT_CHARS, PromptRenderer, escape_series, escape_text
from genrec.tasks.attributes import field
from genrec.tasks.texts import ORIGIN, TEXT, names_title

logger = logging.getLogger(__name__)

KEY, ASKED = "key", "prompt"
MAX_FAILURES = 20  # requests that fail one after another before the endpoint counts as down
_TITLE_CHARS, _DESCRIPTION_CHARS = 120, 600
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_REFUSALS = re.compile(
    r"(i['’]?m sorry|i am sorry|sorry,|i can(no|['’])t|i am unable|i['’]m unable|as an ai\b)",
    re.IGNORECASE,
)


class Writer(Protocol):
    """What answers prompts.

    Attributes:
        model: its name, for the origin of the texts.
        settings: all that shapes an answer besides the prompt; part of the cache's key.
    """

    model: str
    settings: Mapping[str, Any]

    def write(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        """Yield (place in `prompts`, answer) in any order; None where no answer could be had."""
        ...


class OpenAIWriter:
    """An LLM behind an endpoint that speaks OpenAI's chat completions (vLLM, llama.cpp, a vendor).

    Args:
        base_url: for example ``http://localhost:8000/v1``.
        model: name that the endpoint knows.
        api_key_env: environment variable that holds the key; local endpoints need none.
        max_tokens: of an answer.
        temperature: of sampling.
        concurrency: requests in flight.
        timeout: seconds until a request counts as failed.
        retries: of a failed request (429, 5xx, time-outs), with growing pauses.

    Raises:
        ValueError: the package is missing, or a number makes no sense.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        max_tokens: int = 96,
        temperature: float = 0.0,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 5,
    ) -> None:
        if max_tokens < 1 or concurrency < 1 or timeout <= 0 or retries < 0 or temperature < 0:
            raise ValueError(
                f"max_tokens={max_tokens}, concurrency={concurrency}, timeout={timeout}, "
                f"retries={retries}, temperature={temperature}: use positive numbers (retries and "
                "temperature may be 0)"
            )
        try:
            import openai
        except ImportError as error:
            raise ValueError(
                "writing texts through an endpoint needs the package openai; install genrec[llm]"
            ) from error
        self.model = model
        self.settings: Mapping[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        self._concurrency = concurrency
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=os.environ.get(api_key_env) or "none",
            timeout=timeout,
            max_retries=retries,
        )
        # Wrong for every prompt: the key, the rights, the address or the model's name.
        self._fatal = (
            openai.AuthenticationError,
            openai.PermissionDeniedError,
            openai.NotFoundError,
        )

    def write(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        """Answers as they arrive.

        Raises:
            ValueError: the endpoint refuses the key, the address or the model.
            ConnectionError: `MAX_FAILURES` requests failed one after another.
        """
        failures, pending, ahead = 0, dict[Future[str], int](), iter(enumerate(prompts))
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                while True:
                    while len(pending) < 2 * self._concurrency and (one := next(ahead, None)):
                        pending[pool.submit(self._ask, one[1])] = one[0]
                    if not pending:
                        return
                    done, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        place, error = pending.pop(future), future.exception()
                        failures = failures + 1 if error else 0
                        if error:
                            self._judge(error, failures)
                        yield place, None if error else future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _ask(self, prompt: str) -> str:
        answer = self._client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=self.settings["max_tokens"],
            temperature=self.settings["temperature"],
        )
        choices = getattr(answer, "choices", None)  # garbage with status 200 is no answer
        if not choices or getattr(choices[0], "message", None) is None:
            raise ValueError(f"the endpoint's answer is no chat completion: {str(answer)[:80]!r}")
        message = choices[0].message
        refused = choices[0].finish_reason == "content_filter" or message.refusal
        return "" if refused else message.content or ""

    def _judge(self, error: BaseException, failures: int) -> None:
        """Go on after a single failure, stop where it makes no sense to."""
        where = f"{self._client.base_url} (model {self.model!r})"
        if isinstance(error, self._fatal):
            raise ValueError(
                f"{where} refuses: {error}; check the address, the model's name and the key"
            ) from error
        logger.warning("no answer from %s: %s", where, error)
        if failures >= MAX_FAILURES:
            raise ConnectionError(
                f"{failures} requests to {where} failed one after another, the last with: {error}; "
                "what was answered is kept, run again when the endpoint is up"
            ) from error


class LocalWriter:
    """A causal LM from a Hugging Face folder or name, greedy.

    Nothing of the model's own generation settings is used.

    Args:
        model_name_or_path: of the model and its tokenizer.
        dtype: "auto", "float32", "bfloat16" or "float16".
        max_new_tokens: of an answer.
        batch_size: prompts generated together.
    """

    def __init__(
        self,
        model_name_or_path: str,
        dtype: str = "auto",
        max_new_tokens: int = 96,
        batch_size: int = 16,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r}; use auto, float32, bfloat16 or float16")
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(
                f"max_new_tokens={max_new_tokens}, batch_size={batch_size}; both start at 1"
            )
        self.model = str(model_name_or_path)
        self.settings: Mapping[str, Any] = {"max_new_tokens": max_new_tokens, "dtype": dtype}
        self._batch_size = batch_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, padding_side="left")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        lm: Any = AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=dtype)
        self._lm = lm.to(self._device).eval()
        self._lm.generation_config = GenerationConfig()  # else its values fill what ours leaves out

    def write(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        """Answers, batch by batch; prompts of alike length go together."""
        import torch
        from transformers import GenerationConfig

        tokenizer = self._tokenizer
        settings = GenerationConfig(
            max_new_tokens=self.settings["max_new_tokens"],
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            batch = tokenizer(
                [self._dressed(prompts[place]) for place in places],
                return_tensors="pt",
                padding=True,
                add_special_tokens=not tokenizer.chat_template,  # the template brings its own
                return_token_type_ids=False,
            ).to(self._device)
            with torch.inference_mode():
                ids = self._lm.generate(**batch, generation_config=settings)
            new = ids[:, batch["input_ids"].shape[1] :]  # (batch, new tokens)
            answers = tokenizer.batch_decode(new, skip_special_tokens=True)
            yield from zip(places, answers, strict=True)

    def _dressed(self, prompt: str) -> str:
        if not self._tokenizer.chat_template:
            return prompt
        chat = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return str(text)


def write_texts(
    requests: pl.DataFrame, writer: Writer, cache: Path | str, max_chars: int = MAX_TEXT_CHARS
) -> pl.DataFrame:
    """Let an LLM answer prompts, each distinct one once.

    Args:
        requests: key (any type) and prompt.
        writer: the LLM.
        cache: SQLite file, made if it isn't there; may be shared by models and settings.
        max_chars: longer texts are cut.

    Returns:
        key, text, origin ("llm:<model>"), in the order of `requests`. Text is null where the model
        refused, said nothing, or could not be asked; how often is logged. Only the last kind is
        asked again by the next call.

    Raises:
        ValueError, ConnectionError: see the writer.
    """
    base = json.dumps([writer.model, dict(writer.settings)], sort_keys=True)
    prompts = requests[ASKED].unique(maintain_order=True).to_list()
    hashes = [hashlib.sha256(f"{base}\0{prompt}".encode()).hexdigest() for prompt in prompts]
    Path(cache).parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(cache, isolation_level=None)) as store:  # each answer is committed
        store.execute("PRAGMA journal_mode = WAL")
        store.execute("PRAGMA synchronous = NORMAL")
        store.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
        known = [_answer(store, key) for key in hashes]
        missing = [place for place, answer in enumerate(known) if answer is None]
        logger.info(
            "%d prompts, %d of them in %s", len(prompts), len(prompts) - len(missing), cache
        )
        answers = writer.write([prompts[place] for place in missing])
        progress = tqdm(answers, total=len(missing), desc="writing", disable=not missing)
        for number, answer in progress:
            if answer is not None:
                known[missing[number]] = answer
                key = hashes[missing[number]]
                store.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))
    texts = [None if answer is None else clean_answer(answer, max_chars) for answer in known]
    failed, empty = known.count(None), texts.count(None)
    if empty:
        logger.warning(
            "%s: %d of %d prompts got no answer, %d an empty or refusing one; these have no text",
            writer.model, failed, len(prompts), empty - failed,
        )  # fmt: skip
    table = pl.DataFrame({ASKED: prompts, TEXT: texts}, schema={ASKED: pl.String, TEXT: pl.String})
    answered = requests.join(table, on=ASKED, how="left", maintain_order="left")
    return answered.select(KEY, TEXT, pl.lit(f"llm:{writer.model}").alias(ORIGIN))


def _answer(store: sqlite3.Connection, key: str) -> str | None:
    found = store.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
    return None if found is None else str(found[0])


def clean_answer(answer: str, max_chars: int = MAX_TEXT_CHARS) -> str | None:
    """An answer as one escaped line: no thoughts, no "Here is …:" line, no quotes around it.

    Returns:
        None for a refusal, or where nothing is left.
    """
    lines = [line.strip() for line in _THOUGHTS.sub("", answer).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines = lines[1:]
    text = " ".join(lines).strip("*_`# ")
    if len(text) > 1 and (text[0], text[-1]) in (('"', '"'), ("“", "”"), ("'", "'")):
        text = text[1:-1]
    text = escape_text(text, max_chars)
    return None if not text or _REFUSALS.match(text) else text


def item_requests(kind: str, catalog: pl.DataFrame, renderer: PromptRenderer) -> pl.DataFrame:
    """What to ask about each item: its facts, one per line, every one of them escaped.

    Args:
        kind: "query" or "intention".
        catalog: the catalogue; an item without any fact is left out.
        renderer: the templates of `genrec.tasks.texts.written_renderer`.

    Returns:
        key (item_index), prompt.
    """
    if kind not in ("query", "intention"):
        raise ValueError(f"kind={kind!r}: items have a query or an intention")
    facts = {name: field(catalog, name, pl.String) for name in (TITLE, BRAND)}
    path = field(catalog, CATEGORIES, pl.List(pl.String))
    facts[CATEGORIES] = path.list.join(" > ", ignore_nulls=True)
    facts[DESCRIPTION] = field(catalog, DESCRIPTION, pl.String)
    facts[TITLE] = facts[TITLE].set(missing_title(catalog), None)
    limits = {DESCRIPTION: _DESCRIPTION_CHARS}
    lines = []
    for name, column in facts.items():
        text = escape_series(column, limits.get(name, _TITLE_CHARS))
        line = pl.concat_str(pl.lit(f"{name.capitalize()}: "), text)
        lines.append(pl.select(pl.when(text != "").then(line).alias(name)).to_series())
    shown = pl.concat_str(lines, separator="\n", ignore_nulls=True)
    indices = pl.int_range(len(catalog), dtype=pl.Int32, eager=True)
    table = pl.DataFrame({KEY: indices}).with_columns(shown.alias("facts"))
    table = table.filter(pl.col("facts") != "")
    return _asked(table, f"ask_{kind}", "facts", renderer)


def preference_requests(
    row_ids: pl.Series,
    history: pl.Series,
    catalog: pl.DataFrame,
    renderer: PromptRenderer,
    max_items: int = 20,
) -> pl.DataFrame:
    """What to ask about each history: the titles of its newest items, oldest first.

    Args:
        row_ids: the rows.
        history: lists of catalogue rows, oldest first: what came before the target.
        catalog: the catalogue; items without a title are passed over.
        renderer: the templates of `genrec.tasks.texts.written_renderer`.
        max_items: of a history.

    Returns:
        key (the row id), prompt; rows with fewer than two titles are left out.
    """
    titles = field(catalog, TITLE, pl.String).set(missing_title(catalog), None)
    shown = escape_series(titles, _TITLE_CHARS)
    rows = pl.DataFrame({KEY: row_ids}).with_row_index("_row")
    rows = rows.with_columns(history.list.tail(max_items).alias("item")).explode("item")
    rows = rows.drop_nulls("item")
    rows = rows.with_columns(shown.gather(rows["item"]).alias("title")).drop_nulls("title")
    grouped = rows.group_by("_row", KEY, maintain_order=True).agg("title")
    grouped = grouped.filter(pl.col("title").list.len() > 1)
    table = grouped.select(KEY, pl.col("title").list.join("\n").alias("items"))
    return _asked(table, "ask_preference", "items", renderer)


def _asked(table: pl.DataFrame, family: str, field: str, renderer: PromptRenderer) -> pl.DataFrame:
    # Inserted as they are, since lines are kept: every line was escaped by itself.
    prompts = renderer.render_many(renderer.names(family)[0], sids={field: table[field]})
    return table.select(KEY, prompts.alias(ASKED))


def llm_item_texts(
    kind: str,
    catalog: pl.DataFrame,
    renderer: PromptRenderer,
    writer: Writer,
    cache: Path | str,
) -> pl.DataFrame:
    """Queries or intentions by an LLM; an intention that gives its item's title away is dropped.

    Returns:
        item_index, text, origin: items that got a text.
    """
    answers = write_texts(item_requests(kind, catalog, renderer), writer, cache)
    table = answers.rename({KEY: ITEM_INDEX}).drop_nulls(TEXT)
    if kind == "intention":
        named = names_title(catalog, table)
        if named.any():
            logger.warning("%d intentions name their item and are dropped", named.sum())
        table = table.filter(~named)
    return table


def llm_preferences(
    row_ids: pl.Series,
    history: pl.Series,
    catalog: pl.DataFrame,
    renderer: PromptRenderer,
    writer: Writer,
    cache: Path | str,
) -> pl.DataFrame:
    """Preferences of histories by an LLM that sees the history's titles and nothing else.

    Returns:
        row_id, text, origin: rows that got a text.
    """
    requests = preference_requests(row_ids, history, catalog, renderer)
    return write_texts(requests, writer, cache).rename({KEY: ROW_ID}).drop_nulls(TEXT)
