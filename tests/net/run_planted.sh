#!/bin/sh
# Proves that the simulator of whole clusters finds each planted bug (BUGS.md) within a bounded number of seeds, without
# the self-checks of core and peer tier.
# usage: run_planted.sh NETSIM-BUG-EXECUTABLE...; NETSIM_SEEDS: how many seeds each may take.
seeds=${NETSIM_SEEDS:-400}
missed=0
for exe in "$@"; do
    line=$("$exe" --no-self-check --seeds "1..$seeds" 2>/dev/null | grep '^netsim: FAIL' | cut -c1-180)
    if [ -n "$line" ]; then
        echo "$(basename "$exe"): found: $line"
    else
        echo "$(basename "$exe"): NOT FOUND in $seeds seeds"
        missed=1
    fi
done
exit $missed
