#!/bin/sh
# NODES vLLM servers on this machine's CPU, with a FlexKV node each, which read from each other; and the Redis by which they know each
# other. Stops all of it on Ctrl-C.
#
#   examples/multi_node/start_multi_node_serving.sh NODES [BASE_PORT=30001] [CLEAN_REDIS=true]
#
#   MODEL                         a folder with a model; else a small one with random weights is written
#   CPU_CACHE_GB, SSD_CACHE_GB    of each node: 512M, 1
#   TRANSPORT                     how nodes read from each other: p2p_transport in flexkv.conf(5)
#   REDIS_HOST, REDIS_PORT, REDIS_PASSWORD, CLUSTER_NAME   a Redis that is there already, and the cluster's name in it. CLEAN_REDIS
#                                 removes that cluster's keys from it first, and no other key
#
# The first time it installs vLLM's CPU build into the user's cache folder (4 GB, 5 minutes). Exit status 77, with one line that says
# why, where that can't be done.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$("$root/tools/engine-env")
package=$("$root/tools/engine-env" --package)
cd "$root"
PYTHONPATH=$package exec "$python" -u "$root/examples/multi_node/serving.py" "$@"
