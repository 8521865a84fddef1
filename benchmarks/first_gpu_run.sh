#!/usr/bin/env bash
# bash benchmarks/first_gpu_run.sh [FOLDER]: all that only a machine with a CUDA GPU can show, in at most 8 minutes.
#
# The tests marked gpu, the quickstart on the GPU and on the CPU, and benchmarks.gpu; offline. Each part has a time limit
# of its own, so that one that hangs costs only itself. FOLDER (first_gpu_run) gets first_gpu_run.json, with versions,
# the card, the result of every test, times and figures, and a log of each part.
# BENCHMARK=no leaves out benchmarks.gpu, and takes at most 200 s.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-first_gpu_run}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
python=$(command -v python || command -v python3)
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TELL_AT_ONCE=1
rm -f "$out"/*.log "$out"/*.json "$out"/*.xml "$out"/parts.txt

benchmark=${BENCHMARK:-yes}
all=$([ "$benchmark" = yes ] && echo 465 || echo 190)

left() { # seconds until all has to be over, at most $1
    local rest=$((all - SECONDS))
    echo $((rest < $1 ? (rest > 5 ? rest : 5) : $1))
}

part() { # NAME LIMIT_S COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    echo "$name $? $((SECONDS - start)) $limit" >>"$out/parts.txt"
}

quickstart() { # NAME NUM_GPUS LIMIT_S
    local folder
    folder=$(mktemp -d)
    part "$1" "$3" "$python" main.py experiment=quickstart "client_resources.num_gpus=$2" "hydra.run.dir=$folder"
    [ -f "$folder/results.json" ] && cp "$folder/results.json" "$out/$1.json"
    { echo "--- main.log"; tail -n 200 "$folder/main.log"; } >>"$out/$1.log" 2>&1
    rm -rf "$folder"
}

tests() { # NAME LIMIT_S WHICH
    part "$1" "$2" "$python" -m pytest -m gpu -v -n 0 -p no:cacheprovider -o faulthandler_timeout=60 --tb=short \
        -k "$3" --junitxml="$out/$1.xml" tests/test_cuda.py
}

processes="run_without or plan_names or met_an_assert or compiler"
quickstart quickstart_cpu 0 "$(left 120)" &
quickstart quickstart_gpu 1 "$(left 120)" &
tests tests_of_processes "$(left 130)" "$processes" &
tests tests_of_models "$(left 130)" "not node and not ($processes)"
wait
tests tests_of_nodes "$(left 60)" node # alone: one of them fills the card
if [ "$benchmark" = yes ]; then
    part benchmark "$(left 300)" "$python" -m benchmarks.gpu --output="$out/benchmark.json"
fi

"$python" - "$out" >"$out/summary.txt" 2>&1 <<'PYTHON'
import importlib.metadata
import json
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

out = Path(sys.argv[1])


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def told(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return repr(error)


def tests(files):
    found = {}
    for case in (case for file in files for case in ElementTree.parse(file).iter("testcase")):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        said = next((child.get("message") for child in case if child.tag in kinds), None)
        facts = {each.get("name"): each.get("value") for each in case.iter("property")}
        result = {"result": kinds[0] if kinds else "passed", "seconds": float(case.get("time", 0))}
        found[case.get("name")] = result | ({"said": said[:600]} if said else {}) | facts
    return found


def content(name):
    return json.loads((out / name).read_text()) if (out / name).exists() else None


names = (
    "torch transformers trl peft bitsandbytes accelerate datasets flwr flwr-datasets ray hydra-core omegaconf triton "
    "numpy safetensors"
).split()
parts = [line.split() for line in (out / "parts.txt").read_text().splitlines()]
results = tests(sorted(out.glob("tests_*.xml")))
whole = {
    "commit": told("git", "rev-parse", "HEAD"),
    "python": platform.python_version(),
    "versions": {name: version(name) for name in names},
    "cards": told("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader").splitlines(),
    "compiler": told("sh", "-c", "command -v gcc || command -v cc || echo none"),
    "parts": {name: {"exit_code": int(code), "seconds": int(s), "limit_s": int(most)} for name, code, s, most in parts},
    "tests": results,
    "quickstart_gpu": content("quickstart_gpu.json"),
    "quickstart_cpu": content("quickstart_cpu.json"),
    "benchmark": content("benchmark.json"),
}
(out / "first_gpu_run.json").write_text(json.dumps(whole, indent=2) + "\n")
print(json.dumps({"parts": whole["parts"], "tests": {n: r["result"] for n, r in results.items()}}, indent=1))
PYTHON
rm -f "$out"/quickstart_*.json "$out/benchmark.json" "$out"/tests_*.xml "$out/parts.txt"
cat "$out/summary.txt"
