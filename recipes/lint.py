"""What in the data or its split makes results look better or worse than they are?

    genrec lint --run_dir runs/quickstart

Examines the tables of a prepared run and prints what was found, worst first: what item and user ids
give away, sorted histories, ties at the target, training after test targets, cold and repeated
targets, duplicates, odd titles. CPU only; seconds. Ends with status 1 if something is bad. Nothing
is written but the note that the test rows were read.
"""

import sys
from dataclasses import dataclass

import polars as pl
from rich.table import Table
from rich.text import Text

from genrec.artifacts import read_json, require, stage_folder
from genrec.config import make_console, parse, run
from genrec.data.lint import Finding, lint_run_tables, worst_first
from genrec.data.splits import SPLITS, read_split

STYLES = {"bad": "bold red", "look": "yellow", "not run": "magenta", "ok": "green"}


@dataclass
class LintArgs:
    """Settings of lint."""

    run_dir: str = "runs/default"


def findings_table(findings: list[Finding]) -> Table:
    """The findings, in the order given, as a table to print."""
    table = Table(box=None, pad_edge=False)
    table.add_column("status", no_wrap=True)
    table.add_column("check", overflow="fold")
    table.add_column("what was found", overflow="fold")
    for finding in findings:
        text = Text(finding.text)
        if finding.example:
            text.append(f"\nfor example: {finding.example}", style="dim")
        severity = Text(finding.severity, style=STYLES[finding.severity])
        table.add_row(severity, Text(finding.name), text)
    return table


def main() -> None:
    """Run the command."""
    args = parse(LintArgs)
    require(args.run_dir, "prepare")
    folder = stage_folder(args.run_dir, "prepare")
    interactions, catalog = (
        pl.read_parquet(folder / f"{name}.parquet", glob=False)
        for name in ("interactions", "catalog")
    )
    rows = {split: read_split(args.run_dir, split, "lint") for split in SPLITS}
    protocol = read_json(folder / "split.json")["protocol"]
    findings = worst_first(lint_run_tables(interactions, catalog, **rows, protocol=protocol))
    console = make_console(width=100)
    console.print(findings_table(findings))
    if any(finding.severity == "bad" for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
