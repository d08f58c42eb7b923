"""The queue and the engine thread, with a decoder that the test holds by the hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from genrec.server.batching import Answer, Batcher, Job, QueueFull

NO_ROWS = np.array([], dtype=np.int64)


class Decoder:
    """Notes each batch by the ids of its users; waits for `go` while it is held."""

    def __init__(self, held: bool = False, poison: int | None = None) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[str] = set()
        self.go, self.entered, self.poison = threading.Event(), threading.Event(), poison
        if not held:
            self.go.set()

    def __call__(self, jobs) -> list[Answer]:
        self.batches.append([job.k for job in jobs])
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.go.wait(20)
        if self.poison in [job.k for job in jobs]:
            raise RuntimeError("poison")
        return [Answer([], job.k % 2 == 0) for job in jobs]


def job(number: int, width: int = 50, snapshot: object = None) -> Job:
    """A user whom `k` names."""
    future = asyncio.get_running_loop().create_future()
    return Job(snapshot, [], NO_ROWS, number, width, future)  # type: ignore[arg-type]


def run(test: Callable[[Batcher], Awaitable[None]], decoder: Decoder, **settings: object) -> None:
    """Run a test against a started batcher, then close it."""

    async def main() -> None:
        values = {"max_batch": 4, "max_wait_s": 0.0, "max_queue": 8, **settings}
        batcher = Batcher(**values, decode=decoder)  # type: ignore[arg-type]
        batcher.start()
        await asyncio.wait_for(test(batcher), 30)
        decoder.go.set()
        await asyncio.wait_for(batcher.close(), 30)

    asyncio.run(main())


async def entered(decoder: Decoder) -> None:
    """The engine thread is inside the decoder."""
    assert await asyncio.to_thread(decoder.entered.wait, 20)
    decoder.entered.clear()


def test_what_waits_is_decoded_together_in_order():
    decoder = Decoder(held=True)

    async def test(batcher: Batcher) -> None:
        jobs = [job(n) for n in range(7)]
        batcher.submit(jobs[:1])
        await entered(decoder)
        for one in jobs[1:]:
            batcher.submit([one])
        assert batcher.waiting == 6
        decoder.go.set()
        answers = await asyncio.gather(*(one.answer for one in jobs))
        assert [a.certified for a in answers] == [n % 2 == 0 for n in range(7)]
        assert decoder.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert len(decoder.threads) == 1 and batcher.waiting == 0

    run(test, decoder)


def test_batches_of_one_turn_batching_off():
    decoder = Decoder()

    async def test(batcher: Batcher) -> None:
        jobs = [job(n) for n in range(3)]
        batcher.submit(jobs)
        await asyncio.gather(*(one.answer for one in jobs))
        assert decoder.batches == [[0], [1], [2]]

    run(test, decoder, max_batch=1, max_wait_s=10.0)


def test_an_idle_server_waits_for_company():
    decoder = Decoder()

    async def test(batcher: Batcher) -> None:
        first, second = job(0), job(1)
        batcher.submit([first])
        await asyncio.sleep(0.01)
        assert decoder.batches == []
        batcher.submit([second, job(2), job(3)])  # full: no more waiting
        await asyncio.gather(first.answer, second.answer)
        assert decoder.batches == [[0, 1, 2, 3]]

    run(test, decoder, max_wait_s=600.0)


def test_the_wait_ends_without_company():
    decoder = Decoder()

    async def test(batcher: Batcher) -> None:
        only = job(0)
        batcher.submit([only])
        await only.answer
        assert decoder.batches == [[0]]

    run(test, decoder, max_wait_s=0.02)


def test_widths_and_snapshots_are_not_mixed():
    decoder = Decoder(held=True)

    async def test(batcher: Batcher) -> None:
        a, b = object(), object()
        batcher.submit([job(0)])
        await entered(decoder)
        jobs = [job(1, 50, a), job(2, 60, a), job(3, 50, b), job(4, 50, a)]
        batcher.submit(jobs)
        decoder.go.set()
        await asyncio.gather(*(one.answer for one in jobs))
        assert decoder.batches == [[0], [1, 4], [2], [3]]

    run(test, decoder)


def test_a_full_queue_takes_all_of_a_call_or_none():
    decoder = Decoder(held=True)

    async def test(batcher: Batcher) -> None:
        batcher.submit([job(0)])
        await entered(decoder)
        waiting = [job(n) for n in range(1, 7)]
        batcher.submit(waiting)
        with pytest.raises(QueueFull, match="6 users wait, the queue takes 8; try again"):
            batcher.submit([job(7), job(8), job(9)])
        assert batcher.waiting == 6
        batcher.submit([job(10), job(11)])
        with pytest.raises(QueueFull):
            batcher.submit([job(12)])
        waiting[0].answer.cancel()  # who gives up makes room
        late = job(13)
        batcher.submit([late])
        decoder.go.set()
        await late.answer
        assert decoder.batches == [[0], [2, 3, 4, 5], [6, 10, 11, 13]]

    run(test, decoder)


def test_who_gave_up_is_not_decoded():
    decoder = Decoder(held=True)

    async def test(batcher: Batcher) -> None:
        inside, gone, stays = job(0), job(1), job(2)
        batcher.submit([inside])
        await entered(decoder)
        batcher.submit([gone, stays])
        inside.answer.cancel()  # in the thread already: its list goes nowhere
        gone.answer.cancel()
        assert batcher.waiting == 1
        decoder.go.set()
        await stays.answer
        assert decoder.batches == [[0], [2]]
        all_gone = [job(3), job(4)]
        batcher.submit(all_gone)
        for one in all_gone:
            one.answer.cancel()
        last = job(5)
        batcher.submit([last])
        await last.answer
        assert decoder.batches[-1] == [5] and batcher.state == "ready"

    run(test, decoder)


def test_one_user_that_breaks_the_engine_fails_alone():
    decoder = Decoder(held=True, poison=2)
    observed: list[int] = []

    async def test(batcher: Batcher) -> None:
        batcher.submit([job(0)])
        await entered(decoder)
        jobs = [job(n) for n in (1, 2, 3)]
        batcher.submit(jobs)
        decoder.go.set()
        good, bad, fine = await asyncio.gather(
            *(one.answer for one in jobs), return_exceptions=True
        )
        assert isinstance(good, Answer) and isinstance(fine, Answer)
        assert isinstance(bad, RuntimeError) and str(bad) == "poison"
        assert decoder.batches == [[0], [1, 2, 3], [1], [2], [3]]
        assert observed == [1, 1, 1]  # calls that failed aren't counted
        assert batcher.state == "ready"

    run(test, decoder, observe=lambda users, seconds: observed.append(users))


def test_closing_answers_the_queue_and_takes_no_one_new():
    decoder = Decoder(held=True)

    async def main() -> None:
        batcher = Batcher(2, 600.0, 8, decode=decoder)
        with pytest.raises(QueueFull, match="takes no requests now: failed"):
            batcher.submit([job(0)])  # not started
        batcher.start()
        jobs = [job(n) for n in range(5)]
        batcher.submit(jobs)
        await entered(decoder)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        assert batcher.state == "stopping"
        with pytest.raises(QueueFull, match="takes no requests now: stopping"):
            batcher.submit([job(9)])
        decoder.go.set()
        await asyncio.wait_for(closing, 30)
        assert all(one.answer.done() for one in jobs)
        assert decoder.batches == [[0, 1], [2, 3], [4]]  # the last one didn't wait for company

    asyncio.run(main())


def test_a_batcher_whose_loop_ended_says_so():
    async def main() -> None:
        batcher = Batcher(2, 0.0, 8, decode=Decoder())
        batcher.start()
        assert batcher.state == "ready"
        batcher._task.cancel()
        await asyncio.wait({batcher._task})
        assert batcher.state == "failed"
        with pytest.raises(QueueFull, match="takes no requests now: failed"):
            batcher.submit([job(0)])

    asyncio.run(main())
