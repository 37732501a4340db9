"""``tokenary vlm``: ask a small vision-language model about a picture on fewer image tokens, and see which it kept."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenary.cli import output
from tokenary.cli.generate import THREADS, set_threads
from tokenary.cli.vlm_card import card

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tokenary.core.recipe import Step
    from tokenary.models.bench_vlm import BenchVLM
    from tokenary.reduce.vlm import ReducedVLM

app = typer.Typer(no_args_is_help=True, help="Small vision-language models that read fewer image tokens.")
MODEL = typer.Option("", "--model", "-m", help="A model that ships (xs-0), or a folder that was saved.")
app.command()(card)


@app.command()
def ask(
    image: Path = typer.Argument(help="A picture; it is fitted into the square that the model sees."),
    question: str = typer.Argument(help="In the words that the model knows, e.g. 'what color is the circle ?'."),
    reducer: str = typer.Option("", "--with", help="A method of the room reduce, e.g. hiprune:keep=25%."),
    at: str = typer.Option("", "--at", help="Where: encoder, vision:2,4, decoder:2; by default where it belongs."),
    model: str = MODEL,
    crops: bool = typer.Option(False, "--crops", help="See a thumbnail and four crops, at twice the resolution."),
    out: Path = typer.Option(None, "--out", help="Draw which patches were kept: a file .html or .png."),
    max_new_tokens: int = typer.Option(24, "--max-new-tokens", "-n", min=1, help="Most tokens to write."),
    threads: int = THREADS,
    as_json: bool = output.JSON,
) -> None:
    """Ask about a picture; with --out, see what the answer was given from.

    Example: [bold]tokenary vlm ask scene.png "how many objects are there ?" --with reduce-pool:keep=25% --out
    kept.html[/bold]
    """
    from tokenary.core.errors import InputError

    step = _step(reducer)
    method = None if step is None else step.build()
    if out is not None and out.suffix.lower() not in (".html", ".png"):
        raise InputError(f"{out}: a picture is drawn as .html or .png")
    set_threads(threads)
    net = _load(model)
    pixels = read_picture(image, net.config.side * (2 if crops else 1))

    import torch

    from tokenary.reduce.vlm import ReducedVLM

    def run(chosen: Any, place: str) -> tuple[str, ReducedVLM]:
        with ReducedVLM(net, chosen, place) as reduced:
            return reduced.answer(torch.from_numpy(pixels[None]), [question], max_new_tokens)[0], reduced

    full, whole = run(None, "encoder")
    answer, reduced = (full, whole) if method is None else run(method, at or method.at)
    found = _figures(net, question, answer, full, reduced, whole, step, at)
    if out is not None:
        _write(out, found, _drawn(pixels, reduced))
        found["picture"] = str(out)
    if as_json:
        output.as_json(found)
        return
    typer.echo(answer)
    output.note(_sentence(found))
    if out is not None:
        output.note(str(out))


@app.command()
def scene(
    out: Path = typer.Argument(help="The file to draw, .png."),
    model: str = MODEL,
    family: str = typer.Option("", help="Only questions of one family: ocr, chart, counting, spatial, ..."),
    index: int = typer.Option(0, min=0, help="Which scene of the stream."),
    crops: bool = typer.Option(False, "--crops", help="A scene of twice the side."),
    as_json: bool = output.JSON,
) -> None:
    """Draw a scene that no model was trained on, and print questions about it with their answers.

    Example: [bold]tokenary vlm scene scene.png --family counting[/bold]
    """
    from dataclasses import replace

    from tokenary.core.errors import UnknownNameError
    from tokenary.models.bench_vlm import FAMILIES, SIZES, render
    from tokenary.models.bench_vlm.batches import EVALUATION_SEED
    from tokenary.reduce.picture import png

    if family and family not in FAMILIES:
        raise UnknownNameError("family", family, FAMILIES)
    geometry = _load(model).config.geometry if model else SIZES["s"].geometry
    geometry = replace(geometry, side=2 * geometry.side) if crops else geometry
    drawn = render(geometry, "test", EVALUATION_SEED, index, (family,) if family else FAMILIES)
    _write_bytes(out, png(drawn.image))
    turns = [{"question": turn.question, "answer": turn.answer, "family": turn.family} for turn in drawn.turns]
    if as_json:
        output.as_json({"picture": str(out), "turns": turns})
        return
    output.table(["question", "answer", "family"], [list(turn.values()) for turn in turns])


def _step(text: str) -> Step | None:
    """Read a method of this room."""
    from tokenary.core.errors import UnknownNameError
    from tokenary.core.recipe import Step
    from tokenary.core.registry import cards

    if not text:
        return None
    step, known = Step.parse(text), [card.slug for card in cards(room="reduce")]
    if step.slug not in known:
        raise UnknownNameError("method of the room reduce", step.slug, known)
    return step


def _load(name: str) -> BenchVLM:
    from tokenary.models.bench_vlm import available, load

    return load(name or available()[0]).requires_grad_(False)


def read_picture(path: Path, side: int) -> NDArray[np.uint8]:
    """Read a picture and fit it, whole, into a square on black: (side, side, 3) uint8.

    Raises
    ------
    InputError
        If it is no picture, or pillow is missing.
    """
    import numpy as np

    from tokenary.core.errors import InputError

    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise InputError("pictures are read with pillow: pip install 'tokenary[vision]'") from None
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise InputError(f"{path}: no picture can be read here ({' '.join(str(error).split())})") from None
    factor = side / max(picture.size)
    size = tuple(max(1, round(length * factor)) for length in picture.size)
    if size != picture.size:
        picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.array(square)


def _figures(
    net: BenchVLM, question: str, answer: str, full: str, reduced: ReducedVLM, whole: ReducedVLM,
    step: Step | None, at: str,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the page and the JSON say."""
    from tokenary.bench.reduction import kv_bytes, vlm_flops

    flops, held = [], []
    for each in (reduced, whole):
        flops.append(vlm_flops(net.config, each.vision_tokens, each.language_tokens, each.views))
        held.append(kv_bytes(net.config, each.language_tokens))
    return {
        "question": question,
        "answer": answer,
        "answer_on_all": full,
        "method": "plain" if step is None else str(step),
        "at": at or (reduced.reducer.at if reduced.reducer is not None else "encoder"),
        "model": net.config.name,
        "kept": reduced.kept[0],
        "image_tokens": whole.kept[0],
        "gflops": round(flops[0] / 1e9, 4),
        "gflops_on_all": round(flops[1] / 1e9, 4),
        "kv_bytes": held[0],
        "kv_bytes_on_all": held[1],
    }


def _sentence(found: dict[str, Any]) -> str:
    share = found["kept"] / found["image_tokens"] if found["image_tokens"] else 0
    said = "the same on all" if found["answer"] == found["answer_on_all"] else f"on all: {found['answer_on_all']!r}"
    return (
        f"{found['kept']} of {found['image_tokens']} image tokens ({share:.0%}), {found['gflops']:.3g} of "
        f"{found['gflops_on_all']:.3g} GFLOPs; {said}"
    )


def _drawn(pixels: NDArray[np.uint8], reduced: ReducedVLM) -> list[dict[str, Any]]:
    """Draw every view: the picture, or a thumbnail and the crops laid together."""
    import numpy as np
    import torch

    from tokenary.models.bench_vlm.model import anyres_views
    from tokenary.reduce.picture import kept_patches

    rows, columns = reduced.grid
    n = rows * columns
    none = np.full(0, -1, np.int64)
    owners = np.full(reduced.views * n, -1) if reduced.owners is None else reduced.owners[0].numpy()
    numbers = none if reduced.numbers is None else reduced.numbers[0].numpy()
    if reduced.views == 1:
        return [{"title": "Picture", "pixels": kept_patches(pixels, owners[:n], numbers, reduced.grid)}]
    thumbnail = anyres_views(torch.from_numpy(pixels[None]))[0, 0].numpy()
    here = numbers[(numbers >= 0) & (numbers < n)]
    views = [{"title": "Thumbnail", "pixels": kept_patches(thumbnail, owners[:n], here, reduced.grid, 3)}]
    order = np.arange(4 * n).reshape(2, 2, rows, columns).transpose(0, 2, 1, 3).reshape(-1)  # crops to the large grid
    place = np.empty(4 * n, np.int64)
    place[order] = np.arange(4 * n)
    inside = place[numbers[numbers >= n] - n]
    large = kept_patches(pixels, owners[n:][order], inside, (2 * rows, 2 * columns), 3)
    return [*views, {"title": "Four crops", "pixels": large}]


def _write(out: Path, found: dict[str, Any], views: list[dict[str, Any]]) -> None:
    """Write the page, or the pictures side by side."""
    import numpy as np

    from tokenary.reduce.picture import png

    if out.suffix.lower() == ".png":
        tall = max(view["pixels"].shape[0] for view in views)
        padded = [np.pad(v["pixels"], ((0, tall - v["pixels"].shape[0]), (0, 8), (0, 0))) for v in views]
        _write_bytes(out, png(np.concatenate(padded, axis=1)[:, :-8]))
        return
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shown = [
        {
            "title": view["title"],
            "data": base64.b64encode(png(view["pixels"])).decode(),
            "side": view["pixels"].shape[1],
        }
        for view in views
    ]
    page = environment.get_template("vlm.html.j2").render(found=found, sentence=_sentence(found), views=shown)
    output.write_text(out, page)


def _write_bytes(path: Path, data: bytes) -> None:
    from tokenary.core.errors import InputError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
