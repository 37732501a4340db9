from __future__ import annotations

import pytest

from tokenary.cli import main


@pytest.fixture
def cli(capfd, monkeypatch):
    """Run the command line in this process: exit code, stdout, stderr."""
    monkeypatch.delenv("TOKENARY_DEBUG", raising=False)

    def run(*arguments):
        code = main(list(map(str, arguments)))
        return code, *capfd.readouterr()

    return run
