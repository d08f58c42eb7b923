"""Prometheus metrics of one server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PATHS = ("/", "/recommend", "/health", "/metrics", "/admin/view", "/admin/model")
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Monitoring:
    """Counters and histograms in a registry of their own, so that one process can hold two servers.

    Args:
        waiting: current length of the queue.
        n_allowed: items of the current view.
    """

    def __init__(self, waiting: Callable[[], int], n_allowed: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "genrec_requests",
            "Requests by path and status (499: the client went away)",
            ["path", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "genrec_request_seconds",
            "From a request's arrival to its answer",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch = Histogram(
            "genrec_batch_users", "Users per engine call", buckets=_USERS, registry=self.registry
        )
        self._decode = Histogram(
            "genrec_decode_seconds",
            "Seconds per engine call",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._users = Counter("genrec_users", "Users decoded", registry=self.registry)
        self._swaps = Counter(
            "genrec_swaps", "Swaps of model and view", ["what", "outcome"], registry=self.registry
        )
        queue = Gauge("genrec_queue_users", "Users in the queue", registry=self.registry)
        queue.set_function(waiting)
        view = Gauge("genrec_view_items", "Items that may be recommended", registry=self.registry)
        view.set_function(n_allowed)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a finished request; paths that don't exist share one label."""
        path = path if path in PATHS else "other"
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, users: int, seconds: float) -> None:
        """Count an engine call."""
        self._batch.observe(users)
        self._decode.observe(seconds)
        self._users.inc(users)

    def swap(self, what: str, done: bool) -> None:
        """Count a swap of "model" or "view", or a refused one."""
        self._swaps.labels(what, "done" if done else "refused").inc()

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
