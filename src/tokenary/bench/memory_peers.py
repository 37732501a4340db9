"""Another library on the same texts: presses of kvpress, in an environment of their own.

kvpress asks for an older transformers, so it is never a dependency: ``scripts/install_kvpress.py`` makes an environment
below the cache folder, and `kvpress_peer` runs there as a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenary.bench.haystack import Haystack
from tokenary.bench.memory_reading import Answers
from tokenary.bench.progress import Reporter
from tokenary.core.files import cache_folder
from tokenary.models import LM
from tokenary.models.catalogue import CATALOGUE, converted_folder

SCRIPT = Path(__file__).with_name("kvpress_peer.py")


def environment() -> Path:
    """Where the environment of kvpress stands, or would stand."""
    return cache_folder() / "peers" / "kvpress"


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def site_packages_of(folder: Path) -> Path:
    """Where an environment of this version of Python holds its packages."""
    if sys.platform == "win32":
        return folder / "Lib" / "site-packages"
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def kvpress(
    lm: LM, haystacks: Sequence[Haystack], keep: Sequence[float], left_out: list[str], reporter: Reporter
) -> Iterator[tuple[str, int, Answers]]:
    """Ask presses the questions of haystacks.

    Parameters
    ----------
    lm : LM
        The model; the same weights are loaded from its folder.
    haystacks : sequence of Haystack
        What is read and asked.
    keep : sequence of float
        Percent of the keys and values that stay.
    left_out : list of str
        Gets a line where kvpress cannot be run, or fails.
    reporter : Reporter
        Told of every haystack.

    Yields
    ------
    str, int, Answers
        ``kvpress SnapKVPress:keep=25%``, the number of the haystack, and what came out.
    """
    folder, python = folder_of(lm), python_of(environment())
    if folder is None or not python.is_file():
        why = "scripts/install_kvpress.py makes its environment" if folder else f"{lm.name} came from no folder"
        left_out.append(f"kvpress: {why}")
        for _ in haystacks:
            reporter.finish()
        return
    request = {
        "folder": str(folder),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "keep": list(keep),
        "haystacks": [haystack.to_json() for haystack in haystacks],
    }
    command = [str(python), "-P", "-W", "ignore", str(SCRIPT)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            reporter.start("kvpress")
            json.dump(request, process.stdin)
            process.stdin.close()
            for line in process.stdout:
                told = json.loads(line)
                if "done" in told:
                    reporter.finish()
                elif "failed" in told:
                    left_out.append(f"kvpress {told['failed']}")
                else:
                    yield f"kvpress {told['name']}", told["haystack"], _answers(told, haystacks[told["haystack"]])
        except BrokenPipeError:
            pass  # it ended before it had read everything; the exit status says why not
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
        if process.wait():
            errors.seek(0)
            last = (errors.read().strip() or f"status {process.returncode}").splitlines()[-1]
            left_out.append(f"kvpress: its process ended: {last}")


def _answers(told: dict[str, Any], haystack: Haystack) -> Answers:
    """Score what a press made of a haystack."""
    scores = [
        question.score(losses, likely)
        for question, losses, likely in zip(haystack.questions, told["losses"], told["likely"], strict=True)
    ]
    return Answers(
        losses=tuple(loss for loss, _ in scores),
        right=tuple(right for _, right in scores),
        kv_bytes=told["kv_bytes"],
        read_tokens=told["read_tokens"],
        seconds=told["seconds"],
    )


def folder_of(lm: LM) -> Path | None:
    """The transformers folder that a model was loaded from, where it lies on this machine."""
    source = Path(lm.source)
    if source.is_dir():
        return source
    entry = next((entry for entry in CATALOGUE if entry.name == lm.name and entry.source == lm.source), None)
    folder = converted_folder(entry.sha256) if entry is not None and entry.sha256 else None
    return folder if folder is not None and folder.is_dir() else None
