"""Puts the command groups together, and runs them without a traceback."""

from __future__ import annotations

import sys

import typer

from tokenary.cli import (
    batch,
    check,
    claims,
    compare,
    compress,
    doctor,
    generate,
    infill,
    methods,
    models,
    probe,
    serve,
    store,
    tokenizer,
    vlm,
)

#: The base of the errors that typer words itself; typer exports no name for it.
ClickException = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="tokenary",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Everything that happens to a token: published methods behind one interface, each with its proof.

    Methods compose into recipes, e.g. [bold]token-recycling:nodes=24 + keyformer:keep=50%[/bold].

    A first look: [bold]tokenary compare --with token-recycling --with keyformer:keep=50%[/bold]""",
)


def _version(value: bool) -> None:
    if value:
        from tokenary import __version__

        typer.echo(f"tokenary {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("methods")(methods.methods)
app.command("show")(methods.show)
app.add_typer(models.app, name="models")
app.command("generate")(generate.generate)
app.command("infill")(infill.infill)
app.command("compare")(compare.compare)
app.add_typer(claims.app, name="claims")
app.command("check")(check.check)
app.add_typer(store.app, name="store")
app.add_typer(tokenizer.app, name="tokenizer")
app.command("probe")(probe.probe)
app.command("compress")(compress.compress)
app.command("decompress")(compress.decompress)
app.command("serve")(serve.serve)
app.command("batch")(batch.batch)
app.add_typer(vlm.app, name="vlm")
app.command("doctor")(doctor.doctor)


def run(argv: list[str]) -> int:
    """Run one command line; wrong usage is one line on stderr and exit code 2."""
    try:
        code = app(args=argv, prog_name="tokenary", standalone_mode=False)
    except typer.Abort:
        return 130
    except ClickException as error:  # type: ignore[misc]
        if type(error).__name__ == "NoArgsIsHelpError":  # the help itself is the message
            print(error.format_message(), file=sys.stderr)
            return 2
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context is not None else ""
        print(f"tokenary: {' '.join(error.format_message().split())}{where}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0
