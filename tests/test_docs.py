"""The pages say what is so: their figures come from the records, their examples run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tokenary
from tokenary.cli.app import app
from tokenary.core.laws import check_class, laws_of, the_recipe_survives_json
from tokenary.core.registry import card, read_card

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def build():
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_those_of_the_records(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    assert build().main() == 0, capsys.readouterr().err


def test_what_was_not_measured_says_so(monkeypatch, tmp_path):
    module = build()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    page = module.filled("a\n<!-- begin: compare -->\nold 3.7x\n<!-- end: compare -->\nb\n")
    assert (
        page == "a\n<!-- begin: compare -->\n*not measured yet: `make bench` measures it.*\n<!-- end: compare -->\nb\n"
    )
    assert module.verdicts().count("not measured yet") >= 2


def test_every_command_in_the_pages_exists():
    words = {
        tuple(re.findall(r"[a-z]+", line)[: 2 if line.split()[0] in ("claims", "store", "tokenizer") else 1])
        for page in PAGES
        for line in re.findall(r"(?:\$ |`|^    )tokenary ([a-z][a-z ]*)", page.read_text(), re.MULTILINE)
    }
    assert len(words) >= 10
    for command in words:
        assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http") and target != "docs/report.png":
            assert (page.parent / target).exists(), target


def test_the_recipes_in_the_pages_are_recipes():
    text = "\n".join(page.read_text() for page in PAGES)
    recipes = re.findall(r'--with ("[^"]+"|\S+)', text) + re.findall(r"recipe=(\"[^\"]+\")", text)
    assert len(recipes) > 10
    for found in recipes:
        found = found.strip('"`')
        if "last-successor" not in found and not found.startswith("aded:store"):
            tokenary.Recipe.parse(found).build()


def test_the_example_of_a_method_works(tmp_path):
    source = re.search(
        r"```python\n# src/tokenary/decode/(\w+)\.py\n(.*?)```", (ROOT / "docs/add-a-method.md").read_text(), re.DOTALL
    )
    file = tmp_path / f"{source[1]}.py"
    file.write_text(source[2])
    found = read_card(file)
    assert found.slug == source[1].replace("_", "-")
    spec = importlib.util.spec_from_file_location(source[1], file)
    module = sys.modules[source[1]] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        laws = tuple(law for law in laws_of("aded") if law is not the_recipe_survives_json)  # it is in no room here
        report = check_class(getattr(module, found.cls), laws)
    finally:
        del sys.modules[source[1]]
    assert report.ok, str(report)


def test_the_documented_papers_are_the_cards():
    assert card("keyformer").paper == "2403.09054" and card("token-recycling").paper == "2408.08696"


def test_no_path_of_a_machine_and_no_typed_speed():
    for page in PAGES:
        text = re.sub(r"<!-- begin: (\w+) -->.*?<!-- end: \1 -->", "", page.read_text(), flags=re.DOTALL)
        assert not re.search(r"/work|/tmp|/root|/home", text), page
        if page.name != "ledger.md":
            assert not re.search(r"\d(\.\d+)?\s?(x|×|times) (faster|as fast)|\d+ tokens/s", text), page


def test_the_makefile_knows_its_targets():
    made = subprocess.run(["make", "-n", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "lint", "bench", "claims", "clean"):
        assert f"make {target}" in made
    run = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in run and "make test" in run and (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_main_comparison_is_the_same_everywhere():
    """The one that README shows is the one that make demo runs."""
    made, page = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    recipes = [
        re.findall(r"--with ([^\s\\]+)", part)
        for part in (made.split("MAIN :=")[1].split(".PHONY")[0], page.split("```console")[2].split("```")[0])
    ]
    assert recipes[0] == recipes[1] and len(recipes[0]) == 6
    assert "torch==2.13.0\n" in (ROOT / "constraints.txt").read_text()
    assert not re.search(r"\+cpu|://|@", (ROOT / "constraints.txt").read_text())
