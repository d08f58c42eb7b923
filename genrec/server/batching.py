"""Dynamic batching: users that wait together are decoded together, by the one engine thread.

The queue lives on the event loop, the engine in a thread of its own. While the thread decodes, new
users queue up and form the next batch; only an idle server keeps a user waiting for others. What a
user gets doesn't depend on who else is in the batch: the search width is the request's own, filters
are per user, and a list for a smaller k is the beginning of one for a larger (`BeamResult.cut`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from genrec.modeling import encode_prompts
from genrec.recommend import Recommendation
from genrec.server.serving import Snapshot

logger = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """More users wait than the queue may hold, or the server is stopping."""


@dataclass(frozen=True)
class Answer:
    """One user's list."""

    items: list[Recommendation]
    certified: bool


@dataclass(eq=False)
class Job:
    """One user who waits for a list.

    Attributes:
        snapshot: what to answer from.
        history: catalogue rows, oldest first.
        excluded: catalogue rows that must not be in the list.
        k: length of the list.
        beam_width: prefixes kept per level.
        answer: set by the batcher; cancelling it takes the user out of the queue.
        candidates: the only catalogue rows that may be in the list; None: all of the view.
        query: what is looked for, in words, or None.
    """

    snapshot: Snapshot
    history: list[int]
    excluded: np.ndarray
    k: int
    beam_width: int
    answer: asyncio.Future[Answer]
    candidates: np.ndarray | None = None
    query: str | None = None
    since: float = field(default_factory=time.monotonic)


Decode = Callable[[Sequence[Job]], list[Answer]]


def decode(jobs: Sequence[Job]) -> list[Answer]:
    """Lists of users who share a snapshot and a search width, by one engine call."""
    snapshot = jobs[0].snapshot
    recommender = snapshot.recommender
    texts = [
        recommender.prompts([job.history])[0]
        if job.query is None
        else recommender.search_prompt(job.query, job.history)
        for job in jobs
    ]
    prompts = encode_prompts(recommender.tokenizer, texts)
    result = recommender.engine.search(
        prompts,
        max(job.k for job in jobs),
        jobs[0].beam_width,
        [job.excluded for job in jobs],
        snapshot.view,
        candidates=[job.candidates for job in jobs],
    )
    cuts = {k: result.cut(k) for k in {job.k for job in jobs}}
    return [
        Answer(recommender.recommendations(cuts[job.k], row), bool(cuts[job.k].certified[row]))
        for row, job in enumerate(jobs)
    ]


class Batcher:
    """The queue and the engine thread.

    Args:
        max_batch: users decoded together.
        max_wait_s: how long the oldest user of an idle server waits for others.
        max_queue: users that may wait.
        observe: called with the size and the seconds of each engine call that succeeded.
        decode: decodes users that share a snapshot and a search width; runs in the thread.
    """

    def __init__(
        self,
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        observe: Callable[[int, float], object] | None = None,
        decode: Decode = decode,
    ) -> None:
        self.max_batch, self.max_wait_s, self.max_queue = max_batch, max_wait_s, max_queue
        self._observe, self._decode = observe, decode
        self._queue: deque[Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Start to answer; call it on the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def waiting(self) -> int:
        """Users in the queue who still want an answer."""
        return sum(not job.answer.done() for job in self._queue)

    @property
    def state(self) -> Literal["ready", "stopping", "failed"]:
        """One of ready, stopping, and failed: the loop that answers has ended by itself."""
        if self._closing:
            return "stopping"
        return "ready" if self._task is not None and not self._task.done() else "failed"

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue users, all of them or none.

        Raises:
            QueueFull: there is no room for all, or no answer is to be expected any more.
        """
        if self.state != "ready":
            raise QueueFull(f"this server takes no requests now: {self.state}")
        if len(self._queue) + len(jobs) > self.max_queue:
            # Those who gave up no longer need their places.
            self._queue = deque(job for job in self._queue if not job.answer.done())
        if len(self._queue) + len(jobs) > self.max_queue:
            raise QueueFull(
                f"{len(self._queue)} users wait, the queue takes {self.max_queue}; try again"
            )
        self._queue.extend(jobs)
        self._arrived.set()

    async def close(self) -> None:
        """Answer everyone in the queue, then stop the thread; takes no one new."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _run(self) -> None:
        while await self._answer_next():
            pass

    async def _answer_next(self) -> bool:
        """Answer one batch; False: the queue is closed and empty.

        A function of its own, so that an idle server holds on to no batch and its old model.
        """
        batch = await self._next_batch()
        groups: defaultdict[tuple[int, int], list[Job]] = defaultdict(list)
        for job in batch:
            groups[id(job.snapshot), job.beam_width].append(job)
        for group in groups.values():
            await self._answer(group)
        return bool(batch)

    async def _next_batch(self) -> list[Job]:
        """The oldest users, at least one; empty when the queue is closed and empty."""
        while True:
            while not self._queue:
                if self._closing:
                    return []
                self._arrived.clear()
                await self._arrived.wait()
            await self._fill(self._queue[0].since + self.max_wait_s)
            batch: list[Job] = []
            while self._queue and len(batch) < self.max_batch:
                job = self._queue.popleft()
                if not job.answer.done():  # else its client is gone or its time is up
                    batch.append(job)
            if batch:
                return batch

    async def _fill(self, until: float) -> None:
        """Wait for a full batch, but not longer than until that moment."""
        while len(self._queue) < self.max_batch and not self._closing:
            left = until - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    async def _answer(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.answer.done()]
        if not jobs:
            return
        started = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            answers = await loop.run_in_executor(self._thread, self._decode, jobs)
        except Exception as error:
            if len(jobs) == 1:
                if not jobs[0].answer.done():
                    jobs[0].answer.set_exception(error)
                return
            # One user must not spoil the others' lists.
            logger.warning("a batch of %d failed (%r); decoding one by one", len(jobs), error)
            for job in jobs:
                await self._answer([job])
            return
        if self._observe is not None:
            self._observe(len(jobs), time.monotonic() - started)
        for job, answer in zip(jobs, answers, strict=True):
            if not job.answer.done():
                job.answer.set_result(answer)
