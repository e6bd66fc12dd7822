#!/usr/bin/env bash
# The paper's MNIST model, 1500 epochs, in chunks of at most nine minutes that go on from one another in the same folder:
#
#   until benchmarks/reproduce.sh mnist --data mnist.h5; do [ $? -eq 3 ] || break; done
#   benchmarks/reproduce.sh mnist --data mnist.h5 --rows text,decay --minutes 5
#   benchmarks/reproduce.sh mnist --data mnist.h5 --device cpu --quick --out /tmp/trial      # does it work?
#
# Exit code 0 when all rows are finished, 1 when one has failed, 3 when it was time to stop. PYTHON chooses the interpreter; nicecp need not be installed.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" "$root/benchmarks/reproduce.py" "$@"
