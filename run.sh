#!/usr/bin/env bash
# One script for everything:
#   ./run.sh                  the main job: data, training, evaluation, samples, on whatever this machine has
#   ./run.sh setup            the environment alone (.venv)
#   ./run.sh test [--all]     set up and run the tests (--all: the slow ones too)
#   ./run.sh train RECIPE …   train under the DeepSpeed launcher on all accelerators, or on 2 CPU ranks;
#                             --restarts N starts a failed run again, --hostfile FILE takes several hosts
#   ./run.sh MODE …           any other mode of run.py in the environment
# Relative paths of `train` and MODE belong to the directory that the script is called from; the main job, the
# environment and the tests stay in the script's own.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

here=$PWD
venv=.venv
python=$venv/bin/python

say() { printf '\n== %s\n' "$*"; }

setup() {
  local wanted base
  wanted=$(cat requirements.txt)
  if [ -x "$python" ] && [ "$(cat $venv/ready 2>/dev/null)" = "$wanted" ]; then return; fi
  base=${PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
    || { echo "error: $base is not Python 3.10 or newer; set PYTHON=/path/to/python3" >&2; exit 2; }
  command -v g++ >/dev/null || { echo "error: no C++ compiler (g++) found; DeepSpeed compiles its CPU operators" >&2; exit 2; }
  say "setting up $venv (once, about two minutes)"
  rm -f $venv/ready
  "$base" -m venv --clear $venv
  $venv/bin/pip install --quiet --disable-pip-version-check --progress-bar on -r requirements.txt
  printf '%s\n' "$wanted" >$venv/ready
}

# The launcher writes one thread per rank itself only where it binds cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

ranks() { # the largest power of two of the visible accelerators, else 2 CPU ranks
  "$python" -c 'import torch; n = torch.cuda.device_count(); print(1 << (n.bit_length() - 1) if n else 2)'
}

precision() { # bf16 where this machine is quick at it; most laptops multiply it dozens of times slower than fp32
  "$python" -c 'import torch; from bd3_ds.runtime.peak_flops import quicker_precision as quicker
print(quicker(torch.device("cuda" if torch.cuda.is_available() else "cpu")))'
}

prepare() { # $1: a file of runs/docs/text and the pack made of it; the rest: options of data_prep.prepare
  local out=runs/docs/data/$1
  if [ -f "$out/manifest.json" ]; then echo "reusing $out"; else
    "$python" -m data_prep.prepare --source "runs/docs/text/$1.jsonl" --tokenizer runs/docs/tokenizer --length 128 \
      --workers 1 --out "$out" "${@:2}"
  fi
}

stage() { # train one recipe with an evaluation worker beside it; nothing is done twice
  local recipe=$1 run=runs/docs/$2 worker
  if [ -f "$run/records/finished.json" ]; then echo "reusing $run: training is finished"; else
    "$python" run.py eval-worker "$run" >"runs/docs/$2-worker.log" 2>&1 &
    worker=$!
    # shellcheck disable=SC2064: now, since the name is gone when the trap is run
    trap "kill $worker 2>/dev/null || true" EXIT
    # 16 sequences a step in two micro-batches on 1 to 8 ranks, in one on more
    local share=$((16 / $(ranks)))
    "$python" run.py launch "configs/recipes/$recipe.yaml" train.micro_batch=$((share > 1 ? share / 2 : 1)) \
      train.precision="$(precision)"
    trap - EXIT
    echo "waiting for the evaluation worker (its log: runs/docs/$2-worker.log)"
    wait $worker || echo "the worker stopped early; evaluating what is left"
  fi
  "$python" run.py eval-worker "$run" --once --threads 2
}

main_job() {
  local started=$SECONDS
  setup
  mkdir -p runs/docs
  say "corpus: the documentation of the installed packages"
  if [ -d runs/docs/text ]; then echo "reusing runs/docs/text"; else
    "$python" -m data_prep.python_docs runs/docs/text
  fi
  if [ -f runs/docs/tokenizer/tokenizer.model ]; then echo "reusing runs/docs/tokenizer"; else
    "$python" -m data_prep.train_tokenizer --source runs/docs/text/train.jsonl --vocab-size 1024 --out runs/docs/tokenizer
  fi
  (prepare valid --frame none && prepare readmes --frame bos-eos && prepare licences --frame bos-eos) &
  prepare train --frame none
  wait $!
  say "pretraining: full diffusion, L' = L = 128"
  stage docs_pretrain pretrain
  say "fine-tuning: block diffusion, L' = 16"
  stage docs_finetune finetune
  say "results"
  "$python" run.py summary runs/docs/pretrain runs/docs/finetune
  say "three samples"
  "$python" run.py sample runs/docs/finetune --num 3 --json runs/docs/samples.json
  say "done in $((SECONDS - started)) s; next, in $here"
  cat <<'NEXT'
  .venv/bin/tensorboard --logdir runs --reload_multifile true      curves, perplexities and texts
  ./run.sh report runs/docs/pretrain runs/docs/finetune            tables and plots
  ./run.sh sample runs/docs/finetune --prompt "The function returns"
  ./run.sh train configs/recipes/docs_finetune.yaml run_dir=runs/docs/l4 objective.block_size=4 train.total_steps=200
  ./run.sh check configs/recipes/openwebtext_pretrain.yaml         what the paper's run needs
NEXT
}

case "${1:-}" in
  "") main_job ;;
  setup) setup && echo "$venv is ready" ;;
  test)
    shift
    setup
    selection=(-m "not slow")
    if [ "${1:-}" = --all ]; then selection=() && shift; fi
    say "lint and types"
    $venv/bin/ruff check .
    $venv/bin/ruff format --check .
    $venv/bin/mypy
    say "tests"
    if [ $# -gt 0 ]; then exec "$python" -m pytest "${selection[@]}" "$@"; fi
    # Those of units in one process a core; then those that launch runs, which need the cores themselves.
    failed=0
    "$python" -m pytest --numprocesses "$(env -u OMP_NUM_THREADS nproc)" --maxprocesses 8 --dist loadfile \
      "${selection[@]}" tests/unit || failed=1
    "$python" -m pytest "${selection[@]}" tests/distributed tests/fault || failed=1
    exit $failed
    ;;
  train)
    shift
    setup
    cd "$caller"
    exec "$here/$python" "$here/run.py" launch "$@"
    ;;
  *)
    setup
    cd "$caller"
    exec "$here/$python" "$here/run.py" "$@"
    ;;
esac
