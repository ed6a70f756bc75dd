#!/bin/sh
# Run the device tests on each simulated device. Without g++ nothing can be simulated: that is said, and not an error.
#
#   scripts/test_simulators.sh PYTHON [pytest arguments]
set -eu

python=$1
shift
if ! command -v g++ >/dev/null; then
    echo ">> no g++ found: the simulated devices are NOT tested. Install it (apt install g++) and run this again." >&2
    exit 0
fi
for device in npu mlu dcu; do
    "$python" -m llm_adapt.cli simulate build "$device"
    "$python" -m pytest --simulate "$device" tests/devices tests/simulators "$@"
done
