"""Every snippet of the documentation runs; one that cannot run here says why, and its commands exist all the same.

A document's blocks run from top to bottom in one folder (`desk`), its Python blocks in one namespace. Before a block
that cannot run stands `<!-- not run: REASON -->`; it becomes a skipped test, after its options have been checked.
"""

import ast
import dataclasses
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from arm_hf import default_model
from arm_hf.cli import app
from arm_hf.training.options import TrainingOptions, parse_options
from arm_hf.training.train import main as train

ROOT = Path(__file__).resolve().parents[2]
FRONT_PAGE = ROOT / "README.md"
DOCUMENTS = [
    FRONT_PAGE,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "arm_hf").glob("*.md")),
    *sorted((ROOT / "arm_hf" / "guides").glob("*.md")),
    ROOT / "training" / "README.md",
]
# Documents whose snippets start processes, export or train: left to the slow run.
SLOW = {"arm_hf/EXPORT.md", "arm_hf/guides/publish.md"}

SHELL = ("bash", "sh")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
MORE = ("...", "…")
OTHER_PROGRAMS = ("export",)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        document: Where it stands.
        line: Number of its first line of code.
        language: What the fence says.
        code: Its text.
        reason: Why it is not run, or None.
    """

    document: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The words of every command of a shell block."""
        return commands_of(self.code)


def commands_of(code: str) -> Iterator[list[str]]:
    """The words of every command: lines joined, comments and settings of variables left out."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def blocks_of(document: Path) -> list[Block]:
    """All fenced blocks of a document."""
    found, lines, number, comment = [], document.read_text(encoding="utf-8").splitlines(), 0, None
    while number < len(lines):
        line = lines[number].strip()
        if line.startswith("```"):
            end = next(index for index in range(number + 1, len(lines)) if lines[index].strip() == "```")
            code = "\n".join(lines[number + 1 : end])
            found.append(Block(document, number + 2, line.strip("`"), code, comment))
            number, comment = end, None
        elif line:
            match = NOT_RUN.fullmatch(line)
            comment = match.group(1) if match else None
        number += 1
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
NOT_RUN_BLOCKS = [block for block in BLOCKS if block.reason is not None]


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def arguments_of(words: list[str]) -> tuple[str, list[str]]:
    """What a command runs ("arm-hf", "train", "module NAME", "script PATH", or a program), and its arguments."""
    if words[0] in ("accelerate", "torchrun", "python"):
        places = [index for index, word in enumerate(words) if word.endswith(".py") or word == "-m"]
        if not places:
            raise AssertionError(f"{shlex.join(words)} starts neither a module nor a file")
        module = words[places[0]] == "-m"
        target, rest = words[places[0] + module], words[places[0] + module + 1 :]
        known = {
            "arm_hf.cli": "arm-hf",
            "arm_hf": "arm-hf",
            "arm_hf.training.train": "train",
            "training/train.py": "train",
        }
        return known.get(target, f"module {target}" if module else f"script {target}"), rest
    return words[0], words[1:]


def check_options(words: list[str]) -> None:
    """Parse a command as the program itself does; one that is cut off by dots only has its options looked up."""
    program, rest = arguments_of(words)
    cut = any(word in MORE for word in rest)
    rest = [word for word in rest if word not in MORE]
    if program == "arm-hf":
        command = COMMANDS[rest[0]] if rest and rest[0] in COMMANDS else None
        if command is None:
            assert rest and rest[0] in ("--help", "--version"), f"arm-hf has no command {rest[:1]}"
            return
        rest = rest[1:]
        if hasattr(command, "commands") and rest:
            command, rest = command.commands[rest[0]], rest[1:]
        if cut:
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            unknown = [word for word in rest if word.startswith("-") and word.partition("=")[0] not in known]
            assert not unknown, f"{command.name} has no option {unknown}"
        elif "--help" not in rest:
            command.make_context(command.name, list(rest))
    elif program == "train":
        if "--help" not in rest:
            parse_options(rest)
    elif program == "pip":
        extras = re.findall(r"\[([\w,-]+)\]", " ".join(rest))
        known_extras = re.findall(r'^    "([\w-]+)": ', (ROOT / "setup.py").read_text(encoding="utf-8"), flags=re.M)
        assert {extra for found in extras for extra in found.split(",")} <= set(known_extras)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        missing = [word for word in rest if "=" not in word and not re.search(rf"^{word}:", makefile, flags=re.M)]
        assert not missing, f"the Makefile has no target {missing}"
    elif program.startswith(("module ", "script ")):
        kind, target = program.split()
        path = ROOT / (target.replace(".", "/") + ".py" if kind == "module" else target)
        path = path if path.is_file() else ROOT / target.removeprefix("arm_hf.").replace(".", "/")
        assert kind == "script" or path.with_suffix(".py").is_file() or path.is_dir() or target == "pytest", program
    elif program == "srun":
        for inner in commands_of(rest[-1]):
            check_options(inner)
    else:
        assert program in OTHER_PROGRAMS, f"no test knows the program {program!r}"


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in this process, as its own would."""
    program, rest = arguments_of(words)
    code: object = 0
    if program == "arm-hf":
        try:
            code = app(rest, standalone_mode=False, prog_name="arm-hf")
        except SystemExit as stop:
            code = stop.code
    elif program == "train":
        code = train(rest)
    elif program.startswith(("module ", "script ")):
        kind, target = program.split()
        monkeypatch.setattr(sys, "argv", [target, *rest])
        try:
            runpy.run_module(target, run_name="__main__") if kind == "module" else runpy.run_path(
                target, None, "__main__"
            )
        except SystemExit as stop:
            code = stop.code
    else:
        pytest.fail(f"{shlex.join(words)} is not run by this test; mark its block with <!-- not run: why -->")
    assert not code, f"exit code {code}: {shlex.join(words)}"


def run_document(document: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run all blocks of a document that can run; return their number."""
    namespace: dict = {"__name__": "snippet"}
    done = 0
    for block in blocks_of(document):
        if block.reason is not None or block.language not in ("python", *SHELL):
            continue
        print(f"--- {block}")
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(document), "exec"), namespace)
        else:
            for words in block.commands():
                run_command(words, monkeypatch)
        done += 1
    return done


def test_documents_are_found() -> None:
    names = {name_of(document) for document in DOCUMENTS}
    assert names >= SLOW
    assert {"README.md", "CONTRIBUTING.md", "training/README.md", "arm_hf/EXPORT.md", "arm_hf/MANY_IMAGES.md"} <= names
    assert all(document.is_file() for document in DOCUMENTS)


@pytest.mark.parametrize(
    "document",
    [pytest.param(d, id=name_of(d), marks=[pytest.mark.slow] if name_of(d) in SLOW else []) for d in DOCUMENTS],
)
def test_snippets_run(document: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_document(document, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [pytest.param(d, id=name_of(d)) for d in DOCUMENTS if "arm-clip-mini" in d.read_text(encoding="utf-8")],
)
def test_snippets_run_on_the_embedded_model(document: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_ASSETS", ROOT / "arm_hf" / "assets")
    run_document(document, monkeypatch)


@pytest.mark.parametrize("block", NOT_RUN_BLOCKS, ids=str)
def test_what_is_not_run_exists(block: Block) -> None:
    if block.language == "python":
        ast.parse(block.code)
    elif block.language in SHELL:
        for words in block.commands():
            check_options(words)
    pytest.skip(f"not run: {block.reason}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_options_exist(document: Path) -> None:
    """Also in documents that only the slow run executes."""
    for block in blocks_of(document):
        assert block.language, f"{block}: say what language the block is in"
        if block.language in SHELL:
            for words in block.commands():
                check_options(words)


def prose_of(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def names_of_options(command: object) -> set[str]:
    below = getattr(command, "commands", {}).values()
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(names_of_options(each) for each in below))


def test_options_in_the_text_exist() -> None:
    """`arm-hf ...` and `--option` inside of sentences."""
    known = set().union(*(names_of_options(command) for command in COMMANDS.values()))
    known |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainingOptions)}
    known |= {"--config", "--help", "--num_processes"}
    wrong = []
    for document in DOCUMENTS:
        for code in re.findall(r"`([^`\n]+)`", prose_of(document)):
            words = code.split()
            if words[0] == "arm-hf" and len(words) > 1 and words[1] not in (*COMMANDS, "COMMAND", "--help"):
                wrong.append(f"{name_of(document)}: {code}")
            options = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
            if words[0].startswith("--") or words[0] == "arm-hf":
                wrong += [f"{name_of(document)}: {option}" for option in options if option not in known]
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "arm-hf segmentize photo.jpg",
        "arm-hf segment photo.jpg --no-such-option 1",
        "arm-hf plot scores photo.jpg --labels cat --no-such-option",
        "arm-hf segment --no-such-option ...",
        "accelerate launch training/train.py --no-such-option 1",
        "torchrun -m arm_hf.no_such_module",
        "make no-such-target",
        'pip install -e ".[no-such-extra]"',
        "no-such-program",
    ],
)
def test_what_does_not_exist_is_found(line: str) -> None:
    with pytest.raises((AssertionError, ValueError, typer.TyperException)):
        check_options(shlex.split(line))


def test_links_lead_somewhere() -> None:
    broken = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)", prose_of(document)):
            if not target.startswith(("http:", "https:", "mailto:")) and not (document.parent / target).exists():
                broken.append(f"{name_of(document)}: {target}")
    assert not broken


def test_front_page_leads_to_every_guide() -> None:
    text = FRONT_PAGE.read_text(encoding="utf-8")
    missing = [name_of(d) for d in DOCUMENTS if d != FRONT_PAGE and f"({name_of(d)})" not in text]
    assert not missing


def test_first_command_of_the_front_page_in_a_process_of_its_own(desk: Path) -> None:
    """With the embedded model as it is."""
    first = next(words for block in blocks_of(FRONT_PAGE) for words in block.commands() if words[0] == "arm-hf")
    script = Path(sys.executable).with_name("arm-hf")
    program = [str(script)] if script.exists() else [sys.executable, "-m", "arm_hf.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, *first[1:]], capture_output=True, text=True, timeout=300, cwd=desk, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (desk / "out").glob("photo*")) == [
        "photo.json",
        "photo.png",
        "photo_overlay.png",
    ]
