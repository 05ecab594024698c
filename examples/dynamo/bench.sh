#!/bin/sh
# The benchmark of docs/dynamo.md on this machine: a scaled trace through aiperf against the deployment
# of start.sh, with Dynamo's KV router or round robin, with FlexKV or without.
#
#   examples/dynamo/bench.sh [--trace FILE] [--scale "OPTIONS OF scale_trace.py"] [--workers N] [--rows ...]
#
# The four rows take ten minutes on two cores; nothing else should run then. --help says the rest.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$("$root/tools/dynamo-env" --vllm)
package=$("$root/tools/dynamo-env" --package)
aiperf=$("$root/tools/dynamo-env" --aiperf)
PYTHONPATH=$package exec "$python" -u "$root/examples/dynamo/bench.py" --aiperf "$aiperf" "$@"
