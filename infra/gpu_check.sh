#!/usr/bin/env bash
# Measure on one GPU what the README says of GPUs, in under 8 minutes; the table comes last.
#   infra/gpu_check.sh [--small] FOLDER [STEP...]
# FOLDER gets a log and the figures of every step.  --small measures a tiny model, also without a
# GPU, which shows that the script works and nothing else.  Without STEP all are taken.  Each is
# bounded, one that fails does not stop the others, and then the exit code is 1.
set -uo pipefail
began=$SECONDS
limit_s=470 patience=1
B=B-224 L=L-224 G=g-224 pairs=128 memory_pairs=16 videos=32 precision=fp16
rounds="--rounds 4 --steps 10" frames="--frames 40 --rounds 3" size=""
if [ "${1:-}" = --small ]; then
  shift
  limit_s=3600 patience=5  # for machines that are busy, too
  B=N-112 L=N-112 G=N-112 pairs=4 memory_pairs=2 videos=2 precision=auto
  rounds="--rounds 1 --steps 1" frames="--frames 2 --rounds 1" size="--width 160 --height 120"
fi
if [ $# -lt 1 ]; then
  echo "error: no folder is given for logs and figures; give infra/gpu_check.sh FOLDER." >&2
  exit 2
fi
mkdir -p "$1" || exit 2
folder=$(cd "$1" && pwd)
shift
asked=" $* "
[[ "$asked" != *" start-"* ]] || asked+="shards "
scratch=$(mktemp -d "$folder/scratch-XXXXXX") || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD:$PWD/platform${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export LORAT_HOME="$scratch/home"
: >"$folder/steps.tsv"

# step NAME SECONDS COMMAND...: run it, for so long at most; keep its log and how it ended.
step() {
  local name=$1 seconds=$(($2 * patience)) start=$SECONDS left code=0
  shift 2
  [ "$asked" = "  " ] || [[ "$asked" = *" $name "* ]] || return 0
  left=$((limit_s - SECONDS + began))
  [ "$seconds" -lt "$left" ] || seconds=$left
  if [ "$seconds" -lt 5 ]; then
    code=untried
  else
    timeout -k 10 "$seconds" "$@" >"$folder/$name.log" 2>&1 || code=$?
  fi
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" >>"$folder/steps.tsv"
  echo "--- $name: $code after $((SECONDS - start)) s"
}

# train NAME SECONDS VARIANT OPTIONS...: the step loop beside bare PyTorch.
train() {
  local name=$1 seconds=$2 variant=$3
  shift 3
  step "$name" "$seconds" python jobs/benchmark.py train --variant "$variant" --measure speed \
    --batch-size "$pairs" --precision "$precision" --json "$folder/$name.json" "$@"
}

# memory NAME VARIANT FORM: the peak of one variant, its adapters in one form.
memory() {
  step "$1" 90 python jobs/benchmark.py train --variant "$2" --form "$3" --measure lora-memory \
    --batch-size "$memory_pairs" --precision "$precision" --json "$folder/$1.json"
}

# start NAME SECONDS: a whole training, from the command to its tenth step.
start() {
  TORCHINDUCTOR_CACHE_DIR="$scratch/compiled" step "$1" "$2" \
    python infra/gpu_check.py tenth-step "$folder/$1.json" \
    python jobs/train.py --name "$1" --variant "$B" --backbone none --data "$scratch/shards" \
    --batch-size "$pairs" --epochs 1 --pairs-per-epoch $((20 * pairs)) --log-every 10 \
    --validate-every 0 --no-final-evaluation --no-register --resume never
}

# What takes no time of its own goes side by side, on few threads each: several processes that all
# use every core take minutes to draw weights.  The tests are those that need CUDA.
(
  export OMP_NUM_THREADS=$((1 + $(nproc) / 8))
  cuda_tests=$(grep -rl 'torch.cuda.is_available()' tests --include='test_*.py')
  # shellcheck disable=SC2086  (a list of words)
  step tests 240 python -m pytest -n 0 -q -k cuda $cuda_tests &
  step shards 60 python -c 'import pathlib, sys; from tests.small_shards import make_shards
make_shards(pathlib.Path(sys.argv[1]), split="train")' "$scratch/shards" &
  (
    for form in folded usual; do
      memory "memory-B-$form" "$B" "$form" &
      memory "memory-L-$form" "$L" "$form" &
      memory "memory-g-$form" "$G" "$form" &
    done
    wait
  )
  # Fills torch's compile cache, so that the measured runs need not wait for it.
  train compile-B 120 "$B" --rounds 1 --steps 1 &
  train compile-L 150 "$L" --rounds 1 --steps 1 &
  train compile-B-usual 120 "$B" --form usual --rounds 1 --steps 1 &
  wait
)
# shellcheck disable=SC2086
{
  train train-B 90 "$B" $rounds
  train train-L 120 "$L" $rounds
  step track-B 70 python jobs/benchmark.py track --variant "$B" --batch "$videos" $frames $size \
    --json "$folder/track-B.json"
  step track-L 80 python jobs/benchmark.py track --variant "$L" --batch "$videos" $frames $size \
    --json "$folder/track-L.json"
  start start-cold 140
  start start-warm 100
  train train-B-usual 90 "$B" --form usual $rounds
}
echo
python infra/gpu_check.py table "$folder"
