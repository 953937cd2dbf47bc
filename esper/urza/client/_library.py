"""The library behind a service: each operation as what is asked, and what its answer means."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from esper.artifacts import Artifact, is_trusted, read_artifact
from esper.contracts import (
    CURRENT_KERNELS,
    MOST_RESULTS,
    BlueprintQuery,
    BlueprintRecord,
    BlueprintRequest,
    BlueprintState,
    Claim,
    Data,
    GarbageReport,
    KernelOutcome,
    KernelQuery,
    KernelRecord,
    KernelSignature,
    KernelState,
    KernelUsage,
    Page,
    RetentionPolicy,
    explained,
    read,
    reason_text,
)
from esper.errors import (
    ArtifactError,
    BlueprintNotFoundError,
    InputError,
    KernelNotFoundError,
    LeaseLostError,
)
from esper.recovery._effects import Call, Effects
from esper.urza._tags import checked_tags
from esper.urza._valid import checked_label
from esper.urza._wire import (
    API,
    About,
    BlueprintMove,
    ClaimRequest,
    Claims,
    Completion,
    Failure,
    KernelId,
    KernelMove,
    Listed,
    Measurement,
    Measurements,
    Outcomes,
    References,
    TagChange,
    TokenMade,
    TokenRecord,
    TokenRequest,
    TokensListed,
    checked_claim,
)
from esper.urza.client._download import Download, beyond
from esper.urza.client._errors import error_of, unreadable
from esper.urza.client._exchange import Exchange
from esper.urza.client._messages import Answer, Ask
from esper.urza.client._operation import operation, streamed

M = TypeVar("M", bound=Data)
_IS_ID = re.compile(r"[0-9a-f]{64}", re.ASCII).fullmatch
_KERNELS = f"{API}/kernels"
_BLUEPRINTS = f"{API}/blueprints"


def _made(model: type[M], **content: Any) -> M:
    """Data to send.

    Raises:
        InputError: for what is no such data.
    """
    try:
        return model(**content)
    except ValidationError as error:
        raise InputError(f"this is no {model.__name__}: {explained(error)}") from error


def _text(content: Data) -> bytes:
    return content.model_dump_json().encode()


def _parameters(query: Data, renamed: Mapping[str, str]) -> list[tuple[str, str]]:
    """A query as parameters of an address; what is as by default is left out."""
    found: list[tuple[str, str]] = []
    for name, value in query:
        if name == "schema_version" or value == type(query).model_fields[name].default:
            continue
        each = value if isinstance(value, tuple) else (value,)
        found += [(renamed.get(name, name), str(one)) for one in each]
    return found


class Operations:
    """What `KernelLibrary` has, and what administrators need, asked of a service."""

    _exchange: Exchange

    def _data(self, model: type[M], answer: Answer) -> M:
        try:
            return read(model, answer.content)
        except InputError as error:
            raise unreadable(self._exchange.url, model, answer, error) from error

    def _kernel(self, kernel_id: str, part: str = "") -> str:
        """The path of a kernel.

        Raises:
            KernelNotFoundError: for what is no id.
        """
        if not (isinstance(kernel_id, str) and _IS_ID(kernel_id)):
            raise KernelNotFoundError(
                f"the library {self._exchange.url} holds no kernel {str(kernel_id)[:80]!r}: an id"
                " is 64 hexadecimal digits, in lower case"
            )
        return f"{_KERNELS}/{kernel_id}{part}"

    def _blueprint(self, blueprint_id: str, part: str = "") -> str:
        if not (isinstance(blueprint_id, str) and _IS_ID(blueprint_id)):
            raise BlueprintNotFoundError(
                f"the library {self._exchange.url} holds no blueprint"
                f" {str(blueprint_id)[:80]!r}: an id is 64 hexadecimal digits, in lower case"
            )
        return f"{_BLUEPRINTS}/{blueprint_id}{part}"

    def _got(self, model: type[M], path: str) -> Effects[M]:
        return self._data(model, (yield from self._exchange.ask(Ask("GET", path))))

    def _posted(
        self, model: type[M], path: str, content: Data, *, repeat: bool = True
    ) -> Effects[M]:
        ask = Ask("POST", path, content=_text(content))
        return self._data(model, (yield from self._exchange.ask(ask, repeat=repeat)))

    # Kernels.

    @operation
    def put(
        self, artifact: Artifact, *, tags: Iterable[str] = (), state: KernelState | None = None
    ) -> Effects[str]:
        """Upload an artifact; see `KernelLibrary.put`.

        It is VALIDATED where this process trusts it, and TESTING where it does not.
        """
        path = self._kernel(artifact.kernel_id)
        parameters = [("tag", tag) for tag in checked_tags(tags)]
        if state is not None:
            parameters.append(("state", state.value))
        if is_trusted(artifact):
            parameters.append(("trusted", "true"))
        kind = "application/octet-stream"
        ask = Ask("PUT", path, parameters, content=artifact.data, kind=kind)
        answer = yield from self._exchange.ask(ask)
        return self._data(KernelRecord, answer).kernel_id

    @operation
    def get(self, kernel_id: str) -> Effects[Artifact]:
        """The artifact of that id, its bytes verified; see `KernelLibrary.get`."""
        data, resumed = yield from self._downloaded(kernel_id)
        try:
            return read_artifact(data, expected_id=kernel_id)
        except ArtifactError as error:
            if resumed:
                # Of a download in several parts it is not known which is damaged.
                data, _ = yield from self._downloaded(kernel_id)
                return read_artifact(data, expected_id=kernel_id)
            raise ArtifactError(f"{error} It came from {self._exchange.url}.") from error

    @operation
    def read_bytes(self, kernel_id: str) -> Effects[bytes]:
        """The file of that id as it is, which may be damaged; see `KernelLibrary.read_bytes`."""
        data, _ = yield from self._downloaded(kernel_id)
        return data

    @streamed
    def iter_bytes(self, kernel_id: str, start: int = 0) -> Effects[Download]:
        """The file of that id from some byte on, in pieces; see `KernelLibrary.iter_bytes`."""
        if start < 0:
            size = (yield from self._got(KernelRecord, self._kernel(kernel_id))).size_bytes
            raise beyond(kernel_id, size, start)
        return (yield from self._download(kernel_id, start))

    def _download(self, kernel_id: str, start: int = 0) -> Effects[Download]:
        path = self._kernel(kernel_id, "/artifact")
        download = Download(self._exchange, path, kernel_id, start)
        yield from download.open()
        return download

    def _downloaded(self, kernel_id: str) -> Effects[tuple[bytes, int]]:
        download = yield from self._download(kernel_id)
        pieces: list[bytes] = []
        try:
            while piece := (yield from download.piece()):
                pieces.append(piece)
        finally:
            yield from download.close()
        return b"".join(pieces), download.resumed

    @operation
    def record(self, kernel_id: str) -> Effects[KernelRecord]:
        """What is known of a kernel; see `KernelLibrary.record`."""
        return (yield from self._got(KernelRecord, self._kernel(kernel_id)))

    @operation
    def full_id(self, beginning: str) -> Effects[str]:
        """The id of the one kernel whose id begins so; see `KernelLibrary.full_id`."""
        if not re.fullmatch(r"[0-9a-f]{1,64}", beginning, re.ASCII):
            raise KernelNotFoundError(
                f"the library {self._exchange.url} holds no kernel {beginning[:12]!r}: an id is 64"
                " hexadecimal digits, in lower case"
            )
        ask = Ask("GET", f"{API}/kernel-ids", [("beginning", beginning)])
        return self._data(KernelId, (yield from self._exchange.ask(ask))).kernel_id

    @operation
    def find(
        self,
        signature: KernelSignature | None = None,
        *,
        blueprint: str | None = None,
        recipe: str | None = None,
        states: Iterable[KernelState] = CURRENT_KERNELS,
    ) -> Effects[list[KernelRecord]]:
        """All kernels that fit, ordered by blueprint, seed and id; see `KernelLibrary.find`."""
        wanted = tuple(states)
        if not wanted:
            return []
        query = _made(
            KernelQuery,
            signature=signature,
            blueprint=blueprint,
            recipe=recipe,
            states=wanted,
            limit=MOST_RESULTS,
        )
        found: list[KernelRecord] = []
        while True:
            page = yield from self._searched(query)
            found += page.items
            if page.next_cursor is None:
                break
            query = query.model_copy(update={"cursor": page.next_cursor})
        return sorted(found, key=lambda each: (each.blueprint, each.init_seed, each.kernel_id))

    @operation
    def search(self, query: KernelQuery) -> Effects[Page[KernelRecord]]:
        """A page of the kernels for which a query holds; see `KernelLibrary.search`."""
        return (yield from self._searched(query))

    def _searched(self, query: KernelQuery) -> Effects[Page[KernelRecord]]:
        ask = Ask("GET", _KERNELS, _parameters(query, {"states": "state", "tags": "tag"}))
        return self._data(Page[KernelRecord], (yield from self._exchange.ask(ask)))

    @operation
    def set_state(
        self,
        kernel_id: str,
        state: KernelState,
        *,
        expected: KernelState | None = None,
        reason: str = "",
    ) -> Effects[KernelRecord]:
        """Move a kernel to another state; see `KernelLibrary.set_state`."""
        move = _made(KernelMove, to=state, expected=expected, reason=reason_text(reason))
        return (yield from self._posted(KernelRecord, self._kernel(kernel_id, "/state"), move))

    @operation
    def tag(
        self, kernel_id: str, *, add: Iterable[str] = (), remove: Iterable[str] = ()
    ) -> Effects[KernelRecord]:
        """Give a kernel tags, and take some from it; see `KernelLibrary.tag`."""
        change = _made(TagChange, add=tuple(checked_tags(add)), remove=tuple(checked_tags(remove)))
        return (yield from self._posted(KernelRecord, self._kernel(kernel_id, "/tags"), change))

    @operation
    def remove(self, kernel_id: str) -> Effects[None]:
        """Remove a kernel whoever uses it; see `KernelLibrary.remove`. Takes the scope admin."""
        if _IS_ID(kernel_id):
            yield from self._exchange.ask(Ask("DELETE", self._kernel(kernel_id)))

    # What is known of kernels beside them.

    @operation
    def record_measurement(self, measurement: Mapping[str, Any]) -> Effects[None]:
        """Keep what a kernel cost on some device; see `KernelLibrary.record_measurement`."""
        content = _text(_made(Measurement, measurement=dict(measurement)))
        yield from self._exchange.ask(Ask("POST", f"{API}/measurements", content=content))

    @operation
    def measurements(self, kernel_id: str) -> Effects[list[dict[str, Any]]]:
        """What was measured of a kernel; see `KernelLibrary.measurements`."""
        if not _IS_ID(kernel_id):
            return []
        found = yield from self._got(Measurements, self._kernel(kernel_id, "/measurements"))
        return list(found.measurements)

    @operation
    def record_outcomes(self, outcomes: Sequence[KernelOutcome]) -> Effects[None]:
        """Keep what kernels did in runs; see `KernelLibrary.record_outcomes`."""
        content = _text(_made(Outcomes, outcomes=tuple(outcomes)))
        yield from self._exchange.ask(Ask("POST", f"{API}/outcomes", content=content))

    @operation
    def outcomes(self, kernel_id: str) -> Effects[list[KernelOutcome]]:
        """What a kernel did in runs; see `KernelLibrary.outcomes`."""
        if not _IS_ID(kernel_id):
            return []
        found = yield from self._got(Outcomes, self._kernel(kernel_id, "/outcomes"))
        return list(found.outcomes)

    @operation
    def usage(self, kernel_id: str) -> Effects[KernelUsage]:
        """What a kernel did in all runs that have told of it; see `KernelLibrary.usage`."""
        return (yield from self._got(KernelUsage, self._kernel(kernel_id, "/usage")))

    # Runs that refer to kernels, and garbage.

    @operation
    def refer(self, run_id: str, kernel_ids: Iterable[str]) -> Effects[None]:
        """A run needs these kernels; see `KernelLibrary.refer`."""
        ids = tuple(kernel_ids)
        for each in ids:
            self._kernel(each)
        content = _text(_made(References, kernel_ids=ids))
        where = [("run_id", checked_label(run_id, "run"))]
        yield from self._exchange.ask(Ask("PUT", f"{API}/references", where, content=content))

    @operation
    def release_run(self, run_id: str) -> Effects[None]:
        """A run needs its kernels no longer; see `KernelLibrary.release_run`."""
        yield from self._exchange.ask(
            Ask("DELETE", f"{API}/references", [("run_id", checked_label(run_id, "run"))])
        )

    @operation
    def references(self, kernel_id: str) -> Effects[list[str]]:
        """The runs that refer to a kernel; see `KernelLibrary.references`."""
        if not _IS_ID(kernel_id):
            return []
        found = yield from self._got(Listed, self._kernel(kernel_id, "/references"))
        return list(found.ids)

    @operation
    def collect_garbage(self, policy: RetentionPolicy) -> Effects[GarbageReport]:
        """Remove what a policy says; see `KernelLibrary.collect_garbage`. Takes the scope admin."""
        return (yield from self._posted(GarbageReport, f"{API}/garbage-collections", policy))

    # Blueprints that wait to be compiled.

    @operation
    def submit(self, request: BlueprintRequest) -> Effects[BlueprintRecord]:
        """Ask for a blueprint to be compiled; see `KernelLibrary.submit`."""
        return (yield from self._posted(BlueprintRecord, _BLUEPRINTS, request))

    @operation
    def blueprint(self, blueprint_id: str) -> Effects[BlueprintRecord]:
        """What is known of a blueprint; see `KernelLibrary.blueprint`."""
        return (yield from self._got(BlueprintRecord, self._blueprint(blueprint_id)))

    @operation
    def blueprints(self, query: BlueprintQuery) -> Effects[Page[BlueprintRecord]]:
        """A page of the blueprints for which a query holds; see `KernelLibrary.blueprints`."""
        ask = Ask("GET", _BLUEPRINTS, _parameters(query, {"states": "state", "tags": "tag"}))
        return self._data(Page[BlueprintRecord], (yield from self._exchange.ask(ask)))

    @operation
    def set_blueprint_state(
        self,
        blueprint_id: str,
        state: BlueprintState,
        *,
        expected: BlueprintState | None = None,
        reason: str = "",
    ) -> Effects[BlueprintRecord]:
        """Let a blueprint wait again, or give it up; see `KernelLibrary.set_blueprint_state`."""
        move = _made(BlueprintMove, to=state, expected=expected, reason=reason_text(reason))
        path = self._blueprint(blueprint_id, "/state")
        return (yield from self._posted(BlueprintRecord, path, move))

    @operation
    def claim(
        self, worker: str, *, most: int = 1, lease_seconds: float = 60.0
    ) -> Effects[list[Claim]]:
        """Take blueprints to compile; see `KernelLibrary.claim`.

        Where the answer is lost, or the service answers that it cannot work now and not that it has
        begun nothing, it is not asked again: what was claimed then waits again once its lease has
        run out.
        """
        checked_claim(most, lease_seconds)
        worker = checked_label(worker, "worker")
        asked = _made(ClaimRequest, worker=worker, most=most, lease_seconds=float(lease_seconds))
        found = yield from self._posted(Claims, f"{API}/claims", asked, repeat=False)
        return list(found.claims)

    @operation
    def renew(self, claim: Claim) -> Effects[Claim]:
        """Have the lease of a claim begin anew; see `KernelLibrary.renew`."""
        return (yield from self._posted(Claim, f"{API}/claims/renewal", claim))

    @operation
    def complete(self, claim: Claim, kernel_id: str) -> Effects[BlueprintRecord]:
        """A blueprint was compiled to a kernel; see `KernelLibrary.complete`."""
        self._kernel(kernel_id)
        done = Completion(claim=claim, kernel_id=kernel_id)
        return (yield from self._posted(BlueprintRecord, f"{API}/claims/completion", done))

    @operation
    def fail(self, claim: Claim, reason: str, *, retry: bool = False) -> Effects[BlueprintRecord]:
        """A blueprint could not be compiled; see `KernelLibrary.fail`."""
        failure = _made(Failure, claim=claim, reason=reason_text(reason), retry=retry)
        return (yield from self._ended(f"{API}/claims/failure", failure, claim))

    @operation
    def give_back(self, claim: Claim) -> Effects[BlueprintRecord]:
        """Let a blueprint wait again, as if not claimed; see `KernelLibrary.give_back`."""
        return (yield from self._ended(f"{API}/claims/return", claim, claim))

    def _ended(self, path: str, content: Data, claim: Claim) -> Effects[BlueprintRecord]:
        ask = Ask("POST", path, content=_text(content))
        answer = yield from self._exchange.answered(ask)
        if answer.status < 300:
            return self._data(BlueprintRecord, answer)
        error = error_of(self._exchange.url, answer)
        if not (answer.repeated and isinstance(error, LeaseLostError)):
            raise error
        # An earlier request, whose answer did not come, has ended the claim.
        blueprint_id = claim.blueprint.blueprint_id
        return (yield from self._got(BlueprintRecord, self._blueprint(blueprint_id)))

    # The service itself.

    @operation
    def about(self) -> Effects[About]:
        """Which Esper answers, and whom it takes this client for."""
        return (yield from self._got(About, f"{API}/about"))

    @operation
    def tokens(self) -> Effects[list[TokenRecord]]:
        """The tokens that there are, which are not told. Takes the scope admin."""
        return list((yield from self._got(TokensListed, f"{API}/tokens")).tokens)

    @operation
    def make_token(self, name: str, scope: str, *, expires: float | None = None) -> Effects[str]:
        """Make a token, which is told now and never again. Takes the scope admin.

        Raises:
            ConflictError: where there is one of that name.
        """
        asked = _made(TokenRequest, name=name, scope=scope, expires=expires)
        ask = Ask("POST", f"{API}/tokens", content=_text(asked))
        return self._data(TokenMade, (yield from self._exchange.ask(ask, repeat=False))).token

    @operation
    def revoke_token(self, name: str) -> Effects[None]:
        """Make a token worthless. Takes the scope admin.

        Raises:
            InputError: where there is none of that name.
        """
        yield from self._exchange.ask(Ask("DELETE", f"{API}/tokens/{quote(name, safe='')}"))

    @operation
    def close(self) -> Effects[None]:
        """Let go of all connections; nothing is asked afterwards."""
        yield Call(self._exchange.transport.close)
