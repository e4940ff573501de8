"""What the documents say is there is there: files, tests, modules, commands and flags."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from test_layers import MODULES

from raybert.cli import COMMANDS, parse_train

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT) for folder in (".", "docs", "cluster") for path in ROOT.glob(f"{folder}/*.md")
)
README = (ROOT / "README.md").read_text()


def commands(text):
    """The command lines of `run.py` in code, as lists of words; those that go on behind a backslash whole."""
    text = text.replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in [*re.findall(r"^ {4}(.*)$", text, re.MULTILINE), *"\n".join(fenced).splitlines()]:
        found = re.search(r"python (?:run\.py|-m raybert) +([a-z].*)", line)
        if found:
            yield shlex.split(found.group(1), comments=True)
    yield from ([command] for command in re.findall(r"`(?:python )?run\.py ([a-z-]+)", text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    missing = [link for link in links if "://" not in link and not (ROOT / document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_commands_are_commands_and_flags_are_flags(document):
    for command, *words in commands((ROOT / document).read_text()):
        assert command in COMMANDS, command
        if command == "train":
            parse_train(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_tests_that_are_named_are_there(document):
    for name, _, test in re.findall(r"`(test_\w+\.py)(::(\w+))?`", (ROOT / document).read_text()):
        source = ast.parse((ROOT / "tests" / name).read_text())
        tests = [node.name for node in ast.walk(source) if isinstance(node, ast.FunctionDef)]
        assert test in tests or (not test and any(each.startswith("test_") for each in tests)), (name, test)


def test_the_readme_has_a_line_for_every_module_and_every_command():
    tree = README.partition("raybert/            imports")[2].partition("\n```")[0]
    words = set(
        re.findall(r"\w+", re.sub(r"bench_\*", " ".join(filter(lambda m: m.startswith("bench_"), MODULES)), tree))
    )
    assert not [module for module in MODULES if module not in words and not module.startswith("__")]
    assert not [command for command in COMMANDS if f"`{command}" not in README and f"run.py {command}" not in README]
