"""The command line: one file a command group, and one place where every error becomes one line.

Exit codes: 0, 1 for laws that are broken and for defects of Tokenary itself, 2 for wrong input, 130 for Ctrl-C.
Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for programmers
    try:
        from tokenary.cli.app import run

        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, so that a closed pipe is noticed here
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # who reads our output has seen enough: `tokenary methods | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _report(error)
    if code == 130:
        print("tokenary: cancelled", file=sys.stderr)
    return code


def _report(error: Exception) -> int:
    """Say what went wrong in one line on stderr; return the exit code."""
    from tokenary.core.errors import TokenaryError

    if os.environ.get("TOKENARY_DEBUG"):
        import traceback

        traceback.print_exception(error)
    text = " ".join(str(error).split())
    if isinstance(error, TokenaryError):
        print(f"tokenary: {text}", file=sys.stderr)
        return 2
    if isinstance(error, OSError):  # a full disk, a folder that is not ours
        print(f"tokenary: {error.strerror or text}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return 2
    hint = "" if os.environ.get("TOKENARY_DEBUG") else "; run with TOKENARY_DEBUG=1 for the traceback"
    print(f"tokenary: {type(error).__name__}: {text} (this is a bug{hint})", file=sys.stderr)
    return 1
