"""Serve a run over HTTP: /recommend, /health, /metrics; requests that come together share a batch.

    genrec serve --run_dir runs/quickstart --port 8000
    curl localhost:8000/recommend -H 'Content-Type: application/json' -d '{"history": [], "k": 5}'
    GENREC_ADMIN_TOKEN=$(openssl rand -hex 32) genrec serve --run_dir runs/mine --runs_root runs

Needs the serve extra. With a token in GENREC_ADMIN_TOKEN or `admin_token_file` there are
/admin/view and /admin/model, which exchange the view of the catalogue and the model while the
server answers; a model's run must lie below `runs_root`. Views last until the server stops:
`view_file` (what /admin/view takes, as a JSON file) is the one to start with. SIGTERM and Ctrl-C
answer what is queued, then end. Headers that come byte by byte, TLS and callers' quotas are the
business of a proxy in front of it.
"""

import functools
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from genrec.config import check_choice, parse, run
from genrec.engine_options import check_engine_options, engine_options
from genrec.normalizers import NORMALIZERS


@dataclass
class ServeArgs:
    """Settings of the server."""

    run_dir: str = "runs/default"  # or a bundle that genrec export made
    model_run: str | None = None  # run that the model comes from; default: run_dir
    model_stage: str | None = None  # sft or grpo; default: grpo where it is complete
    engine: str = "torch"  # torch, vllm or vllm-inworker; those on vLLM can't swap models
    normalizer: str | None = None  # full, level or trie; default: what the model declares
    dtype: str = "float32"  # others are faster, but a list may then depend on its batch
    tensor_parallel_size: int | None = None  # of vllm: GPUs that share a model; default 1
    gpu_memory_utilization: float | None = None  # of vllm: share of a GPU; default: the engine's
    max_model_len: int | None = None  # of both vLLM engines: tokens; default: the model's
    host: str = "127.0.0.1"  # 0.0.0.0 to be reached from other machines
    port: int = 8000
    max_batch: int = 32  # users decoded together; 1: no batching
    max_wait_ms: float = 2.0  # how long an idle server waits for others to join a batch
    max_queue: int = 1024  # users that may wait; more get 503
    timeout_s: float = 10.0  # for an answer; then 504
    beam_width: int | None = None  # default: the next of 50, 100, 200, … from 2k on
    max_k: int = 100
    max_history: int = 1000  # items of a request's history
    max_exclude: int = 1000
    max_candidates: int = 1000  # items of a request's candidates
    max_requests: int = 64  # users in one call
    max_body_bytes: int = 262144
    max_connections: int = 1024  # open at once; more get 503
    drain_s: int = 30  # at the end, for requests in flight
    view_file: str | None = None  # {"allow": [ids]} or {"deny": [ids]}; default: every item
    admin_token_file: str | None = None  # default: GENREC_ADMIN_TOKEN; without either no /admin
    runs_root: str | None = None  # folder of the runs that /admin/model may load; default: none

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("engine", self.engine, ("torch", "vllm", "vllm-inworker"))
        if self.engine != "torch" and self.runs_root is not None:
            raise ValueError(
                f"runs_root is set, so that models can be swapped, but engine={self.engine!r}: two "
                "vLLM engines can't share a process; serve with engine='torch', or drop runs_root "
                "and start a second server for another model"
            )
        check_engine_options(self.engine, engine_options(self))
        if self.normalizer is not None:
            check_choice("normalizer", self.normalizer, NORMALIZERS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, ("sft", "grpo"))
        if not 0 < self.port < 65536:
            raise ValueError(f"port={self.port} must lie between 1 and 65535")
        for name in ("max_connections", "drain_s"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.runs_root is not None and not Path(self.runs_root).is_dir():
            raise ValueError(f"runs_root={self.runs_root} is no folder")


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at that address, so that one in use is found before a model is loaded.

    It doesn't listen yet: who connects meanwhile is refused rather than kept waiting.

    Raises:
        ValueError: the address is in use, not of this machine, or the port needs other rights.
    """
    # The protocol is named, since asyncio turns Nagle's algorithm off only where it is: an answer's
    # body would wait until the client acknowledges its head, which takes 40 ms.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, UnicodeError) as error:
        made.close()
        raise ValueError(
            f"host={host}, port={port} can't be listened at ({error}); choose another --port or "
            "--host"
        ) from error
    return made


def main() -> None:
    """Load the run, then serve until a signal comes."""
    args = parse(ServeArgs)
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise ImportError('serving needs uvicorn; run: pip install "genrec[serve]"') from error
    from genrec.server.app import create_app
    from genrec.server.requests import read_view
    from genrec.server.serving import ViewRule, load_run
    from genrec.server.settings import ServerSettings, read_admin_token

    settings = ServerSettings(
        run_dir=args.run_dir,
        model_run=args.model_run,
        view=ViewRule() if args.view_file is None else read_view(args.view_file),
        max_batch=args.max_batch,
        max_wait_ms=args.max_wait_ms,
        max_queue=args.max_queue,
        timeout_s=args.timeout_s,
        beam_width=args.beam_width,
        max_k=args.max_k,
        max_history=args.max_history,
        max_exclude=args.max_exclude,
        max_candidates=args.max_candidates,
        max_requests=args.max_requests,
        max_body_bytes=args.max_body_bytes,
        admin_token=read_admin_token(args.admin_token_file),
        runs_root=None if args.runs_root is None else Path(args.runs_root),
    )
    load = functools.partial(
        load_run,
        stage=args.model_stage,
        engine=args.engine,
        normalizer=args.normalizer,
        dtype=args.dtype,
        batch_size=args.max_batch,
        engine_options=engine_options(args),
    )
    with bound_socket(args.host, args.port) as bound:
        config = uvicorn.Config(
            create_app(load, settings),
            access_log=False,  # /metrics counts; a line per request would cost more than it tells
            server_header=False,
            limit_concurrency=args.max_connections,
            timeout_graceful_shutdown=args.drain_s,
        )
        with suppress(KeyboardInterrupt):  # uvicorn raises it once more when it has ended
            uvicorn.Server(config).run(sockets=[bound])


if __name__ == "__main__":
    run(main)
