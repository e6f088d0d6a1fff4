"""README.md and docs/*.md: every ```python block runs, every `tiedkl` command line parses.

The blocks of a page run in order in one namespace, in a process of their own, in an empty folder, on a CPU with one
thread. HTML comments directly above a block, which readers do not see, prepare it:

    <!-- needs: transformers, lightning -->     not run where one of these cannot be imported
    <!-- setup: import torch; n = 3 -->         runs before the block, in the same namespace; may span lines
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from tiedkl import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
DIRECTIVE = re.compile(r"<!--\s*(needs|setup):(.*?)-->\s*", re.DOTALL)
SHELLS = {"sh", "bash", "shell", "console"}


class Block(NamedTuple):
    line: int  # of its first line of code, from 1
    language: str
    code: str
    needs: tuple[str, ...] = ()


def blocks(text: str) -> list[Block]:
    """Fenced blocks of a page, and setup comments as Python blocks too. ValueError for comments without a block."""
    found: list[Block] = []
    needs: tuple[str, ...] = ()
    setups: list[Block] = []
    lines, i = text.splitlines(), 0
    while i < len(lines):
        fence = FENCE.match(lines[i])
        if fence:
            indent, mark, info = fence.groups()
            end = next((j for j in range(i + 1, len(lines)) if lines[j].strip() == mark), None)
            if end is None:
                raise ValueError(f"line {i + 1}: a fence that does not end")
            code = "\n".join(line.removeprefix(indent) for line in lines[i + 1 : end])
            language = (info.split() or [""])[0]
            found += [s._replace(needs=needs) for s in setups] + [Block(i + 2, language, code, needs)]
            if language != "python" and (setups or needs):
                raise ValueError(f"line {i + 1}: needs or setup above a block that is not Python")
            needs, setups, i = (), [], end + 1
        elif re.match(r"\s*<!--\s*(needs|setup):", lines[i]):
            comment = DIRECTIVE.match("\n".join(lines[i:]).lstrip())
            if comment is None:
                raise ValueError(f"line {i + 1}: a comment that does not end")
            kind, body = comment.groups()
            if kind == "needs":
                needs += tuple(name.strip() for name in body.split(","))
            else:
                skipped = len(body) - len(body.lstrip("\n"))
                setups.append(Block(i + 1 + skipped, "python", textwrap.dedent(body.strip("\n")).strip()))
            i += comment.group(0).rstrip().count("\n") + 1
        elif lines[i].strip() and (needs or setups):
            raise ValueError(f"line {i + 1}: the needs or setup comment above is not directly above a block")
        else:
            i += 1
    if needs or setups:
        raise ValueError(f"line {len(lines)}: a needs or setup comment without a block")
    return found


# Each block is compiled with the page's name and lines, so that a traceback points into the page.
RUNNER = """
import json, sys, torch
torch.set_num_threads(1)
page, todo = json.load(sys.stdin)
names = {"__name__": "__main__", "__file__": page}
for line, code in todo:
    exec(compile("\\n" * (line - 1) + code, page, "exec"), names)
"""


def run_blocks(page: Path, todo: list[Block], folder: Path) -> str | None:
    """Run Python blocks; None, or why it failed, with page and line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    environment["HF_HUB_OFFLINE"] = "1"
    environment.pop("TRITON_INTERPRET", None)  # set for the tests; readers do not have it
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([str(page), [(b.line, b.code) for b in todo]]),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 0:
        return None
    places = re.findall(rf'(?:File )?"{re.escape(str(page))}", line (\d+)', done.stderr)
    where = f"{page.name}:{places[-1]}" if places else page.name
    return f"{where}: a Python block failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def missing(needs: tuple[str, ...]) -> list[str]:
    return [name for name in needs if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    python = [b for b in blocks(page.read_text(encoding="utf-8")) if b.language == "python"]
    todo = [b for b in python if not missing(b.needs)]
    if not todo:
        if not python:
            return  # a page of formulas
        pytest.skip(f"{page.name} needs {', '.join(sorted({n for b in python for n in missing(b.needs)}))}")
    failure = run_blocks(page, todo, tmp_path)
    if failure:
        pytest.fail(failure, pytrace=False)


def command_lines(text: str) -> list[tuple[int, str]]:
    """(line, command) of every `tiedkl ...` in shell blocks, indented blocks and code spans."""
    found = []
    language: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if fence:
            language = (fence.group(3).split() or [""])[0] if language is None else None
        elif language is None:
            spans = re.findall(r"`(tiedkl [^`]*)`", line)
            indented = re.match(r" {4,}(tiedkl .*)", line)
            found += [(number, c) for c in (*spans, *([indented.group(1)] if indented else []))]
        elif language in SHELLS and (command := re.match(r"\s*(?:\$ )?(tiedkl .*)", line)):
            found.append((number, command.group(1)))
    return found


def parse(command: str) -> str | None:
    """None where the command line parses, else why not."""
    argv = shlex.split(command, comments=True)[1:]
    parser = argparse.ArgumentParser(prog="tiedkl", exit_on_error=False)
    parser.add_argument("--version", action="version", version="")
    subparsers = parser.add_subparsers(required=True)
    if argv and argv[0] in cli.COMMANDS:
        try:
            importlib.import_module(f"tiedkl.cli.{argv[0].replace('-', '_')}").add_parser(subparsers)
        except ModuleNotFoundError as error:
            pytest.skip(f"tiedkl {argv[0]} needs {error.name}")
    try:
        parser.parse_args(argv)
    except argparse.ArgumentError as error:
        return str(error)
    except SystemExit as stop:
        return None if stop.code in (0, None) else f"exit status {stop.code}"
    return None


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_command_lines_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, command in command_lines(page.read_text(encoding="utf-8")):
        refused = parse(command)
        if refused is not None:
            pytest.fail(f"{page.name}:{line}: {command}\n{refused}\n{capsys.readouterr().err}", pytrace=False)


PAGE = """# A page
<!-- needs: json -->
<!-- setup:
a = 1
b = 2
-->

```python
c = a + b
```
text
<!-- setup: d = 4 -->
```python
assert (c, d) == (3, 4)
```
1. in a list
   ```python
   if c:
       e = 5
   ```
"""


def test_blocks_of_a_page(tmp_path: Path) -> None:
    python = blocks(PAGE)
    assert [(b.line, b.needs) for b in python] == [(4, ("json",)), (9, ("json",)), (12, ()), (14, ()), (18, ())]
    assert python[-1].code == "if c:\n    e = 5"
    assert run_blocks(tmp_path / "page.md", python, tmp_path) is None
    assert missing(("json", "no_such_package")) == ["no_such_package"]


def test_a_failure_names_page_and_line(tmp_path: Path) -> None:
    python = blocks(PAGE.replace("== (3, 4)", "== (3, 5)"))
    failure = run_blocks(tmp_path / "page.md", python, tmp_path)
    assert failure is not None
    assert failure.startswith("page.md:14: a Python block failed")
    assert "AssertionError" in failure
    failure = run_blocks(tmp_path / "page.md", blocks("```python\nx = 1\nx = = 2\n```"), tmp_path)
    assert failure is not None
    assert failure.startswith("page.md:3: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- needs: json -->\ntext\n```python\n```",
            "line 2: the needs or setup comment above is not directly above",
        ),
        ("<!-- setup: a = 1 -->\n```sh\n```", "line 2: needs or setup above a block that is not Python"),
        ("<!-- setup: a = 1 -->", "line 1: a needs or setup comment without a block"),
        ("text\n```python\na", "line 2: a fence that does not end"),
        ("<!-- setup: a", "line 1: a comment that does not end"),
    ],
)
def test_pages_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks(text)


def test_command_lines_of_a_page() -> None:
    text = "`tiedkl doctor`, `tiedkl`\n\n    tiedkl bench  # all\n"
    text += "\n```sh\n$ tiedkl verify\nls\n```\n```python\ntiedkl x\n```"
    assert command_lines(text) == [(1, "tiedkl doctor"), (3, "tiedkl bench  # all"), (6, "tiedkl verify")]
    assert parse("tiedkl bench --rounds 3  # a comment") is None
    assert parse("tiedkl bench --no-such-option") is not None
    assert parse("tiedkl no-such-command") is not None
    assert parse("tiedkl bench --rounds three") is not None
