"""`esper config`, and options that settings stand in for."""

import json
import os
import socket

import pytest
from typer.testing import CliRunner

from esper.cli._app import app
from esper.cli._connected import token_for
from esper.cli._defaults import OPTIONS
from esper.settings import load_settings, setting_fields
from esper.urza import Library

FIELDS = dict(setting_fields())


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.upper().startswith("ESPER_")]:
        if name != "ESPER_CACHE_DIR":
            monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def run(*arguments, status=0):
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    told = done.stdout + done.stderr
    assert done.exit_code == status, told
    return told


# Showing and checking.


def test_show_says_where_each_value_comes_from(tmp_path, monkeypatch):
    (tmp_path / "here/esper.yaml").write_text(
        "library:\n  where: lib[red]\n  token: hunter2\nbus: {url: 'redis://:hunter2@h/0'}\n"
    )
    monkeypatch.setenv("ESPER_SERVE__PORT", "99")
    told = run("config", "show")
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines()[1:]}
    assert set(rows) == set(FIELDS)
    assert rows["library.where"] == ["lib[red]", "esper.yaml:2"]
    assert rows["library.token"] == ["***", "esper.yaml:3"]
    assert rows["bus.url"] == ["redis://:***@h/0", "esper.yaml:4"]
    assert rows["serve.port"] == ["99", "ESPER_SERVE__PORT"]
    assert rows["serve.open_metrics"] == ["false", "default"]
    assert rows["worker.name"] == ["default"]
    told = json.loads(run("config", "show", "--json"))
    assert told["file"] == "esper.yaml"
    assert told["settings"]["library.token"] == {"value": "***", "from": "esper.yaml:3"}
    assert told["settings"]["serve.port"] == {"value": 99, "from": "ESPER_SERVE__PORT"}
    assert told["settings"]["worker.name"] == {"value": None, "from": "default"}
    assert set(told["settings"]) == set(FIELDS)


def test_show_says_where_a_file_was_looked_for(tmp_path):
    told = run("config", "show")
    home = tmp_path / "home/.config/esper/esper.yaml"
    assert f"no file of settings was read: there is none at esper.yaml or {home}" in told
    assert json.loads(run("config", "show", "--json"))["looked_in"] == ["esper.yaml", str(home)]


def test_a_file_can_be_named(tmp_path):
    named = tmp_path / "named.yaml"
    named.write_text("serve: {port: 7}\n")
    told = json.loads(run("--config", named, "config", "show", "--json"))
    assert told["settings"]["serve.port"] == {"value": 7, "from": f"{named}:1"}
    told = run("--config", tmp_path / "other.yaml", "config", "show", status=2)
    assert "other.yaml cannot be read: No such file" in told


def test_check_says_what_is_wrong_and_what_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_NONSENSE", "1")  # of no concern to a file
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("library: {where: a}\nserve: {port: 7}\n")
    assert "good.yaml is valid, and says library.where, serve.port" in run("config", "check", good)
    good.write_text("# nothing\n")
    assert "is valid, and says nothing" in run("config", "check", good)
    bad.write_text("library: {tokn: hunter2}\n")
    told = run("config", "check", bad, status=2)
    assert "bad.yaml:1: there is no setting 'library.tokn'; did you mean library.token?" in told
    assert "hunter2" not in told
    assert "nothing reads" in run("config", "show", status=2)


# Options.


def test_settings_and_options_agree_on_their_names():
    for options in OPTIONS.values():
        for names, _ in options.values():
            assert set(names) <= set(FIELDS)


def test_without_settings_the_library_is_where_it_was(tmp_path):
    told = run("kernels", "list", status=2)
    assert f"no library in {tmp_path / 'here/runs/library'}" in told.replace("\n", "")
    assert "[default: runs/library]" in run("kernels", "list", "--help")


def test_a_folder_named_as_the_settings_are_is_told_of(tmp_path):
    (tmp_path / "here/esper.yaml").mkdir()
    for command in (("config", "show"), ("library", "search"), ("worker", "--once")):
        assert "esper.yaml cannot be read: Is a directory, where a YAML" in run(*command, status=2)
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["esper.yaml"]


@pytest.mark.parametrize("by", ["here", "named", "variable", "option"])
def test_the_library_is_where_the_settings_say(by, tmp_path, monkeypatch):
    place = tmp_path / "of settings"
    Library(place).close()
    text = f"library: {{where: '{place}'}}\n"
    before, after = [], []
    if by == "here":
        (tmp_path / "here/esper.yaml").write_text(text)
    elif by == "named":
        (tmp_path / "named.yaml").write_text(text)
        before = ["--config", tmp_path / "named.yaml"]
    elif by == "variable":
        (tmp_path / "here/esper.yaml").write_text("library: {where: elsewhere}\n")
        monkeypatch.setenv("ESPER_LIBRARY__WHERE", str(place))
    else:
        (tmp_path / "here/esper.yaml").write_text("library: {where: elsewhere}\n")
        after = ["--library", place]
    told = run(*before, "kernels", "list", *after)
    assert "no library" not in told
    assert not (tmp_path / "here/runs").exists()


def test_every_command_on_kernels_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_LIBRARY__WHERE", str(tmp_path / "of-settings"))
    for command in ("list", "show a", "verify a", "prune"):
        done = CliRunner().invoke(app, ["kernels", *command.split()])
        told = (done.stdout + done.stderr).replace("\n", "")
        assert f"no library in {tmp_path / 'of-settings'}" in told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "library: {where: 'http://urza:8420'}",
            "esper.yaml:1 says that it is at http://urza:8420",
        ),
        (
            "library:\n  database: postgresql://u:hunter2@h/d\n  blobs: s3://b",
            "esper.yaml:2 names a database: give --library",
        ),
        ("libary: {}", "there is no setting 'libary'; did you mean library?"),
        ("serve: {port: x}", "serve.port: Input should be a valid integer"),
    ],
)
def test_settings_that_a_command_cannot_use_are_refused(settings, message, tmp_path):
    (tmp_path / "here/esper.yaml").write_text(settings)
    told = run("kernels", "list", status=2)
    assert message in told.replace("\n", "")
    assert "hunter2" not in told
    assert "Traceback" not in told
    # With the option there is nothing that they are needed for.
    Library(tmp_path / "own").close()
    run("kernels", "list", "--library", tmp_path / "own")
    run("kernels", "list", "--help")
    run("--version")


def test_no_secret_is_in_the_help(tmp_path):
    (tmp_path / "here/esper.yaml").write_text(
        "library: {database: 'postgresql://u:hunter2@h/d', blobs: a, token: hunter2}\n"
        "bus: {url: 'redis://:hunter2@h/0'}\n"
    )
    for command in ("grow", "kernels list", "worker", "serve", "blueprints list", "token make"):
        done = CliRunner().invoke(app, [*command.split(), "--help"])
        assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("place", "token"),
    [("http://lab:8420", "abc"), ("http://lab:8420/", "abc"), ("http://lab:8421", None),
     ("http://elsewhere:8420", None), ("folder", None)],
)  # fmt: skip
def test_a_token_goes_to_the_address_that_it_stands_beside(place, token, tmp_path):
    (tmp_path / "here/esper.yaml").write_text('library: {where: "http://lab:8420", token: abc}\n')
    assert token_for(place, load_settings(None).settings) == token
    assert token_for(place, None) is None
    (tmp_path / "here/esper.yaml").write_text("library: {token: abc}\n")
    assert token_for(place, load_settings(None).settings) == "abc"


def test_a_library_that_is_named_is_served_and_not_the_database_of_the_settings(tmp_path):
    (tmp_path / "here/esper.yaml").write_text(
        "library: {database: 'postgresql://nobody@127.0.0.1:1/none', blobs: blobs}\n"
    )
    run("token", "make", "me", "--library", "mine")
    tokens = ("--token-file", "mine/tokens.json")
    # What is served is opened before anybody listens, and here nobody can.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = run("serve", "--library", "mine", "--port", port, status=2)
        assert f"port {port} of 127.0.0.1 is in use" in told
        assert (tmp_path / "here/mine/library.sqlite").is_file()
        told = run("serve", "--port", port, *tokens, status=1)
        assert "127.0.0.1" in told
        assert "is in use" not in told
        assert not (tmp_path / "here/runs/library/library.sqlite").exists()


@pytest.mark.parametrize(("options", "is_full"), [((), True), (("--bus-capacity", 4096), False)])
def test_the_size_of_the_queue_to_the_bus_is_a_setting(options, is_full, tmp_path):
    (tmp_path / "here/esper.yaml").write_text(
        "bus: {url: 'sqlite:bus.sqlite'}\ntelemetry: {capacity: 1}\n"
    )
    (tmp_path / "here/short.yaml").write_text("steps: 20\ndecide_every: 2\ncontroller: none\n")
    told = run("grow", "--task", "xor-2", "--config", "short.yaml", *options)
    assert ("did not get to the bus, as too much waited" in told) is is_full


def test_tokens_are_made_beside_settings_of_a_library_elsewhere(tmp_path):
    (tmp_path / "here/esper.yaml").write_text("library: {where: 'http://lab:8420'}\n")
    run("token", "make", "me", "--token-file", "tokens.json")
    assert "me" in run("token", "list", "--token-file", "tokens.json")
    told = run("token", "list", status=2)
    assert "give --token-file FILE, the one that `esper serve` has, or --library FOLDER" in told
    told = run("kernels", "list", "--library", "http://a:hunter2@lab:8420", status=2)
    assert "not opened by http:// here" in " ".join(told.replace("│", " ").split())
    assert "hunter2" not in told
