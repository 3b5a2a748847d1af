"""The README's commands run as they stand. A comment before each block says how: `quick` here, `slow` on request, `exists` by name;
`parse` where files of the user's own are needed: verb and options are looked up."""
from __future__ import annotations

import inspect
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- run: (\w+) -->\n)?```(?:console|sh|bash)\n(.*?)```", re.S)


def commands(how: str) -> list[str]:
    """The command lines of the blocks marked `how`."""
    return [line for mark, block in BLOCK.findall(README) if mark == how for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, so that commands which write do not write there."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "export", "profiles", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def replay(line: str, edgekd: Callable[..., subprocess.CompletedProcess[str]], folder: Path, timeout: float) -> None:
    words = shlex.split(line)
    assert words[0] == "edgekd", f"only edgekd commands are replayed, not {line!r}"
    done = edgekd(*words[1:], cwd=folder, timeout=timeout)
    assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


def test_every_block_says_how_it_is_run() -> None:
    marks = [mark for mark, _ in BLOCK.findall(README)]
    assert marks and set(marks) == {"exists", "parse", "quick", "slow"}


def test_make_goals__exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in commands("exists"):
        tool, goal = line.split()
        assert tool == "make" and re.search(rf"^{goal}:", makefile, re.M), line


@pytest.mark.parametrize("line", commands("quick"))
def test_quick_commands(line: str, edgekd: Callable[..., subprocess.CompletedProcess[str]], checkout: Path) -> None:
    replay(line, edgekd, checkout, timeout=600)


def test_parsed_commands__have_their_verb_and_options() -> None:
    from edgekd.cli import app

    verbs = {c.name or c.callback.__name__: c.callback for c in app.registered_commands if c.callback}
    for line in commands("parse"):
        tool, verb, *words = shlex.split(line.partition("-m ")[2] if line.startswith("torchrun ") else line)
        options = {flag for p in inspect.get_annotations(verbs[verb], eval_str=True).values() for o in getattr(p, "__metadata__", ())
                   for flag in (o.default, *(o.param_decls or ()))}  # typer takes the first spelling for a default
        assert tool == "edgekd" and not [w for w in words if w.startswith("-") and w not in options], line


@pytest.mark.slow
def test_slow_commands(edgekd: Callable[..., subprocess.CompletedProcess[str]], checkout: Path) -> None:
    for line in commands("slow"):
        replay(line, edgekd, checkout, timeout=3000)
    assert (checkout / "runs/mine/report.html").is_file() and (checkout / "mask.png").is_file()


def test_every_verb_is_told() -> None:
    from edgekd.cli import app

    verbs = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
    assert not [v for v in verbs if f"`{v}`" not in README]


def test_links_lead_somewhere() -> None:
    for text in (README, *((ROOT / f).read_text() for f in ("CONTRIBUTING.md", "CHANGELOG.md"))):
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S))
def test_contributing__its_code_is_code(block: str) -> None:
    compile(block, "CONTRIBUTING.md", "exec")
