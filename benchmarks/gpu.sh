#!/usr/bin/env bash
# All that needs a GPU, in at most ten minutes and without a network: tests, memory and race checks, kernels, training steps
# beside PyTorch and JAX. Leaves small JSON and text files; a part that fails or takes too long does not stop the others.
#
#   benchmarks/gpu.sh --data mnist.h5                 # on the GPU, results in gpu-results/
#   benchmarks/gpu.sh --device cpu --quick --out /tmp/trial      # does the script itself work? needs no GPU
#
# Exit code 0 when every part ended well, 1 otherwise. BUDGET: seconds for all of it, by default 570. PYTHON chooses the interpreter; nicecp need not be installed.
set -uo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit "$1"; }
data="" device=cuda quick="" out=gpu-results
while [ $# -gt 0 ]; do
    case $1 in
        --data | --device | --out)
            [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value; see gpu.sh --help" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2"
            shift 2 ;;
        --quick) quick=--quick; shift ;;
        -h | --help) usage 0 ;;
        *) echo "gpu.sh: unknown option $1" >&2; usage 2 ;;
    esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
case $device in cpu | cuda) ;; *) echo "gpu.sh: --device is cuda or cpu, not $device" >&2; exit 2 ;; esac
if [ -n "$data" ]; then
    [ -f "$data" ] || { echo "gpu.sh: --data $data: there is no such file" >&2; exit 2; }
    data=$(realpath "$data")
fi
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# What is compiled on the way stays in the folder of this run: a bare machine has nothing, and nothing is left behind.
export NUMBA_CACHE_DIR="${NUMBA_CACHE_DIR:-$out/cache/numba}" CUPY_CACHE_DIR="${CUPY_CACHE_DIR:-$out/cache/cupy}"
export TORCHINDUCTOR_CACHE_DIR="$out/cache/inductor" TRITON_CACHE_DIR="$out/cache/triton"
cd "$root" || exit 2
: >"$out/parts.txt"
BUDGET=${BUDGET:-570} # seconds for all parts
failed=0

part() { # part NAME SECONDS LOG COMMAND...
    local name=$1 limit=$2 log=$3 begin=$SECONDS code left=$((BUDGET - SECONDS))
    shift 3
    [ "$device" = cuda ] || limit=$((3 * limit)) # a trial on a CPU, whose code may have to be compiled first
    [ "$left" -ge "$limit" ] || limit=$((left > 1 ? left : 1))
    printf '\n=== %s\n' "$name"
    # Into a file and not through a pipe, which a process that outlives the limit could hold open.
    timeout -k 5 "$limit" "$@" >"$log" 2>&1 </dev/null
    code=$?
    cat "$log"
    printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - begin))" >>"$out/parts.txt"
    [ "$code" -eq 0 ] || failed=1
}

leave_out() { # leave_out NAME WHY
    printf '\n=== %s: left out, %s\n' "$1" "$2" | tee "$out/$1.txt"
    printf '%s\tskip\t0\n' "$1" >>"$out/parts.txt"
}

part doctor 60 "$out/doctor.json" "$python" -m nicecp doctor --device "$device" --json
if [ "$device" = cuda ]; then
    part tests 150 "$out/tests.txt" "$python" -m pytest -q -p no:cacheprovider -m gpu \
        --continue-on-collection-errors tests/gpu tests/kernels # as make test-gpu: there may be no make
    sanitizer=$(PATH="$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer" command -v compute-sanitizer)
    for tool in memcheck racecheck; do
        if [ -n "$sanitizer" ]; then
            part "$tool" 60 "$out/$tool.txt" "$sanitizer" --tool "$tool" --error-exitcode 9 \
                "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu/test_sanitized.py
        else
            leave_out "$tool" "compute-sanitizer is not installed"
        fi
    done
else
    for name in tests memcheck racecheck; do leave_out "$name" "they need a GPU"; done
fi
part kernels 60 "$out/kernels.txt" "$python" benchmarks/gpu_kernels.py --device "$device" $quick --json "$out/kernels.json"
part steps 400 "$out/steps.txt" "$python" benchmarks/gpu_steps.py --device "$device" $quick --data "$data" \
    --timeout 45 --json "$out/steps.json"
rm -rf "$out/cache"
printf '\n'
"$python" benchmarks/gpu_report.py "$out"
exit "$failed"
