"""The pages under docs/: their tables are the code's, their examples run, what they name exists."""

import ast
import inspect
import re
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import pytest

from esper.contracts import KernelSignature
from esper.tezzeret import blueprint_names, load_blueprint, resolve
from esper.tezzeret._ops import OPS
from esper_functional import (
    MOVES,
    Event,
    EventKind,
    SeedLifecycleError,
    SeedLifecycleState,
    SeedState,
    apply_event,
    fold_events,
    init_seeds,
    lifecycle_diagram,
)
from esper_functional._state import FIELDS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def described(owner: type) -> dict[str, str]:
    """The string that stands behind each attribute of a class, in one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    found: dict[str, str] = {}
    name = ""
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            name = target.id if isinstance(target, ast.Name) else ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = " ".join(str(node.value.value).split())
            name = ""
    return found


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def stages_table() -> str:
    meaning = described(SeedLifecycleState)
    return table(
        ("stage", "number", "meaning"),
        [(s.name, int(s), meaning[s.name]) for s in SeedLifecycleState],
    )


def moves_table() -> str:
    return table(("from", "to", "by"), [(m.source.name, m.target.name, m.cause) for m in MOVES])


def at_stage(stage: SeedLifecycleState) -> SeedState:
    """One seed that came to a stage by events."""
    kinds = {
        SeedLifecycleState.DORMANT: (),
        SeedLifecycleState.LOADING: ("load",),
        SeedLifecycleState.ACTIVE: ("load", "activate"),
        SeedLifecycleState.ERROR_RECOVERY: ("load", "fail"),
        SeedLifecycleState.FOSSILIZED: ("load", "activate", "fossilize"),
    }
    return fold_events(init_seeds(1, 1), [Event(0, 0, 0, EventKind(k)) for k in kinds[stage]])


def events_table() -> str:
    """Every kind tried at every stage."""
    meaning = described(EventKind)
    rows = []
    for kind in EventKind:
        outcomes: dict[SeedLifecycleState, SeedLifecycleState] = {}
        for stage in SeedLifecycleState:
            with suppress(SeedLifecycleError):
                after = apply_event(at_stage(stage), Event(0, 0, 0, kind, span=1))
                outcomes[stage] = SeedLifecycleState(int(after.stage[0, 0]))
        sources = " or ".join(stage.name for stage in outcomes)
        targets = " or ".join(
            dict.fromkeys("the same" if a == b else b.name for a, b in outcomes.items())
        )
        everywhere = len(outcomes) == len(SeedLifecycleState)
        rows.append(
            (f"`{kind.value}`", meaning[kind.name], "any" if everywhere else sources, targets)
        )
    return table(("kind", "what happened", "from", "to"), rows)


def fields_table() -> str:
    state, meaning = init_seeds(1), described(SeedState)
    rows = [
        (f"`{name}`", array.dtype.name, array.nbytes, meaning[name])
        for name, array in ((name, getattr(state, name)) for name in FIELDS)
    ]
    total = sum(array.nbytes for array in jax.tree.leaves(state))
    return table(("field", "dtype", "bytes", "holds"), [*rows, ("all", "", total, "")])


def operations_table() -> str:
    """Each operation, its attributes, and the first sentence that its class says of itself."""
    rows = []
    for kind in dict.fromkeys(OPS.values()):
        names = [f"`{name}`" for name, own in OPS.items() if own is kind]
        plain = {"name", "op", "inputs"}
        attributes = [f"`{name}`" for name in kind.model_fields if name not in plain]
        (sentence, *_) = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
        rows.append((", ".join(names), " ".join(attributes), " ".join(sentence.split())))
    return table(("operation", "attributes", "what it is"), rows)


EXAMPLES = {"vector": "64->64", "sequence": "16x64->16x64", "signal": "16x64->16x64"}
EXAMPLES |= {"image": "16x16x16->16x16x16"}


def blueprints_table() -> str:
    rows = []
    for name in blueprint_names():
        blueprint = load_blueprint(name)
        signature = KernelSignature.parse(EXAMPLES[blueprint.takes[0]])
        graph = resolve(blueprint, signature)
        rows.append(
            (
                f"`{name}`", ", ".join(blueprint.takes), blueprint.fits, blueprint.birth,
                f"{graph.parameter_count:,}", f"{graph.flops:,}", blueprint.summary.strip(),
            )
        )  # fmt: skip
    return table(("blueprint", "takes", "fits", "birth", "parameters", "FLOPs", "what it is"), rows)


@pytest.mark.parametrize("part", [operations_table, blueprints_table])
def test_the_tables_of_kernels_are_the_codes(part):
    assert part() in text_of("kernels.md"), part()


@pytest.mark.parametrize("part", [stages_table, moves_table, events_table, fields_table])
def test_the_tables_of_the_lifecycle_are_the_codes(part):
    assert part() in text_of("lifecycle.md"), part()


def test_the_diagram_is_the_tables():
    assert f"```mermaid\n{lifecycle_diagram()}\n```" in text_of("lifecycle.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_examples_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    # optax is not made for the strict promotion that the tests run under.
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)


def test_the_experiment_is_about_twenty_lines():
    blocks = re.findall(r"```python\n(.*?)```", text_of("index.md"), re.DOTALL)
    (core,) = (block for block in blocks if block.startswith("def net("))
    lines = [line for line in core.splitlines() if line.strip()]
    assert 20 <= len(lines) <= 32


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_it_links_to_is_there(page):
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", place.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", t).strip().lower().replace(" ", "-") for t in titles]
            assert anchor in slugs, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_that_it_names_are_there(page):
    named = re.findall(
        r"`((?:esper|functional|adapters|experiments|tests|docs)/[\w./*]*)`", page.read_text()
    )
    for path in named:
        assert list(ROOT.glob(path)), path


def test_every_law_names_the_test_that_checks_it():
    _, *sections = re.split(r"^## ", text_of("laws.md"), flags=re.MULTILINE)
    for section in sections:
        for law in re.split(r"^- ", section, flags=re.MULTILINE)[1:]:
            named = re.findall(r"\[(test_\w+)\]\(\.\./tests/(?:\w+/)?(test_\w+)\.py\)", law)
            assert named, law
            assert all(shown == linked for shown, linked in named), law


def test_the_index_lists_every_page_and_example():
    text = text_of("index.md")
    for page in PAGES:
        assert page.name == "index.md" or f"({page.name})" in text, page.name
    for example in (ROOT / "experiments").glob("growing_*.py"):
        assert f"(../experiments/{example.name})" in text, example.name
