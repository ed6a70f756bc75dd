#!/bin/bash
# All tests in two processes side by side: those that import model files of frameworks and then the simulated devices,
# and all others. Each has one thread. On two cores this takes half the time, and no test sees what the other part has
# imported or patched.
#
#   scripts/test_in_parts.sh PYTHON [pytest arguments]
set -uo pipefail

python=$1
shift
export OMP_NUM_THREADS=1

named() { # run the rest of the arguments, with a name before each line
    local name=$1
    shift
    "$@" 2>&1 | sed -u "s/^/$name | /"
}

frameworks() {
    "$python" -m pytest --part frameworks "$@" && scripts/test_simulators.sh "$python" "$@"
}

named "frameworks, devices" frameworks "$@" &
first=$!
named "all else           " "$python" -m pytest --part rest "$@" &
second=$!
status=0
wait $first || status=1
wait $second || status=1
exit $status
