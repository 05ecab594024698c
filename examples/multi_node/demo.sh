#!/bin/sh
# Prompts that one node has seen are sent to the others: see demo.py.
#
#   examples/multi_node/demo.sh [--nodes N] [--network] [--rate RATE] [--transport NAME] [--alone]
#
# Exit status 77, with one line that says why, where vLLM can't be installed.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$("$root/tools/engine-env")
package=$("$root/tools/engine-env" --package)
PYTHONPATH=$package exec "$python" -u "$root/examples/multi_node/demo.py" "$@"
