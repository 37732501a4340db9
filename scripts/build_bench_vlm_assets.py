"""Build src/tokenary/models/bench_vlm/files/assets.npz: rasterised fonts, handwritten digits and photographs.

Needed only to change the assets; the package carries the result. Needs pillow, scikit-learn and scikit-image, and a
folder with the fonts named below (Debian packages fonts-dejavu, -liberation, -lato, -roboto-unhinted, -inconsolata,
-cantarell, -comic-neue, -open-sans, -hack, -firacode, -freefont-ttf, -courier-prime, -crosextra-carlito,
-crosextra-caladea, -gfs-didot, -play, -quicksand).

    python scripts/build_bench_vlm_assets.py --fonts FOLDER [FOLDER ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
from PIL import Image, ImageDraw, ImageFont

from tokenary.models.bench_vlm.assets import CAP_HEIGHT, FILE, GLYPHS, PHOTOS

# Validation and test fonts are of families that training never sees.
FONTS = {
    "train": """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-ExtraLight DejaVuSansCondensed DejaVuSansMono
        DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerifCondensed LiberationSans-Regular LiberationSans-Bold
        LiberationSans-Italic LiberationMono-Regular LiberationMono-Bold LiberationSerif-Regular LiberationSerif-Bold
        LiberationSerif-Italic LiberationSansNarrow-Regular Lato-Regular Lato-Black Lato-Light Lato-Italic
        Roboto-Regular Roboto-Bold Roboto-Italic RobotoCondensed-Regular Inconsolata ComicNeue-Regular ComicNeue-Bold
        FiraCode-Regular FiraCode-SemiBold FreeMono FreeMonoBold FreeSerif FreeSerifBold CourierPrime
        CourierPrimeBold GFSDidot GFSDidotBold""",
    "val": "Carlito-Regular Carlito-Bold Cantarell-Regular Hack-Regular Hack-Bold Quicksand-Medium",
    "test": "Caladea-Regular Caladea-Bold OpenSans-Regular OpenSans-Semibold Play-Regular Play-Bold",
}
PHOTO_FILES = {
    "person": "astronaut.png", "cat": "chelsea.png", "cup": "coffee.png", "rocket": "rocket.jpg",
    "stars": "hubble_deep_field.jpg", "eye": "retina.jpg", "coins": "coins.png",
    "brick": "brick.png", "grass": "grass.png", "flower": "flower.jpg", "temple": "china.jpg",
}  # fmt: skip
PHOTO_SIDE = 160


def glyph(font: ImageFont.FreeTypeFont, top: int, character: str) -> np.ndarray:
    """Rasterise one character to (1.2 CAP_HEIGHT, width) uint8; the row 0 is the top of a capital H."""
    left, _, right, _ = font.getbbox(character)
    image = Image.new("L", (right - left, CAP_HEIGHT * 6 // 5))
    ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=font)
    return np.asarray(image)


def rasterise(path: Path) -> list[np.ndarray]:
    """Rasterise all of `GLYPHS` in one font, scaled so that a capital H is CAP_HEIGHT pixels high."""
    size = CAP_HEIGHT
    while True:
        font = ImageFont.truetype(str(path), size)
        _, top, _, bottom = font.getbbox("H")
        if bottom - top >= CAP_HEIGHT:
            return [glyph(font, top, character) for character in GLYPHS]
        size += 1


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fonts", nargs="+", type=Path, required=True)
    files = {
        path.stem.replace(" ", ""): path
        for folder in parser.parse_args().fonts
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".ttf", ".otf")
    }
    names, splits, rows = [], [], []
    for split, text in FONTS.items():
        for name in text.split():
            names.append(name)
            splits.append(split)
            rows.append(rasterise(files[name]))
    width = max(g.shape[1] for row in rows for g in row)
    widths = np.array([[g.shape[1] for g in row] for row in rows], np.uint8)
    glyphs = np.array([[np.pad(g, ((0, 0), (0, width - g.shape[1]))) for g in row] for row in rows])
    glyphs = (glyphs.astype(np.uint16) + 8) // 17  # 16 grey levels
    digits = sklearn.datasets.load_digits()
    photos = []
    for name in PHOTOS:
        folder = Path(skimage.__file__).parent / "data"
        path = folder / PHOTO_FILES[name]
        if not path.exists():
            path = Path(sklearn.datasets.__file__).parent / "images" / PHOTO_FILES[name]
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        box = [(length - side) // 2 for length in image.size]
        image = image.crop((box[0], box[1], box[0] + side, box[1] + side)).resize((PHOTO_SIDE, PHOTO_SIDE))
        photos.append(np.asarray(image) // 4 * 4)  # 64 levels a channel: half the file
    np.savez_compressed(
        FILE,
        glyphs=glyphs.astype(np.uint8),
        glyph_widths=widths,
        font_names=np.array(names),
        font_splits=np.array(splits),
        digits=digits.images.astype(np.uint8),
        digit_labels=digits.target.astype(np.uint8),
        photos=np.array(photos),
    )
    print(f"{FILE.name}: {len(names)} fonts, glyphs {glyphs.shape}, {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
