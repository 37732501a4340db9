"""``tokenary compress`` and ``tokenary decompress``: files through a language model, without loss."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from tokenary.cli import output
from tokenary.core.files import written_whole

if TYPE_CHECKING:
    from tokenary.codec.blocks import Machine
    from tokenary.codec.container import Header
    from tokenary.codec.files import Progress
    from tokenary.models.lm import LM

_FILES = typer.Argument(help="Files; - is standard input.")
_OUT = typer.Option(None, "--out", "-o", help="Where the result goes: a file, a folder, or - for standard output.")
_MODEL = typer.Option("smollm2", "--model", "-m", help="Model: a catalogue name, a folder, a .gguf file, a hub id.")
_WORKERS = typer.Option(1, min=1, help="Blocks that are coded at the same time; the result does not depend on it.")
_FORCE = typer.Option(False, "--force", "-f", help="Write over what is there.")


def compress(
    files: list[str] = _FILES,
    out: str = _OUT,
    model: str = _MODEL,
    workers: int = _WORKERS,
    codec: str = typer.Option("nacrith", "--with", help="The method, with options if you like: nacrith:lanes=4."),
    backend: str = typer.Option("torch", help="torch: archives can be read anywhere. llama.cpp: on this machine."),
    block: int = typer.Option(256, min=1, max=65536, help="KiB that are coded independently of all others."),
    resume: bool = typer.Option(False, "--resume", help="Go on where a run that broke off has left a .partial file."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what size and time to expect, from a sample."),
    force: bool = _FORCE,
    as_json: bool = output.JSON,
) -> None:
    """Compress files with a language model; what is not text is packed without one.

    Example: [bold]tokenary compress notes.txt[/bold]  writes notes.txt.tkz
    """
    from tokenary.codec.backends import codec_from

    method = codec_from(codec)
    loaded: list[tuple[LM, Machine]] = []

    def prepare() -> tuple[LM, Machine]:
        from tokenary.codec.backends import reader_for
        from tokenary.codec.files import machine_for

        if not loaded:
            lm = _load(model)
            loaded.append((lm, machine_for(lm, method, reader_for(lm, backend))))
        return loaded[0]

    reports = []
    for name, target in _targets(files, out, _packed_name):
        with _source(name) as source:
            if dry_run:
                reports.append(_forecast(name, source, prepare, as_json))
                continue
            reports.append(_compress(name, source, target, prepare, block << 10, workers, resume, force))
    if as_json:
        output.as_json(reports)


def decompress(
    files: list[str] = _FILES,
    out: str = _OUT,
    model: str = typer.Option(None, "--model", "-m", help="Where the weights are, if not under the archive's name."),
    workers: int = _WORKERS,
    recover: bool = typer.Option(False, "--recover", help="Of a damaged archive, write every block that is whole."),
    force: bool = _FORCE,
    as_json: bool = output.JSON,
) -> None:
    """Bring back what `tokenary compress` has packed; nothing is written that does not match its checksum.

    Example: [bold]tokenary decompress notes.txt.tkz[/bold]
    """
    loaded: dict[str, LM] = {}

    def prepare(header: Header) -> Machine:
        from tokenary.codec.backends import machine_of

        name = model or header.model
        if name not in loaded:
            loaded[name] = _load(name)
        return machine_of(header, loaded[name])

    reports = []
    for name, target in _targets(files, out, _unpacked_name):
        with _source(name) as source:
            reports.append(_decompress(name, source, target, prepare, workers, recover, force))
    if as_json:
        output.as_json(reports)
    if any(report["lost"] for report in reports):
        raise typer.Exit(1)


def _compress(
    name: str,
    source: IO[bytes],
    target: Path | None,
    prepare: Callable[[], tuple[LM, Machine]],
    block: int,
    workers: int,
    resume: bool,
    force: bool,
) -> dict[str, Any]:
    from tokenary.codec.files import compress as run

    _may_write(target, force)
    with contextlib.ExitStack() as stack:
        place = target or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "archive"
        size = source.seek(0, 2)
        progress = stack.enter_context(_bar(name, size))
        found = run(source, place, prepare, block=block, workers=workers, resume=resume, progress=progress)
        if target is None:
            with place.open("rb") as stream:
                shutil.copyfileobj(stream, sys.stdout.buffer)
                sys.stdout.buffer.flush()
    bits = 8 * found.packed / max(found.size, 1)
    how = "" if found.coded else ", without the model"
    output.note(
        f"{name}: {output.size(found.size)} -> {output.size(found.packed)}, {bits:.3f} bits a byte{how}"
        + (f", {found.kept} of {found.blocks} blocks were there" if found.kept else "")
    )
    return {
        "file": name,
        "out": str(target or "-"),
        "bytes": found.size,
        "packed_bytes": found.packed,
        "bits_per_byte": bits,
        "coded": found.coded,
        "blocks": found.blocks,
        "resumed_blocks": found.kept,
    }


def _decompress(
    name: str,
    source: IO[bytes],
    target: Path | None,
    prepare: Callable[[Header], Machine],
    workers: int,
    recover: bool,
    force: bool,
) -> dict[str, Any]:
    from tokenary.codec.container import Header
    from tokenary.codec.files import decompress as run
    from tokenary.core.errors import InputError

    _may_write(target, force)
    with contextlib.ExitStack() as stack:
        try:
            size = Header.read(source).size
        except InputError:
            size = 0  # said below, or mended
        source.seek(0)
        progress = stack.enter_context(_bar(name, size))
        sink = stack.enter_context(_whole(target))
        found = run(source, sink, prepare, workers=workers, recover=recover, progress=progress)
    for start, end in found.lost:
        output.note(f"{name}: bytes {start} to {end} of {found.size} are lost")
    output.note(f"{name}: {output.size(found.size - sum(end - start for start, end in found.lost))}")
    return {"file": name, "out": str(target or "-"), "bytes": found.size, "lost": [list(span) for span in found.lost]}


def _forecast(name: str, source: IO[bytes], prepare: Callable[[], tuple[LM, Machine]], quiet: bool) -> dict[str, Any]:
    from tokenary.codec.estimate import estimate

    found = estimate(source, lambda: prepare()[1])
    if not quiet:
        minutes = found.seconds / 60
        typer.echo(
            f"{name}: {output.size(found.size)}, {100 * found.text / max(found.size, 1):.0f}% text -> about"
            f" {output.size(found.packed)} ({8 * found.packed / max(found.size, 1):.2f} bits a byte), about"
            f" {minutes:.1f} minutes with one worker (from {output.size(found.sampled)} of its text)"
        )
    return {
        "file": name,
        "bytes": found.size,
        "text_bytes": found.text,
        "packed_bytes": found.packed,
        "seconds": found.seconds,
        "sampled_bytes": found.sampled,
    }


# ------------------------------------------------------------------------------------------- files and streams


def _load(name: str) -> LM:
    from tokenary.models.loading import load

    return load(name, dtype="float32", device="cpu", progress=sys.stderr.isatty())


def _packed_name(name: str) -> str:
    from tokenary.codec.container import SUFFIX

    return name + SUFFIX


def _unpacked_name(name: str) -> str:
    from tokenary.codec.container import SUFFIX
    from tokenary.core.errors import InputError

    if not name.endswith(SUFFIX):
        raise InputError(f"{name} does not end in {SUFFIX}: name the result with -o")
    return name.removesuffix(SUFFIX)


def _targets(files: list[str], out: str | None, rename: Callable[[str], str]) -> list[tuple[str, Path | None]]:
    """Pair each file with where its result goes; None is standard output."""
    from tokenary.core.errors import InputError

    made: list[tuple[str, Path | None]] = []
    folder = out is not None and out != "-" and Path(out).is_dir()
    if len(files) > 1 and out is not None and not folder:
        raise InputError(f"{len(files)} files need a folder that exists as --out, not {out}")
    for name in files:
        if out == "-" or (out is None and name == "-"):
            made.append((name, None))
        elif out is None:
            made.append((name, Path(rename(name))))
        elif folder:
            made.append((name, Path(out) / rename(Path("stdin" if name == "-" else name).name)))
        else:
            made.append((name, Path(out)))
    return made


@contextlib.contextmanager
def _source(name: str) -> Iterator[IO[bytes]]:
    """Open a file; standard input is copied to a temporary one, since it is read more than once."""
    from tokenary.core.errors import InputError

    if name == "-":
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.seek(0)
            yield copy
        return
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(open(name, "rb"))
        except OSError as error:
            raise InputError(f"cannot read {name}: {error.strerror}") from error
        yield stream


@contextlib.contextmanager
def _whole(target: Path | None) -> Iterator[IO[bytes]]:
    """Yield standard output, or a stream that becomes `target` at the end."""
    if target is not None:
        with written_whole(target) as stream:
            yield stream
        return
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()


def _may_write(target: Path | None, force: bool) -> None:
    from tokenary.core.errors import InputError

    if target is None:
        if sys.stdout.isatty() and not force:
            raise InputError("binary data are not written to a terminal: name a file with -o")
    elif target.exists() and not force:
        raise InputError(f"{target} exists: --force writes over it")
    elif not target.absolute().parent.is_dir():
        raise InputError(f"there is no folder {target.absolute().parent}")


@contextlib.contextmanager
def _bar(name: str, size: int) -> Iterator[Progress | None]:
    """Draw progress on stderr, with bits a byte so far and the time left; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[bits]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(name, total=max(size, 1), bits="")

        def told(done: float, coded: int) -> None:
            bits = f"{8 * coded / done:.3f} bits a byte" if coded and done else ""
            shown.update(task, completed=done, bits=bits)

        yield told
