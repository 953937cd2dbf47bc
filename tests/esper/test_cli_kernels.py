"""`esper kernels` as a user meets it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from esper.artifacts import read_artifact, rewrite_artifact
from esper.artifacts._archive import read_archive, write_archive
from esper.contracts import KernelSignature
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.urza import Library
from tests.esper.test_cli import esper, tree

BLUEPRINT = """
schema_version: 2
name: mine
summary: a blueprint of the user's own
birth: zero
sizes: {width: 4}
nodes:
  - {name: up, op: linear, inputs: [x], features: width}
  - {name: bend, op: relu, inputs: [up]}
  - {name: down, op: linear, inputs: [bend], features: out, init: zeros}
output: down
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder with a library of four kernels, compiled by the command."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "mine.yaml").write_text(BLUEPRINT)
    # fmt: off
    done = esper(
        "kernels", "compile", "low_rank", "mine.yaml", "--signature", "3->4",
        "--signature", "5->5 bfloat16", "--library", "library", "--measure", cwd=folder, check=0,
    )
    # fmt: on
    assert len(ids(done.stdout)) == 4
    return folder


def ids(text: str) -> list[str]:
    return re.findall(r"^[0-9a-f]{64}$", text, re.MULTILINE)


def test_what_was_compiled_is_in_the_library_with_what_it_costs(kept):
    store = Library(kept / "library", create=False)
    rows = store.find()
    assert sorted((row.blueprint, row.signature) for row in rows) == [
        ("low_rank", "3->4 float32"),
        ("low_rank", "5->5 bfloat16"),
        ("mine", "3->4 float32"),
        ("mine", "5->5 bfloat16"),
    ]
    for row in rows:
        assert [m["backend"] for m in store.measurements(row.kernel_id)] == ["jax", "torch"]
    # The same bytes come of it in this process.
    here = compile_blueprint(load_blueprint("low_rank"), KernelSignature.parse("3->4"))
    assert here.kernel_id in {row.kernel_id for row in rows}


def test_compiling_again_compiles_nothing_and_names_the_same_kernels(kept):
    before = tree(kept / "library" / "kernels")
    # fmt: off
    done = esper(
        "kernels", "compile", "low_rank", "--in", 3, "--out", 4, "--library", "library",
        cwd=kept, check=0,
    )
    # fmt: on
    assert len(ids(done.stdout)) == 1
    assert tree(kept / "library" / "kernels") == before


def test_list_shows_kernels_and_blueprints(kept):
    listed = esper("kernels", "list", "--library", "library", cwd=kept, check=0).stdout
    assert listed.count("3->4 float32") == 2
    assert "4 kernels; 26 blueprints" in listed
    one = esper("kernels", "list", "--library", "library", "--blueprint", "mine", "--signature",
                "3->4", cwd=kept, check=0).stdout  # fmt: skip
    assert "1 kernels" in one
    shown = esper("kernels", "list", "--blueprints", cwd=kept, check=0).stdout
    for name in ("low_rank", "squeeze_excite", "conformer_conv"):
        assert name in shown


def test_show_draws_the_graph_of_a_kernel_given_the_beginning_of_its_id(kept):
    store = Library(kept / "library", create=False)
    (row,) = store.find(KernelSignature.parse("3->4"), blueprint="mine")
    shown = esper("kernels", "show", row.kernel_id[:10], "--library", "library", cwd=kept, check=0)
    assert row.kernel_id in shown.stdout
    assert "36 parameters" in shown.stdout
    assert re.search(r"jax on .* µs forward", shown.stdout)
    assert [line.rstrip() for line in shown.stdout.splitlines()[-4:]] == [
        "○  x                                      3",
        "●  up: linear (features 4)                4",
        "●  bend: relu                             4",
        "●  down: linear (features 4, init zeros)  4",
    ]


def test_show_draws_a_blueprint_in_text_and_for_markdown(tmp_path):
    signature = ("--signature", "6->6")
    shown = esper("kernels", "show", "gated", *signature, cwd=tmp_path, check=0).stdout
    lines = [line.rstrip() for line in shown.splitlines()[-6:]]
    assert [line[:5].rstrip() for line in lines] == ["○", "├─●", "│ ●", "● │", "●─╯", "●"]
    drawn = esper("kernels", "show", "gated", *signature, "--mermaid", cwd=tmp_path, check=0).stdout
    assert "n_gate --> n_open" in drawn
    assert "x --> n_gate" in drawn


def test_verify_accepts_a_kernel_and_refuses_one_that_was_tampered_with(kept, tmp_path):
    store = Library(kept / "library", create=False)
    (row,) = store.find(KernelSignature.parse("3->4"), blueprint="low_rank")
    done = esper("kernels", "verify", row.kernel_id, "--library", "library", cwd=kept, check=0)
    assert "accepted" in done.stdout
    data = bytearray(store.read_bytes(row.kernel_id))
    members = read_archive(bytes(data), max_bytes=1 << 30)
    manifest = json.loads(members["manifest.json"])
    manifest["digests"]["program.stablehlo"] = "0" * 64
    members["manifest.json"] = json.dumps(manifest).encode()
    bad = tmp_path / "bad.kernel"
    bad.write_bytes(write_archive(members))
    refused = esper("kernels", "verify", bad, cwd=tmp_path, check=1)
    assert "refused" in refused.stdout
    assert "program.stablehlo" in refused.stdout


def test_fetch_verifies_and_keeps_kernels_of_another_library(kept, tmp_path):
    store = Library(kept / "library", create=False)
    rows = store.find(blueprint="low_rank")
    # fmt: off
    done = esper(
        "kernels", "fetch", *(row.kernel_id[:16] for row in rows), "--from", kept / "library",
        "--library", "mine", cwd=tmp_path, check=0,
    )
    # fmt: on
    assert ids(done.stdout) == [row.kernel_id for row in rows]
    mine = Library(tmp_path / "mine", create=False)
    for row in rows:
        assert mine.read_bytes(row.kernel_id) == store.read_bytes(row.kernel_id)
    # Another kernel's bytes under an id are refused, and the rest is fetched.
    shutil.copytree(kept / "library", tmp_path / "theirs")
    first, second = (
        tmp_path / "theirs" / "kernels" / row.kernel_id[:2] / f"{row.kernel_id}.kernel"
        for row in rows
    )
    first.write_bytes(second.read_bytes())
    done = esper("kernels", "fetch", rows[0].kernel_id, rows[1].kernel_id, "--from", "theirs",
                 "--library", "fetched", cwd=tmp_path, check=1)  # fmt: skip
    assert f"kernel {rows[0].kernel_id[:12]} is damaged" in done.stderr
    assert ids(done.stdout) == [rows[1].kernel_id]
    # What is refused is not kept, and the rest is.
    hostile = tmp_path / "hostile.kernel"
    hostile.write_bytes(store.read_bytes(rows[0].kernel_id)[:-40])
    good = tmp_path / "good.kernel"
    good.write_bytes(store.read_bytes(rows[1].kernel_id))
    done = esper("kernels", "fetch", hostile, good, "--library", "other", cwd=tmp_path, check=1)
    assert "hostile.kernel is refused" in done.stderr
    assert ids(done.stdout) == [rows[1].kernel_id]
    assert len(Library(tmp_path / "other", create=False).find()) == 1


def test_prune_says_what_it_would_remove_and_removes_it_when_told(kept, tmp_path):
    shutil.copytree(kept / "library", tmp_path / "library")
    store = Library(tmp_path / "library", create=False)
    damaged, missing = store.find(blueprint="low_rank")
    for row, act in ((damaged, "damage"), (missing, "remove")):
        path = tmp_path / "library" / "kernels" / row.kernel_id[:2] / f"{row.kernel_id}.kernel"
        if act == "damage":
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        else:
            path.unlink()
    said = esper("kernels", "prune", "--library", "library", cwd=tmp_path, check=0).stdout
    assert f"{damaged.kernel_id}  damaged" in said
    assert f"{missing.kernel_id}  its file is missing" in said
    assert "2 of 4 kernels would be removed" in said
    assert len(store.find()) == 4
    done = esper("kernels", "prune", "--library", "library", "--yes", cwd=tmp_path, check=0).stdout
    assert "2 of 4 kernels removed" in done
    assert {row.blueprint for row in store.find()} == {"mine"}


def test_a_kernel_compiled_anew_replaces_its_ancestor(tmp_path):
    store = Library(tmp_path / "library")
    made = compile_blueprint(load_blueprint("low_rank"), KernelSignature.parse("3->4"))
    old = rewrite_artifact(made, versions=made.manifest.versions | {"jaxlib": "0.6.1"})
    store.put(old)
    shown = esper("kernels", "show", old.kernel_id, "--library", "library", cwd=tmp_path, check=0)
    assert "due to be compiled anew" in shown.stdout
    # fmt: off
    done = esper(
        "kernels", "compile", "--again", old.kernel_id[:12], "--library", "library", cwd=tmp_path,
        check=0,
    )
    # fmt: on
    (new_id,) = ids(done.stdout)
    new = store.get(new_id)
    assert new.manifest.ancestor == old.kernel_id
    assert new.manifest.versions == made.manifest.versions
    assert new.stablehlo == made.stablehlo
    # fmt: off
    pruned = esper(
        "kernels", "prune", "--replaced", "--yes", "--library", "library", cwd=tmp_path, check=0
    )
    # fmt: on
    assert f"{old.kernel_id}  replaced by {new_id[:12]}" in pruned.stdout
    assert [row.kernel_id for row in store.find()] == [new_id]


def test_a_batch_in_which_one_fails_keeps_the_rest(tmp_path):
    # fmt: off
    done = esper(
        "kernels", "compile", "low_rank", "attention", "gated", "--in", 3, "--out", 4,
        "--library", "library", cwd=tmp_path, check=2,
    )
    # fmt: on
    assert len(ids(done.stdout)) == 2
    assert "blueprint 'attention' takes one sequence" in done.stderr
    assert len(Library(tmp_path / "library", create=False).find()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile"], "say what to compile"),
        (["compile", "low_rank"], "--in and --out, or --signature is missing"),
        (["compile", "--in", "3", "--out", "4"], "a blueprint is missing"),
        (["compile", "low_rank", "--in", "3"], "--in and --out go together"),
        (["compile", "low_rank", "--signature", "3-4"], "'3-4' is no signature"),
        (
            ["compile", "low_rank", "--in", "3", "--out", "4", "--size", "rank"],
            "such as 'width=16'",
        ),
        (["compile", "none.yaml", "--in", "3", "--out", "4"], "none.yaml cannot be read"),
        (["compile", "--again", "abc"], "there is no library in"),
        (["list", "--library", "none"], "there is no library in"),
        (["show", "gated"], "--signature is missing"),
        (["show", "gone.kernel"], "gone.kernel cannot be read"),
        (["verify", "gone.kernel"], "gone.kernel cannot be read"),
        (["fetch", "gone.kernel"], "gone.kernel cannot be read"),
        (["fetch", "abc", "--from", "none"], "there is no library in"),
    ],
)
def test_bad_usage(tmp_path, arguments, message):
    done = esper("kernels", *arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    if "--again" not in arguments:
        assert done.returncode == 2


def test_an_id_that_several_kernels_begin_with(kept):
    # Of four ids, two begin alike sooner or later: the empty beginning is that of all.
    done = esper("kernels", "show", "", "--library", "library", cwd=kept, check=2)
    assert "several kernels begin with ''" in done.stderr


def test_a_file_is_shown_without_a_library(kept, tmp_path):
    store = Library(kept / "library", create=False)
    row = store.find()[0]
    file = tmp_path / "one.kernel"
    file.write_bytes(store.read_bytes(row.kernel_id))
    assert row.kernel_id in esper("kernels", "show", file, cwd=tmp_path, check=0).stdout
    assert read_artifact(file.read_bytes()).kernel_id == row.kernel_id
