"""The files of configs/cluster: configurations load, manifests fit Ray's and KubeRay's schemas, and they agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from blockroll.service import metrics
from blockroll.service.config import ServiceConfig
from blockroll.service.of_run import service_of
from blockroll.settings import load_yaml, parse
from blockroll.trainer_bridge.client.service_control import EngineRow, ServiceStatus
from blockroll.trainer_bridge.trainers.grpo.config import GrpoConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "cluster"
SCHEMAS = ROOT.parent / "shared" / "schemas"
SERVICES = ["local", "mi300x-node", "two-nodes", "autoscaled"]


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", SERVICES)
def test_services_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockroll.service.config.cores", lambda: 96)  # of the machine that the file is for
    config = load_yaml(FOLDER / f"{name}.yaml", ServiceConfig)
    assert config.ledger.name == "ledger.sqlite"
    assert config.delivery.keys is not None or config.delivery.bind.startswith("tcp://127.0.0.1:")


def test_the_quick_start_describes_a_service() -> None:
    run = load_yaml(ROOT / "configs" / "grpo" / "quickstart.yaml", GrpoConfig)
    assert run.service == {"schedule": {"kind": "fused", "levels": [0, 4]}} and callable(service_of(run))


def test_rays_own_schema_takes_the_launcher_file() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    launcher = read("ray-up.yaml")
    jsonschema.validate(launcher, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launcher, "max_workerz": 1}, schema)


@pytest.mark.parametrize("kind", ["raycluster", "rayjob"])
def test_kuberays_schemas_take_the_manifests(kind: str) -> None:
    path = SCHEMAS / f"kuberay-{kind}s-v1.json"
    if not path.is_file():
        pytest.skip("the schemas of KubeRay are not here")
    schema, manifest = strict(json.loads(path.read_text())), read(f"kuberay-{kind}.yaml")
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(manifest)
    manifest["spec"]["workerGroupSpec"] = []
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(manifest)


def strict(schema: Any) -> Any:
    """Kubernetes drops fields that a schema does not know; here they are errors."""
    if isinstance(schema, dict):
        changed = {key: strict(value) for key, value in schema.items()}
        if isinstance(changed.get("properties"), dict) and "type" in changed and "additionalProperties" not in changed:
            changed["additionalProperties"] = False
        return changed
    return [strict(item) for item in schema] if isinstance(schema, list) else schema


def test_bounds_and_tokens_agree() -> None:
    """The most nodes hold the most engines, each node has the resources that an engine asks for, and Ray asks for a token."""
    engines = load_yaml(FOLDER / "autoscaled.yaml", ServiceConfig).engines
    job, cluster, launcher = read("kuberay-rayjob.yaml")["spec"], read("kuberay-raycluster.yaml")["spec"], read("ray-up.yaml")
    assert job["rayClusterSpec"] == cluster
    [group] = cluster["workerGroupSpecs"]
    own = json.loads(json.loads(group["rayStartParams"]["resources"]))
    assert group["maxReplicas"] * int(group["rayStartParams"]["num-gpus"]) == engines.max == group["maxReplicas"] * own["MI300X"]
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == {"mode": "token"}
    node = launcher["available_node_types"]["mi300x"]
    assert node["max_workers"] * node["resources"]["GPU"] == engines.max and node["resources"]["MI300X"] == 8
    assert node["resources"]["CPU"] >= 8 * engines.num_cpus
    for command in (launcher["head_start_ray_commands"][-1], launcher["worker_start_ray_commands"][-1]):
        assert command.startswith("RAY_AUTH_MODE=token ")


@pytest.mark.parametrize("maker", ["rocm", "cuda"])
def test_containers_keep_the_torch_of_their_image(maker: str) -> None:
    text = (FOLDER / f"Containerfile.{maker}").read_text()
    [base], [torch] = re.findall(r"^ARG BASE=\S+:(\S+)$", text, re.M), re.findall(r"^ARG TORCH=(\S+)$", text, re.M)
    assert torch in base and "latest" not in base
    assert "grep -vE '^(torch|triton)==' constraints.txt" in text and "pip install --no-cache-dir -c /tmp/constraints.txt" in text
    pinned = [line for line in (FOLDER / "requirements-rocm.txt").read_text().splitlines() if line[0] not in "#-"]
    assert f"torch=={torch}+rocm" in pinned[0] and all("==" in line for line in pinned)
    if maker == "rocm":
        assert all(said in text for said in ("/dev/kfd", "/dev/dri", "--shm-size", "ENV HIP_FORCE_DEV_KERNARG=1",
                                             "RUN cc --version", "numa_balancing"))  # fmt: skip


def test_the_dashboard_shows_metrics_that_exist() -> None:
    figures: dict[str, float | int | str] = {"version": 1, "engine.restarts": 0}
    status = ServiceStatus(figures, (EngineRow(0, 7, "n", "cpu", "busy", 1, 2.0, "", tuple((name, 1.0) for name in (
        "forwards", "decode_tokens", "queue", "running", "pages", "pages_free", "step_seconds", "drafted.1", "accepted.1"))),))
    names = {sample.name for family in metrics.families(status) for sample in family.samples} | {"blockroll_up"}
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    used = {name for panel in dashboard["panels"] for target in panel["targets"]
            for name in re.findall(r"blockroll_\w+", target["expr"])}  # fmt: skip
    assert len(used) > 15 and used - names == set()


@pytest.mark.parametrize(("section", "said"), [
    ({"engines": {"cuont": 2}}, "engines.cuont: unknown key in x; did you mean `count`?"),
    ({"engines": {"count": 3}}, "engines: 3 engines of 1 core each on a machine with 2 in x; give fewer, or set engines."),
    ({"engines": {"min": 2}}, "engines.max: only one bound is given in x; give min and max"),
    ({"engines": {"min": 1, "max": 2, "count": 1}}, "engines.count: 1 beside the bounds"),
    ({"engines": {"device": "gpu"}}, "engines.device: unknown device 'gpu'"),
    ({"engines": {"device": "cuda"}}, "engines.num_gpus: 0 GPUs for an engine on cuda"),
    ({"schedule": {"levels": [99]}}, "schedule.levels: (99,) holds a level outside 0..63"),
    ({"weights": {"transport": "rdma"}}, 'weights.transport: "rdma" in x cannot be used; it should be \'ray\', '),
    ({"http": {"host": "0.0.0.0"}}, "http.api_key: missing, and 0.0.0.0 is not an address that only this machine can reach in x"),
    ({"delivery": {"bind": "tcp://0.0.0.0:1"}}, "delivery.keys: missing, and tcp://0.0.0.0:1 is not an address"),
    ({"logging": {"level": "loud"}}, 'logging.level: "loud" in x cannot be used'),
])
def test_what_a_configuration_cannot_say(section: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockroll.service.config.cores", lambda: 2)
    with pytest.raises(ValueError) as error:
        parse({"policy": "tiny-reasoner", **section}, ServiceConfig, "x")
    assert str(error.value).startswith(said)


def test_oversubscription_and_bounds() -> None:
    config = parse({"policy": "p", "engines": {"min": 2, "max": 500, "oversubscribe": True}}, ServiceConfig, "x")
    assert config.engines.follows_queue and config.engines.at_start == 2 and config.engines.most == 500
