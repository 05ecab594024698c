#!/bin/sh
# NVIDIA Dynamo with FlexKV on this machine's CPU, from a clean checkout: see demo.py for what it
# shows, docs/dynamo.md for how to do the same with GPUs.
#
#   examples/dynamo/start.sh [--form etcd|file] [--planes nats] [--workers N] [--own-connector] [--keep]
#
# The first time it installs Dynamo and vLLM's CPU build into the user's cache folder (4 GB, 5
# minutes). Exit status 77, with one line that says why, where that can't be done.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$("$root/tools/dynamo-env" --vllm)
package=$("$root/tools/dynamo-env" --package)
PYTHONPATH=$package exec "$python" -u "$root/examples/dynamo/demo.py" "$@"
