"""What the documents say must be there: links, numbers, commands."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from stp.cli import root as stp
from stpctl.commands import root as stpctl
from stpd.__main__ import main as stpd

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS: dict[str, click.Command] = {"stp": stp, "stpd": stpd, "stpctl": stpctl}
REQUIREMENT = re.compile(r"^\* \*\*R-(\d+)-(\d+)\*\*", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The headings of a document as GitHub makes anchors of them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{target}: no such heading"


def test_requirements_are_numbered_in_order() -> None:
    found = [
        (int(a), int(b)) for a, b in REQUIREMENT.findall((ROOT / "docs" / "protocol.md").read_text("utf-8"))
    ]
    sections = sorted({section for section, _ in found})
    assert sections == list(range(2, 12))
    for section in sections:
        numbers = [number for where, number in found if where == section]
        assert sorted(numbers) == list(range(1, len(numbers) + 1)), (
            f"§{section}: a number is missing or twice"
        )


def test_requirements_that_are_cited_exist() -> None:
    known = {f"R-{a}-{b}" for a, b in REQUIREMENT.findall((ROOT / "docs" / "protocol.md").read_text("utf-8"))}
    sources = [
        p for top in ("stp", "stpd", "stpctl", "tests", "bench", "docs") for p in (ROOT / top).rglob("*.*")
    ]
    for path in sources:
        if path.suffix in (".py", ".md"):
            cited = set(re.findall(r"\bR-\d+-\d+\b", path.read_text(encoding="utf-8")))
            assert cited <= known, f"{path.relative_to(ROOT)} cites {sorted(cited - known)}"


def test_decisions_are_in_the_index() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "docs" / "decisions").glob("[0-9]*.md")}
    assert {name for name in files if f"({name})" not in index} == set()


def commands(text: str) -> set[str]:
    """What a reader would type: in back quotes, or at the beginning of an indented line."""
    typed = re.findall(r"`((?:stp|stpd|stpctl) [^`]+)`", text)
    typed += re.findall(r"^    (?:\$ )?((?:stp|stpd|stpctl) .+)$", text, re.MULTILINE)
    return set(typed)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(document: Path) -> None:
    for line in commands(document.read_text(encoding="utf-8")):
        words = re.sub(r"--context\s+\S+", "", line).split()
        command = PROGRAMS[words[0]]
        for word in words[1:]:
            if not isinstance(command, click.Group) or word.startswith("-"):
                break
            found = command.commands.get(word)
            assert found is not None, f"`{line}`: there is no {word}"
            command = found
        options = {
            name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        options |= {"-h", "--help", "--version"}
        for word in words:
            if re.fullmatch(r"--?[a-z][a-z-]*", word):
                assert word in options, f"`{line}`: there is no {word}"
