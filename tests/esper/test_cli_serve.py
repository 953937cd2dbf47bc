"""`esper serve` and `esper token` asked for what cannot be: said before anything is opened."""

import shutil
import socket
import subprocess

import pytest

from tests.esper.test_cli import esper_here


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def here(*arguments, check=0) -> str:
    return " ".join(esper_here(*arguments, check=check).output.split())


@pytest.mark.parametrize(
    ("database", "message"),
    [
        ("mysql://u:hunter2@h/d", "cannot be kept in the database mysql://u@h/d: expected sqlite"),
        ("hunter2", "this is no URL of a database: expected sqlite"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_with_the_other_options(database, message):
    # Nobody has a token either, which is only found once the tokens are looked at.
    text = here("serve", "--database", database, "--blobs", "blobs", check=2)
    assert message in text
    assert "hunter2" not in text


def made_by_openssl(*arguments) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_files_for_https_that_are_no_pem_are_named(tmp_path):
    for name in ("a", "b"):
        made_by_openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", "/CN=lab",
        )  # fmt: skip
    made_by_openssl("ec", "-in", "a.key", "-aes256", "-passout", "pass:word", "-out", "locked.key")
    made_by_openssl("x509", "-in", "a.pem", "-outform", "der", "-out", "a.der")
    (tmp_path / "text").write_text("no PEM\n")
    here("token", "make", "me", "--library", "lib")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for certificate, key, message in (
            (
                "text",
                "a.key",
                "the file text holds no certificate: expected a PEM",
            ),
            ("a.der", "a.key", "the file a.der holds no certificate"),
            ("a.key", "a.key", "the file a.key holds no certificate"),
            (".", "a.key", "the file . holds no certificate"),
            ("a.pem", "text", "the file text holds no private key: expected a PEM file"),
            ("a.pem", "a.pem", "the file a.pem holds no private key"),
            ("a.pem", "b.key", "a.pem and the key b.key cannot be used together: key values mis"),
            (
                "a.pem",
                "locked.key",
                "the private key locked.key has a password, which a service has",
            ),
            # These are in order, so that it comes to the port, at which nobody can listen.
            ("a.pem", "a.key", f"port {port} of 127.0.0.1 is in use"),
        ):
            options = ("--library", "lib", "--port", port, "--workers", 2)
            text = here("serve", *options, "--certificate", certificate, "--key", key, check=2)
            assert message in text


@pytest.mark.parametrize("days", ["0", "-1", "nan"])
def test_a_token_that_would_have_expired_is_not_made(days, tmp_path):
    text = here("token", "make", "me", "--days", days, "--library", "lib", check=2)
    assert "expected more than 0 days; leave --days out for one that never expires" in text
    assert not (tmp_path / "lib").exists()


@pytest.mark.parametrize("command", [("list",), ("revoke", "me")])
@pytest.mark.parametrize("place", [("--library", "nowhere"), ("--token-file", "nowhere/tokens")])
def test_tokens_are_not_looked_for_in_a_folder_that_is_not_there(command, place, tmp_path):
    text = here("token", *command, *place, check=2)
    assert "the folder nowhere is not there; give the --library or --token-file that" in text
    assert not (tmp_path / "nowhere").exists()
