"""Documents say what is there: links, commands, files, names and limits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from myelin import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
VERBS = set(getattr(get_command(cli.app), "commands", {}))


def test_there_are_the_pages_and_verbs_that_are_promised() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md"} <= names
    assert {"docs/protocol.md", "docs/threat-model.md", "docs/privacy.md"} <= names
    promised = "keygen budget build inspect job approve seal grant run fetch verify rebuild demo"
    assert set(promised.split()) <= VERBS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"https?:|mailto:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = page.read_text()
    for verb in re.findall(r"(?:^|[ `/])myelin ([a-z]+)(?= |`|$)", text, re.M):
        if verb in ("a", "and", "is", "lets", "uses"):
            continue
        assert verb in VERBS, f"{page.name}: myelin {verb}"
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_architecture_names_files_that_are_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for name in re.findall(r"`([\w./-]+\.(?:py|rs|md))`", text):
        places = (name, f"src/myelin/{name}", f"tests/{name}", f"docs/{name}")
        assert any((ROOT / place).exists() for place in places), name


def test_the_protocol_lists_exactly_the_reasons_of_the_enclave() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text()
    listed = re.findall(r"`([a-z-]+)`", page.split("### Reasons")[1].split("\n\n")[2])
    code = (ROOT / "enclave" / "protocol" / "src" / "refusal.rs").read_text()
    # In the same order, which is that of their statuses.
    assert listed == re.findall(r'"([a-z]+(?:-[a-z]+)+)",$', code, re.M)


def test_every_dependency_is_explained_in_the_readme() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for wanted in {re.split(r"[<>=~]", name)[0] for group in groups for name in group}:
        assert f"`{wanted}`" in readme, wanted
