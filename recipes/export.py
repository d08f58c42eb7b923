"""A run -> one portable folder that serves: model, SID map, catalogue, prompts, settings.

    genrec export --run_dir runs/quickstart --output_dir bundles/quickstart
    genrec export --verify bundles/quickstart

`Recommender.load("bundles/quickstart")` gives the lists of the run; `model/` inside is a plain
checkpoint that transformers and vLLM load. The folder has a model card (README.md) whose licence
lines are to be filled in, and a manifest with the SHA-256 of every file. Nothing that exists is
overwritten. `--verify` hashes all files and exits with status 1 if one differs.
"""

from dataclasses import dataclass
from pathlib import Path

from genrec.config import check_choice, parse, run


@dataclass
class ExportArgs:
    """Settings of export."""

    run_dir: str = "runs/default"
    output_dir: str | None = None  # the bundle, a new folder; default: <run_dir>/bundle
    model_stage: str | None = None  # sft or grpo; default: grpo where it is complete
    model_run: str | None = None  # run that the model comes from; default: run_dir
    # float32, bfloat16 or float16: round the stored weights, and lists can differ from the run's.
    dtype: str | None = None
    k: int | None = None  # list length of who asks without one; default: recommend's, else 10
    beam_width: int | None = None  # default: recommend's, else by k
    # Model that the run's adapter was trained on (for grpo: the run's sft/model). The bundle holds
    # it with the SID rows, and the adapter apart, which torch and vllm put on it.
    serving_base: str | None = None
    license: str | None = None  # of the model, for its card: an SPDX name or "other"
    verify: str | None = None  # hash every file of this bundle instead

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, ("sft", "grpo"))
        if self.dtype is not None:
            check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        for name in ("output_dir", "verify"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty; name a folder, or leave --{name} out")
        for name in ("k", "beam_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def verify(folder: str) -> None:
    """Hash every file; exit status 1 if one differs."""
    from genrec.bundle.files import card_was_edited, read_manifest, verify_bundle

    problems = verify_bundle(folder)
    for problem in problems:
        print(problem)
    if problems:
        print(f"NOT verified: {len(problems)} findings in {folder}")
        raise SystemExit(1)
    if card_was_edited(folder):
        print("README.md was edited since the export, as it may be")
    manifest = read_manifest(folder)
    print(
        f"OK: {len(manifest['files'])} files unchanged; model {manifest['name']} "
        f"({manifest['model_stage']}), SID map {manifest['sid_map_sha256'][:12]}"
    )


def main() -> None:
    """Run the command."""
    args = parse(ExportArgs)
    if args.verify is not None:
        verify(args.verify)
        return
    from genrec.bundle.files import read_manifest
    from genrec.bundle.writing import ExportSettings, write_bundle

    target = Path(args.run_dir) / "bundle" if args.output_dir is None else Path(args.output_dir)
    settings = ExportSettings(
        args.model_stage, args.model_run, args.dtype, args.k, args.beam_width, args.license,
        args.serving_base,
    )  # fmt: skip
    write_bundle(args.run_dir, target, settings)
    manifest = read_manifest(target)
    size = sum(file["bytes"] for file in manifest["files"].values())
    stored, trained = manifest["dtype"]["stored"], manifest["dtype"]["trained"]
    print(f"{target}: {len(manifest['files'])} files, {size / 2**20:,.1f} MiB, weights in {stored}")
    if stored != trained:
        print(f"the weights were trained in {trained}: lists can differ from those of the run")
    if args.license is None:
        print(f"fill in the licence lines of {target / 'README.md'} before you pass it on")
    print(f'serve it: Recommender.load("{target}")')


if __name__ == "__main__":
    run(main)
