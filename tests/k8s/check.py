"""Checks k8s/ as far as that goes without a cluster. Prints what was checked; ends with 1 and what is wrong.

There is no kustomize to be installed from a package index, so what it would make of the components is made here: the one
patch each of them has is merged into the example's Deployment as a strategic merge does it (maps merge, lists of named
things merge by name, new ones come first), and the result is validated like everything else.
"""

import copy
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import kubernetes_validate
import yaml

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
        except Exception as error:  # noqa: BLE001: whatever it says is what is wrong
            fault(where, f"Kubernetes {version}: {str(error).splitlines()[0]}")


def merge(base, patch):
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = dict(base)
        for key, value in patch.items():
            merged[key] = merge(base[key], value) if key in base else copy.deepcopy(value)
        return merged
    named = lambda things: all(isinstance(thing, dict) and "name" in thing for thing in things)
    if isinstance(base, list) and isinstance(patch, list) and named(base) and named(patch):
        known = {thing["name"]: thing for thing in base}
        new = [copy.deepcopy(thing) for thing in patch if thing["name"] not in known]
        patches = {thing["name"]: thing for thing in patch}
        return new + [merge(thing, patches.get(thing["name"], {})) for thing in base]
    return copy.deepcopy(patch)


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
                fault(where, f"container {container['name']}: a memory limit and no CPU limit is wanted")
            for mount in container.get("volumeMounts", []):
                if "subPath" in mount:
                    fault(where, f"{mount['name']} is mounted by subPath: changes would not arrive")


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
            fault(path.relative_to(ROOT), "the name of its ConfigMap would change with its contents")


def probes_meet_the_configuration(deployment, config, where):
    text = config.read_text()
    port = int(re.search(r'\[probes\]\s+listen\s*=\s*"[^"]*:(\d+)"', text).group(1))
    for container in containers(deployment):
        if container["name"] != "sidecache":
            continue
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        if ports.get("probes") != port:
            fault(where, f"the port of the probes is {ports.get('probes')}, and the configuration says {port}")
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe in container and container[probe]["httpGet"]["port"] != "probes":
                fault(where, f"{probe} does not ask the probes' port")


def configurations_are_good():
    secrets = tempfile.mkdtemp()
    for path in sorted(K8S.rglob("config.toml")):
        text = path.read_text()
        for name in re.findall(r'file = "/run/secrets/sidecache/([^"]+)"', text):
            pathlib.Path(secrets, name).write_text("a secret for the check\n")
        copied = pathlib.Path(secrets, "config.toml")
        copied.write_text(text.replace("/run/secrets/sidecache", secrets))
        done = subprocess.run(
            [os.environ["SIDECACHE"], "check", "--config", str(copied)], capture_output=True, text=True, timeout=60
        )
        if done.returncode != 0:
            fault(path.relative_to(ROOT), done.stderr.strip())
    for first, second in [("sidecar", "sidecar-before-1.29")]:
        if (K8S / first / "config.toml").read_text() != (K8S / second / "config.toml").read_text():
            fault(f"k8s/{second}/config.toml", f"is not that of k8s/{first}")


def metrics_exist():
    source = (ROOT / "src/admin/metrics.rs").read_text()
    kinds = dict(re.findall(r'(?:counter|gauge|histogram)\(\s*to,\s*"(\w+)"()', source))
    known = set()
    for kind, name in re.findall(r'(counter|gauge|histogram)\(\s*to,\s*"(\w+)"', source):
        suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[kind]
        known |= {f"sidecache_{name}{suffix}" for suffix in suffixes}
    if len(kinds) < 15:
        fault("src/admin/metrics.rs", "its metrics could not be read")
    used = set()
    for path in [K8S / "grafana/dashboard.json", K8S / "grafana/alerts.yaml"]:
        text = path.read_text()
        for name in re.findall(r"\bsidecache_\w+", text):
            used.add(name)
            if name not in known:
                fault(path.relative_to(ROOT), f"{name} is no metric of ours")
    json.loads((K8S / "grafana/dashboard.json").read_text())
    runbook = (ROOT / "docs/RUNBOOK.md").read_text().lower()
    for group in documents(K8S / "grafana/alerts.yaml")[0]["spec"]["groups"]:
        for rule in group["rules"]:
            if f"## {rule['alert'].lower()}" not in runbook:
                fault("docs/RUNBOOK.md", f"says nothing of {rule['alert']}")
    return used


def main():
    checked = 0
    for path in sorted(K8S.rglob("*.yaml")):
        for doc in documents(path):
            if doc["kind"] in FOREIGN or path.name == "patch.yaml":
                continue
            validate(doc, path.relative_to(ROOT))
            if doc["kind"] == "Deployment":
                hardened(doc, path.relative_to(ROOT))
            checked += 1
    app = documents(K8S / "example/deployment.yaml")[0]
    for component, versions in VERSIONS.items():
        where = f"k8s/{component} in the example"
        patched = merge(app, documents(K8S / component / "patch.yaml")[0])
        patched["metadata"]["name"] = app["metadata"]["name"]
        validate(patched, where, versions)
        hardened(patched, where)
        probes_meet_the_configuration(patched, K8S / component / "config.toml", where)
        names = [container["name"] for container in containers(patched)]
        if names[0] != "sidecache" or "app" not in names:
            fault(where, f"the containers are {names}: the sidecar comes first, and the application stays")
        checked += 1
    shared = documents(K8S / "shared/deployment.yaml")[0]
    probes_meet_the_configuration(shared, K8S / "shared/config.toml", "k8s/shared")
    listed_files_exist()
    configurations_are_good()
    used = metrics_exist()
    if faults:
        print("\n".join(faults), file=sys.stderr)
        sys.exit(1)
    print(f"{checked} resources are valid, {len(used)} metrics of dashboard and alerts exist")


main()
