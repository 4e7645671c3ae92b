"""Checks k8s/ without a cluster. Prints the number of checks, or prints the errors and exits with status 1.

kustomize builds each folder; chart.py renders the Helm chart.
"""

import copy
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jsonschema
import kubernetes_validate
import yaml

from chart import Chart

ROOT = pathlib.Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
VERSIONS = {"sidecar": ["1.29", "1.31"], "sidecar-before-1.29": ["1.26", "1.28"]}
FOREIGN = {"Kustomization", "Component", "PodMonitor", "PrometheusRule"}
faults = []


def fault(where, what):
    faults.append(f"{where}: {what}")


def documents(path):
    return [doc for doc in yaml.safe_load_all(path.read_text()) if doc]


def validate(doc, where, versions=("1.26", "1.29", "1.31")):
    for version in versions:
        try:
            kubernetes_validate.validate(copy.deepcopy(doc), version, strict=True)
        except Exception as error:  # noqa: BLE001: every exception is a validation error
            fault(where, f"Kubernetes {version}: {str(error).splitlines()[0]}")


def built(folder):
    """Returns the documents that kustomize builds from a folder."""
    command = [os.environ["KUSTOMIZE"], "build", "--load-restrictor", "LoadRestrictionsNone", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        fault(folder, done.stderr.strip())
        return []
    return [doc for doc in yaml.safe_load_all(done.stdout) if doc]


def containers(deployment):
    spec = deployment["spec"]["template"]["spec"]
    return spec.get("initContainers", []) + spec.get("containers", [])


def hardened(deployment, where):
    pod = deployment["spec"]["template"]["spec"].get("securityContext", {})
    for container in containers(deployment):
        if container["image"] == "sidecache" or container["name"] in ("sidecache", "redis"):
            context = {**pod, **container.get("securityContext", {})}
            for key, wanted in [
                ("runAsNonRoot", True),
                ("readOnlyRootFilesystem", True),
                ("allowPrivilegeEscalation", False),
                ("capabilities", {"drop": ["ALL"]}),
                ("seccompProfile", {"type": "RuntimeDefault"}),
            ]:
                if context.get(key) != wanted:
                    fault(where, f"container {container['name']}: securityContext.{key} is not {wanted}")
            resources = container.get("resources", {})
            if "cpu" in resources.get("limits", {}) or "memory" not in resources.get("limits", {}):
                fault(where, f"container {container['name']}: needs a memory limit and no CPU limit")
            for mount in container.get("volumeMounts", []):
                if "subPath" in mount:
                    fault(where, f"{mount['name']} is mounted with subPath, which does not follow changes")


def listed_files_exist():
    for path in K8S.rglob("kustomization.yaml"):
        doc = documents(path)[0]
        here = path.parent
        files = doc.get("resources", []) + doc.get("components", []) + [p["path"] for p in doc.get("patches", [])]
        for generator in doc.get("configMapGenerator", []):
            files += generator["files"]
        for name in files:
            if not (here / name).exists():
                fault(path.relative_to(ROOT), f"{name} does not exist")
        if doc.get("configMapGenerator") and not doc.get("generatorOptions", {}).get("disableNameSuffixHash"):
            fault(path.relative_to(ROOT), "its ConfigMap needs a fixed name: set disableNameSuffixHash")


def check_probes_port(deployment, config, where):
    text = config.read_text()
    port = int(re.search(r'\[probes\]\s+listen\s*=\s*"[^"]*:(\d+)"', text).group(1))
    for container in containers(deployment):
        if container["name"] != "sidecache":
            continue
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        if ports.get("probes") != port:
            fault(where, f"the probes port is {ports.get('probes')}, but the configuration has {port}")
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe in container and container[probe]["httpGet"]["port"] != "probes":
                fault(where, f"{probe} does not use the probes port")


def check_configuration(text, where):
    """Reports a fault if `sidecache check` rejects this configuration."""
    with tempfile.TemporaryDirectory() as secrets:
        for name in re.findall(r'file = "/run/secrets/sidecache/([^"]+)"', text):
            pathlib.Path(secrets, name).write_text("a secret for the check\n")
        copied = pathlib.Path(secrets, "config.toml")
        copied.write_text(text.replace("/run/secrets/sidecache", secrets))
        done = subprocess.run(
            [os.environ["SIDECACHE"], "check", str(copied)], capture_output=True, text=True, timeout=60
        )
        if done.returncode != 0:
            fault(where, done.stderr.strip())


def check_configurations():
    for path in sorted(K8S.rglob("config.toml")):
        check_configuration(path.read_text(), path.relative_to(ROOT))
    for first, second in [("sidecar", "sidecar-before-1.29")]:
        if (K8S / first / "config.toml").read_text() != (K8S / second / "config.toml").read_text():
            fault(f"k8s/{second}/config.toml", f"differs from that of k8s/{first}")


def metrics_exist():
    source = (ROOT / "src/admin/metrics.rs").read_text()
    kinds = dict(re.findall(r'(?:counter|gauge|histogram)\(\s*to,\s*"(\w+)"()', source))
    known = set()
    for kind, name in re.findall(r'(counter|gauge|histogram)\(\s*to,\s*"(\w+)"', source):
        suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[kind]
        known |= {f"sidecache_{name}{suffix}" for suffix in suffixes}
    if len(kinds) < 15:
        fault("src/admin/metrics.rs", "its metrics could not be parsed")
    used = set()
    for path in [K8S / "grafana/dashboard.json", K8S / "grafana/alerts.yaml"]:
        text = path.read_text()
        for name in re.findall(r"\bsidecache_\w+", text):
            used.add(name)
            if name not in known:
                fault(path.relative_to(ROOT), f"{name} is not a metric of sidecache")
    json.loads((K8S / "grafana/dashboard.json").read_text())
    runbook = (ROOT / "docs/RUNBOOK.md").read_text().lower()
    for group in documents(K8S / "grafana/alerts.yaml")[0]["spec"]["groups"]:
        for rule in group["rules"]:
            if f"## {rule['alert'].lower()}" not in runbook:
                fault("docs/RUNBOOK.md", f"has no section for {rule['alert']}")
    return used


def check_chart():
    """Validates the chart with default and other values, and its sidecar in a Pod. Returns the number of resources."""
    chart = Chart(K8S / "helm/sidecache")
    others = {
        "autoscaling": {"enabled": False},
        "podMonitor": {"enabled": True},
        "image": {"tag": "1.2.3"},
        "env": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
        "podAnnotations": {"a": "b"},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "x", "operator": "Exists"}],
    }
    checked = 0
    for values in ({}, others):
        for name, text in chart.render(values).items():
            where = f"k8s/helm/sidecache/templates/{name}"
            if "{{" in text or "None" in text:
                fault(where, "a placeholder was not replaced")
            if name == "NOTES.txt":
                continue
            for doc in filter(None, yaml.safe_load_all(text)):
                checked += 1
                if doc["kind"] not in FOREIGN:
                    validate(doc, where)
                if doc["kind"] == "Deployment":
                    hardened(doc, where)
                if doc["kind"] == "ConfigMap":
                    check_configuration(doc["data"]["config.toml"], where)
    for wrong in ({"replicas": 0}, {"resources": {"limits": {"cpu": "1"}}}, {"config": "x"}, {"nothing": 1}):
        try:
            chart.render(wrong)
            fault("k8s/helm/sidecache/values.schema.json", f"accepts {wrong}")
        except jsonschema.ValidationError:
            pass
    deployment = documents(K8S / "example/deployment.yaml")[0]
    pod = deployment["spec"]["template"]["spec"]
    parameters = {"image": "sidecache:0.1.0", "configMap": "sidecache"}
    pod["initContainers"] = yaml.safe_load(chart.include("sidecache.sidecar", parameters))
    pod["volumes"] = yaml.safe_load(chart.include("sidecache.volume", parameters))
    validate(deployment, "the chart's sidecar in the example", VERSIONS["sidecar"])
    hardened(deployment, "the chart's sidecar in the example")
    by_kustomize = next(doc for doc in built(K8S / "example") if doc["kind"] == "Deployment")
    ours, theirs = containers(deployment)[0], containers(by_kustomize)[0]
    if {**ours, "image": ""} != {**theirs, "image": ""}:
        fault("k8s/helm/sidecache/templates/_sidecar.tpl", "differs from the sidecar of k8s/sidecar")
    return checked + 1


def main():
    checked = 0
    for folder in ("example", "shared", "redis", "grafana"):
        for doc in built(K8S / folder):
            where = f"k8s/{folder}: {doc['kind']} {doc['metadata']['name']}"
            if doc["kind"] not in FOREIGN:
                validate(doc, where, VERSIONS["sidecar"] if folder == "example" else ("1.26", "1.29", "1.31"))
            if doc["kind"] == "Deployment":
                hardened(doc, where)
            checked += 1
    with tempfile.TemporaryDirectory(dir=ROOT / "target") as scratch:
        for component, versions in VERSIONS.items():
            where = f"k8s/{component} in the example"
            overlay = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [os.path.relpath(K8S / "example/deployment.yaml", scratch)],
                "components": [os.path.relpath(K8S / component, scratch)],
            }
            pathlib.Path(scratch, "kustomization.yaml").write_text(yaml.safe_dump(overlay))
            patched = [doc for doc in built(scratch) if doc["kind"] == "Deployment"]
            for deployment in patched:
                validate(deployment, where, versions)
                hardened(deployment, where)
                check_probes_port(deployment, K8S / component / "config.toml", where)
                names = [container["name"] for container in containers(deployment)]
                if names[0] != "sidecache" or "app" not in names:
                    fault(where, f"unexpected containers {names}: the sidecar must be first, and the application present")
            checked += len(patched)
            if len(patched) != 1:
                fault(where, f"expected one Deployment, found {len(patched)}")
    shared = documents(K8S / "shared/deployment.yaml")[0]
    check_probes_port(shared, K8S / "shared/config.toml", "k8s/shared")
    listed_files_exist()
    check_configurations()
    checked += check_chart()
    used = metrics_exist()
    if faults:
        print("\n".join(faults), file=sys.stderr)
        sys.exit(1)
    print(f"{checked} resources are valid, {len(used)} metrics of dashboard and alerts exist")


main()
