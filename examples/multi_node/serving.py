#!/usr/bin/env python3
"""What start_multi_node_serving.sh runs: the cluster, and how to ask it, until Ctrl-C."""
from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cluster import MODEL, Cluster, Options, Trouble  # noqa: E402
from processes import ended_by_signals, marked  # noqa: E402

USAGE = "usage: start_multi_node_serving.sh NODES [BASE_PORT=30001] [CLEAN_REDIS=true]"
SWITCH = {"true": True, "1": True, "false": False, "0": False}


def options() -> Options:
    words = [w.partition("=")[2] if w.startswith(("BASE_PORT=", "CLEAN_REDIS=")) else w for w in sys.argv[1:]]
    if not 1 <= len(words) <= 3 or not words[0].isdigit() or not 1 <= int(words[0]) <= 64:
        raise Trouble(f"{USAGE}\nNODES: 1 to 64")
    port = words[1] if len(words) > 1 else "30001"
    if not port.isdigit() or not 0 < int(port) <= 65535 - int(words[0]):
        raise Trouble(f"{USAGE}\nBASE_PORT: {port} is none")
    clean = words[2].lower() if len(words) > 2 else "true"
    if clean not in SWITCH:
        raise Trouble(f"{USAGE}\nCLEAN_REDIS: true or false, not {clean}")
    host = os.environ.get("REDIS_HOST", "")
    return Options(
        nodes=int(words[0]), base_port=int(port), clean=SWITCH[clean], model=os.environ.get("MODEL", ""),
        transport=os.environ.get("TRANSPORT", ""), cpu_cache=os.environ.get("CPU_CACHE_GB", "512M"),
        ssd_cache=os.environ.get("SSD_CACHE_GB", "1"), redis=f"{host}:{os.environ.get('REDIS_PORT', '6379')}" if host else "",
        redis_password=os.environ.get("REDIS_PASSWORD", ""), cluster=os.environ.get("CLUSTER_NAME", "multi-node"))


def say_how(cluster: Cluster) -> None:
    ports = [n.port for n in cluster.nodes]
    print(f"""
{len(ports)} servers are up: http://127.0.0.1:{ports[0]} to {ports[-1]}. The same prompt at one, then at another, and the answer's
usage says what was reused:

  curl -s http://127.0.0.1:{ports[0]}/v1/completions -H 'Content-Type: application/json' \\
       -d '{{"model": "{MODEL}", "prompt": "'"$(head -c 2000 README.md | tr -cd 'a-zA-Z ')"'", "max_tokens": 8, "temperature": 0}}'

What the nodes know of each other:
  {shutil.which('flexkv') or 'flexkv'} status {cluster.nodes[0].address}
Configuration, logs: {cluster.folder}
Redis: {cluster.redis_host}:{cluster.redis_port}, its password is in {cluster.folder}/flexkv_config_0.json

Ctrl-C stops everything.""", flush=True)


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="flexkv-nodes."))     # short: sockets in it have at most 107 bytes
    try:
        with ended_by_signals():
            wanted = options()
            print(f"starting {wanted.nodes} vLLM servers with a FlexKV daemon each{'' if wanted.redis else ', and Redis'}; "
                  "an engine takes half a minute of CPU", flush=True)
            with Cluster(folder, wanted) as cluster:
                say_how(cluster)
                while True:
                    cluster.wait("", 3600, lambda: time.sleep(0.9), 0.1)
    except Trouble as e:
        print(f"multi-node: {e}", file=sys.stderr)
        return 1
    finally:
        left = len(marked(folder))
        shutil.rmtree(folder, ignore_errors=True)
        if left:
            print(f"multi-node: {left} processes could not be ended", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
