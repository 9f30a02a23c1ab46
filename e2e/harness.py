"""What the scripts here share: arguments, a folder with room, how a run is judged and tidied up."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

from servers import Node, say

HERE = Path(__file__).parent


class Run(Protocol):
    """Servers, and what was wrong with what they did."""

    node: Node
    wrong: list[str]

    def close(self) -> None:
        """Ends all servers at once."""


def arguments_of(doc: str) -> argparse.ArgumentParser:
    """The arguments of every script; `doc` is the script's own."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--kvar", type=Path, required=True, help="the kvar binary")
    parser.add_argument("--overlay", required=True, help="PYTHONPATH of kvar, and of LMCache")
    return parser


def out_folder(free_bytes_min: int = 0) -> Path:
    """Where results and the folders of runs go; ends the script where there is not enough room."""
    out = HERE / "out"
    out.mkdir(exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < free_bytes_min:
        raise SystemExit(f"{free >> 30} GiB free in {out}, {free_bytes_min >> 30} needed")
    return out


def judge(run: Run, phases: Callable[[], None], folder: Path, *, keep: bool) -> int:
    """Goes through the phases and ends the servers; the exit code is the verdict.

    After a run that was as it should be the folder is removed, unless it is to be kept; otherwise
    the logs stay in it.
    """
    fine = False
    try:
        phases()
        for problem in run.wrong:
            print(f"WRONG: {problem}")
        fine = not run.wrong
        print("all as it should be" if fine else f"{len(run.wrong)} problems")
    finally:
        run.close()
        if fine and not keep:
            shutil.rmtree(folder)
        else:
            run.node.data.unlink(missing_ok=True)
            say(f"logs are kept in {folder}")
    return 0 if fine else 1


def script(main: Callable[[], int]) -> NoReturn:
    """Runs a script to its exit code."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted; everything was stopped")
        sys.exit(130)
