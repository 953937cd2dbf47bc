"""What is written for clusters is valid, closed, and names what the code has."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema
import kubernetes_validate
import pytest
import redis
import typer.core
import typer.main
import yaml

import esper
from esper.cli._app import app
from esper.settings import Settings, check_settings_file, load_settings
from esper.settings._found import OTHER_VARIABLES
from esper.settings._settings import VARIABLES
from tests.esper.servers import free_port, needs

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "kustomize" / "base"
EXAMPLE = DEPLOY / "kustomize" / "example"
OLDEST, NEWEST = "1.28.0", "1.36.0"
"""Versions of Kubernetes whose schemas the objects are held against."""

Data = dict[str, Any]


def objects(folder: Path) -> list[Data]:
    """Those that a folder's kustomization names, without what is generated."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    files = [folder / name for name in listed if name.endswith(".yaml")]
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


OBJECTS = objects(BASE)
WORKLOADS = {
    each["metadata"]["name"]: each
    for each in OBJECTS
    if each["kind"] in ("Deployment", "StatefulSet")
}
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Data] = COMPOSE["services"]


def pod_of(workload: Data) -> Data:
    return workload["spec"]["template"]["spec"]


def labels_of(workload: Data) -> Data:
    common = {"app.kubernetes.io/part-of": "esper"}  # from the kustomization
    return {**common, **workload["spec"]["template"]["metadata"]["labels"]}


def container_of(workload: Data) -> Data:
    (container,) = pod_of(workload)["containers"]
    return container


def name_of(each: Data) -> str:
    return f"{each['kind']}-{each['metadata']['name']}"


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("each", [*OBJECTS, *objects(EXAMPLE)], ids=name_of)
def test_each_object_is_one_of_kubernetes(each, version):
    kubernetes_validate.validate(each, version, strict=True)


def test_the_schemas_refuse_what_is_wrong():
    broken = json.loads(json.dumps(WORKLOADS["urza"]))
    container_of(broken)["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        kubernetes_validate.validate(broken, NEWEST, strict=True)


def rendered(folder: Path) -> list[Data]:
    program = shutil.which("kustomize")
    command = [program, "build"] if program else ["kubectl", "kustomize"]
    if program is None and shutil.which("kubectl") is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("folder", [BASE, EXAMPLE], ids=lambda folder: folder.name)
def test_what_kustomize_makes_of_it(folder):
    made = rendered(folder)
    assert len(made) >= len(OBJECTS) + 2
    for each in made:
        kubernetes_validate.validate(each, NEWEST, strict=True)
    if folder == EXAMPLE:
        names = {each["metadata"]["name"] for each in made if each["kind"] == "Secret"}
        for workload in made:
            if workload["kind"] in ("Deployment", "StatefulSet"):
                used = {name for name, _ in secrets_used(workload)}
                assert used <= names, "references follow the names that are made"
                assert workload["metadata"]["namespace"] == "esper"


def secrets_used(workload: Data) -> set[tuple[str, str]]:
    found = set()
    for variable in container_of(workload).get("env", ()):
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference:
            found.add((reference["name"], reference["key"]))
    for volume in pod_of(workload).get("volumes", ()):
        if "secret" in volume:
            for item in volume["secret"]["items"]:
                found.add((volume["secret"]["secretName"], item["key"]))
    return found


def test_the_example_makes_every_secret_that_is_used_and_holds_none():
    kustomization = yaml.safe_load((EXAMPLE / "kustomization.yaml").read_text())
    made = set()
    for secret in kustomization["secretGenerator"]:
        for file in secret.get("envs", ()):
            lines = (EXAMPLE / file).read_text().splitlines()
            pairs = [line.split("=", 1) for line in lines if line and line[0] != "#"]
            assert {value for _, value in pairs} == {"change-me"}
            made |= {(secret["name"], key) for key, _ in pairs}
        for file in secret.get("files", ()):
            assert json.loads((EXAMPLE / file).read_text())["tokens"] == []
            made.add((secret["name"], file))
    used = {each for workload in WORKLOADS.values() for each in secrets_used(workload)}
    assert used == made


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_container_can_do_little(name):
    pod, container = pod_of(WORKLOADS[name]), container_of(WORKLOADS[name])
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"].keys() == {"requests", "limits"}
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]
    assert not any("hostPath" in volume for volume in pod.get("volumes", ()))


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_container_mounts_what_there_is(name):
    workload = WORKLOADS[name]
    volumes = {volume["name"] for volume in pod_of(workload).get("volumes", ())}
    claims = workload["spec"].get("volumeClaimTemplates", ())
    volumes |= {claim["metadata"]["name"] for claim in claims}
    mounts = [mount["name"] for mount in container_of(workload)["volumeMounts"]]
    assert sorted(mounts) == sorted(volumes)
    if workload["kind"] == "StatefulSet":
        assert [claim["spec"]["accessModes"] for claim in claims] == [["ReadWriteOnce"]]
    generated = yaml.safe_load((BASE / "kustomization.yaml").read_text())["configMapGenerator"]
    for volume in pod_of(workload).get("volumes", ()):
        if "configMap" in volume:
            assert volume["configMap"]["name"] in {each["name"] for each in generated}


@pytest.mark.parametrize("name", ["postgres", "redis", "urza"])
def test_what_serves_is_asked_whether_it_does(name):
    container = container_of(WORKLOADS[name])
    ports = {port["name"] for port in container["ports"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[kind]
        assert "exec" in probe or probe["httpGet"]["port"] in ports


def services() -> dict[str, Data]:
    return {each["metadata"]["name"]: each for each in OBJECTS if each["kind"] == "Service"}


def test_each_service_has_pods_with_that_port():
    for name, service in services().items():
        selected = [w for w in WORKLOADS.values() if selects(service["spec"]["selector"], w)]
        assert [each["metadata"]["name"] for each in selected] == [name]
        for port in service["spec"]["ports"]:
            known = {p["name"]: p["containerPort"] for p in container_of(selected[0])["ports"]}
            assert known[port["targetPort"]] == port["port"]


def selects(wanted: Mapping[str, str], workload: Data) -> bool:
    return wanted.items() <= labels_of(workload).items()


def test_selectors_select_their_own_pods():
    for each in OBJECTS:
        if each["kind"] in ("Deployment", "StatefulSet"):
            assert selects(each["spec"]["selector"]["matchLabels"], each)
        if each["kind"] == "StatefulSet":
            assert each["spec"]["serviceName"] in services()
        if each["kind"] == "PodDisruptionBudget":
            chosen = [
                w for w in WORKLOADS.values() if selects(each["spec"]["selector"]["matchLabels"], w)
            ]
            (budgeted,) = chosen
            assert budgeted["spec"]["replicas"] > each["spec"]["maxUnavailable"]


def may_speak(source: str, target: str, port: int) -> bool:
    """Whether the policies let one workload reach another at a port: both sides have to."""
    return all(
        any(
            any(
                any(_matches(peer, WORKLOADS[other]) for peer in rule.get(word, [{}]))
                and any(p["port"] == port for p in rule["ports"])
                for rule in policy["spec"].get(side, ())
            )
            for policy in OBJECTS
            if policy["kind"] == "NetworkPolicy"
            and selects(policy["spec"]["podSelector"]["matchLabels"], WORKLOADS[own])
        )
        for own, other, side, word in (
            (source, target, "egress", "to"),
            (target, source, "ingress", "from"),
        )
    )


def _matches(peer: Data, workload: Data) -> bool:
    if peer.get("namespaceSelector"):
        return False
    return selects(peer.get("podSelector", {}).get("matchLabels", {}), workload)


def test_who_may_speak_with_whom():
    allowed = {
        (source, target)
        for source in WORKLOADS
        for target, port in (("postgres", 5432), ("redis", 6379), ("urza", 8420))
        if source != target and may_speak(source, target, port)
    }
    assert allowed == {
        ("urza", "postgres"),
        ("urza", "redis"),
        ("worker", "redis"),
        ("worker", "urza"),
    }
    (deny,) = [each for each in OBJECTS if each["metadata"]["name"] == "esper-deny"]
    assert all(selects(deny["spec"]["podSelector"]["matchLabels"], w) for w in WORKLOADS.values())
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not deny["spec"].keys() & {"ingress", "egress"}


def test_addresses_name_services_and_their_ports():
    text = "".join(file.read_text() for file in BASE.glob("*.yaml"))
    addresses = re.findall(r"(?:postgresql|redis|http)://(?:\S*@)?([\w.-]+):(\d+)", text)
    ports = {name: each["spec"]["ports"][0]["port"] for name, each in services().items()}
    assert {name for name, _ in addresses} == {"postgres", "redis", "urza"}
    assert all(ports[name] == int(port) for name, port in addresses)


def test_the_compose_file_is_one():
    folder = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    assert list(validator.iter_errors({**COMPOSE, "service": {}}))
    known = (
        subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if shutil.which("docker")
        else None
    )
    if known is not None and known.returncode == 0:
        command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
        command[3:3] = ["--env-file", str(EXAMPLE / "secrets.env")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_services_of_compose_can_do_little_and_are_asked_how_they_are():
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if name not in ("worker", "tokens"):
            assert service["healthcheck"]["test"], name
        for network in service.get("networks", ()):
            assert network in COMPOSE["networks"]
        for volume in service.get("volumes", ()):
            assert volume.split(":")[0] in COMPOSE["volumes"]
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other]
    assert [service.get("ports") for service in SERVICES.values() if "ports" in service] == [
        ["127.0.0.1:8420:8420"]
    ]


def test_the_variables_of_compose_are_in_the_example():
    text = (DEPLOY / "compose.yaml").read_text()
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    given = re.findall(r"^(\w+)=", (EXAMPLE / "secrets.env").read_text(), re.M)
    assert used == set(given)
    assert re.findall(r"(?<!\$)\$\{\w+(.)", text) == [":"] * len(re.findall(r"(?<!\$)\$\{", text))


def images() -> Iterator[str]:
    yield from (container_of(each)["image"] for each in WORKLOADS.values())
    yield from (service["image"] for service in SERVICES.values())


def test_images_are_of_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for image in images():
        name, _, tag = image.partition(":")
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?", tag), image
        if name.startswith("esper-"):
            assert tag == project["version"]
    for tag in yaml.safe_load((EXAMPLE / "kustomization.yaml").read_text())["images"]:
        assert tag["newTag"] == project["version"]
    base, compose = set(), set()
    for found, where in ((base, WORKLOADS.values()), (compose, SERVICES.values())):
        for each in where:
            found.add(each["image"] if "image" in each else container_of(each)["image"])
    assert base <= compose, "the same versions here and there"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Command lines that `esper` is given."""
    for name in ("urza", "worker"):
        yield f"kustomize {name}", container_of(WORKLOADS[name])["args"]
        yield f"compose {name}", SERVICES[name]["command"]
    line = SERVICES["tokens"]["entrypoint"][2]
    found = re.fullmatch(r'exec esper (.+?) "\$\$@" (.+)', line)
    assert found is not None
    yield "compose tokens", [*found[1].split(), "make", "somebody", *found[2].split()]
    for line in re.findall(r"`esper (token [^`]*)`", (EXAMPLE / "kustomization.yaml").read_text()):
        yield "example", line.split()
    text = (DEPLOY / "Dockerfile").read_text()
    for found in re.findall(r"^CMD (.+)$", text, re.M):
        yield "Dockerfile", json.loads(found)


@pytest.mark.parametrize(("where", "line"), list(commands()), ids=str)
def test_the_command_line_has_each_command(where, line):
    command: Any = typer.main.get_command(app)
    words = list(line)
    while isinstance(command, typer.core.TyperGroup):
        assert words, where
        assert words[0] in command.commands, (where, words[0])
        command = command.commands[words.pop(0)]
    assert isinstance(command, typer.core.TyperCommand)
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    assert used <= known, where


def test_the_port_and_the_probes_are_the_services():
    from esper.cli._serve import DEFAULT_PORT

    assert Settings().serve.port == DEFAULT_PORT
    assert container_of(WORKLOADS["urza"])["ports"][0]["containerPort"] == DEFAULT_PORT
    assert f"EXPOSE {DEFAULT_PORT}" in (DEPLOY / "Dockerfile").read_text()
    container = container_of(WORKLOADS["urza"])
    asked = {container[kind]["httpGet"]["path"] for kind in ("readinessProbe", "livenessProbe")}
    asked |= set(re.findall(r":8420(/\w+)", SERVICES["urza"]["healthcheck"]["test"][-1]))
    assert asked == {"/healthz", "/readyz"}
    from esper.urza.service import _status

    assert asked <= {getattr(route, "path", "") for route in _status.router.routes}


def environment_of(kind: str, name: str) -> dict[str, str]:
    """What a container's process has, with a secret's name for each secret."""
    if kind == "compose":
        given = dict(SERVICES[name]["environment"])
        return {key: re.sub(r"\$\{(\w+):[^}]*\}", r"the-\1", value) for key, value in given.items()}
    found: dict[str, str] = {}
    for variable in container_of(WORKLOADS[name])["env"]:
        if "value" in variable:
            # Only of those before it, as Kubernetes does it.
            value = re.sub(r"\$\((\w+)\)", lambda each: found[each[1]], variable["value"])
        else:
            value = f"the-{variable['valueFrom']['secretKeyRef']['key']}"
        found[variable["name"]] = value
    assert found.pop("ESPER_CONFIG") == "/etc/esper/esper.yaml"
    found["ESPER_CONFIG"] = str(BASE / settings_file_of(name))
    return found


def settings_file_of(name: str) -> str:
    volumes = {volume["name"]: volume for volume in pod_of(WORKLOADS[name])["volumes"]}
    mounts = {m["mountPath"]: m["name"] for m in container_of(WORKLOADS[name])["volumeMounts"]}
    wanted = volumes[mounts["/etc/esper"]]["configMap"]["name"]
    generated = yaml.safe_load((BASE / "kustomization.yaml").read_text())["configMapGenerator"]
    ((file,),) = [each["files"] for each in generated if each["name"] == wanted]
    key, _, path = file.partition("=")
    assert key == "esper.yaml"
    return path


def settings_in(kind: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    for variable in [each for each in os.environ if each.startswith("ESPER_")]:
        if variable != "ESPER_CACHE_DIR":
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for variable, value in environment_of(kind, name).items():
        monkeypatch.setenv(variable, value)
    return load_settings().settings


def shown(secret: Any) -> str:
    return secret.get_secret_value()


@pytest.mark.parametrize("kind", ["compose", "kustomize"])
def test_the_services_settings_are_settings(kind, monkeypatch, tmp_path):
    found = settings_in(kind, "urza", monkeypatch, tmp_path)
    assert (found.serve.host, found.serve.port) == ("0.0.0.0", 8420)
    assert found.library.blobs == "s3://esper/library"
    assert found.library.database is not None
    host = "postgresql://esper:the-POSTGRES_PASSWORD@postgres:5432/esper"
    assert shown(found.library.database) == host
    assert found.library.s3.access_key_id == "the-S3_ACCESS_KEY_ID"
    assert shown(found.library.s3.secret_access_key) == "the-S3_SECRET_ACCESS_KEY"
    assert shown(found.bus.url) == "redis://:the-REDIS_PASSWORD@redis:6379/0"
    assert found.logging.format == "json"
    assert found.serve.token_file is not None
    token_file = Path(found.serve.token_file)
    if kind == "compose":
        volumes = [volume.split(":")[1] for volume in SERVICES["urza"]["volumes"]]
        assert found.library.s3.endpoint == "http://s3:9000"
        assert ":9000" in SERVICES["s3"]["command"][0]
    else:
        volumes = [m["mountPath"] for m in container_of(WORKLOADS["urza"])["volumeMounts"]]
    assert str(token_file.parent) in volumes


@pytest.mark.parametrize("kind", ["compose", "kustomize"])
def test_the_workers_settings_are_settings(kind, monkeypatch, tmp_path):
    found = settings_in(kind, "worker", monkeypatch, tmp_path)
    assert found.library.where == "http://urza:8420"
    assert shown(found.library.token) == "the-WORKER_TOKEN"
    assert shown(found.bus.url) == "redis://:the-REDIS_PASSWORD@redis:6379/0"


def test_every_variable_of_esper_that_is_named_is_one():
    named = set(re.findall(r"\bESPER_\w+", "".join(_texts())))
    assert {"ESPER_CONFIG", "ESPER_LIBRARY__DATABASE"} <= named
    assert named <= {*VARIABLES, *OTHER_VARIABLES}


def _texts() -> Iterator[str]:
    for place in (DEPLOY, ROOT / "docs" / "lab.md"):
        for file in [place] if place.is_file() else place.rglob("*"):
            if file.is_file():
                yield file.read_text()


def test_what_the_labs_esper_is_told_is_settings(tmp_path):
    from esper.lab._asked import asked_of
    from esper.lab._config import write_configs
    from esper.lab._folder import LabFolder
    from esper.lab._secrets import LabSecrets

    folder = LabFolder(tmp_path)
    secrets = LabSecrets.new()
    asked = asked_of(folder.asked, ports={}, workers=None)
    write_configs(folder, asked, secrets)
    for path, token in (
        (folder.config, secrets.user_token),
        (folder.worker_config, secrets.worker_token),
    ):
        found = check_settings_file(path).settings
        assert shown(found.library.token) == token
        assert found.library.where == f"http://127.0.0.1:{asked.ports['urza']}"
        assert shown(found.bus.url).endswith(f"@127.0.0.1:{asked.ports['redis']}/0")
    found = check_settings_file(folder.service_config).settings
    assert found.serve.port == asked.ports["urza"]
    assert found.library.blobs == "s3://esper/library"


def test_grace_is_longer_than_what_the_programs_take():
    from esper.urza.service import Limits

    settings = Settings()
    assert settings.serve.grace == Limits().shutdown_seconds
    graces = {"urza": settings.serve.grace, "worker": settings.worker.grace}
    for name, seconds in graces.items():
        assert pod_of(WORKLOADS[name])["terminationGracePeriodSeconds"] > seconds
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > seconds


def redis_script(kind: str) -> str:
    if kind == "compose":
        return SERVICES["redis"]["command"][0].replace("$$", "$")
    return container_of(WORKLOADS["redis"])["args"][0]


@pytest.mark.parametrize("kind", ["compose", "kustomize"])
def test_the_script_that_starts_redis_does(tmp_path, kind):
    needs("redis-server", "redis-cli")
    port = free_port()
    script = redis_script(kind).replace("/tmp/", f"{tmp_path}/").replace("/data", str(tmp_path))
    script = script.replace("redis.conf --dir", f"redis.conf --port {port} --dir")
    environment = {**os.environ, "REDIS_PASSWORD": "known-to-few"}
    with subprocess.Popen(
        ["sh", "-euc", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            client = redis.Redis(port=port, password="known-to-few")
            until = time.monotonic() + 60
            while True:
                try:
                    assert client.ping()
                    break
                except redis.ConnectionError:
                    assert process.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.05)
            found = client.config_get("append*") | client.config_get("maxmemory*")
            assert (found["appendonly"], found["appendfsync"]) == ("yes", "always")
            assert found["maxmemory-policy"] == "noeviction"
            client.close()
            assert "known-to-few" not in Path(f"/proc/{process.pid}/cmdline").read_text()
            assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
            ping = ping_of(kind).replace("redis-cli", f"redis-cli -p {port}")
            for password, works in (("known-to-few", True), ("wrong", False)):
                done = subprocess.run(
                    ["sh", "-euc", ping],
                    env={**environment, "REDIS_PASSWORD": password},
                    capture_output=True,
                    check=False,
                )
                assert (done.returncode == 0) is works
        finally:
            # It is Redis itself that gets the signal, and not a shell before it.
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
    assert process.returncode == 0


def ping_of(kind: str) -> str:
    if kind == "compose":
        return SERVICES["redis"]["healthcheck"]["test"][1].replace("$$", "$")
    return container_of(WORKLOADS["redis"])["readinessProbe"]["exec"]["command"][2]


def test_the_script_that_starts_s3_asks_for_a_key(tmp_path):
    (rclone,) = needs("rclone", among=[Path(sys.executable).parent])
    port = free_port()
    script = SERVICES["s3"]["command"][0].replace("$$", "$").replace("/data", str(tmp_path))
    script = script.replace("rclone serve", f"{rclone} serve").replace(":9000", f"127.0.0.1:{port}")
    keys = {"S3_ACCESS_KEY_ID": "KEY", "S3_SECRET_ACCESS_KEY": "SECRET"}
    environment = {**os.environ, **keys, "RCLONE_CONFIG": "/dev/null"}
    with subprocess.Popen(
        ["sh", "-euc", script], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until = time.monotonic() + 60
            while True:
                with socket.socket() as tried:
                    if tried.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            with pytest.raises(urllib.error.HTTPError, match="400|403"):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/esper/")
            assert (tmp_path / "esper").is_dir()
        finally:
            process.terminate()
            process.communicate(timeout=60)


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M)).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]  # pyright: ignore


def test_the_dockerfile_takes_what_there_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    stages: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            stages[rest.split(" AS ")[1]] = []
        elif stages:
            list(stages.values())[-1].append((word, rest))
        sources = rest.split()[:-1] if word == "COPY" else []
        sources += re.findall(r"--mount=type=bind,source=([\w.]+)", rest)
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in known, source
        for extras in re.findall(r"\*\.whl\)\[([\w,]+)\]", rest):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    targets = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert targets == {"service", "worker"} <= stages.keys()
    for target in targets:
        words = [word for word, _ in stages[target]]
        assert ("USER", "10001:10001") in stages[target]
        assert words.index("USER") > words.index("RUN")
        assert ("ENTRYPOINT", '["esper"]') in stages[target]
    user = pod_of(WORKLOADS["urza"])["securityContext"]
    assert (user["runAsUser"], user["runAsGroup"]) == (10001, 10001)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    packages = {Path(each).parts[0] for each in wheel["targets"]["wheel"]["packages"]}
    assert all(f"!{package}" in known for package in packages)
    assert esper.__version__ == project["version"]


def test_the_gates_script_is_one():
    script = ROOT / ".ci" / "run"
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
