"""Kills a change of a bundle at each of its steps in turn; run by test_change.

    python kill_double.py BUNDLE PLACE WHAT LORA

For n = 0, 1, ... a child process does WHAT (bake or remove) on PLACE/n, a copy of BUNDLE, and ends
itself with SIGKILL just before the n-th time it renames, links, removes or makes anything below it.
The last copy is the one whose child came through.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from lcexport.lora import LoraChoice, bake, remove

EVENTS = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")


def change(folder: Path, what: str, lora: str) -> None:
    if what == "bake":
        bake(folder, [LoraChoice(path=Path(lora))], golden=False)
    else:
        remove(folder)


def killed_at(step: int, folder: Path) -> None:
    """From here on, die before the `step`-th event below `folder`."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in EVENTS and any(str(folder) in str(word) for word in arguments):
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


def main(bundle: Path, place: Path, what: str, lora: str) -> None:
    for step in range(100):
        folder = shutil.copytree(bundle, place / str(step))
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            killed_at(step, folder)
            change(folder, what, lora)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))


main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
