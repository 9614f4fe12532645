"""The pages: what is generated is current, and what they name is there."""

import re
from pathlib import Path

import pytest

from utils.experiment import cli, flags, tables, tree
from utils.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {name: cli.parser_of(task) for name, task in TASKS.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_recorded_runs(page):
    text = page.read_text()
    assert tables.update(text) == text, f"run: python -m utils.experiment.tables {page.relative_to(ROOT)}"


def test_the_flags_page_is_that_of_the_parsers():
    assert flags.PAGE.read_text() == flags.page(), "run: python -m utils.experiment.flags"


def test_the_tree_is_that_of_the_folders():
    assert tree.PAGE.read_text() == tree.update(tree.PAGE.read_text()), "run: python -m utils.experiment.tree"


@pytest.mark.parametrize("task", TASKS)
def test_the_flags_page_explains_every_flag(task):
    page = flags.PAGE.read_text()
    wanted = {
        option for action in PARSERS[task]._actions for option in action.option_strings if option.startswith("--")
    }
    assert [flag for flag in sorted(wanted - {"--help"}) if f"`{flag}" not in page] == []


def test_pages_name_only_flags_that_exist():
    known = {option for parser in PARSERS.values() for action in parser._actions for option in action.option_strings}
    others = {"--nproc-per-node", "--no-deps"}  # torchrun's, pip's
    others |= {"--onnx", "--stronglyTyped", "--saveEngine", "--minShapes", "--optShapes", "--maxShapes"}  # trtexec's
    for page in PAGES:
        assert set(re.findall(r"--[a-z]\w*(?:-\w+)*", page.read_text())) <= known | others, page.name


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_fits():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 200
    table = text.split("<!-- table:")[1].split("<!-- /table -->")[0]
    assert len(re.findall(r"^\| (?:\+|Original)", table, re.MULTILINE)) == 6
    assert text.index("<!-- table:") < text.index("## Install") < text.index("## Run")


def test_the_readme_has_the_totals_of_the_coverage_run():
    """The last line of the report that counts all networks: tried, captured, exact, exported, all on integers, agreeing."""
    report = (ROOT / "results" / "coverage.txt").read_text()
    (line,) = [line for line in report.splitlines() if line.startswith("all ") and "BatchNorm" not in line]
    networks, *counts = re.findall(r"(?<=\s)\d+(?=\s)", line)[:6]
    captured, exact, exported, whole, agree = counts
    sentence = (
        f"Of {networks} networks of torchvision, timm, segmentation_models_pytorch and ultralytics, {captured} are captured, "
        f"{exact} of them exactly; {exported} are exported, {whole} with every convolution and linear layer on integers, "
        f"and {agree} agree with ONNX Runtime."
    )
    assert sentence in " ".join((ROOT / "README.md").read_text().split())


def test_every_recorded_row_is_shown_with_its_command():
    text = (ROOT / "results" / "README.md").read_text()
    rows = re.findall(r"^\| (?:\+|Original).*$", text, re.MULTILINE)
    assert len(rows) > 150 and all(re.search(r"\| `[^`]*` \| \w+\+? \|$", row) for row in rows)
