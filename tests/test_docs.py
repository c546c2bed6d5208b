"""What README.md and docs/ say can be done can be done: configurations, links, commands."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import fields_dict
from ruamel.yaml import YAML

from mgpu_effects.config_file import ConfigErrors, load_settings
from mgpu_effects.settings import Settings
from mgpu_http.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
# Where a command begins: the line, a prompt, the other side of a pipe.
COMMAND = re.compile(r"(?:^|\$ |\| *)(make|mgpu) +([a-z-]+)(?: +([a-z][a-z-]*))?", re.MULTILINE)
SHELLS = {"sh", "bash", "console"}
SETTINGS_KEYS = {*fields_dict(Settings), "gpu"}

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


class AnyVariable(dict[str, str]):
    """An environment in which every variable is set."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return "set"


def configurations(text: str) -> Iterator[str]:
    """Give the yaml blocks that are a configuration of the broker, or a part of one."""
    for language, block in FENCE.findall(text):
        if language == "yaml":
            content = YAML(typ="safe").load(block)
            if isinstance(content, dict) and content.keys() & SETTINGS_KEYS:
                yield block


def wrong_configurations(text: str, scratch: Path) -> list[str]:
    wrong = []
    for block in configurations(text):
        scratch.write_text(block)
        try:
            load_settings(scratch, AnyVariable())
        except ConfigErrors as errors:
            wrong.append(f"{errors} in:\n{block}")
    return wrong


def anchors(text: str) -> set[str]:
    """Give the names by which forges link to the headings of a page."""
    found: Counter[str] = Counter()
    names = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        plain = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def broken_links(text: str, place: Path) -> list[str]:
    """Give the links to files and headings that are not there."""
    broken = []
    for link in LINK.findall(SPAN.sub("", FENCE.sub("", text))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = place.parent / path if path else place
        there = target.read_text() if target.suffix == ".md" and target.is_file() else ""
        if not target.exists() or (anchor and anchor not in anchors(there if path else text)):
            broken.append(link)
    return broken


def unknown_commands(text: str) -> list[str]:
    """Give the commands in code that neither the Makefile nor `mgpu` knows."""
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    known = {command.name for command in COMMANDS}
    code = [block for language, block in FENCE.findall(text) if language in SHELLS]
    code += SPAN.findall(FENCE.sub("", text))
    unknown = []
    for program, first, second in COMMAND.findall("\n".join(code)):
        names = {first} if program == "make" else {first, f"{first} {second}"}
        if not names & (targets if program == "make" else known):
            unknown.append(f"{program} {first} {second}".strip())
    return unknown


@page
def test_configurations_are_in_order(page: Path, tmp_path: Path) -> None:
    assert wrong_configurations(page.read_text(), tmp_path / "consumers.yaml") == []


@page
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page.read_text(), page) == []


@page
def test_commands_are_there(page: Path) -> None:
    assert unknown_commands(page.read_text()) == []


def test_pages_have_what_is_tested_here() -> None:
    text = "\n".join(path.read_text() for path in PAGES)
    assert len(list(configurations(text))) > 5
    assert len(LINK.findall(text)) > 20
    assert {"make", "mgpu"} <= {program for program, *_ in COMMAND.findall(_spans(text))}


def _spans(text: str) -> str:
    return "\n".join(SPAN.findall(FENCE.sub("", text)))


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    place = tmp_path / "page.md"
    text = (
        "# A `b`, c\n\n[here](#a-b-c) [there](page.md#a-b-c) [away](https://example.org)\n"
        "[no page](none.md) [no heading](#none) [nor there](page.md#none) `[code](none.md)`\n\n"
        "`make test`, `make nonsense`, `mgpu key add NAME`, `mgpu key lose`, `mgpu nonsense`\n\n"
        "```sh\n$ echo | mgpu log apply FILE\nmgpu log lose FILE\n```\n\n"
        "```yaml\nconsumers: {a: {url: 'http://127.0.0.1:1', speed: '${env:SPEED}'}}\n```\n"
        "```yaml\nscrape_configs: []\n```\n"
    )
    place.write_text(text)
    assert broken_links(text, place) == ["none.md", "#none", "page.md#none"]
    assert sorted(unknown_commands(text)) == [
        "make nonsense",
        "mgpu key lose",
        "mgpu log lose",
        "mgpu nonsense",
    ]
    wrong = wrong_configurations(text, tmp_path / "consumers.yaml")
    assert len(wrong) == 1
    assert "speed" in wrong[0]


# ------------------------------------------------------------------------- what commands print

SHOWN = re.compile(
    r"^```console\n\$ mgpu ((?:log|replay)[^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL
)
RATE = re.compile(r"\d+ a second")


DEBUGGING, _ = (ROOT / "docs" / "debugging.md").read_text().split("\n## Three incidents")


# The incidents behind it are checked in tests/incidents.
@pytest.mark.parametrize(("command", "printed"), SHOWN.findall(DEBUGGING))
def test_commands_print_what_is_shown(
    command: str,
    printed: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("COLUMNS", "140")
    time.tzset()
    assert main(command.split()) == 0
    assert RATE.sub("N a second", capsys.readouterr().out) == RATE.sub("N a second", printed)
