"""TorchScript made to harm: refused by what it is as data, and never loaded."""

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.artifacts import Artifact, load_torchscript, read_artifact, scan_torchscript
from esper.artifacts._archive import write_archive
from esper.errors import ArtifactError
from tests.esper import hostile

NORM, ATTENTION = "torch.batch_norm", "torch.scaled_dot_product_attention"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('return torch.from_file("/etc/passwd", False, 3)', "calls torch.from_file"),
        ('y = torch.save(x, "written")\nreturn x', "calls torch.save"),
        ("return ops.evil.run(x)", "calls ops.evil.run"),
        ("return torch.classes.evil.Thing(x)", "calls torch.classes.evil.Thing"),
        ("return torch.ops.evil.run(x)", "calls torch.ops.evil.run"),
        ("y = annotate(List[int], [])\nreturn x", "contains subscript|calls annotate"),
        ("return getattr(x, 'y')", "calls getattr"),
        ("return self.thing", "has the expression 'self.thing'"),
        ("return CONSTANTS.c0", "has the expression 'CONSTANTS.c0'"),
        ("return y", "uses the name 'y'"),
        ("while True:\n  x = torch.relu(x)\nreturn x", "contains while"),
        ("for i in x:\n  x = torch.relu(x)\nreturn x", "contains for"),
        ("if x:\n  x = torch.relu(x)\nreturn x", "contains if"),
        ("import os\nreturn x", "contains import"),
        ("return (lambda: x)()", "contains lambda"),
        ("return [y for y in x]", "contains listcomp"),
        ("return x.resize_(1)", "calls x.resize_"),
        ("return torch.relu(*x)", "contains starred"),
        ("return torch.relu(**x)", "unpacks arguments"),
        ("return torch.add(x, x, out=x)", "gives the keyword 'out'"),
        (
            f"y = torch.select(x, 0, 0)\nreturn {NORM}(x, None, None, y, y, True, 1., 0.1, False)",
            "a batch_norm that writes into its statistics",
        ),
        (f"return {NORM}(x, None, None, None, x, True, 1., 1e-05, False)", "a batch_norm that"),
        (f"return {NORM}(x, running_mean=x, training=True)", "a batch_norm that"),
        (f"return {NORM}(x, running_var=x)", "a batch_norm that"),
        (f"return {NORM}(x, None, None, x, x, 0, 0., 1e-05, False)", "a batch_norm that"),
        (f"return {NORM}(x, None, None, x, x, torch.gt(x, x), 0., 1e-05)", "a batch_norm that"),
        (f"return {ATTENTION}(x, x, x, None, 0.5, False)", "attention with dropout"),
        (f"return {ATTENTION}(x, x, x, dropout_p=0.5)", "attention with dropout"),
        (f"return {ATTENTION}(x, x, x, None, torch.sum(x))", "attention with dropout"),
        ("return torch.cat(torch.where(x))", "a where without two values"),
        ("x.data = x\nreturn x", "assigns to 'x.data'"),
        ("y = z = x\nreturn x", "in its method"),
        ("torch.relu(x)\nreturn x", "contains expr"),
        ("return", "returns nothing"),
        ("return torch.mul(x, 9999999999)", "has the number 9999999999, at most 1048576"),
        ("return torch.mul(x, -1048577)", "has the number 1048577"),
        (f"return torch.mul(x, 0x{'f' * 100_000})", "has the number of 400000 bits"),
        (f"return torch.mul(x, {'9' * 5000})", "cannot be parsed: .*limit"),
        ("return torch.add(x, [65536, -65536, 1])", r"the sizes \[65536, -65536, 1\], whose"),
        (f"return torch.add(x, [{'1, ' * 2000}])", "has a list of 2000"),
        ("return torch.mul(x, 1j)", "a constant of type complex"),
        ("return torch.mul(x, b'1')", "a constant of type bytes"),
        ("return torch.mul(x, ...)", "a constant of type ellipsis"),
        ("return torch.mul(x, --1)", "has the expression '--1'"),
        ("return torch.mul(x, +1)", "contains uadd"),
        (f"return torch.gelu(x, approximate='{'a' * 65}')", "has a text of 65 characters"),
        (f"return {'torch.relu(' * 50}x{')' * 50}", "is nested more than 16 deep"),
        (f"return {'(' * 5000}x{')' * 5000}", "cannot be parsed"),
        (f"return {'-' * 50_000}1", "cannot be parsed: .*Memory"),
        (f"return x{'.a' * 50_000}", "cannot be parsed: .*recursion"),
        (f"return x{'()' * 5_000}", "cannot be parsed: .*recursion"),
        (f"return {'[' * 90}x{']' * 90}", "is nested more than 16 deep"),
        (f"y = {'x + ' * 900}x\nreturn y", "contains binop"),
        (f"return x  # {'a' * 300_000}", "larger than 262144 bytes"),
        ("return x\0", "cannot be parsed"),
        ("return тensor", "cannot be parsed: .*ascii"),
    ],
)
def test_code_that_does_more_than_compute(body: str, message: str):
    archive = hostile.torchscript(body)
    with pytest.raises(ArtifactError, match=f"its TorchScript .*({message})"):
        load_torchscript(archive)


@pytest.mark.parametrize(
    "body",
    [
        "return x",
        "y = torch.relu(x)\nreturn torch.add(x, y)",
        "return torch.mul(x, -1)",
        "return torch.mul(x, -0.5)",
        "return torch.gelu(x, approximate='tanh')",
        "return torch.add(x, x, alpha=2)",
        "return torch.linear(x, x, None)",
        "return torch.add(x, [-1, 64, 64])",
        f"return {NORM}(x, x, x, None, None, True, 0., 1e-05, False)",
        f"return {NORM}(x, None, None, x, x, False, 0., 1e-05, False)",
        f"return {NORM}(x, running_mean=x, running_var=x, training=False)",
        f"return {ATTENTION}(x, x, x, None, 0., True)",
        f"return {ATTENTION}(x, x, x)",
        "return torch.where(torch.gt(x, 0), x, 0.)",
    ],
)
def test_code_of_the_form_that_kernels_have(body: str):
    assert scan_torchscript(hostile.torchscript(body)) == 1


HEAD = "class EsperKernel(Module):\n  __parameters__ = []\n  __buffers__ = []\n"
METHOD = "  def forward(self: __torch__.EsperKernel,\n    x: Tensor) -> Tensor:\n    return x\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "one class with one method"),
        ("x = 1\n", "one class with one method"),
        (HEAD, "one class with one method"),
        (HEAD + METHOD + HEAD + METHOD, "one class with one method"),
        (HEAD + METHOD + METHOD, "one class with one method"),
        (HEAD + METHOD.replace("forward", "__setstate__"), "defines '__setstate__'"),
        (HEAD + METHOD + METHOD.replace("forward", "__getstate__"), "defines '__getstate__'"),
        (HEAD.replace("EsperKernel", "Other") + METHOD, "defines the class 'Other'"),
        (HEAD.replace("Module", "Interface") + METHOD, r"the class 'EsperKernel' of \['Interface"),
        (HEAD.replace("(Module)", "(Module, metaclass=x)") + METHOD, "defines the class"),
        ("@final\n" + HEAD + METHOD, "defines the class"),
        (HEAD + "  @export\n" + METHOD, "defines 'forward'"),
        (HEAD + "  __constants__ = []\n" + METHOD, "has '__constants__ = .*' in its class"),
        (HEAD.replace("= []", "= ['a']") + METHOD, "in its class"),
        (HEAD + METHOD.replace("x: Tensor", "x: Tensor = 1"), "arguments that are not plain"),
        (HEAD + METHOD.replace("x: Tensor", "*x: Tensor"), "arguments that are not plain"),
        (HEAD + METHOD.replace("x: Tensor", "x: str"), r"takes .*'str'"),
        (HEAD + METHOD.replace("x: Tensor", "x"), "takes"),
        (HEAD + METHOD.replace("-> Tensor", "-> int"), "gives 'int'"),
        (HEAD + METHOD.replace(": __torch__.EsperKernel", ": __torch__.Other"), "takes"),
    ],
)
def test_classes_of_another_form(source: str, message: str):
    with pytest.raises(ArtifactError, match=message):
        scan_torchscript(hostile.archive_of(source.encode()))


class _Runs:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(_Runs(), 2), "global|operation"),
        (pickle.dumps(_Runs(), 4), "not allowed"),
        (b"cos\nsystem\n(S'true'\ntR.", "global 'os system'"),
        (b"\x80\x02c__torch__\nOther\n.", "global '__torch__ Other'"),
        (b"\x80\x02Vtext\n.", "operation UNICODE"),
        (b"\x80\x02).trailing", "goes on after its end"),
        (b"\x80\x02)", "cannot be read"),
        (b"", "cannot be read"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "cannot be read|not allowed"),
        (b"\x80\x02" + b")" * 5000 + b".", "larger than 4096"),
    ],
)
def test_pickles_are_never_loaded(member: str, content: bytes, message: str, capsys: Any):
    archive = hostile.archive_of((HEAD + METHOD).encode(), **{f"kernel/{member}": content})
    with pytest.raises(ArtifactError, match=message):
        load_torchscript(archive)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name",
    ["kernel/../../etc/cron.d/evil", "/etc/cron.d/evil", "kernel/code/__torch__/evil.py",
     "kernel\\data.pkl", "kernel/extra/a", "other/data.pkl", "kernel/data/0"],
)  # fmt: skip
def test_members_with_other_names(name: str, artifact: Artifact, tmp_path: Path):
    archive = hostile.archive_of((HEAD + METHOD).encode(), **{name: b"x"})
    with pytest.raises(ArtifactError, match="unexpected or missing members"):
        scan_torchscript(archive)
    # In the artifact's own archive as well.
    outer = write_archive(hostile.members_of(artifact.data) | {name: b"x"})
    with pytest.raises(ArtifactError, match="it has the members"):
        read_artifact(outer)


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("kernel/.data/version", b"1" * 500, "has the version"),
        ("kernel/.data/version", b"-1", "has the version"),
        ("kernel/byteorder", b"middle", "has the byte order"),
    ],
)
def test_odd_small_members(member: str, content: bytes, message: str):
    with pytest.raises(ArtifactError, match=message):
        scan_torchscript(hostile.archive_of((HEAD + METHOD).encode(), **{member: content}))


@settings(max_examples=300, deadline=None)
@given(source=st.text(alphabet="torch.relu(x)[]=-1,_ \nreturn", max_size=200))
def test_code_of_any_kind_is_refused_or_accepted_and_nothing_else(source: str):
    # Any other error fails the test.
    with contextlib.suppress(ArtifactError):
        assert scan_torchscript(hostile.torchscript(source)) == 1
