"""The README is true: its Python runs, its commands parse, and it names what there is."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlx_ltx import train
from mlx_ltx.checkpoints.__main__ import build_parser as checkpoints_parser
from mlx_ltx.flags import build_parser, capabilities
from mlx_ltx.pipelines.pipeline import pipelines
from mlx_ltx.training.config import config_from

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PARSERS = {"mlx_ltx.generate": build_parser, "mlx_ltx.checkpoints": checkpoints_parser}


def code(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert match, f"no section {title}"
    return match[1]


def commands() -> list[list[str]]:
    """The module and the arguments of every command line of this package, in code blocks and inline."""
    lines = [line for block in code("sh") for line in block.splitlines()] + re.findall(r"`(python -m [^`]+)`", README)
    found = []
    for line in lines:
        for part in re.split(r"\s&&\s", line.split("  #")[0]):
            match = re.search(r"python3? -m (mlx_ltx\.\w+)(.*)", part)
            if match and not part.lstrip().startswith("#"):
                found.append([match[1], *shlex.split(match[2])])
    return found


def described(block: str) -> dict[str, set[str]]:
    """The files and folders that a tree in a code block names, by the folder that they are in ("" is the top)."""
    found: dict[str, set[str]] = {"": set()}
    folder = ""
    for line in block.splitlines():
        match = re.match(r"( {0,2})([\w./]+)(\s|$)", line)
        if not match:
            continue
        name = match[2].rstrip("/")
        if not match[1]:
            folder = name
            found[""].add(name)
        else:
            found.setdefault(folder, set()).add(name)
    return found


def test_the_example_in_python_runs(tmp_path):
    (example, *_) = code("python")
    run = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "circle.mp4").stat().st_size > 1000
    assert "circle.mp4: " in run.stdout
    assert " step 1 of " in run.stdout


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command)[:60])
def test_commands_parse(command):
    module, *arguments = command
    if module == "mlx_ltx.train":
        assert train.parse(arguments)[1].config
        return
    assert module in PARSERS
    parsed = vars(PARSERS[module]().parse_args(arguments))
    assert parsed
    if module == "mlx_ltx.generate":
        assert parsed.get("pipeline", "distilled") in pipelines()


def test_commands_give_what_their_pipeline_takes():
    told = capabilities(build_parser())
    flags = {name: entry["field"] for name, entry in told["flags"].items()}
    fields = set(flags.values())
    for module, *arguments in commands():
        if module != "mlx_ltx.generate":
            continue
        given = vars(build_parser().parse_args(arguments))
        pipeline = pipelines().get(given.get("pipeline", ""))
        if pipeline is None:
            continue
        renamed = {"prompt_file": "prompt", "prompts_file": "prompts"}
        used = {renamed.get(name, name) for name in given} & fields
        assert used <= pipeline.accepts, arguments
        assert set(pipeline.needs) <= used, arguments


def test_there_are_commands_to_check():
    assert len([command for command in commands() if command[0] == "mlx_ltx.generate"]) > len(pipelines())


def test_the_table_of_pipelines_is_complete_and_has_an_example_of_each():
    rows = [row.split(" | ") for row in section("Pipelines").splitlines() if row.startswith("| `")]
    assert [row[0].strip("| `") for row in rows] == list(pipelines())
    for row in rows:
        name = row[0].strip("| `")
        arguments = shlex.split(row[3].strip("| `"))[3:]
        assert vars(build_parser().parse_args(arguments)).get("pipeline", "distilled") == name
        chosen = pipelines()[name].guided
        assert row[2] in {True: ("dev",), False: ("distilled", "both"), None: ("both",)}[chosen], name


def test_flags_that_are_named_exist():
    known = {name for action in build_parser()._actions for name in action.option_strings}
    trainers = train.build_parser(), train.build_parser(train.PRECOMPUTE)
    for parser in (checkpoints_parser(), *_subparsers(checkpoints_parser()), *trainers):
        known |= {name for action in parser._actions for name in action.option_strings}
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", README))
    assert named
    assert named <= known, named - known


def _subparsers(parser):
    return [sub for action in parser._actions if isinstance(action.choices, dict) for sub in action.choices.values()]


def test_the_architecture_names_what_there_is():
    (tree, *_) = re.findall(r"^```\n(mlx_ltx/\n.*?)^```", section("Architecture"), re.MULTILINE | re.DOTALL)
    found = described(tree)
    package = {path.name for path in (ROOT / "mlx_ltx").iterdir() if (path / "__init__.py").exists()}
    named = {name for name in found["mlx_ltx"] if not name.endswith(".py")}
    assert named == package
    for name in found["mlx_ltx"] - named:
        assert (ROOT / "mlx_ltx" / name).is_file(), name
    top = {path.name for path in (ROOT / "mlx_ltx").glob("*.py")}
    mentioned = {name for name in re.findall(r"\b\w+\.py\b", tree) if name in top}
    assert mentioned >= top - {"errors.py", "version.py"}
    for name in found[""]:
        assert (ROOT / name).is_dir(), name


def test_files_that_are_named_exist():
    for name in re.findall(r"`((?:mlx_ltx|scripts|tests|weights)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
    for block in code("sh"):
        for name in re.findall(r"\bscripts/[\w./-]+", block):
            assert (ROOT / name).exists(), name


def test_links_inside_the_page_lead_somewhere():
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in anchors, anchor


def test_the_training_config_is_one():
    (text,) = code("yaml")
    config = config_from(yaml.safe_load(text))
    assert config.is_lora
