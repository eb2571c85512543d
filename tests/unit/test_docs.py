"""The documents: every page is in the site, every link leads somewhere, every Python block runs or is checked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lockstep.rollouts.trajectory import TrajectoryGroup
from random_batches import choice, trajectory
from runs import healthy_metrics, make_run

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "llms.txt", ROOT / "CHANGELOG.md"])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"^(?:\$ )?lockstep ([a-z-]+)", re.MULTILINE)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
    targets = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in targets if not (page.parent / link).exists()]
    assert not missing


def test_python_blocks_run(tmp_path, monkeypatch):
    """Where a run of the quickstart's name is."""
    page = ROOT / "docs" / "how-to" / "how-do-i.md"
    random = np.random.default_rng(0)
    groups = {1: [TrajectoryGroup(trajectories=[trajectory(choice([5], [6]), reward=float(k)) for k in range(2)])]}
    run = make_run(tmp_path / "made", "/nowhere", healthy_metrics(2, random), groups, random)
    shutil.copytree(run.path, tmp_path / "runs" / "quickstart" / "examples" / "yes-no-maybe")
    monkeypatch.chdir(tmp_path)
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), {})


def test_every_page_is_in_the_site():
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if f" {page}\n" not in listed]


def test_commands_in_documents_exist():
    from typer.main import get_command

    from lockstep.cli.main import app

    command = get_command(app)
    known = set(getattr(command, "commands", ()))
    named = {
        command
        for page in PAGES
        for block in re.findall(r"```(?:sh|console|)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for command in COMMAND.findall(block)
    }
    assert named
    assert named <= known
