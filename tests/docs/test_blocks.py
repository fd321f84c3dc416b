"""What stands in the documentation is there: every command's flags parse, every gin file and binding loads, every
recipe and setting is known, every snippet is a program, every link leads somewhere. `test_pages.py` runs them."""

import ast
import re
import unicodedata
from pathlib import Path

import blocks
import gin.config
import pytest
import yaml

from vikhr_t5 import cli, launch
from vikhr_t5.errors import UserError

ALL = [block for page in blocks.PAGES for block in blocks.blocks(page)]
BASH = [block for block in ALL if block.language == "bash"]
GIN_COMMANDS = ("train", "eval", "infer", "plan")


def test_there_is_something_to_check():
    assert len(BASH) > 30
    assert {"README.md", "mixtures.md", "mistral.md"} <= {block.page.name for block in BASH}


@pytest.mark.parametrize("block", ALL, ids=str)
def test_a_block_says_what_it_is(block):
    assert block.language in blocks.LANGUAGES
    assert block.not_run is None or block.language != "text"


@pytest.mark.parametrize("block", BASH, ids=str)
def test_commands_parse(block):
    for words in block.commands():
        match words:
            case ["vikhr-t5", *arguments]:
                flags = cli.parse(arguments)
                if flags.command in GIN_COMMANDS and flags.gin_file:
                    load(flags)
            case ["vikhr-mistral", *arguments] | ["accelerate", "launch", _, _, "-m", "vikhr_mistral.cli", *arguments]:
                mistral(arguments)
            case ["make", *targets]:
                makefile = (blocks.ROOT / "Makefile").read_text()
                assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def load(flags):
    """The gin files of a command with its bindings. Files that are the reader's own are not here."""
    if all((blocks.ROOT / "gin" / file).exists() for file in flags.gin_file):
        loads(flags.gin_file, flags.bindings)


def loads(files, bindings=()) -> str:
    """The configuration as gin has it."""
    try:
        try:
            launch.load(files, bindings)
        except UserError as error:  # a page may leave values to the reader
            if not str(error).startswith("required by the gin files and not given"):
                raise
        return gin.config_str()
    finally:
        with gin.unlock_config():
            gin.config.clear_config()


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "gin"], ids=str)
def test_gin_goes_into_a_recipe(block, tmp_path):
    file = tmp_path / "reader.gin"
    file.write_text(f"include 'recipes/demo_finetune.gin'\n{block.text}\n", encoding="utf-8")
    configuration = loads([str(file)])
    names = re.findall(r"^\s*(?:[\w./]+\.)?(\w+) = ", block.text, re.MULTILINE)
    assert names
    assert not [name for name in names if not re.search(rf"\b{name} =", configuration)]


def mistral(arguments):
    from vikhr_mistral import cli as mistral_cli
    from vikhr_mistral.config import read_config
    from vikhr_mistral.instruct import InstructConfig
    from vikhr_mistral.pretrain import PretrainConfig

    flags = mistral_cli.parse(arguments)
    kind = {"pretrain": PretrainConfig, "instruct": InstructConfig}.get(flags.command)
    if kind:
        assert read_config(kind, mistral_cli.config_file(flags.config), flags.overrides)


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "python"], ids=str)
def test_snippets_are_programs(block):
    assert ast.parse(block.text).body


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "yaml"], ids=str)
def test_yaml_is_yaml(block):
    assert isinstance(yaml.safe_load(block.text), dict)


@pytest.mark.parametrize("page", blocks.PAGES, ids=lambda page: str(page.relative_to(blocks.ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """GitHub's and MkDocs' names of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFKC", head).lower()) for head in heads)
    return {re.sub(r"[ ]+", "-", head.strip()) for head in kept}
