"""What is configured: where it is found, what goes before what, and what is refused."""

import contextlib
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import esper.settings
from esper.errors import InputError
from esper.settings import (
    VARIABLES,
    SecretUrl,
    check_settings_file,
    is_configured,
    is_secret,
    load_settings,
    setting_fields,
    shown_value,
    variable_of,
    without_password,
)
from tests.test_docs import described, text_of

FIELDS = dict(setting_fields())


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Nothing is configured but what a test configures."""
    for name in [name for name in os.environ if name.upper().startswith("ESPER_")]:
        if name != "ESPER_CACHE_DIR":
            monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def written(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# Where settings come from.


def test_without_anything_all_is_default():
    loaded = load_settings()
    assert loaded.file is None
    assert set(loaded.origins.values()) == {"default"}
    assert set(loaded.origins) == set(FIELDS)
    assert loaded.settings.library.place == "runs/library"
    assert loaded.settings.bus.url is None
    assert not is_configured(None, os.environ)


def test_the_first_file_that_is_there_is_read(tmp_path, monkeypatch):
    def where():
        assert is_configured(None, os.environ)
        loaded = load_settings()
        return loaded.settings.library.where, loaded.origins["library.where"]

    home = written(tmp_path / "home/.config/esper/esper.yaml", "library:\n\n  where: of-home\n")
    assert where() == ("of-home", f"{home}:3")
    xdg = written(tmp_path / "xdg/esper/esper.yaml", "library: {where: of-xdg}\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert where() == ("of-xdg", f"{xdg}:1")
    written("esper.yaml", "# mine\nlibrary: {where: of-here}\n")
    assert where() == ("of-here", "esper.yaml:2")
    named = written(tmp_path / "named.yaml", "library: {where: named}\n")
    monkeypatch.setenv("ESPER_CONFIG", str(named))
    assert where() == ("named", f"{named}:1")
    asked = written(tmp_path / "asked.yaml", "library: {where: asked}\n")
    assert load_settings(asked).settings.library.where == "asked"
    monkeypatch.setenv("ESPER_CONFIG", "")
    assert where() == ("of-here", "esper.yaml:2")


def test_a_bus_may_be_a_socket(monkeypatch):
    monkeypatch.setenv("ESPER_BUS__URL", "unix:///run/redis.sock?db=1")
    url = load_settings().settings.bus.url
    assert url is not None
    assert url.get_secret_value() == "unix:///run/redis.sock?db=1"


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_a_file_that_is_named_has_to_be_there(by, monkeypatch, tmp_path):
    path = tmp_path / "not-there.yaml"
    if by == "variable":
        monkeypatch.setenv("ESPER_CONFIG", str(path))
    with pytest.raises(InputError, match=r"settings file .*not-there.yaml cannot be read: No such"):
        load_settings(path if by == "argument" else None)


@pytest.mark.parametrize("place", ["esper.yaml", "../home/.config/esper/esper.yaml"])
def test_a_folder_of_that_name_is_no_file_and_is_not_passed_over(place):
    Path(place).mkdir(parents=True)
    assert is_configured(None, os.environ)
    with pytest.raises(InputError, match=r"esper.yaml cannot be read: Is a directory, where a"):
        load_settings()


def test_the_environment_goes_before_the_file(monkeypatch):
    written("esper.yaml", "library: {where: of-file}\nserve: {port: 1, host: a}\n")
    monkeypatch.setenv("ESPER_SERVE__PORT", "2")
    monkeypatch.setenv("esper_serve__open_metrics", "true")
    monkeypatch.setenv("ESPER_LIBRARY__S3__REGION", "here")
    monkeypatch.setenv("ESPER_LIBRARY__WHERE", "")
    loaded = load_settings()
    serve = loaded.settings.serve
    assert (serve.port, serve.host, serve.open_metrics) == (2, "a", True)
    assert loaded.settings.library.s3.region == "here"
    assert loaded.settings.library.where == "of-file"  # an empty variable is none
    given = {name: origin for name, origin in loaded.origins.items() if origin != "default"}
    assert given == {
        "library.where": "esper.yaml:1",
        "library.s3.region": "ESPER_LIBRARY__S3__REGION",
        "serve.host": "esper.yaml:2",
        "serve.port": "ESPER_SERVE__PORT",
        "serve.open_metrics": "esper_serve__open_metrics",
    }


EXAMPLES = {
    "library.where": "a", "library.database": "postgresql://u:p@h/d", "library.blobs": "s3://b/f",
    "bus.url": "redis://h", "logging.format": "json", "logging.level": "error",
    "serve.open_metrics": "true", "worker.measure": "true", "tamiyo.shadow": "true",
    "tamiyo.learn": "true", "tamiyo.sample": "0.5",
}  # fmt: skip
TOGETHER = {
    "library.database": ["library.blobs"], "library.blobs": ["library.database"],
    "serve.key": ["serve.certificate"], "serve.certificate": ["serve.key"],
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("by", ["file", "environment"])
def test_every_setting_can_be_given_both_ways(name, by, monkeypatch):
    def example(name):
        text = str(FIELDS[name].annotation)
        return EXAMPLES.get(name, "7" if "int" in text or "float" in text else "text")

    wanted = {each: example(each) for each in [name, *TOGETHER.get(name, [])]}
    for each, value in wanted.items():
        if by == "environment":
            monkeypatch.setenv(variable_of(each), value)
    if by == "file":
        lines, data = [], {}
        for each, value in wanted.items():
            *sections, last = each.split(".")
            inner = data
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = int(value) if value == "7" else value == "true" or value
        lines.append(json.dumps(data))  # JSON is YAML
        written("esper.yaml", "\n".join(lines))
    loaded = load_settings()
    assert {each for each in FIELDS if loaded.is_given(each)} == set(wanted)
    value = loaded.value(name)
    assert value != FIELDS[name].get_default(call_default_factory=True)
    plain = value.get_secret_value() if is_secret(FIELDS[name]) else value
    assert str(plain).lower().removesuffix(".0") == wanted[name]


# What is refused.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("libary: {}", r"esper.yaml:1: there is no setting 'libary'; did you mean library\?"),
        ("library:\n  wher: x", r"esper.yaml:2: .*'library.wher'; did you mean library.where\?"),
        ("port: 3", r"no setting 'port'; did you mean serve.port\?"),
        ("xyzzy: 3", "no setting 'xyzzy'; expected one of library, bus, serve, worker"),
        ("library: {s3: {secret: x}}", "'library.s3.secret'; did you mean"),
        ("library: 3", "esper.yaml:1: library is a section: expected settings such as where"),
        ("library: [1]", "library is a section"),
        ("[1]", "no mapping of sections such as `library:`, but a list"),
        ("text", "no mapping of sections such as `library:`, but a str"),
        ("a: [1\n", "not YAML at line 2, column 1"),
        ("a: \x00", "not YAML"),
        ("serve:\n  port: 1\n  host: a\n  port: 2", "serve.port twice, at lines 2 and 4: keep one"),
        ("a: &x [1]\nb: *x", "an alias at line 2: write out what it stands for"),
        ("a: !!python/object/apply:os.system [x]", "not YAML at line 1.*python/object"),
        ("a: 2024-99-99", "holds a number or a date that is none: put texts into quotes"),
        ("[" * 10_000, "nested deeper than 20 levels at line 1"),
        ("#" * ((1 << 20) + 1), "more than 1048576 bytes: it is something else"),
        ("serve:\n\n  port: false", "esper.yaml:3: serve.port: expected a number, and not true"),
        ("serve: {port: 70000}", r"serve.port: .*less than or equal to 65535 \(got 70000\)"),
        ("serve: {workers: 1.5}", r"serve.workers: .*integer.*\(got 1.5\)"),
        ("serve: {rate: .nan}", "serve.rate: .*greater than 0"),
        ("serve: {rate: .inf}", "serve.rate: .*finite"),
        ("serve: {rate: 0}", "serve.rate: .*greater than 0"),
        ("serve: {host: ''}", "serve.host: String should have at least 1"),
        ("serve: {key: a}", "serve: HTTPS takes both `certificate` and `key`"),
        ("worker: {lease: 0.5}", "worker.lease: .*greater than or equal to 1"),
        ("telemetry: {capacity: 0}", "telemetry.capacity: .*greater than or equal to 1"),
        ("logging: {format: xml}", r"logging.format: .*'json'.*\(got 'xml'\)"),
        ("bus: {url: amqp://h}", "bus.url: the address of a bus is memory:, sqlite:PATH or redis"),
        ("library: {database: mysql://h, blobs: a}", "library.database: the address of a database"),
        ("library: {blobs: a}", "library: a library has both `database` and `blobs`, or neither"),
        (
            "library: {where: a, blobs: b, database: 'sqlite:///x'}",
            "library: a library has either `where` or `database` and `blobs`",
        ),
        ("library: {where: 3}", r"library.where: .*string \(got 3\)"),
        ("library: {where: 'https://u:two@h'}", r"library.where: .*without a user and password"),
        ("library: {where: 'https://u:hunter/two@h'}", r"library.where: .*without a user and pass"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text, message):
    written("esper.yaml", text)
    with pytest.raises(InputError, match=message) as raised:
        load_settings()
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=message):
        check_settings_file(Path("esper.yaml"))


def test_a_file_that_is_no_text_or_no_file_is_refused(tmp_path):
    Path("esper.yaml").write_bytes(b"library: \xff")
    with pytest.raises(InputError, match="not YAML: byte 9 is not UTF-8"):
        load_settings()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_settings(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "library:\nbus:\n", "{}"])
def test_a_file_that_says_nothing_says_nothing(text, monkeypatch):
    written("esper.yaml", text)
    assert set(load_settings().origins.values()) == {"default"}


def test_all_that_is_wrong_is_told_at_once():
    written("esper.yaml", "serve: {port: x, host: 3}\nbus: {url: amqp://h}\n")
    with pytest.raises(InputError, match="serve.port: .*") as raised:
        load_settings()
    for name in ("serve.port", "serve.host", "bus.url"):
        assert name in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("ESPER_LIBRARY__WHER", r"did you mean ESPER_LIBRARY__WHERE\?"),
        ("ESPER_LIBRARY_WHERE", r"did you mean ESPER_LIBRARY__WHERE\?"),
        ("ESPER_LIBRARY", "did you mean ESPER_LIBRARY"),
        ("Esper_Bus_Url", r"did you mean ESPER_BUS__URL\?"),
        ("ESPER_CACHE", r"did you mean ESPER_CACHE_DIR\?"),
        ("ESPER_QXZ_42", "`esper config show` lists those that are"),
    ],
)
def test_a_variable_that_nothing_reads_is_refused(variable, near, monkeypatch):
    monkeypatch.setenv(variable, '{"where": "hunter2"}')
    message = f"nothing reads the environment variable {variable}; {near}"
    with pytest.raises(InputError, match=message) as raised:
        load_settings()
    assert "hunter2" not in str(raised.value)


def test_variables_that_are_no_settings_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ESPERANTO", "1")
    assert not is_configured(None, os.environ)
    assert set(load_settings().origins.values()) == {"default"}
    assert set(VARIABLES.values()) == set(FIELDS)


def test_a_wrong_value_of_a_variable_names_it(monkeypatch):
    monkeypatch.setenv("ESPER_SERVE__PORT", "http")
    with pytest.raises(InputError, match=r"^ESPER_SERVE__PORT: .*integer.*\(got 'http'\)$"):
        load_settings()


def test_a_file_is_checked_without_the_environment(monkeypatch):
    monkeypatch.setenv("ESPER_SERVE__PORT", "2")
    monkeypatch.setenv("ESPER_NONSENSE", "2")
    loaded = check_settings_file(written("esper.yaml", "serve: {host: a}"))
    assert (loaded.settings.serve.port, loaded.settings.serve.host) == (8420, "a")
    assert loaded.origins["serve.port"] == "default"


def test_settings_do_not_change():
    settings = load_settings().settings
    with pytest.raises(ValueError, match="frozen"):
        settings.library = settings.library
    with pytest.raises(ValueError, match="frozen"):
        settings.serve.port = 3


# Secrets.

SECRET = "hunter2-Ünique"
PLACES = [name for name, field in FIELDS.items() if is_secret(field)]


def test_what_is_secret():
    assert set(PLACES) == {
        "library.database", "library.token", "library.s3.secret_access_key",
        "library.s3.session_token", "bus.url",
    }  # fmt: skip


def _everything_told(loaded):
    shown = {name: shown_value(loaded.value(name)) for name in FIELDS}
    return f"{loaded!r} {loaded} {loaded.settings.model_dump_json()} {json.dumps(shown)}"


def test_no_secret_is_shown(monkeypatch):
    written(
        "esper.yaml",
        f"library:\n  database: postgresql://esper:{SECRET}@db:5432/esper?sslpassword={SECRET}\n"
        f"  blobs: s3://bucket\n  token: {SECRET}\n  s3:\n    secret_access_key: {SECRET}\n"
        f"bus:\n  url: redis://:{SECRET}@bus/0\n",
    )
    monkeypatch.setenv("ESPER_LIBRARY__S3__SESSION_TOKEN", SECRET)
    loaded = load_settings()
    for name in PLACES:
        assert SECRET in loaded.value(name).get_secret_value()
    told = _everything_told(loaded)
    assert SECRET not in told
    assert "hunter2" not in told
    assert "postgresql://esper:***@db:5432/esper?sslpassword=***" in told
    assert "redis://:***@bus/0" in told


@pytest.mark.parametrize("name", [*FIELDS, "library.tokn", "library.s3.secret", "pasword"])
@pytest.mark.parametrize("shape", ["text", "list", "mapping", "url"])
@pytest.mark.parametrize("by", ["file", "environment"])
def test_no_secret_is_in_an_error_or_what_it_came_from(name, shape, by, monkeypatch):
    value = {
        "text": SECRET, "list": [SECRET], "mapping": {"a": SECRET}, "url": f"http://a:{SECRET}@b",
    }[shape]  # fmt: skip
    if by == "file":
        data = value
        for part in reversed(name.split(".")):
            data = {part: data}
        written("esper.yaml", json.dumps({**data, "xyzzy": 1}, ensure_ascii=False))
    else:
        monkeypatch.setenv(
            variable_of(name), value if isinstance(value, str) else json.dumps(value)
        )
        monkeypatch.setenv("ESPER_SERVE__PORT", "x")
    with pytest.raises(InputError) as raised:
        load_settings()
    whole = "".join(traceback.format_exception(raised.value))
    # A value that is no secret's place is shown, so that it can be put right; not within a URL.
    public = (
        name in FIELDS
        and name not in PLACES
        and (shape == "text" or (by == "environment" and shape != "url"))
    )
    if not public:
        assert SECRET not in whole
        assert "nique" not in whole


@pytest.mark.parametrize(
    "text",
    [
        "token: 'SECRET\n", "token: \t@SECRET", "a: [SECRET", "*SECRET", "token: *hunter2",
        "token: !hunter2", "token: !hunter2 x", "token: !!hunter2", "token: !hunter2!x",
        "token: !<hunter2> x", "token: !it's-hunter2", "token: !!bool hunter2",
        "token: !!timestamp hunter2", "token: !!int hunter2", "{token: &hunter2 a, x: &hunter2 b}",
        "{token:hunter2}", "{token=hunter2}", "{s3: {session_token hunter2}}",
        "{token:hunter2, token:hunter2}", "{a: {b:hunter2: 1, b:hunter2: 2}}",
    ],
)  # fmt: skip
def test_no_secret_is_in_an_error_of_yaml(text):
    written("esper.yaml", "library:\n  " + text.replace("SECRET", SECRET))
    with pytest.raises(InputError) as raised:
        load_settings()
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))


_WORD = st.text("abcXYZ019-_.~%+=!$&'()*,;", min_size=1, max_size=12)
_ODD = st.sampled_from(["p@ss:w/rd", "hunter/two", "a?b#c", "#"])


@given(user=_WORD | st.just(""), password=_WORD | _ODD,
       host=st.sampled_from(["h", "[::1]:5432", "a.b:1"]))  # fmt: skip
def test_a_url_is_shown_without_its_password(user, password, host):
    url = f"postgresql://{user}:{password}@{host}/d"
    expected = f"postgresql://{user}:***@{host}/d"
    assert without_password(url) == expected
    assert str(SecretUrl(url)) == expected
    assert password not in repr(SecretUrl(url)).replace(expected, "")
    assert without_password(f"cannot connect to {url}, sorry") == (
        f"cannot connect to {expected}, sorry"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://TOKEN@host/x", "https://***@host/x"),
        ("http://h/x?token=abc&page=2", "http://h/x?token=***&page=2"),
        ("http://h/?X-Amz-Signature=abc&a=1", "http://h/?X-Amz-Signature=***&a=1"),
        ("http://h/a@b", "http://h/a@b"),
        ("http://h/x?mail=a@b", "http://h/x?mail=a@b"),
        ("http://h/x:y and a@b", "http://h/x:y and a@b"),
        ("mail a@b.c", "mail a@b.c"),
        ("redis://h:6379/0", "redis://h:6379/0"),
    ],
)
def test_only_passwords_are_hidden(text, shown):
    assert without_password(text) == shown


# What it costs.


def test_asking_whether_anything_is_configured_imports_nothing_heavy():
    script = """
import sys, os
from esper.settings import is_configured
is_configured(None, os.environ)
print(*sorted(m for m in sys.modules if "." not in m))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    heavy = {"pydantic", "pydantic_settings", "yaml", "torch", "jax", "numpy"}
    assert not set(done.stdout.split()) & heavy


def test_the_names_are_there():
    for name in esper.settings.__all__:
        assert getattr(esper.settings, name) is not None
    with contextlib.suppress(AttributeError):
        esper.settings.nothing  # noqa: B018
        pytest.fail("there is a name that is not listed")


# What is written of it.


def settings_table():
    from esper.settings._settings import Settings

    rows = ["| setting | default | what it is |", "| --- | --- | --- |"]
    for name in FIELDS:
        model = Settings
        *sections, last = name.split(".")
        for section in sections:
            model = model.model_fields[section].annotation
        default = FIELDS[name].default
        shown = "" if default is None else f"`{json.dumps(default)}`"
        rows.append(f"| `{name}` | {shown} | {described(model)[last].replace('|', '&#124;')} |")
    return "\n".join(rows)


def test_the_page_names_every_setting():
    assert settings_table() in text_of("configuration.md"), settings_table()


def test_the_page_s_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", text_of("configuration.md"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "configuration.md", "exec"), {})
    (example,) = re.findall(r"```yaml\n(.*?)```", text_of("configuration.md"), re.DOTALL)
    loaded = check_settings_file(written("example.yaml", example))
    assert loaded.is_given("bus.url")


# What drivers take as a password.


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://esper:hunter/two@db:5432/esper", "postgresql://esper:***@db:5432/esper"),
        ("postgresql://esper:hunter?two@db/esper", "postgresql://esper:***@db/esper"),
        ("postgresql://esper:hunter#two@db/esper", "postgresql://esper:***@db/esper"),
        ("postgresql://esper:hunter two@db/esper", "postgresql://esper:***@db/esper"),
        ("postgresql://es?per:hunter2@db/esper", "postgresql://es?per:***@db/esper"),
        ("postgresql://me@corp:hunter2@db/esper", "postgresql://***@db/esper"),
        ("postgresql://db/e?sslpassword=hunter#2;t o&a=1", "postgresql://db/e?sslpassword=***&a=1"),
        # These hold no password, but could: too much is hidden, and not too little.
        ("postgresql://db:5432/e?application_name=a@b", "postgresql://db:***@b"),
        ("postgresql://token@db/e?application_name=a@b", "postgresql://***@b"),
    ],
)
def test_what_may_be_a_password_in_an_address_is_not_shown(address, shown):
    written("esper.yaml", json.dumps({"library": {"database": address, "blobs": "blobs"}}))
    loaded = load_settings()
    assert loaded.value("library.database").get_secret_value() == address
    assert shown_value(loaded.value("library.database")) == shown
    assert f"SecretUrl('{shown}')" in repr(loaded.settings.library)
    if " " not in address:
        assert without_password(f"cannot reach {address}, sorry") == f"cannot reach {shown}, sorry"


def test_a_key_with_a_value_in_it_is_named_without_it():
    written("esper.yaml", "bus: {}\nlibrary: {token:hunter2}")
    message = (
        r"^esper.yaml:2: there is no setting 'library.token…'; did you mean library.token\?"
        r" \(a space is wanted after the colon that ends a key\)$"
    )
    with pytest.raises(InputError, match=message):
        load_settings()


def test_a_tag_that_is_not_read_is_told_by_its_line():
    written("esper.yaml", "library:\n  token: !hunter2")
    with pytest.raises(InputError, match=r"at line 2, column 10: .*the tag \(put a text that"):
        load_settings()
