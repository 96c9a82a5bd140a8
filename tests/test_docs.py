"""The documents: what they link to, name and quote exists, and their lines of Python run.

Commands are looked up, not run: their modules, and their flags in the modules' source, where absl defines them by name.
"""

import ast
import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import yaml

from pop3d_jax.data.records import RecordSource, decode_record
from pop3d_jax.data.shards import unframe_record

_PROJECT = Path(__file__).resolve().parent.parent
_PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{page.name}" for page in _PROJECT.glob("docs/*.md")),
]
_FOLDERS = ("benchmarks", "configs", "data_prep", "docs", "pop3d_jax", "tests")
# Named in the documents, but the reader's own to write.
_READERS_FILES = {"setup.py"}
_OWN_PACKAGES = ("pop3d_jax", "data_prep", "benchmarks")


def _text(page: str) -> str:
    """The page without its comments, continued lines joined."""
    text = re.sub(r"<!--.*?-->", "", (_PROJECT / page).read_text(), flags=re.DOTALL)
    return re.sub(r"\\\n\s*", " ", text)


def _prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", _text(page), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """What GitHub calls the page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Module and words of every `python -m` on the page."""
    for module, rest in re.findall(r"python(?:3\.11)? -m ([\w.]+)([^\n`]*)", _text(page)):
        # The command ends where the shell's next one or a comment begins; brackets enclose what may be left out.
        yield module, re.sub(r'[\[\]"]', " ", re.split(r" && | \| |; |  +#", rest)[0]).split()


def _defined(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Names of the flags that a piece of source defines, and of the functions that it calls."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr.startswith("DEFINE_")
    }
    return names, {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def _source(module: str) -> ast.Module:
    return ast.parse(Path(importlib.util.find_spec(module).origin).read_text())


@functools.cache
def _flags(module: str) -> frozenset[str]:
    """Names of the flags that a module defines, itself or by a function of `shared_flags`."""
    names, called = _defined(_source(module))
    for node in _source("pop3d_jax.shared_flags").body:
        if isinstance(node, ast.FunctionDef) and node.name in called:
            names |= _defined(node)[0]
    return frozenset(names)


@functools.cache
def _config(file: str) -> ml_collections.ConfigDict:
    return importlib.import_module(file.split(":")[0].removesuffix(".py").replace("/", ".")).get_config()


def _has_field(config: ml_collections.ConfigDict, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or name not in config:
            return False
        config = config[name]
    return True


@pytest.mark.parametrize("page", _PAGES)
def test_links_lead_somewhere(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (_PROJECT / page).parent / name if name else _PROJECT / page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", _PAGES)
def test_files_that_are_named_exist(page):
    missing = []
    for quoted in re.findall(r"`([^`\n]+)`", _prose(page)):
        folder = Path()
        for word in quoted.split():
            own = re.fullmatch(r"[\w./-]+\.(py|md|ipynb|toml|cff)", word) or word.startswith(
                tuple(f"{name}/" for name in _FOLDERS)
            )
            # "pop3d_jax/train.py evaluate.py" names two files of one folder; a NAME is the reader's.
            if not own or word in _READERS_FILES or re.search(r"[A-Z]{3,}\.json", word):
                continue
            if "/" in word:
                folder = Path(word).parent
            if not any((_PROJECT / place / word).exists() for place in ("", folder, Path(page).parent)):
                missing.append(word)
    assert not missing


@pytest.mark.parametrize("page", _PAGES)
def test_commands_and_their_flags_exist(page):
    wrong = []
    for module, words in _commands(page):
        if importlib.util.find_spec(module) is None:
            wrong.append(module)
            continue
        if not module.startswith(_OWN_PACKAGES):
            continue
        flags = [word[2:].partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
        named = [
            word.removeprefix("--config=") for word in words if re.match(r"(--config=)?configs/\w+\.py(:\w+)?$", word)
        ]
        config = _config(named[0] if named else "configs/pop3d_nuscenes.py")
        for flag in flags:
            if flag.startswith("config."):
                known = "config" in _flags(module) and _has_field(config, flag.removeprefix("config."))
            else:
                known = flag in _flags(module) | {"help"}
            if not known:
                wrong.append(f"{module} --{flag}")
    assert not wrong


@pytest.mark.parametrize("page", _PAGES)
def test_fields_of_configurations_and_targets_of_make_exist(page):
    quoted = re.findall(r"`([^`\n]+)`", _text(page))
    fields = [found[1] for text in quoted if (found := re.match(r"config\.([a-z_.]+)(?: = .*)?$", text))]
    configs = [_config(f"configs/{name}.py") for name in ("pop3d_nuscenes", "scalr")]
    known = [field for field in fields if field in ("json", "py") or any(_has_field(each, field) for each in configs)]
    assert known == fields
    targets = re.findall(r"(?:`|^)(?:\w+=\w+ )?make ([\w-]+)", _text(page), re.MULTILINE)
    rules = set(re.findall(r"^([\w-]+):", (_PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert set(targets) <= rules


@pytest.mark.parametrize("page", _PAGES)
def test_flags_that_are_named_without_their_command_exist(page):
    files = [path for package in _OWN_PACKAGES for path in (_PROJECT / package).glob("*.py")]
    commands = {path.stem: _flags(f"{path.parent.name}.{path.stem}") for path in files if path.stem != "__init__"}
    unknown = []
    for quoted in re.findall(r"`([^`\n]+)`", _prose(page)):
        # `--flag=value` of any command, or `train --flag`; not `tensorboard --logdir`.
        first = quoted.split()[0]
        known = frozenset().union(*commands.values()) if first.startswith("--") else commands.get(first)
        for word in quoted.split() if known else ():
            flag = re.match(r"--([a-z_]+)(?:=|$)", word)
            if flag and flag[1] not in known | {"help"}:
                unknown.append(quoted)
    assert not unknown


def test_the_checks_find_something_to_check():
    commands = [command for page in _PAGES for command in _commands(page)]
    assert {"pop3d_jax.train", "pop3d_jax.query", "data_prep.build"} <= {module for module, _ in commands}
    assert any("--config.model.remat=all" in words for _, words in commands)
    assert {"workdir", "step", "out", "baselines"} <= _flags("pop3d_jax.evaluate")
    assert "text" not in _flags("pop3d_jax.evaluate")
    assert not _has_field(_config("configs/demo.py"), "optim.learning_rat")
    assert "what-is-verified-and-what-is-not" in _anchors(_PROJECT / "README.md")


def test_every_command_is_on_the_page_of_the_public_surface():
    files = [path for package in ("pop3d_jax", "data_prep") for path in (_PROJECT / package).glob("*.py")]
    commands = {f"{path.parent.name}.{path.stem}" for path in files if "__main__" in path.read_text()}
    table = _text("docs/api.md").split("## Commands")[1].split("## ")[0]
    assert set(re.findall(r"python -m ([\w.]+)", table)) == commands


def test_the_citation_is_of_this_software():
    citation = yaml.safe_load((_PROJECT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license", "references"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    project = (_PROJECT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert len(citation["references"]) == 5
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year", "url"} <= set(reference)
        assert all({"family-names", "given-names"} == set(author) for author in reference["authors"])


def test_the_lines_of_the_record_page_read_records(small_records):
    blocks = re.findall(r"```python\n(.*?)```", (_PROJECT / "docs" / "record.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block.replace("RECORDS", str(small_records)), names)
    expected = RecordSource(small_records, "val")[0]
    assert names["token"] in names["source"].sample_tokens
    assert names["points"].shape[1] == 5
    assert names["front"].dtype == np.uint8
    assert names["key_frame"].images == expected.images
    assert decode_record(names["serialized"]).sample_token == expected.sample_token
    assert names["serialized"] == unframe_record(names["frame"])


def test_the_fields_of_the_record_page_are_those_of_the_record():
    table = (_PROJECT / "docs" / "record.md").read_text().split("## Fields")[1].split("Cameras of nuScenes")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = re.findall(r"`(\w+)`", " ".join(first_cells))
    assert sorted(named) == sorted(RecordSource.__getitem__.__annotations__["return"].__dataclass_fields__)


def test_the_public_modules_render_without_a_warning(tmp_path):
    modules = re.search(r"^PUBLIC := (.*)$", (_PROJECT / "Makefile").read_text(), re.MULTILINE)[1].split()
    table = _text("docs/api.md").split("## Python")[1]
    for module in modules:
        row = next(line for line in table.splitlines() if line.startswith(f"| `{module}`"))
        assert set(re.findall(r"`(\w+)`", row)) == set(importlib.import_module(module).__all__)

    command = [sys.executable, "-W", "error::UserWarning", "-m", "pdoc", "--docformat", "google"]
    rendered = subprocess.run(
        [*command, "--output-directory", str(tmp_path), *modules],
        cwd=_PROJECT,
        env=os.environ | {"PYTHONPATH": str(_PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert rendered.returncode == 0, rendered.stderr
    assert "Warn" not in rendered.stderr
    page = (tmp_path / "pop3d_jax" / "grids" / "feature_grids.html").read_text()
    for name in ("FeatureGrids.open", "FeatureGrids.search", "KeyFrameGrid", "Hit", "Volume"):
        assert f'id="{name}"' in page
