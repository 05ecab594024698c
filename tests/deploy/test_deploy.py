"""deploy/: container, compose and Kubernetes files. The linters that exist for them, and what these can't know: that each option
is one of ours and does something, that sizes fit each other, that a daemon with these settings starts and the probes answer.

No Docker and no Kubernetes is needed, or used: see docs/deploy.md for what that leaves open."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import dockerfile

ROOT = Path(__file__).resolve().parents[2]
FLEXKV = os.environ.get("FLEXKV_BIN", str(ROOT / "build-gcc" / "flexkv"))
TOOLS = Path(sys.executable).parent         # linters of the same environment
DOCKER, KUBERNETES = ROOT / "deploy/docker", ROOT / "deploy/kubernetes"
MANIFESTS = sorted(KUBERNETES.glob("*.yml"))
GIB = 1 << 30
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def run(*args, env=None, timeout=60):
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=env)
    return done.returncode, done.stdout + done.stderr


def shown(*args):
    """What `flexkv config` says."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLEXKV_")}
    return json.loads(subprocess.run([FLEXKV, "config", "--json", *map(str, args)], capture_output=True, text=True, timeout=60,
                                     check=True, env=env).stdout)


def clean(*args):
    status, out = run(*args)
    assert status == 0, out


def size(text):
    number, unit = re.fullmatch(r"(\d+)(\w*)", str(text)).groups()
    return int(number) * UNITS[unit]


def objects():
    return [o for path in MANIFESTS for o in yaml.safe_load_all(path.read_text())]


def the(kind, name):
    return next(o for o in objects() if (o["kind"], o["metadata"]["name"]) == (kind, name))


def pods():
    return [o for o in objects() if "template" in o.get("spec", {})]


def containers():
    return [c for o in pods() for c in o["spec"]["template"]["spec"].get("initContainers", []) +
            o["spec"]["template"]["spec"]["containers"]]


def daemon():
    return the("DaemonSet", "flexkv")["spec"]["template"]["spec"]["containers"][0]


def nodes():
    """What the compose file says of its daemons."""
    return {name: s for name, s in yaml.safe_load((DOCKER / "compose.yml").read_text())["services"].items() if name != "redis"}


def environment_name(option):
    return "FLEXKV_" + option.upper()


# ---- linters ----

@pytest.mark.parametrize("path", [*MANIFESTS, DOCKER / "compose.yml"], ids=lambda p: p.name)
def test_yaml_is_clean(path):
    rules = ("{extends: default, rules: {line-length: {max: 140}, document-start: disable, "
             "braces: {max-spaces-inside: 1}, comments: {min-spaces-from-content: 1}}}")
    clean(TOOLS / "yamllint", "--strict", "-d", rules, path)


def test_the_dockerfile_is_clean():
    # DL3006: no tag for our own stages. All packages are Debian's of one release: their versions are its.
    clean(TOOLS / "hadolint", "--no-color", "--ignore", "DL3006", DOCKER / "Dockerfile")


def test_compose_is_what_the_specification_says():
    clean(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yml")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_kubernetes_knows_the_manifests(path):
    clean(TOOLS / "kubernetes-validate", "--strict", "-k", "1.30", path)


def test_a_broken_manifest_is_noticed(tmp_path):
    text = (KUBERNETES / "daemonset.yml").read_text()
    for right, wrong in (("nodeSelector", "nodeSelektor"), ("periodSeconds: 2", "periodSeconds: soon")):
        (tmp_path / "broken.yml").write_text(text.replace(right, wrong))
        assert run(TOOLS / "kubernetes-validate", "--strict", "-k", "1.30", tmp_path / "broken.yml")[0] != 0


# ---- options ----

def used_options():
    """(where, option as in the environment, value) of every option that a file here sets."""
    for name, service in nodes().items():
        for key, value in service["environment"].items():
            yield f"compose.yml {name}", key, value
    for entry in daemon()["env"]:
        yield "daemonset.yml", entry["name"], entry.get("value")
    for key, value in yaml.safe_load(the("ConfigMap", "flexkv")["data"]["flexkv.yml"]).items():
        yield "configmap.yml", environment_name(key), value
    for name, (_, steps) in dockerfile.stages((DOCKER / "Dockerfile").read_text()).items():
        for word, rest in steps:
            if word == "ENV":
                for key, value in dockerfile.environment(rest).items():
                    yield f"Dockerfile {name}", key, value
    for line in (ROOT / "deploy/systemd/flexkv.env").read_text().splitlines():
        if m := re.fullmatch(r"#?(FLEXKV_\w+)=(.*)", line):
            yield "flexkv.env", *m.groups()


@pytest.mark.parametrize("where,key,value", list(used_options()), ids=lambda v: str(v)[:40])
def test_an_option_is_known_and_does_something(where, key, value):
    if key == "FLEXKV_CONFIG_PATH":
        return
    row = {environment_name(name): row for name, row in shown().items()}.get(key)
    assert row, f"{where}: there is no option {key}"
    assert row["status"] == "active", f"{where}: {key} is {row['status']}"


def test_the_config_map_is_read_as_it_is_meant(tmp_path):
    text = the("ConfigMap", "flexkv")["data"]["flexkv.yml"]
    (tmp_path / "flexkv.yml").write_text(text)
    rows = shown("--file", tmp_path / "flexkv.yml")
    for key, value in yaml.safe_load(text).items():
        assert "flexkv.yml" in rows[key]["source"], key
        if key == "cpu_cache_gb":
            assert rows[key]["value"] == value * GIB


# ---- that things fit each other ----

def test_memory_limits_are_above_the_cpu_tier():
    cpu = yaml.safe_load(the("ConfigMap", "flexkv")["data"]["flexkv.yml"])["cpu_cache_gb"]
    assert size(daemon()["resources"]["limits"]["memory"]) >= cpu * GIB + 2 * GIB
    for service in nodes().values():
        assert size(service["mem_limit"]) >= int(service["environment"]["FLEXKV_CPU_CACHE_GB"]) * GIB + GIB


def test_each_node_of_compose_is_somebody():
    services = nodes()
    assert len(services) >= 2
    for what in ("FLEXKV_NODE_NAME", "FLEXKV_LOCAL_IP"):
        assert len({s["environment"][what] for s in services.values()}) == len(services)
    for service in services.values():
        assert service["environment"]["FLEXKV_LOCAL_IP"] == service["networks"]["nodes"]["ipv4_address"]
    volumes = [v.split(":")[0] for s in services.values() for v in s["volumes"]]
    assert len(set(volumes)) == len(volumes)
    redis = yaml.safe_load((DOCKER / "compose.yml").read_text())["services"]["redis"]
    assert all(s["environment"]["FLEXKV_REDIS_HOST"] == redis["networks"]["nodes"]["ipv4_address"]
               for s in services.values())


def test_no_container_has_more_rights_than_it_needs():
    for c in containers():
        rights = c["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False and rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"]["drop"] == ["ALL"]
        assert set(rights["capabilities"].get("add", [])) <= {"CHOWN"}
        assert "memory" in c["resources"]["limits"] and "memory" in c["resources"]["requests"]
    for o in pods():
        spec = o["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["automountServiceAccountToken"] is False
        assert not any(spec.get(h) for h in ("hostNetwork", "hostPID", "hostIPC"))


def test_no_secret_is_in_the_files():
    for path in [*MANIFESTS, *DOCKER.iterdir()]:
        text = path.read_text()
        assert "kind: Secret" not in text
        assert not re.search(r"(?i)(password|secret)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{8,}", text), path.name
    wanted = {(e["valueFrom"]["secretKeyRef"]["name"], e["valueFrom"]["secretKeyRef"]["key"])
              for c in containers() for e in c.get("env", []) if "secretKeyRef" in e.get("valueFrom", {})}
    documented = (ROOT / "docs/deploy.md").read_text()
    assert wanted and all(f"--from-literal={key}=" in documented for _, key in wanted)


def test_nodes_may_reach_each_other_where_they_listen():
    listens = next(e["value"] for e in daemon()["env"] if e["name"] == "FLEXKV_P2P_LISTEN")
    allowed = the("NetworkPolicy", "flexkv")["spec"]["ingress"][0]["ports"]
    port = int(listens.rpartition(":")[2])
    assert [p["containerPort"] for p in daemon()["ports"]] == [port]
    assert {p["port"] for p in allowed} == {port, the("Service", "flexkv-redis")["spec"]["ports"][0]["port"]}
    names = [e["name"] for e in daemon()["env"]]
    assert names.index("FLEXKV_LOCAL_IP") < names.index("FLEXKV_P2P_LISTEN")     # only then it is put in


def test_names_in_the_manifests_lead_somewhere():
    spec = the("DaemonSet", "flexkv")["spec"]["template"]["spec"]
    volumes = {v["name"] for v in spec["volumes"]}
    for c in spec["initContainers"] + spec["containers"]:
        assert {m["name"] for m in c["volumeMounts"]} <= volumes
    config = yaml.safe_load(the("ConfigMap", "flexkv")["data"]["flexkv.yml"])
    assert config["redis_host"] == the("Service", "flexkv-redis")["metadata"]["name"]
    assert config["ssd_cache_dir"].startswith(next(m["mountPath"] for m in daemon()["volumeMounts"] if m["name"] == "ssd"))
    version = re.search(r"version: '([\d.]+)'", (ROOT / "meson.build").read_text())[1]
    assert daemon()["image"] == f"flexkv:{version}"


def test_what_the_dockerfile_copies_and_runs_is_there():
    ignore = dockerfile.Ignore((DOCKER / "Dockerfile.dockerignore").read_text())
    stages = dockerfile.stages((DOCKER / "Dockerfile").read_text())
    scripts = set()
    for name, (_, steps) in stages.items():
        for word, rest in steps:
            if word == "COPY":
                stage, sources, _ = dockerfile.copy(rest)
                assert stage is None or list(stages).index(stage) < list(stages).index(name)
                assert stage or all((ROOT / s).exists() and ignore.keeps(s) for s in sources if s != ".")
            if word == "RUN":
                scripts |= set(re.findall(r"^(?:/usr/local/lib/flexkv/)?([\w/-]+)", rest))
    assert {"tools/install-deps", "deploy/docker/build"} <= scripts
    for s in ("tools/install-deps", "deploy/docker/build"):
        assert os.access(ROOT / s, os.X_OK)
    for kept in ("meson.build", "src/api/api.c", "python/flexkv/__init__.py", "tests/meson.build"):
        assert ignore.keeps(kept), kept
    for left in ("build/flexkv", "tests/unit/test_key.c", ".git/HEAD", "deploy/docker/.env"):
        assert not ignore.keeps(left), left


def test_the_image_gets_every_library_that_the_program_needs():
    """By name: what the program is linked with is in the packages of install-deps --runtime."""
    text = (ROOT / "tools/install-deps").read_text()
    packages = re.search(r'runtime_packages="([^"]+)"', text)[1].split()
    have = set()
    for package in packages:
        status, out = run("dpkg-query", "-L", package)
        if status:
            pytest.skip(f"{package} is not installed here (tools/install-deps --runtime)")
        have |= {Path(p).name for p in out.split()}
    needed = set(re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", FLEXKV)[1]))
    libc = {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "libdl.so.2", "libpthread.so.0"}
    assert not needed - libc - have


# ---- a daemon with these settings ----

def wait_for(what, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("where", ["kubernetes", "compose"])
def test_a_daemon_with_these_settings_starts_and_the_probes_answer(where, tmp_path):
    """The files' settings, but for the sizes and the places; Redis is not there, which a daemon survives."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLEXKV_")}
    if where == "kubernetes":
        (tmp_path / "flexkv.yml").write_text(the("ConfigMap", "flexkv")["data"]["flexkv.yml"])
        for entry in daemon()["env"]:
            field = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            env[entry["name"]] = entry.get("value") or {"status.podIP": "127.0.0.1", "spec.nodeName": "machine-1"}.get(
                field, "0123456789abcdef01234567")
        env["FLEXKV_P2P_LISTEN"] = env["FLEXKV_P2P_LISTEN"].replace("$(FLEXKV_LOCAL_IP)", env["FLEXKV_LOCAL_IP"])
        env["FLEXKV_CONFIG_PATH"] = str(tmp_path / "flexkv.yml")
        words = ["flexkv", *daemon()["args"]]
        probes = [daemon()[p]["exec"]["command"] for p in ("startupProbe", "readinessProbe", "livenessProbe")]
    else:
        stage = dockerfile.stages((DOCKER / "Dockerfile").read_text())["node"][1]
        last = dict(stage)
        env |= {k: re.sub(r"\$\{.*\}", "0123456789abcdef01234567", v) for k, v in nodes()["flexkv-1"]["environment"].items()}
        env["FLEXKV_P2P_LISTEN"] = env["FLEXKV_P2P_LISTEN"].replace(env["FLEXKV_LOCAL_IP"], "127.0.0.1")
        env["FLEXKV_LOCAL_IP"] = "127.0.0.1"
        words = dockerfile.command(last["ENTRYPOINT"]) + dockerfile.command(last["CMD"])
        probes = [dockerfile.command(last["HEALTHCHECK"])]
    assert env["FLEXKV_P2P_LISTEN"] == "127.0.0.1:7000"
    env["FLEXKV_P2P_LISTEN"] = "127.0.0.1"          # whatever port is free here
    env["FLEXKV_SERVER_RECV_PORT"] = f"ipc://{tmp_path}/flexkv.sock"
    sizes = {"cpu_cache_gb": "64M", "ssd_cache_gb": "64M", "ssd_cache_dir": tmp_path / "ssd", "redis_host": "127.0.0.1",
             "redis_port": "1"}
    words += [w for k, v in sizes.items() for w in ("--set", f"{k}={v}")]
    assert words[0] == "flexkv" and all(p[0] == "flexkv" for p in probes)
    (tmp_path / "ssd").mkdir()
    assert run(FLEXKV, *probes[0][1:], env=env)[0] == 1         # nobody answers yet
    with open(tmp_path / "log", "w") as log:
        node = subprocess.Popen([FLEXKV, *map(str, words[1:])], env=env, stdout=log, stderr=log)
    try:
        for probe in probes:
            assert wait_for(lambda: run(FLEXKV, *probe[1:], env=env)[0] == 0), (tmp_path / "log").read_text()
    finally:
        node.terminate()
        assert node.wait(30) == 0
    assert run(FLEXKV, *probes[0][1:], env=env)[0] == 1


def test_scripts_parse():
    assert shutil.which("sh")
    clean("sh", "-n", DOCKER / "build")
    for o in pods():
        for c in o["spec"]["template"]["spec"]["containers"]:
            if c.get("command") == ["sh", "-c"]:
                clean("sh", "-n", "-c", c["args"][0])
