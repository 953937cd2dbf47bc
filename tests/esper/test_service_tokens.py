"""Tokens: made, found, revoked, never kept; and how often one may ask."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.cli._serve import _moment
from esper.errors import ConflictError, InputError
from esper.urza.service import Limits, Scope, TokenFile, digest_of, token_of
from esper.urza.service._rate import Rate


def test_a_token_is_found_by_itself_alone_and_the_file_does_not_hold_it(tmp_path):
    file = TokenFile(tmp_path / "tokens.json")
    secret, made = file.make("alice", Scope.WRITE)
    assert file.find(secret) == made
    assert made.sha256 == digest_of(secret)
    assert secret not in (tmp_path / "tokens.json").read_text()
    assert secret not in repr(made)
    assert made.sha256 not in repr(made)
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), made.sha256, "\udcff", "ünïcode"):
        assert file.find(wrong) is None


def test_what_one_process_changes_another_sees_with_its_next_question(tmp_path):
    here, there = (TokenFile(tmp_path / "tokens.json") for _ in range(2))
    assert here.tokens() == ()
    secret, _ = there.make("alice", Scope.READ)
    assert here.find(secret) is not None
    assert there.revoke("alice")
    assert here.find(secret) is None
    assert not there.revoke("alice")


def test_a_token_is_worth_nothing_from_its_end_on(tmp_path):
    now = [100.0]
    file = TokenFile(tmp_path / "tokens.json", clock=lambda: now[0])
    secret, made = file.make("alice", Scope.READ, expires=200.0)
    now[0] = 199.9
    assert file.find(secret) == made
    now[0] = 200.0
    assert file.find(secret) is None


def test_names_are_used_once_and_are_names(tmp_path):
    file = TokenFile(tmp_path / "tokens.json")
    file.make("alice", Scope.READ)
    with pytest.raises(ConflictError, match=r"'alice' already: revoke it first"):
        file.make("alice", Scope.ADMIN)
    for name in ("", "a b", "../x", "-a", "x" * 65, "a\n"):
        with pytest.raises(InputError, match="cannot be named"):
            file.make(name, Scope.READ)


def test_tokens_of_the_settings_are_found_and_not_revoked_here(tmp_path):
    secret, token = token_of("lab", Scope.ADMIN, secret="a-token-of-the-settings")
    file = TokenFile(tmp_path / "tokens.json", [token])
    assert file.find(secret) == token
    with pytest.raises(InputError, match="'lab' is one of the settings"):
        file.revoke("lab")
    with pytest.raises(ConflictError, match="'lab' already"):
        file.make("lab", Scope.READ)
    with pytest.raises(InputError, match="that nobody can guess"):
        token_of("lab", Scope.READ, secret="secret")
    with pytest.raises(InputError, match="no file of tokens"):
        TokenFile(None).make("alice", Scope.READ)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"tokens": 1}', "\x00", '{"tokens": [], "more": 1}',
        json.dumps({"tokens": [{"name": "a", "scope": "x", "sha256": "0" * 64, "created": 1.0}]}),
        json.dumps({"schema_version": 2, "tokens": []}), "x" * (2 << 20),
    ],
)  # fmt: skip
def test_a_file_of_something_else_lets_nobody_in_and_is_not_written_over(tmp_path, text):
    path = tmp_path / "tokens.json"
    path.write_text(text)
    file = TokenFile(path)
    with pytest.raises(
        InputError, match=r"tokens in .*tokens.json cannot be read: it is no file of"
    ):
        file.find("x" * 40)
    with pytest.raises(InputError, match="cannot be read"):
        file.make("alice", Scope.READ)
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written: .*Name a file in a folder"):
        TokenFile(tmp_path / "file" / "tokens.json").make("alice", Scope.READ)


def test_many_that_make_tokens_at_once_lose_none(tmp_path):
    def make(who):
        for each in range(5):
            TokenFile(tmp_path / "tokens.json").make(f"t{who}-{each}", Scope.READ)

    threads = [threading.Thread(target=make, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(TokenFile(tmp_path / "tokens.json").tokens()) == 30
    assert {path.name for path in tmp_path.iterdir()} == {"tokens.json", "tokens.json.lock"}


def test_a_scope_allows_what_those_before_it_do():
    order = [Scope.READ, Scope.WRITE, Scope.ADMIN]
    for place, scope in enumerate(order):
        assert [scope.allows(other) for other in order] == [at <= place for at in range(3)]


@given(
    rate=st.floats(0.5, 100.0),
    burst=st.floats(1.0, 20.0),
    waits=st.lists(st.floats(0.0, 2.0), min_size=1, max_size=60),
)
def test_a_bucket_lets_through_no_more_than_its_content_and_what_flows_in(rate, burst, waits):
    now = [0.0]
    bucket = Rate(rate, burst, clock=lambda: now[0])
    taken = 0
    for wait in waits:
        now[0] += wait
        left = bucket.take("alice")
        taken += left == 0.0
        assert taken <= burst + rate * now[0] + 1e-6
        if left:
            # Who waits as long as it says gets one.
            assert 0.0 < left <= 1.0 / rate
            now[0] += left + 1e-9
            assert bucket.take("alice") == 0.0
            taken += 1
    assert bucket.take("bob") == 0.0


@pytest.mark.parametrize("field", ["upload_bytes", "threads", "rate", "header_seconds"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_positive(field, value):
    with pytest.raises(InputError, match=f"{field} of a service's limits must be more than 0"):
        Limits(**{field: value})


def test_a_file_of_tokens_keeps_its_mode(tmp_path):
    path = tmp_path / "tokens.json"
    file = TokenFile(path)
    file.make("alice", Scope.READ)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    file.make("bob", Scope.READ)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("expires", [-1.0, 1e17, float("inf"), float("nan")])
def test_an_end_that_no_date_has_is_refused_and_one_of_before_is_listed(tmp_path, expires):
    path = tmp_path / "tokens.json"
    with pytest.raises(InputError, match="'far' cannot expire at .*the end of the year 9999"):
        TokenFile(path).make("far", Scope.READ, expires=expires)
    assert _moment(1e17) == "1e+17 s"
    assert _moment(0.0) == "1970-01-01 00:00"
