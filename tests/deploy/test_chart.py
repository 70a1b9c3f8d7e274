"""The chart as helm renders it and as the API server's schemas read it. No cluster has seen it."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from tests.support.chart import CHART, Helm, Manifest, only, server_of, settings_of, tools_folder

from polyadapt.config import load_config

ROOT = Path(__file__).parents[2]
RELEASES = ("1.29", "1.37")  # the oldest of Chart.yaml's kubeVersion, and the newest there is

PEER = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
POOL = {"enabled": True, "endpointPicker": {"name": "picker", "port": 9002}}
ROUTE = {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["llm.example.com"]}
SHARED_KEYS = {
    "databaseUrl": "database",
    "awsAccessKeyId": "s3-id",
    "awsSecretAccessKey": "s3-secret",
}
SHARED_STORE = {"blobUrl": "s3://bucket/adapters"}
KEDA: Manifest = {
    "autoscaling": {"kind": "keda"},
    "secret": {"keys": SHARED_KEYS},
    "store": SHARED_STORE,
}
EVERYTHING: Manifest = {
    "replicas": 3,
    "image": {"digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "registry"}],
    "gpu": {"count": 1},
    "settings": {"max_num_seqs": 8, "kv_cache_bytes": "1GiB", "adapter_roots": ["/models"]},
    "secret": {
        "name": "keys",
        "keys": {"apiKey": "admin", "markKek": "kek", "textMarkKey": "text", **SHARED_KEYS},
    },
    "store": SHARED_STORE,
    "secretEnv": {"HF_TOKEN": "hf"},
    "adapters": {"entries": [{"name": "sql", "source": "hf://org/sql@main"}], "prune": True},
    "env": {"OMP_NUM_THREADS": "4"},
    "extraVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
    "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    "nodeSelector": {"accelerator": "gpu"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "priorityClassName": "serving",
    "runtimeClassName": "nvidia",
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "models"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {"clients": [PEER], "scrapers": [PEER]},
    "inferencePool": POOL,
    "httpRoute": ROUTE,
    "autoscaling": {"kind": "keda", "prometheusAddress": "http://prometheus:9090"},
    "serviceAccount": {"annotations": {"role": "x"}},
}
MATRIX: dict[str, Manifest] = {
    "defaults": {},
    "everything": EVERYTHING,
    "hpa": {
        "autoscaling": {"kind": "hpa"},
        "secret": {"keys": {"databaseUrl": "database"}},
        "store": {"blobUrl": "gs://bucket"},
    },
    "claim": {"cache": {"existingClaim": "home"}},
    "bare": {
        "podDisruptionBudget": {"enabled": False},
        "topologySpread": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False},
        "httpRoute": ROUTE,
        "terminationGracePeriodSeconds": 600,
    },
    "ipv6": {"host": "::", "ports": {"http": 9000, "internal": 9001}},
}
CUSTOM = {"ServiceMonitor", "InferencePool", "HTTPRoute", "ScaledObject"}  # no built-in schema

matrix = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)


@pytest.fixture(scope="session")
def helm() -> Helm:
    return Helm(tools_folder() / "helm")


@matrix
def test_helm_lints_the_chart_without_a_warning(helm: Helm, values: Manifest) -> None:
    done = helm.lint(values)
    assert done.returncode == 0, done.stdout + done.stderr


@matrix
@pytest.mark.parametrize("release", RELEASES)
def test_the_objects_meet_the_schemas_of_every_supported_release(
    helm: Helm, values: Manifest, release: str
) -> None:
    for each in helm.template(values):
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, release, strict=True)


def test_a_field_that_no_release_knows_is_found(helm: Helm) -> None:
    deployment = only(helm.template({}), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, RELEASES[-1], strict=True)


def test_the_chart_says_which_releases_it_supports() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={RELEASES[0]}.0-0"
    newest = max(
        tuple(map(int, path.name[1:].split("-")[0].split(".")))
        for path in Path(kubernetes_validate.__file__).parent.glob("kubernetes-json-schema/v1.*")
    )
    assert RELEASES[-1] == f"{newest[0]}.{newest[1]}"


def test_the_chart_and_the_package_have_one_version() -> None:
    import polyadapt

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == polyadapt.__version__


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"imge": {}}, "imge"),
        ({"image": {"tag": "latest"}}, "/image/tag"),
        ({"image": {"digest": "sha256:1"}}, "/image/digest"),
        ({"replicas": "two"}, "/replicas"),
        ({"ports": {"http": 0}}, "/ports/http"),
        ({"settings": {"port": 9000}}, "propertyName 'port'"),
        ({"settings": {"text_mark_key": "x"}}, "propertyName 'text_mark_key'"),
        ({"securityContext": {"readOnlyRootFilesystem": False}}, "readOnlyRootFilesystem"),
        ({"podSecurityContext": {"runAsUser": 0}}, "runAsUser"),
        ({"resources": {"limits": {"memory": "lots"}}}, "/resources/limits/memory"),
        ({"secret": {"keys": {"apiKey": ""}}}, "apiKey"),
        ({"env": {"A B": "x"}}, "A B"),
        ({"autoscaling": {"kind": "magic"}}, "/autoscaling/kind"),
        (KEDA, "prometheusAddress"),
        ({"inferencePool": {"enabled": True}}, "endpointPicker.name"),
        ({"httpRoute": {"enabled": True}}, "parentRefs"),
        ({"terminationGracePeriodSeconds": 119}, "expected at least 120"),
        ({"drain": {"graceSeconds": 300}, "terminationGracePeriodSeconds": 300}, "least 330"),
        ({"replicas": 2}, "one registry and one store of adapters"),
        ({"autoscaling": {"kind": "hpa"}}, "one registry and one store of adapters"),
        ({"store": {"blobUrl": "/srv"}}, "/store/blobUrl"),
        ({"replicas": 2, "cache": {"existingClaim": "home"}}, "one volume for one replica"),
    ],
)
def test_wrong_values_are_refused_by_name(helm: Helm, values: Manifest, expected: str) -> None:
    done = helm.refusal(values)
    assert done.returncode != 0
    assert expected in done.stderr


@matrix
def test_pods_meet_the_restricted_standard(helm: Helm, values: Manifest) -> None:
    pod = only(helm.template(values), "Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for volume in pod["volumes"]:
        assert "hostPath" not in volume
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


@matrix
def test_no_object_leaves_a_choice_to_the_day(helm: Helm, values: Manifest) -> None:
    objects = helm.template(values)
    container = server_of(objects)
    assert re.fullmatch(
        r"polyadapt(:\d+\.\d+\.\d+(-cuda)?|@sha256:[0-9a-f]{64})", container["image"]
    )
    for kind in ("requests", "limits"):
        assert "memory" in container["resources"][kind]
    assert "cpu" in container["resources"]["requests"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in {port["name"] for port in container["ports"]}


@matrix
def test_every_label_selector_finds_the_pods_and_every_port_exists(
    helm: Helm, values: Manifest
) -> None:
    objects = helm.template(values)
    template = only(objects, "Deployment")["spec"]["template"]
    labels = template["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in server_of(objects)["ports"]}
    assert len(set(ports.values())) == len(ports) == 2
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            assert spec["selector"].items() <= labels.items()
            assert {port["targetPort"] for port in spec["ports"]} <= set(ports)
        elif each["kind"] in ("Deployment", "PodDisruptionBudget", "InferencePool"):
            assert spec["selector"]["matchLabels"].items() <= labels.items()
        elif each["kind"] == "NetworkPolicy":
            assert spec["podSelector"]["matchLabels"].items() <= labels.items()
            named = {port["port"] for rule in spec["ingress"] for port in rule["ports"]}
            assert named <= set(ports)
    if any(each["kind"] == "InferencePool" for each in objects):
        pool = only(objects, "InferencePool")["spec"]
        assert pool["targetPorts"] == [{"number": ports["http"]}]


@matrix
def test_the_server_accepts_its_settings(helm: Helm, values: Manifest, tmp_path: Path) -> None:
    objects = helm.template(values)
    container = server_of(objects)
    file = tmp_path / "config.yaml"
    file.write_text(settings_of(objects))
    environ = {each["name"]: each.get("value", "a-secret") for each in container["env"]}
    config = load_config({}, environ=environ, file=file)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (config.server.port, config.server.internal_port) == (ports["http"], ports["internal"])
    assert container["args"] == ["--config", "/etc/polyadapt/config.yaml"]
    grace = only(objects, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= config.server.drain_notice_s + config.server.drain_grace_s + 20
    probe = container["readinessProbe"]
    seen = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert seen <= config.server.drain_notice_s, "requests are refused before readiness is seen"


def test_only_the_named_scrapers_reach_the_internal_port(helm: Helm) -> None:
    closed = only(helm.template({}), "NetworkPolicy")["spec"]["ingress"]
    assert [rule["ports"] for rule in closed] == [[{"port": "http"}]]
    opened = only(helm.template(EVERYTHING), "NetworkPolicy")["spec"]["ingress"]
    assert [rule["from"] for rule in opened if rule["ports"] == [{"port": "internal"}]] == [[PEER]]
    service = [each for each in helm.template({}) if each["kind"] == "Service"]
    assert [port["targetPort"] for each in service for port in each["spec"]["ports"]] == ["http"]


def test_the_monitor_finds_the_internal_service_and_its_port(helm: Helm) -> None:
    objects = helm.template(EVERYTHING)
    monitor = only(objects, "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (service,) = [
        each for each in objects
        if each["kind"] == "Service" and wanted <= each["metadata"]["labels"].items()
    ]  # fmt: skip
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_the_pool_names_its_picker_and_the_route_the_pool(helm: Helm) -> None:
    objects = helm.template(EVERYTHING)
    pool = only(objects, "InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert set(pool["spec"]) == {"selector", "targetPorts", "endpointPickerRef"}
    assert pool["spec"]["endpointPickerRef"] == {
        "kind": "Service",
        "name": "picker",
        "port": {"number": 9002},
        "failureMode": "FailClose",
    }
    route = only(objects, "HTTPRoute")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    (rule,) = route["spec"]["rules"]
    assert rule["backendRefs"] == [
        {
            "group": "inference.networking.k8s.io",
            "kind": "InferencePool",
            "name": pool["metadata"]["name"],
        }
    ]
    (to_service,) = only(helm.template(MATRIX["bare"]), "HTTPRoute")["spec"]["rules"]
    service = only(helm.template(MATRIX["bare"]), "Service")
    (backend,) = to_service["backendRefs"]
    assert (backend["name"], backend["port"]) == (
        service["metadata"]["name"],
        service["spec"]["ports"][0]["port"],
    )


def test_replicas_are_the_autoscalers_where_there_is_one(helm: Helm) -> None:
    for kind, values in (
        ("HorizontalPodAutoscaler", MATRIX["hpa"]),
        ("ScaledObject", EVERYTHING),
    ):
        objects = helm.template(values)
        deployment = only(objects, "Deployment")
        assert "replicas" not in deployment["spec"]
        assert only(objects, kind)["spec"]["scaleTargetRef"] == {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": deployment["metadata"]["name"],
        }


def test_the_adapters_are_applied_through_the_service(helm: Helm) -> None:
    objects = helm.template(EVERYTHING)
    job = only(objects, "Job")
    assert "post-upgrade" in job["metadata"]["annotations"]["helm.sh/hook"]
    template = job["spec"]["template"]
    (container,) = template["spec"]["containers"]
    (service,) = [
        each for each in objects
        if each["kind"] == "Service" and each["spec"]["ports"][0]["name"] == "http"
    ]  # fmt: skip
    address = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    file, _, server, _, wait_s, prune = container["args"]
    assert (server, prune) == (address, "--prune")
    assert float(wait_s) == 900
    (mounted,) = [m for m in container["volumeMounts"] if file.startswith(m["mountPath"] + "/")]
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    name = volumes[mounted["name"]]["configMap"]["name"]
    (held,) = [each for each in objects if each["metadata"]["name"] == name]
    entries = yaml.safe_load(held["data"]["adapters.yaml"])["adapters"]
    assert entries == EVERYTHING["adapters"]["entries"]
    labels = template["metadata"]["labels"]
    assert not service["spec"]["selector"].items() <= labels.items(), "it would be sent requests"
    (rule,) = [
        rule for rule in only(objects, "NetworkPolicy")["spec"]["ingress"]
        if rule["ports"] == [{"port": "http"}]
    ]  # fmt: skip
    assert {"podSelector": {"matchLabels": labels}} in rule["from"]
    assert not [each for each in helm.template({}) if each["kind"] == "Job"]


def test_a_gpu_asks_for_the_device_and_the_cuda_image(helm: Helm) -> None:
    container = server_of(helm.template({"gpu": {"count": 2}}))
    assert container["image"].endswith("-cuda")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "nvidia.com/gpu" not in server_of(helm.template({}))["resources"]["limits"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"gpu": {"count": 1}}, ["auto"]),
        ({"gpu": {"count": 2}}, ["cuda:0", "cuda:1"]),
        ({"gpu": {"count": 2}, "settings": {"devices": ["cuda:1"]}}, ["cuda:1"]),
    ],
)
def test_every_device_of_a_pod_gets_an_engine(
    helm: Helm, values: Manifest, expected: list[str]
) -> None:
    settings = yaml.safe_load(settings_of(helm.template(values)))
    assert list(load_config(settings, environ={}).engine_configs()) == expected


def test_new_settings_make_new_pods(helm: Helm) -> None:
    def checksum(values: Manifest) -> Any:
        metadata = only(helm.template(values), "Deployment")["spec"]["template"]["metadata"]
        return metadata["annotations"]["checksum/settings"]

    assert checksum({"settings": {"max_num_seqs": 8}}) != checksum(
        {"settings": {"max_num_seqs": 9}}
    )
    assert checksum({}) == checksum({"replicas": 1})


def test_no_secret_is_in_any_object(helm: Helm) -> None:
    objects = helm.template(EVERYTHING)
    assert "Secret" not in {each["kind"] for each in objects}
    named = {
        each["name"]: each["valueFrom"]["secretKeyRef"]
        for each in server_of(objects)["env"]
        if "valueFrom" in each
    }
    assert named == {
        "POLYADAPT_API_KEY": {"name": "keys", "key": "admin"},
        "POLYADAPT_MARK_KEK": {"name": "keys", "key": "kek"},
        "POLYADAPT_TEXT_MARK_KEY": {"name": "keys", "key": "text"},
        "POLYADAPT_DATABASE_URL": {"name": "keys", "key": "database"},
        "AWS_ACCESS_KEY_ID": {"name": "keys", "key": "s3-id"},
        "AWS_SECRET_ACCESS_KEY": {"name": "keys", "key": "s3-secret"},
        "HF_TOKEN": {"name": "keys", "key": "hf"},
    }


def test_the_plain_base_is_the_chart_with_its_defaults(helm: Helm) -> None:
    from tools import kubernetes_base

    rendered = kubernetes_base.render(helm.binary)
    assert kubernetes_base.BASE.read_text() == rendered, "run `make kubernetes-base`"


def test_kubectl_builds_the_plain_base() -> None:
    done = subprocess.run(
        [str(tools_folder() / "kubectl"), "kustomize", str(ROOT / "deploy" / "kubernetes")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    kinds = {"Deployment", "Service", "ConfigMap", "ServiceAccount", "PodDisruptionBudget"}
    assert {each["kind"] for each in objects} == kinds | {"NetworkPolicy"}
    for each in objects:
        for release in RELEASES:
            kubernetes_validate.validate(copy.deepcopy(each), release, strict=True)
