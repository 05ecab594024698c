#!/bin/sh
# Proves that the cluster simulator finds each planted bug (BUGS.md) within a bounded number of seeds.
# usage: run_planted.sh CSIM-BUG-EXECUTABLE...; CSIM_SEEDS: how many seeds each may take.
seeds=${CSIM_SEEDS:-600}
missed=0
for exe in "$@"; do
    line=$("$exe" --seeds "1..$seeds" 2>/dev/null | grep '^csim: FAIL' | cut -c1-160)
    if [ -n "$line" ]; then
        echo "$(basename "$exe"): found: $line"
    else
        echo "$(basename "$exe"): NOT FOUND in $seeds seeds"
        missed=1
    fi
done
exit $missed
