"""python -m flexkv.dynamo: what it makes of a command line, and what it stops at. Dynamo itself is not
needed: a module of that name shows what it was started with."""
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys

import pytest

from flexkv.dynamo.command import OWN_MODULE, UsageError, translate

WORKER = '''
import json, os, sys, time
print(json.dumps({"arguments": sys.argv[1:], "events": os.environ.get("DYNAMO_USE_FLEXKV"),
                  "connector": os.environ.get("DYN_CONNECTOR")}), flush=True)
if "--stay" in sys.argv:
    time.sleep(60)
'''
DEFAULT = {"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both",
           "kv_load_failure_policy": "recompute"}


def argument(arguments, name):
    return json.loads(arguments[arguments.index(name) + 1])


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def events(port, **more):
    return ["--kv-events-config", json.dumps({"publisher": "zmq", "topic": "kv-events",
                                              "enable_kv_cache_events": True,
                                              "endpoint": f"tcp://*:{port}", **more})]


# ---- the command line ----

@pytest.mark.parametrize("given", [["--connector", "flexkv"], ["--connector=flexkv"], [],
                                   ["--connector", "FlexKV"]])
def test_the_connector_in_the_form_that_is_taken(given):
    command = translate(["--model", "m", *given, "--block-size", "32"], {})
    assert command.arguments[:4] == ["--model", "m", "--block-size", "32"]
    assert argument(command.arguments, "--kv-transfer-config") == DEFAULT
    assert not any("--connector" in a for a in command.arguments)


def test_our_own_connector_class():
    command = translate(["--flexkv-own-connector", "--model", "m"], {})
    assert argument(command.arguments, "--kv-transfer-config") == {
        **DEFAULT, "kv_connector_module_path": OWN_MODULE}


def test_what_was_configured_stays():
    transfer = json.dumps({"kv_connector": "MultiConnector", "kv_connector_extra_config": {
        "connectors": [{"kv_connector": "FlexKVConnectorV1"}]}})
    command = translate(["--kv_transfer_config", transfer, "--connector", "flexkv"], {})
    assert command.arguments == ["--kv-transfer-config", transfer]


def test_data_parallel_ranks():
    command = translate(["-dp", "4", "--data-parallel-size-local=2", "--data-parallel-start-rank", "2"], {})
    assert (command.replicas, command.ranks, command.first_rank) == (4, 2, 2)


@pytest.mark.parametrize("given, said", [
    (["--connector", "nixl", "flexkv"], "MultiConnector"),
    (["--connector"], "--connector needs a value"),
    (["--kv-transfer-config", "{"], "no JSON"),
    (["--kv-transfer-config", "[]"], "no JSON object"),
    (["--kv-transfer-config", '{"kv_connector":"NixlConnector"}'], "NixlConnector"),
    (["--kv-transfer-config"], "--kv-transfer-config needs a value"),
    (["--flexkv-own-connector", "--kv-transfer-config", json.dumps(DEFAULT)], "kv_connector_module_path"),
    (["--data-parallel-size", "two"], "no number"),
])
def test_what_cant_be_meant(given, said):
    with pytest.raises(UsageError, match=said):
        translate(given, {})


def test_the_environments_connector():
    assert translate([], {"DYN_CONNECTOR": "flexkv"}).arguments
    with pytest.raises(UsageError, match="nixl"):
        translate([], {"DYN_CONNECTOR": "nixl"})


# ---- the program ----

@pytest.fixture
def folder(tmp_path):
    """With a dynamo.vllm that says what it was started with."""
    package = tmp_path / "path" / "dynamo" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(WORKER)
    return tmp_path


def start(folder, *arguments, **env):
    path = os.pathsep.join(filter(None, (str(folder / "path"), os.environ.get("PYTHONPATH"))))
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("FLEXKV_", "DYN"))}
    return subprocess.Popen([sys.executable, "-m", "flexkv.dynamo", *arguments], cwd=folder,
                            env={**mine, "PYTHONPATH": path, "FLEXKV_LOG_LEVEL": "ERROR", **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder, *arguments, **env):
    process = start(folder, *arguments, **env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@contextlib.contextmanager
def running(folder, *arguments, **env):
    process = start(folder, *arguments, "--stay", **env)
    try:
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def refused(folder, *arguments, **env):
    status, out, err = run(folder, *arguments, **env)
    assert (status, out) == (2, ""), err
    assert err.startswith("flexkv.dynamo: ") and err.count("\n") == 1, err
    return err


def test_it_becomes_the_worker(folder):
    status, out, _ = run(folder, "--model", "m", "--connector", "flexkv", DYN_CONNECTOR="flexkv")
    said = json.loads(out)
    assert status == 0 and said["events"] == "1" and said["connector"] is None
    assert argument(said["arguments"], "--kv-transfer-config") == DEFAULT
    chosen = argument(said["arguments"], "--kv-events-config")
    assert chosen["enable_kv_cache_events"] and chosen["endpoint"].startswith("tcp://*:")


def test_events_can_be_left_out(folder):
    status, out, _ = run(folder, *events(free_port(), enable_kv_cache_events=False),
                         DYNAMO_USE_FLEXKV="0")
    hint, said = out.splitlines()
    assert "the router will know nothing" in hint and json.loads(said)["events"] == "0"


def test_show(folder):
    status, out, _ = run(folder, "--flexkv-show", "--connector", "flexkv")
    assert status == 0 and shlex.split(out)[1:3] == ["-m", "dynamo.vllm"]


def test_without_dynamo(folder):
    (folder / "path").rename(folder / "elsewhere")
    assert "has no dynamo.vllm" in refused(folder, "--model", "m")


def test_ports_in_use(folder):
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen(1)
        port = s.getsockname()[1]
        said = refused(folder, *events(port))
        assert f"port {port}" in said and f"process {os.getpid()}" in said
        said = refused(folder, *events(port - 1), "--data-parallel-size", "2")
        assert f"port {port}" in said


def test_ports_that_ranks_share(folder):
    port = free_port()
    said = refused(folder, *events(port, replay_endpoint=f"tcp://*:{port + 1}"), "-dp", "2")
    assert "replay_endpoint" in said and "ranks" in said


@pytest.mark.parametrize("endpoint", ["tcp://*", "tcp://*:x", "tcp://*:70000"])
def test_endpoints_that_are_none(folder, endpoint):
    assert endpoint in refused(folder, *events(0, endpoint=endpoint))


def test_two_workers_with_one_endpoint(folder):
    """The first one has not bound it yet."""
    port = free_port()
    with running(folder, *events(port)):
        assert f"port {port}" in refused(folder, *events(port))
    assert run(folder, *events(port))[0] == 0


def test_two_workers_with_one_address(folder):
    address = f"ipc://{folder}/node"
    with running(folder, FLEXKV_SERVER_RECV_PORT=address):
        assert "FLEXKV_SERVER_RECV_PORT" in refused(folder, FLEXKV_SERVER_RECV_PORT=address)
        assert run(folder, FLEXKV_SERVER_RECV_PORT=address, FLEXKV_SERVER_CLIENT_MODE="1")[0] == 0


def test_an_address_where_a_node_listens(folder):
    import flexkv
    address = f"ipc://{folder}/node"
    with flexkv.Node.open() as node:
        node.listen(address)
        said = refused(folder, FLEXKV_SERVER_RECV_PORT=address)
        assert "listens" in said and f"process {os.getpid()}" in said


def test_addresses_that_cant_be(folder):
    assert "no directory" in refused(folder, FLEXKV_SERVER_RECV_PORT="ipc:///nowhere/node")
    assert "107" in refused(folder, FLEXKV_SERVER_RECV_PORT=f"ipc://{folder}/{'x' * 120}")


def test_two_workers_with_one_ssd_directory(folder):
    """Also if it is the default one, and the option was just not thought of."""
    with running(folder, FLEXKV_SSD_CACHE_GB="1G"):
        assert "FLEXKV_SSD_CACHE_DIR=flexkv_ssd" in refused(folder, FLEXKV_SSD_CACHE_GB="1G")
        other = {"FLEXKV_SSD_CACHE_GB": "1G", "FLEXKV_SSD_CACHE_DIR": str(folder / "ssd")}
        assert run(folder, **other)[0] == 0


def test_an_ssd_directory_that_a_node_uses(folder):
    place = folder / "ssd"
    place.mkdir()
    code = (f"import fcntl, time; f = open({str(place / 'flexkv.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print('has it', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline()
        said = refused(folder, FLEXKV_SSD_CACHE_GB="1G", FLEXKV_SSD_CACHE_DIR=str(place))
        assert f"FLEXKV_SSD_CACHE_DIR={place} is in use" in said
    finally:
        holder.kill()
        holder.communicate()
    (folder / "file").write_text("")
    assert "no directory" in refused(folder, FLEXKV_SSD_CACHE_GB="1G",
                                     FLEXKV_SSD_CACHE_DIR=str(folder / "file" / "ssd"))
