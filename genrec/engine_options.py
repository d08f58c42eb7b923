"""Settings of the vLLM engines that recipes offer by name; none changes a list in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPTIONS = ("tensor_parallel_size", "gpu_memory_utilization", "max_model_len")
_KNOWN = {"torch": (), "vllm": OPTIONS, "vllm-inworker": ("max_model_len",)}


def engine_options(settings: Any) -> dict[str, float]:
    """The options that are set among a recipe's settings."""
    return {name: value for name in OPTIONS if (value := getattr(settings, name)) is not None}


def check_engine_options(engine: str, options: Mapping[str, float]) -> None:
    """Raise ValueError if the engine has no such option, or a value can't be.

    Args:
        engine: of `genrec.recommend.ENGINES`.
        options: from `engine_options`.
    """
    if foreign := [name for name in options if name not in _KNOWN[engine]]:
        raise ValueError(f"{foreign[0]} is no setting of engine={engine}; leave it out")
    share = options.get("gpu_memory_utilization", 1)
    if not 0 < share <= 1:
        raise ValueError(f"gpu_memory_utilization={share} must lie in (0, 1]")
    for name in ("tensor_parallel_size", "max_model_len"):
        if options.get(name, 1) < 1:
            raise ValueError(f"{name}={options[name]} must be at least 1")
