"""Real text and pictures: what ships with the package, and one loader a public data set.

``prompts``, ``prose`` and ``stdlib_code`` are always there. The others (``wikitext2``, ``gsm8k``, ``humaneval``,
``enwik8``, ``udhr``, ``imdb``, ``bach_chorales``, and ``cifar10``, which are arrays) return plain objects and look for
their file first in the folder ``TOKENARY_DATA``, then in the cache; else they download it from its source. Every file
is checked against its sha256.
``DATASETS`` lists them with licence and size; ``read_prompts`` reads a user's own file.
"""

from __future__ import annotations

from tokenary.data.loaders import enwik8, gsm8k, humaneval, imdb, udhr, wikitext2
from tokenary.data.pictures import CIFAR10_CLASSES, cifar10
from tokenary.data.scores import Note, bach_chorales
from tokenary.data.shipped import Prompt, prompts, prose, read_prompts, stdlib_code
from tokenary.data.sources import DATASETS, Dataset

__all__ = [
    "CIFAR10_CLASSES",
    "DATASETS",
    "Dataset",
    "Note",
    "Prompt",
    "bach_chorales",
    "cifar10",
    "enwik8",
    "gsm8k",
    "humaneval",
    "imdb",
    "prompts",
    "prose",
    "read_prompts",
    "stdlib_code",
    "udhr",
    "wikitext2",
]
