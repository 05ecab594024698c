#!/bin/sh
# Proves that the simulator finds each planted bug (BUGS.md) within a bounded number of seeds,
# by the model alone (without the core's self-check).
# usage: run_planted.sh SIM-BUG-EXECUTABLE...; SIM_SEEDS: how many seeds each may take.
seeds=${SIM_SEEDS:-1000}
missed=0
for exe in "$@"; do
    line=$("$exe" --no-self-check --seeds "1..$seeds" --steps 5000 2>/dev/null |
           grep '^sim: FAIL' | cut -c1-160)
    if [ -n "$line" ]; then
        echo "$(basename "$exe"): found: $line"
    else
        echo "$(basename "$exe"): NOT FOUND in $seeds seeds"
        missed=1
    fi
done
exit $missed
