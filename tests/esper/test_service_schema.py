"""The service does what its description says, for what fits it and for what does not."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import load_all_checks
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from esper.urza.service import Scope, TokenFile, make_app
from esper.urza.service._app import routes_of
from esper.urza.service._openapi import describe
from tests.esper.service_process import Serving

load_all_checks()
DESCRIBED = describe(
    [
        route
        for route in routes_of(make_app(lambda: None, TokenFile(None)))  # pyright: ignore
        if route.include_in_schema
    ],
    "0",
)
OPERATIONS = [
    found.ok() for found in schemathesis.openapi.from_dict(DESCRIBED).get_all_operations()
]

# What JSON schema cannot say is refused too: a source that is no canonical JSON, an interval
# without its gain, an upload that is no kernel, a cursor of another query.
UNSAID = [positive_data_acceptance]
MODES = [
    (operation, mode)
    for operation in OPERATIONS
    for mode in GenerationMode
    # Where nothing can be given, nothing wrong can be.
    if mode is GenerationMode.POSITIVE or operation.path not in ("/healthz", "/readyz")
]


@pytest.fixture(scope="module")
def service(tmp_path_factory, artifact) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("schema"), limits={"rate": 1e6, "burst": 1e6})
    assert serving.upload(artifact.kernel_id, artifact.data).status == 201
    yield serving
    assert serving.stop() == 0
    assert "Traceback" not in serving.errors()
    serving.close()


def test_all_endpoints_are_asked():
    assert len(OPERATIONS) == sum(len(methods) for methods in DESCRIBED["paths"].values()) > 30


@pytest.mark.parametrize(
    ("operation", "mode"), MODES, ids=[f"{each.label} {mode.value}" for each, mode in MODES]
)
def test_every_endpoint_keeps_to_its_description(operation, mode, service):
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        if operation.path == "/api/v1/tokens/{name}" and case.path_parameters:
            # Those of the tests would be revoked.
            case.path_parameters["name"] = f"x{case.path_parameters['name']}"
        token = {"Authorization": f"Bearer {service.tokens[Scope.ADMIN]}"}
        case.call_and_validate(
            base_url=service.url, headers=token, excluded_checks=UNSAID, timeout=30
        )

    ask()
