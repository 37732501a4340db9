"""``tokenary tokenizer``: measure tokenizers on text, and train new ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenary.cli import output
from tokenary.cli.transfer import transfer

if TYPE_CHECKING:
    from tokenary.tokenize.base import TextTokenizer
    from tokenary.tokenize.corpus import Part, Skipped

app = typer.Typer(
    no_args_is_help=True,
    help="Measure tokenizers on text, and train new ones; in and out as tokenizer.json.\n\n"
    "Example: [bold]tokenary tokenizer audit smollm2 gpt4o --builtin multilingual[/bold]",
)

_TEXT = typer.Option(
    [],
    "--text",
    "-t",
    help="A text file, UTF-8, or LANGUAGE=FILE; repeat it, or let further files follow that do not end in .json.",
)
_OUT = typer.Option(Path("out"), "--out", help="Folder for what is written.")
#: Options of `train` that belong to one algorithm.
_OWN = {
    "superword": ("transition", "most_words"),
    "supertoken": ("whole",),
    "lz": ("validation", "candidates", "score", "serial", "stop"),
    "even": ("parallel", "builtin", "language", "grid", "law"),
}
_ALGORITHMS = ("bpe", "unigram", *_OWN)
_MESSAGES, _MULTILINGUAL = "messages", "multilingual"


@app.command("list")
def list_tokenizers(as_json: bool = output.JSON) -> None:
    """List the tokenizers that can be named without a file.

    Example: [bold]tokenary tokenizer list[/bold]
    """
    from tokenary.tokenize.catalogue import list_tokenizers as rows_of

    found = rows_of()
    if as_json:
        output.as_json(found)
        return
    rows = []
    for row in found:
        state = "on disk" if row["on_disk"] else f"{row['download_mb']:g} MB to fetch"
        rows.append([row["name"], row["title"], row["what"], state, row["licence"]])
    output.table(["name", "tokenizer", "kind", "here", "licence"], rows)
    output.note("also: a tokenizer.json, a folder that holds one, a model of `tokenary models`, a hub id org/name")


# ------------------------------------------------------------------------------------------------------- audit


@app.command("audit")
def audit(
    tokenizers: list[str] = typer.Argument(
        help="A tokenizer.json, a folder that holds one, a name of `tokenary tokenizer list`, a model, or org/name."
    ),
    text: list[str] = _TEXT,
    builtin: str = typer.Option(
        None, help="multilingual: the Universal Declaration of Human Rights, the same text in 33 languages."
    ),
    language: list[str] = typer.Option(
        [], "--language", "-l", help="With --builtin: a language instead of the 33 (eng, cmn_hans, ...); repeat it."
    ),
    parallel: bool = typer.Option(
        False, "--parallel", help="Line i of every file says the same thing: premiums are measured."
    ),
    reference: str = typer.Option("eng", help="The language that premiums compare with."),
    order: int = typer.Option(4, min=1, max=4, help="Longest run of tokens for conditional entropies."),
    alpha: float = typer.Option(2.0, help="Order of the Renyi entropy."),
    compress: str = typer.Option("gzip", help="Compressors that run: gzip, xz (slower), lz78, none."),
    first_mb: int = typer.Option(16, min=1, help="Conditional entropies and compression look at so many MiB a file."),
    vocabulary: bool = typer.Option(True, help="Look for tokens that no text becomes."),
    engine: str = typer.Option("local", help="local, or ray: Ray Data, with the same figures to the last digit."),
    address: str = typer.Option(None, help="Of a Ray cluster; without it --engine ray starts one here."),
    out: Path = _OUT,
    as_json: bool = output.JSON,
) -> None:
    """Audit tokenizers: what text costs in tokens, how evenly languages are treated, what the vocabulary wastes.

    Fertility is tokens a word; a premium is the tokens that a language needs over those of the reference, for the same
    sentences. H1 is the entropy of a token, bits/byte the best adaptive code with up to three tokens of context:
    compare tokenizers by it. Dead tokens do not occur in this text, unreachable ones in none; a fault is a text that
    does not come back from decoding. Writes audit.json and audit.html, which also shows two tokenizers token by token.

    Example: [bold]tokenary tokenizer audit smollm2 gpt4o --builtin multilingual[/bold]

    Files are read in parts and may be larger than memory: [bold]tokenary tokenizer audit tokenizer.json --text
    corpus.txt[/bold]. Parallel ones: [bold]... --parallel --text eng=en.txt --text deu=de.txt[/bold]
    """
    from tokenary.core.errors import InputError, OptionError

    if text:  # the shell writes --text *.txt as one option and many arguments
        text = [*text, *(name for name in tokenizers if _is_text(name))]
        tokenizers = [name for name in tokenizers if not _is_text(name)]
    if not tokenizers:
        raise InputError("name a tokenizer: see `tokenary tokenizer list`")
    if bool(text) == (builtin is not None):
        raise InputError("give text files with --text, or --builtin multilingual")
    if builtin not in (None, _MULTILINGUAL):
        raise OptionError("builtin", builtin, _MULTILINGUAL)
    if language and builtin is None:
        raise InputError("--language chooses among the languages of --builtin multilingual")
    if engine not in ("local", "ray"):
        raise OptionError("engine", engine, "local or ray")
    if address and engine != "ray":
        raise InputError("--address is that of a Ray cluster: give --engine ray")

    from tokenary.tokenize.audit import audit as run
    from tokenary.tokenize.audit import differences, local
    from tokenary.tokenize.corpus import plan_files, plan_texts
    from tokenary.tokenize.engine_ray import ray_engine
    from tokenary.tokenize.parallel import multilingual
    from tokenary.tokenize.report import render, warnings
    from tokenary.tokenize.token_premium import TokenPremium
    from tokenary.tokenize.tokenizer_information import TokenizerInformation

    options: dict[str, Any] = {"order": order, "alpha": alpha, "compress": compress, "first_mb": first_mb}
    information = TokenizerInformation(**options)
    chosen = ray_engine(address) if engine == "ray" else local
    loaded = _load(tokenizers)
    parts = plan_files(text, parallel) if text else plan_texts(multilingual(language or None))
    if (parallel or builtin) and reference not in {part.language for part in parts}:
        raise InputError(f"the reference {reference!r} is none of the languages: name one with --reference")
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written shows before minutes of counting
    measures = [TokenPremium(reference), information]
    with _progress(sum(part.nbytes for part in parts)) as done:
        record = run(loaded, parts, measures, engine=chosen, vocabulary=vocabulary, done=done)
    record["differences"] = [row for other in loaded[1:] for row in differences(loaded[0], other, parts)]
    output.write_text(out / "audit.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    output.write_text(out / "audit.html", render(record))
    if as_json:
        output.as_json(record)
    else:
        _print_audit(record)
        output.notes(warnings(record), [out / "audit.json", out / "audit.html"])


def _print_audit(record: dict[str, Any]) -> None:
    """Print the tables of an audit, and what they say."""
    from tokenary.tokenize.report import by_language, findings, summary

    output.table(*summary(record))
    for row in record["tokenizers"]:
        if len(row["languages"]) > 1:
            typer.echo(f"\n{row['name']}")
            output.table(*by_language(record, row))
    typer.echo("\n".join(["", *findings(record)]))


def _is_text(name: str) -> bool:
    """Whether an argument can only be a text file, not a tokenizer."""
    path = Path(name.partition("=")[2] or name)
    return path.is_file() and path.suffix != ".json"


def _load(names: Sequence[str]) -> list[TextTokenizer]:
    """Load tokenizers and give them names that differ."""
    from tokenary.core.errors import InputError
    from tokenary.tokenize.base import load_tokenizer

    if len(set(names)) < len(names):
        raise InputError("a tokenizer is named twice")
    loaded = [load_tokenizer(name) for name in names]
    short = [tokenizer.name for tokenizer in loaded]
    for name, tokenizer in zip(names, loaded, strict=True):
        if short.count(tokenizer.name) > 1:
            tokenizer.name = name
    return loaded


class _progress:
    """A progress bar on stderr, called with how much more is done."""

    def __init__(self, total: float, unit: str = "bytes") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        size = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        columns = "{task.description}", BarColumn(), size, TimeRemainingColumn()
        console = Console(file=sys.stderr)
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("counting" if unit == "bytes" else unit, total=total)

    def __enter__(self) -> Callable[[float], None]:
        self._bar.start()
        return lambda more: self._bar.advance(self._task, more)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


# ------------------------------------------------------------------------------------------------------- train


@app.command("train")
def train(
    more: list[str] = typer.Argument(None, metavar="[FILE]...", help="More text files."),
    text: list[str] = _TEXT,
    algorithm: str = typer.Option("bpe", "--algorithm", "-a", help=f"One of {', '.join(_ALGORITHMS)}."),
    vocab_size: int = typer.Option(8192, "--vocab-size", "-v", min=257, help="Tokens, with bytes and special ones."),
    special: list[str] = typer.Option([], help="A special token; the first one ends a text. Repeat it."),
    held_out: list[str] = typer.Option([], help="Text that is not trained on: figures are given for it."),
    transition: float = typer.Option(None, help="superword: share of the vocabulary learned inside words (0.9)."),
    most_words: int = typer.Option(None, help="superword: words that a token may hold (4)."),
    whole: bool = typer.Option(False, "--whole", help="supertoken: in use merge over line ends too."),
    validation: str = typer.Option(None, help="lz: text that merges are judged by; else the last 100 kB."),
    candidates: int = typer.Option(None, help="lz: most frequent pairs that are tried at each step (32)."),
    score: str = typer.Option(None, help="lz: gzip (default), lz78, or gain (of likelihood)."),
    serial: str = typer.Option(None, help="lz: how ids are written for gzip: fixed (default), or ranked."),
    stop: bool = typer.Option(False, "--stop", help="lz: end where no merge makes the text shorter."),
    parallel: list[str] = typer.Option([], help="even: LANGUAGE=FILE, line i of all says the same; half verifies."),
    builtin: str = typer.Option(None, help="even: messages, those of Django in 98 languages (trained on the rest)."),
    language: list[str] = typer.Option([], "--language", "-l", help="even: with --builtin, a language; repeat it."),
    grid: list[int] = typer.Option([], help="even: a vocabulary size that the law is fitted to; repeat it."),
    law: str = typer.Option(None, help="even: power (default), saturating, local, or search (by halving)."),
    seed: int = typer.Option(0, help="Of random chunks and splits."),
    out: Path = _OUT,
    as_json: bool = output.JSON,
) -> None:
    """Train a tokenizer: tokenizer.json and tokenizer_config.json for transformers, training.json on how.

    [bold]bpe[/bold], [bold]unigram[/bold]: with the trainers of tokenizers, over bytes.
    [bold]superword[/bold]: BPE that goes on across spaces for the last tenth of the vocabulary.
    [bold]supertoken[/bold]: BPE over chunks of random length, tokens of several words.
    [bold]lz[/bold]: takes the merge that makes a held-out text shortest under gzip; slow, for a few thousand tokens.
    [bold]even[/bold]: a tokenizer for each language, of the size at which all need as many tokens for the same
    sentences; --vocab-size is the size whose median is the target.

    Example: [bold]tokenary tokenizer train --text book.txt --vocab-size 4096 --out out/book[/bold]

    [bold]tokenary tokenizer train -a even --builtin messages -v 500 --out out/even[/bold]
    """
    from tokenary.core.errors import InputError, UnknownNameError

    if algorithm not in _ALGORITHMS:
        raise UnknownNameError("algorithm", algorithm, _ALGORITHMS)
    given = {
        "transition": transition, "most_words": most_words, "whole": whole, "validation": validation,
        "candidates": candidates, "score": score, "serial": serial, "stop": stop, "parallel": parallel,
        "builtin": builtin, "language": language, "grid": grid, "law": law,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value not in (None, False, [])}
    for name in given:
        owner = next(owner for owner, names in _OWN.items() if name in names)
        if owner != algorithm:
            raise InputError(f"--{name.replace('_', '-')} is an option of {owner}, not of {algorithm}")
    text = [*text, *(more or [])]
    if len(special) > len(set(special)) or vocab_size - len(special) < 257:
        raise InputError("special tokens must differ, and leave 257 tokens of the vocabulary")
    about: dict[str, Any] = {"algorithm": algorithm, "vocab_size": vocab_size, "seed": seed, **given, "texts": text}
    if algorithm == "even":
        if held_out:
            raise InputError("--held-out is not for even: half of the parallel lines verify it")
        _train_even(about, text, special, out, as_json)
        return
    if not text:
        raise InputError("no text to train on: give files with --text")
    corpus, held = _Corpus(text), _Corpus(held_out) if held_out else None
    out.mkdir(parents=True, exist_ok=True)

    from tokenary.tokenize.training import usage, with_special

    trained = _trainer(algorithm, corpus, vocab_size - len(special), given, about, seed, quiet=as_json)
    trained = with_special(trained, special) if special else trained
    about |= {"vocabulary": trained.vocab_size, "digest": trained.digest, "bytes": corpus.nbytes}
    if held is not None:
        about["held_out"] = usage(trained, list(held))
    _write(out, trained, special, about)
    corpus.report()
    if as_json:
        output.as_json(about)
        return
    if trained.vocab_size < vocab_size:
        output.note(f"note: the text yields {trained.vocab_size:,} tokens, not {vocab_size:,}")
    typer.echo(f"{out / 'tokenizer.json'}: {trained.vocab_size:,} tokens from {output.size(corpus.nbytes)}")
    if held is not None:
        found = about["held_out"]
        typer.echo(
            f"held out: {found['bytes_per_token']:.2f} bytes and {found['chars_per_token']:.2f} characters a token,"
            f" {found['across_words']:.1%} of them across words"
        )


class _Corpus:
    """Texts of files, read part by part each time they are asked for; counts what it leaves out."""

    def __init__(self, files: Sequence[str]) -> None:
        from tokenary.tokenize.corpus import plan_files

        self.parts: list[Part] = plan_files(files)
        self.nbytes = sum(part.nbytes for part in self.parts)
        self._skipped: dict[Part, Skipped] = {}

    def __iter__(self) -> Iterator[str]:
        from tokenary.tokenize.corpus import read

        for part in self.parts:
            rows, self._skipped[part] = read(part)
            yield from (text for _, text in rows)

    def report(self) -> None:
        """Say on stderr how many lines were left out."""
        lines = sum(skipped.lines for skipped in self._skipped.values())
        if lines:
            output.note(f"note: {lines:,} lines are not UTF-8 and were left out")


def _trainer(
    algorithm: str, corpus: _Corpus, size: int, given: dict[str, Any], about: dict[str, Any], seed: int, quiet: bool
) -> TextTokenizer:
    from tokenary.tokenize.supertoken import MIXTURE, train_supertokens
    from tokenary.tokenize.token_premium.superword import train_superwords
    from tokenary.tokenize.training import train_bpe

    progress = not quiet and sys.stderr.isatty()
    if algorithm in ("bpe", "unigram"):
        return train_bpe(corpus, size, algorithm, progress=progress)  # type: ignore[arg-type]
    if algorithm == "supertoken":
        about["mixture"] = MIXTURE
        return train_supertokens(corpus, size, seed=seed, progress=progress, **given)
    if algorithm == "superword":
        with _merging() as done:
            return train_superwords(list(corpus), size, done=done, **given)
    return _train_lz(corpus, size, given, about)


def _train_lz(corpus: _Corpus, size: int, given: dict[str, Any], about: dict[str, Any]) -> TextTokenizer:
    from tokenary.core.errors import InputError, OptionError
    from tokenary.tokenize.tokenizer_information.lz_bpe import train_lz_bpe

    for name, choices in (("score", ("gzip", "lz78", "gain")), ("serial", ("fixed", "ranked"))):
        if given.get(name, choices[0]) not in choices:
            raise OptionError(name, given[name], " or ".join(choices))
    options = {name: value for name, value in given.items() if name != "validation"}
    if "validation" in given:
        texts, judge = list(corpus), "".join(_Corpus([given["validation"]]))
    else:
        whole = "".join(corpus)
        at = len(whole) - min(100_000, len(whole) // 4)
        texts, judge = [whole[:at]], whole[at:]
    if not judge.strip():
        raise InputError("nothing to judge merges by: the validation text is empty")
    with _merging() as done:
        trained = train_lz_bpe(texts, judge, size, done=done, **options)
    about |= {"natural_stop": trained.natural_stop, "validation_bytes": len(judge.encode())}
    return trained.tokenizer()


class _merging:
    """A bar for trainers that tell merges so far and their number."""

    def __init__(self) -> None:
        self._bar: _progress | None = None
        self._last = 0

    def __enter__(self) -> Callable[[int, int], None]:
        return self._done

    def _done(self, merges: int, total: int) -> None:
        if self._bar is None:
            self._bar = _progress(total, "merging")
            self._advance = self._bar.__enter__()
        self._advance(merges - self._last)
        self._last = merges

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__()


def _train_even(about: dict[str, Any], text: Sequence[str], special: Sequence[str], out: Path, as_json: bool) -> None:
    from tokenary.core.errors import InputError, OptionError
    from tokenary.tokenize.token_premium.even import even_vocabularies, verify
    from tokenary.tokenize.training import with_special

    builtin, law = about.get("builtin"), about.get("law", "power")
    if law not in ("power", "saturating", "local", "search"):
        raise OptionError("law", law, "power, saturating, local or search")
    if builtin not in (None, _MESSAGES):
        raise OptionError("builtin", builtin, _MESSAGES)
    if builtin and (text or about.get("parallel")):
        raise InputError("--builtin messages brings its own text")
    if builtin:
        training, shared = _messages(about.get("language", []), about["seed"])
    else:
        training, shared = _parallel(text, about.get("parallel", []))
    common = about["vocab_size"] - len(special)
    sizes = about.get("grid") or [max(257, round(common * factor)) for factor in (0.55, 0.7, 0.85, 1.2, 1.6, 2.1, 3)]
    fitting = {name: rows[::2] for name, rows in shared.items()}
    unseen = {name: rows[1::2] for name, rows in shared.items()}
    out.mkdir(parents=True, exist_ok=True)
    with _merging() as done:
        even = even_vocabularies(training, fitting, sizes, common, law, done=done)
    found = verify(even, common, unseen)
    about |= {"target": even.target, "sentences": {"fitted": len(fitting[min(fitting)]), "verified": 0}, **found}
    about["sentences"]["verified"] = len(unseen[min(unseen)])
    for name in found["languages"]:
        made = even.tokenizer(name)
        _write(out / name, with_special(made, special) if special else made, special, {"language": name})
    output.write_text(out / "training.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        output.as_json(about)
        return
    head = ["language", "size", "tokens", f"tokens at {common:,}", "target reached"]
    rows = [
        [name, f"{row['size']:,}", f"{row['tokens']:,}", f"{row['tokens_equal']:,}", "yes" if row["reached"] else "no"]
        for name, row in found["languages"].items()
    ]
    output.table(head, rows)
    own, equal = found["own"], found["equal"]
    typer.echo(
        f"\nOn sentences that nothing was fitted to: coefficient of variation {own['cv']:.3f} instead of"
        f" {equal['cv']:.3f}, max/min {own['max_min']:.2f} instead of {equal['max_min']:.2f} (F test of the variances:"
        f" p = {found['variance_ratio_p']:.2g})\n{out}"
    )


def _messages(languages: Sequence[str], seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Django's messages: half of those that all languages share, shuffled, and the rest of each language."""
    from tokenary.core.errors import InputError
    from tokenary.core.seeding import substream
    from tokenary.tokenize.parallel import django_catalogues

    texts = django_catalogues(languages or None)
    if not languages:  # those with enough messages
        texts = {name: found for name, found in texts.items() if len(found) > 400}
    shared = sorted(set.intersection(*(set(found) for found in texts.values())))
    keys = [shared[i] for i in substream(seed, "messages").permutation(len(shared))[: len(shared) // 2]]
    if len(keys) < 40:
        raise InputError(f"these languages share {len(shared)} messages, too few: leave some out")
    training = {name: [found[key] for key in sorted(set(found).difference(keys))] for name, found in texts.items()}
    return training, {name: [found[key] for key in keys] for name, found in texts.items()}


def _parallel(text: Sequence[str], parallel: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts to train on, and lines that all languages share."""
    from tokenary.core.errors import InputError
    from tokenary.tokenize.corpus import plan_files, read

    if not text or not parallel:
        raise InputError("even needs --text LANGUAGE=FILE to train on, and --parallel LANGUAGE=FILE of the same lines")
    training: dict[str, list[str]] = {}
    for part in plan_files(text):
        training.setdefault(part.language, []).extend(text for _, text in read(part)[0])
    lines: dict[str, dict[str, str]] = {}
    for part in plan_files(parallel, parallel=True):
        rows = lines.setdefault(part.language, {})
        for key, line in read(part)[0]:
            rows[key] = rows.get(key, "") + line
    if set(lines) != set(training) or len(lines) < 2:
        raise InputError(
            f"--text has {', '.join(sorted(training))} and --parallel {', '.join(sorted(lines))}: both must name the"
            " same languages, at least two"
        )
    keys = sorted(set.intersection(*(set(rows) for rows in lines.values())))
    if len(keys) < 4:
        raise InputError(f"the languages share {len(keys)} lines that can be used: at least 4 are needed")
    return training, {name: [rows[key] for key in keys] for name, rows in lines.items()}


def _write(out: Path, tokenizer: TextTokenizer, special: Sequence[str], about: dict[str, Any]) -> None:
    """Write a tokenizer as transformers reads a folder, and how it came about."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if special:
        config["eos_token"] = special[0]
    output.write_text(out / "tokenizer.json", tokenizer.to_json())
    output.write_text(out / "tokenizer_config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    output.write_text(out / "training.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


app.command("transfer")(transfer)
