"""`esper kernels` as a user meets it."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper.artifacts import Artifact, read_artifact, rewrite_artifact
from esper.artifacts._archive import read_archive, write_archive
from esper.contracts import KernelSignature
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.urza import Library
from tests.esper.test_cli import ENVIRONMENT, esper, esper_here, tree

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


def here(*arguments, check: int):
    return esper_here("kernels", *arguments, check=check)


def file_of(store: Library, kernel_id: str) -> Path:
    return store.folder / "kernels" / kernel_id[:2] / f"{kernel_id}.kernel"


@pytest.fixture(scope="module")
def made() -> Artifact:
    """A kernel of `compile low_rank --in 3 --out 4`."""
    return compile_blueprint(load_blueprint("low_rank"), KernelSignature.parse("3->4"))


ASKED = ("low_rank", "--in", 3, "--out", 4, "--workers", 0)


@pytest.mark.parametrize("harm", ["missing", "damaged", "huge"])
def test_a_kernel_whose_file_is_not_whole_is_compiled(tmp_path, made, harm):
    store = Library(tmp_path / "library")
    file = file_of(store, store.put(made))
    if harm == "missing":
        file.unlink()
    elif harm == "damaged":
        file.write_bytes(made.data[:-1] + b"x")
    else:
        with file.open("r+b") as opened:
            opened.truncate(1 << 40)
    done = here("compile", *ASKED, "--library", store.folder, check=0)
    assert ids(done.stdout) == [made.kernel_id]
    assert store.get(made.kernel_id).data == made.data


def test_kernels_that_are_there_are_measured_where_that_was_not_done(tmp_path, made):
    store = Library(tmp_path / "library")
    store.put(made)
    here("compile", *ASKED, "--measure", "--library", store.folder, check=0)
    measured = store.measurements(made.kernel_id)
    assert [m["backend"] for m in measured] == ["jax", "torch"]
    store.record_measurement({**measured[0], "device": "another machine's"})
    before = store.measurements(made.kernel_id)
    here("compile", *ASKED, "--measure", "--library", store.folder, check=0)
    assert store.measurements(made.kernel_id) == before


def test_what_cannot_be_kept_costs_no_other_kernel(tmp_path, made):
    store = Library(tmp_path / "library")
    database = sqlite3.connect(store.folder / "library.sqlite")
    refuse = "CREATE TRIGGER t{0} BEFORE INSERT ON {0} {1} BEGIN SELECT RAISE(ABORT, 'no {0}'); END"
    database.execute(refuse.format("measurements", ""))
    database.execute(refuse.format("kernels", "WHEN NEW.blueprint = 'norm'"))
    database.commit()
    database.close()
    # fmt: off
    done = here(
        "compile", "norm", *ASKED, "--measure", "--library", store.folder, check=1
    )
    # fmt: on
    assert ids(done.stdout) == [made.kernel_id]
    assert [row.kernel_id for row in store.find()] == [made.kernel_id]
    assert re.search("kernel .* could not be kept in .*: no kernels", done.stderr)
    # Of jax and of torch.
    told = f"what was measured of kernel {made.kernel_id[:12]} could not be kept in"
    assert done.stderr.count(told) == 2


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
    done = esper_here(
        "kernels", "compile", "low_rank", "--in", 3, "--out", 4, "--library", "library",
        cwd=kept, check=0,
    )
    # fmt: on
    assert len(ids(done.stdout)) == 1
    assert tree(kept / "library" / "kernels") == before


def test_list_shows_kernels_and_blueprints(kept):
    listed = esper_here("kernels", "list", "--library", "library", cwd=kept, check=0).stdout
    assert listed.count("3->4 float32") == 2
    assert "4 kernels; 26 blueprints" in listed
    one = esper_here("kernels", "list", "--library", "library", "--blueprint", "mine",
                     "--signature", "3->4", cwd=kept, check=0).stdout  # fmt: skip
    assert "1 kernel; 26 blueprints" in one
    shown = esper_here("kernels", "list", "--blueprints", cwd=kept, check=0).stdout
    for name in ("low_rank", "squeeze_excite", "conformer_conv"):
        assert name in shown


@pytest.mark.parametrize("columns", [80, 40])
def test_no_window_and_no_pipe_cuts_an_id(kept, made, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    store = Library(kept / "library", create=False)
    rows = store.find()
    listed = here("list", "--library", store.folder, check=0).stdout.splitlines()
    assert [line.split()[0] for line in listed[1:-1] if line.strip()] == [
        row.kernel_id for row in rows
    ]
    assert listed[1].split()[1:4] == [rows[0].blueprint, *rows[0].signature.split()]
    shown = here("show", made.kernel_id[:12], "--library", store.folder, check=0).stdout
    assert re.search(rf"^ *kernel +{made.kernel_id}", shown)
    assert re.search(r"^ *compiled by .*torch \S+ *$", shown, re.MULTILINE)
    blueprints = here("list", "--blueprints", check=0).stdout
    assert re.search("^ *low_rank .*its second factor starts at zero. *$", blueprints, re.MULTILINE)


def test_show_draws_the_graph_of_a_kernel_given_the_beginning_of_its_id(kept):
    store = Library(kept / "library", create=False)
    (row,) = store.find(KernelSignature.parse("3->4"), blueprint="mine")
    shown = esper_here(
        "kernels", "show", row.kernel_id[:10], "--library", "library", cwd=kept, check=0
    )
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
    shown = esper_here("kernels", "show", "gated", *signature, cwd=tmp_path, check=0).stdout
    lines = [line.rstrip() for line in shown.splitlines()[-6:]]
    assert [line[:5].rstrip() for line in lines] == ["○", "├─●", "│ ●", "● │", "●─╯", "●"]
    drawn = esper_here(
        "kernels", "show", "gated", *signature, "--mermaid", cwd=tmp_path, check=0
    ).stdout
    assert "n_gate --> n_open" in drawn
    assert "x --> n_gate" in drawn


def test_verify_accepts_a_kernel_and_refuses_one_that_was_tampered_with(kept, tmp_path):
    store = Library(kept / "library", create=False)
    (row,) = store.find(KernelSignature.parse("3->4"), blueprint="low_rank")
    done = esper_here("kernels", "verify", row.kernel_id, "--library", "library", cwd=kept, check=0)
    assert "accepted" in done.stdout
    data = bytearray(store.read_bytes(row.kernel_id))
    members = read_archive(bytes(data), max_bytes=1 << 30)
    manifest = json.loads(members["manifest.json"])
    manifest["digests"]["program.stablehlo"] = "0" * 64
    members["manifest.json"] = json.dumps(manifest).encode()
    bad = tmp_path / "bad.kernel"
    bad.write_bytes(write_archive(members))
    refused = esper_here("kernels", "verify", bad, cwd=tmp_path, check=1)
    assert "refused" in refused.stdout
    assert "program.stablehlo" in refused.stdout


def test_fetch_verifies_and_keeps_kernels_of_another_library(kept, tmp_path):
    store = Library(kept / "library", create=False)
    rows = store.find(blueprint="low_rank")
    # fmt: off
    done = esper_here(
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
    done = esper_here("kernels", "fetch", rows[0].kernel_id, rows[1].kernel_id, "--from", "theirs",
                 "--library", "fetched", cwd=tmp_path, check=1)  # fmt: skip
    assert f"kernel {rows[0].kernel_id[:12]} is damaged" in done.stderr
    assert ids(done.stdout) == [rows[1].kernel_id]
    # What is refused is not kept, and the rest is.
    hostile = tmp_path / "hostile.kernel"
    hostile.write_bytes(store.read_bytes(rows[0].kernel_id)[:-40])
    good = tmp_path / "good.kernel"
    good.write_bytes(store.read_bytes(rows[1].kernel_id))
    done = esper_here(
        "kernels", "fetch", hostile, good, "--library", "other", cwd=tmp_path, check=1
    )
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
    said = esper_here("kernels", "prune", "--library", "library", cwd=tmp_path, check=0).stdout
    assert f"{damaged.kernel_id}  damaged" in said
    assert f"{missing.kernel_id}  its file is missing" in said
    assert "2 of 4 kernels would be removed" in said
    assert len(store.find()) == 4
    done = esper_here(
        "kernels", "prune", "--library", "library", "--yes", cwd=tmp_path, check=0
    ).stdout
    assert "2 of 4 kernels removed" in done
    assert {row.blueprint for row in store.find()} == {"mine"}


def test_a_kernel_compiled_anew_replaces_its_ancestor(tmp_path):
    store = Library(tmp_path / "library")
    made = compile_blueprint(load_blueprint("low_rank"), KernelSignature.parse("3->4"))
    old = rewrite_artifact(made, versions=made.manifest.versions | {"jaxlib": "0.6.1"})
    store.put(old)
    shown = esper_here(
        "kernels", "show", old.kernel_id, "--library", "library", cwd=tmp_path, check=0
    )
    assert "due to be compiled anew" in shown.stdout
    # fmt: off
    done = esper_here(
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
    pruned = esper_here(
        "kernels", "prune", "--replaced", "--yes", "--library", "library", cwd=tmp_path, check=0
    )
    # fmt: on
    assert f"{old.kernel_id}  replaced by {new_id[:12]}" in pruned.stdout
    assert [row.kernel_id for row in store.find()] == [new_id]


def test_no_kernel_is_removed_on_the_word_of_another(tmp_path, made):
    other = compile_blueprint(load_blueprint("gated"), made.manifest.signature)
    wider = compile_blueprint(
        load_blueprint("low_rank"), made.manifest.signature, sizes={"rank": 2}
    )
    later = made.manifest.versions | {"numpy": "999"}
    trained = {name: value + 1 for name, value in made.params.items()}
    # fmt: off
    liars = [
        (rewrite_artifact(artifact, **{"ancestor": made.kernel_id, "versions": later} | changed),
         reason)
        for artifact, changed, reason in (
            (other, {}, "another blueprint, "),
            (wider, {}, "another sizes, parameters"),
            (made, {"init_seed": 1}, "another seed"),
            (made, {"birth": "free"}, "another birth"),
            (made, {"params": trained}, "another parameters"),
            (made, {"versions": made.manifest.versions}, "was compiled by the same versions"),
            (made, {"versions": later | {"jaxlib": "0.1.0"}}, "is due itself"),
            (made, {"versions": {}}, "is due itself"),
        )
    ]
    # fmt: on
    for i, (liar, reason) in enumerate(liars):
        store = Library(tmp_path / str(i))
        store.put(made)
        store.put(liar)
        done = here("prune", "--replaced", "--yes", "--library", store.folder, check=0)
        assert "0 of 2 kernels removed" in done.stdout
        (said,) = [line for line in done.stdout.splitlines() if f"{made.kernel_id}  kept" in line]
        assert f"kept: {liar.kernel_id[:12]} names it as its ancestor, but" in said
        assert reason in said
        assert store.get(made.kernel_id).data == made.data
    # The same, compiled by other versions, does replace it, whatever else is said.
    store.put(rewrite_artifact(made, ancestor=made.kernel_id, versions=later))
    done = here("prune", "--replaced", "--yes", "--library", store.folder, check=0)
    assert f"{made.kernel_id}  replaced by" in done.stdout
    assert "1 of 3 kernels removed" in done.stdout


def test_prune_lists_again_what_is_whole_and_removes_what_is_damaged(tmp_path, made):
    store = Library(tmp_path / "library")
    other = rewrite_artifact(made, init_seed=1)
    for artifact in (made, other):
        store.put(artifact)
        store.remove(artifact.kernel_id)
        file_of(store, artifact.kernel_id).write_bytes(artifact.data)
    file_of(store, other.kernel_id).write_bytes(b"short")
    for yes in ((), ("--yes",)):
        assert store.find() == []
        said = here("prune", *yes, "--library", store.folder, check=0).stdout
        assert f"{other.kernel_id}  damaged, and not listed" in said
        assert f"{made.kernel_id}  kept: it was not listed, and is whole" in said
    assert "1 of 2 kernels removed" in said
    assert "1 that was not listed listed again" in said
    assert [row.kernel_id for row in store.find()] == [made.kernel_id]
    assert not file_of(store, other.kernel_id).exists()
    assert "0 of 1 kernel removed" in here("prune", *yes, "--library", store.folder, check=0).stdout


def test_a_batch_in_which_one_fails_keeps_the_rest(tmp_path):
    # fmt: off
    done = esper_here(
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
        (
            ["compile", "low_rank", "--in", "3", "--out", "4", "--size", f"rank={'9' * 5000}"],
            f"of at most 9 digits, such as 'width=16'; got 'rank={'9' * 35}'",
        ),
        (["compile", "low_rank", "--in", "3", "--out", "4", "--size", "rank=999999999"], "rank"),
        (
            ["compile", "low_rank", "--in", "3", "--out", "4", "--size", "rank=٣"],
            "at most 9 digits",
        ),
        (["verify", "x" * 300], "there is no library in"),
        (["show", f"{'x' * 300}.kernel"], "cannot be read"),
        (["show", "/.kernel"], "/.kernel cannot be read"),
    ],
)
def test_bad_usage_exits_2_with_a_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = here(*arguments, check=2)
    assert message in done.stderr


def test_an_id_that_several_kernels_begin_with(kept):
    # Of four ids, two begin alike sooner or later: the empty beginning is that of all.
    done = esper_here("kernels", "show", "", "--library", "library", cwd=kept, check=2)
    assert "several kernels begin with ''" in done.stderr


def test_a_file_is_shown_without_a_library(kept, tmp_path):
    store = Library(kept / "library", create=False)
    row = store.find()[0]
    file = tmp_path / "one.kernel"
    file.write_bytes(store.read_bytes(row.kernel_id))
    assert row.kernel_id in esper_here("kernels", "show", file, cwd=tmp_path, check=0).stdout
    assert read_artifact(file.read_bytes()).kernel_id == row.kernel_id


def test_what_is_not_there_is_bad_input_and_the_rest_is_done(kept, made, tmp_path):
    library = ("--library", kept / "library")
    for arguments in (
        ("show", "deadbeef"),
        ("fetch", "deadbeef", "--from", kept / "library", "--library", tmp_path / "new"),
        ("compile", "--again", "deadbeef", *library),
    ):
        if arguments[-1] != kept / "library":
            arguments = (*arguments, *library) if "--library" not in arguments else arguments
        assert "holds no kernel deadbeef" in here(*arguments, check=2).stderr
    gone, long, good = tmp_path / "gone.kernel", "x" * 300, tmp_path / "good.kernel"
    good.write_bytes(made.data)
    done = here("verify", gone, long, good, *library, check=2)
    assert "good.kernel: accepted" in done.stdout
    assert "gone.kernel cannot be read" in done.stderr
    assert f"holds no kernel {'x' * 12}:" in done.stderr
    bad = tmp_path / "bad.kernel"
    bad.write_bytes(made.data[:-1])
    done = here("verify", bad, gone, good, *library, check=1)
    assert "bad.kernel: refused" in done.stdout
    assert "good.kernel: accepted" in done.stdout


def test_a_file_larger_than_any_kernel_is_not_read(tmp_path):
    for name in ("huge.kernel", "huge.yaml"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
    told = "has 1099511627776 bytes, and may have at most 1073741824"
    for command in ("show", "verify", "fetch"):
        assert told in here(command, tmp_path / "huge.kernel", check=2).stderr
    done = here("show", tmp_path / "huge.yaml", "--signature", "3->4", check=2)
    assert "has 1099511627776 bytes, and may have at most 1048576" in done.stderr
    # What has no size, such as a device or a pipe, has no end either.
    (tmp_path / "endless.kernel").symlink_to("/dev/zero")
    done = here("show", tmp_path / "endless.kernel", check=2)
    assert "cannot be read: it is no file" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_output_that_is_not_taken(kept):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "esper.cli", "kernels", "list", "--library", "library"],
            cwd=kept, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "esper: No space left on device. Make room or give access.\n"


@pytest.mark.parametrize("module", ["typer", "jaxlib", "sqlalchemy"])
def test_ctrl_c_during_the_imports_ends_the_command(kept, module):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "esper.cli", "kernels", "list", "--library",
         "library"],
        cwd=kept, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Python writes a line after each import: the first of a package comes in the middle of it.
    for line in process.stderr:
        if line.split("|")[-1].strip().startswith(f"{module}."):
            break
    process.send_signal(signal.SIGINT)
    shown, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    told = [line for line in told.splitlines() if not line.startswith("import time:")]
    assert told == ["esper: interrupted"]
    assert shown == ""


def imports(process: int) -> bool:
    """Whether a worker of a process is at its imports."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    workers = [child for child, command in commands.items() if b"spawn_main" in command]
    return any("numpy" in Path(f"/proc/{child}/maps").read_text() for child in workers)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
def test_ctrl_c_while_workers_start_ends_them_without_a_word(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "esper.cli", "kernels", "compile", "low_rank", "gated", "--in", "3",
         "--out", "4", "--workers", "2"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not imports(process.pid):
        time.sleep(0.01)
    # As a terminal does, to all of them.
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.strip() == "esper: interrupted"
