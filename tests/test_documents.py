"""What the documents say is what the code does."""

import os
import re
from pathlib import Path

import jax
import pytest

from esper_functional import lifecycle_diagram

ROOT = Path(__file__).parents[1]


def test_the_lifecycle_diagram_is_the_tables():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert f"```mermaid\n{lifecycle_diagram()}\n```" in text


def test_the_readmes_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    # As users run them: the tests' strict promotion is no business of optax's.
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md"])
def test_links_and_paths_in_the_documents_exist(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:esper|functional|adapters|experiments|tests)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_the_readmes_two_commands_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert re.search(rf"^{target}:", makefile, re.M)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
