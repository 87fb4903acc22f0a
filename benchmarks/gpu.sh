#!/usr/bin/env bash
# All that a GPU should be measured at, in under 12 minutes: bash benchmarks/gpu.sh OUT [full|toy]
# Each stage is a process with a limit of its own and writes OUT/STAGE.json: see gpu.py. `toy` tries
# it out, on a CPU too. PYTHON is the interpreter that is used.
set -u
out=${1:?usage: gpu.sh OUT [full|toy]}
size=${2:-full}
here=$(dirname "$0")
work=${WORK:-$(mktemp -d)} # what is large: embeddings, indexes, the checkpoint
mkdir -p "$out"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} XLA_PYTHON_CLIENT_PREALLOCATE=false
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}
failed=0
# Seconds, the sum below 720.
while read -r stage limit; do
  echo "== $stage (at most $limit s)"
  timeout -k 5 "$limit" "${PYTHON:-python3}" "$here/gpu.py" "$stage" "$work" --size "$size" \
    2>"$out/$stage.log" </dev/null
  code=$?
  [ -f "$work/$stage.json" ] && cp "$work/$stage.json" "$out/"
  if [ $code -eq 0 ]; then
    rm "$out/$stage.log"
  else
    echo "$stage: failed with $code; the last of $out/$stage.log:"
    tail -n 3 "$out/$stage.log"
    failed=1
  fi
done <<'STAGES'
encode 75
data 45
search 150
fast-plaid 90
train 200
kernel 75
fused 75
STAGES
exit $failed
