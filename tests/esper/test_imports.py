import ast
import subprocess
import sys
from pathlib import Path

import pytest


def _loaded(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import esper",
        "import esper; esper.__version__",
        "import esper.contracts, esper.errors, esper.logs, esper.oona, esper.settings",
        "import esper_functional; esper_functional.KasminaException",
    ],
)
def test_what_computes_nothing_pulls_in_neither_torch_nor_jax(statement):
    assert not _loaded(statement) & {"torch", "jax", "jaxlib", "equinox", "numpy"}


def test_the_core_has_its_names_from_the_first_that_is_asked_for():
    import esper_functional
    from esper_functional import _api

    for name in _api.__all__:
        assert getattr(esper_functional, name) is getattr(_api, name)
    assert set(_api.__all__) <= set(dir(esper_functional))
    assert esper_functional.__all__ == _api.__all__
    for name in ("sead", "_sead", "__sead__"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(esper_functional, name)


def test_the_core_and_the_jax_face_do_not_import_torch():
    assert "torch" not in _loaded("import esper_adapters.equinox; from esper_functional import *")


def test_a_face_imports_its_own_framework_alone():
    assert not _loaded("import esper_adapters.pytorch") & {"equinox", "flax", "optax"}
    assert not _loaded("import esper_adapters.equinox") & {"flax", "torch"}
    assert not _loaded("import esper_adapters.flax") & {"equinox", "torch"}


def test_the_names_that_users_type():
    import esper
    from esper.execution import KasminaLayer, SeedLifecycleState

    assert esper.__all__ == ["export_plain", "unwrap", "wrap"]
    assert callable(esper.wrap)
    assert "Linear" in [base.__name__ for base in KasminaLayer.__mro__]
    assert SeedLifecycleState.FOSSILIZED == 4
    with pytest.raises(AttributeError, match="no attribute 'wrp'"):
        esper.wrp  # noqa: B018


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("KasminaLayer", "Linear"),
        ("KasminaConv2dLayer", "Conv2d"),
        ("KasminaAttentionLayer", "MultiheadAttention"),
        ("KasminaLayerNormLayer", "LayerNorm"),
        ("KasminaBatchNormLayer", "_BatchNorm"),
    ],
)
def test_the_family_is_where_the_platform_puts_it(name, base):
    import esper.execution

    assert name in esper.execution.__all__
    layer = getattr(esper.execution, name)
    assert base in [own.__name__ for own in layer.__mro__]


def test_the_core_imports_nothing_but_what_it_may():
    root = Path(__file__).parents[2] / "functional" / "esper_functional"
    allowed = {"esper_functional", "jax", "jaxtyping", "numpy"} | set(sys.stdlib_module_names)
    effects = {"logging", "os", "pathlib", "random", "socket", "subprocess", "threading", "time"}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            else:
                continue
            assert names <= allowed - effects, path.name
