#!/usr/bin/env bash
# Everything that wants a GPU, in the order of its worth, in parts of at most ten minutes each:
#
#   OUT=folder bash bench/gpu_round.sh 1     correctness on the GPU, then the floors
#   OUT=folder bash bench/gpu_round.sh 2     the head's ops against their peers
#   OUT=folder bash bench/gpu_round.sh 3     advantages, merge, conflicts, interference
#   OUT=folder bash bench/gpu_round.sh 4     the 7B update: tree, plain rows, TRL, backends, checkpointing
#   OUT=folder bash bench/gpu_round.sh 5     whole steps with vLLM, beside the plan
#   OUT=folder bash bench/gpu_round.sh all   one after another
#
# then, from what is in $OUT: python -m bench.targets $OUT/*.json; python -m bench.table $OUT/*.json
# Without a GPU every part runs at small sizes: that is how the script itself is tested.
# PYTHON: the interpreter (python). COMMIT: what the results record where this is no git checkout.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
part=${1:?name a part: 1 2 3 4 5 or all}
out=${OUT:?set OUT to the folder for the results}
python=${PYTHON:-python}
commit=${COMMIT:+--commit $COMMIT}
minutes=${MINUTES:-8.5}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 TOKENIZERS_PARALLELISM=false
status=0

step() { # name, command...: its output goes to $out/name.log as well
	local name=$1
	shift
	echo "== $name: $*"
	"$@" 2>&1 | tee "$out/$name.log" | tail -n "${TAIL:-40}"
	local code=${PIPESTATUS[0]}
	[ "$code" -eq 0 ] || { echo "== $name ended with status $code"; status=1; }
}

run_part() {
	case $1 in
	1)
		step tests-gpu timeout 420 "$python" -m pytest -q -m gpu tests ${GPU_TESTS:-}
		step floors "$python" -m bench.floors --out "$out" $commit
		;;
	2) step head "$python" -m bench.run --op linear_logprob linear_logprob_backward policy_loss --out "$out" --minutes "$minutes" $commit ;;
	3) step lora "$python" -m bench.run --op guideline_advantages gdpo_advantages lora_merge lora_conflicts lora_interference --out "$out" --minutes "$minutes" $commit ;;
	4) step train_step "$python" -m bench.run --op train_step --out "$out" --minutes "$minutes" $commit ;;
	5) step end_to_end "$python" -m bench.end_to_end --out "$out" $commit ;;
	*)
		echo "no part $1: 1 2 3 4 5 or all" >&2
		exit 2
		;;
	esac
}

if [ "$part" = all ]; then
	for each in 1 2 3 4 5; do run_part "$each"; done
	"$python" -m bench.targets --markdown "$out/targets.md" "$out"/*.json
else
	run_part "$part"
fi
exit "$status"
