#!/bin/sh
# Dynamo's KV router against round robin, with FlexKV and without, over the whole Mooncake conversation
# trace and four workers without engines: routing and caches are real, times are modelled.
#
#   examples/dynamo/routing.sh [--requests N] [--workers N] [--rows kv+flexkv,kv,...] [--json FILE]
#
# docs/dynamo.md has the table and what was modelled; --help says the rest.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$("$root/tools/dynamo-env" --vllm)
package=$("$root/tools/dynamo-env" --package)
PYTHONPATH=$package exec "$python" -u "$root/examples/dynamo/routing.py" "$@"
