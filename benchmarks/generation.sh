#!/usr/bin/env bash
# The models of docs/quality.md's tables, from text to exports to 300 texts each: one core a process, some hours.
#   benchmarks/generation.sh data              the corpus of the installed packages' documentation
#   benchmarks/generation.sh diffusion         trains MDLM, and from it BD3 with L' = 16, 8, 4  } may run
#   benchmarks/generation.sh causal            trains AR, the judge, and SEDD                   } side by side
#   benchmarks/generation.sh texts MODEL …     draws; `python -m benchmarks.generation_tables` makes the tables
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
out=runs/gen
export OMP_NUM_THREADS=1

train() { # name, steps of 16 x 256 tokens, then what differs from the recipe: 4 layers of width 256
  "$python" run.py train configs/recipes/docs_pretrain.yaml run_dir="$out/$1" data.train=$out/data/train \
    data.length=256 "eval.sets={valid: $out/data/valid}" model.layers=4 train.micro_batch=16 \
    train.activation_checkpointing=none train.total_steps="$2" train.export_every=300 train.checkpoint_every=300 \
    optim.ema_decay=0.995 "${@:3}" </dev/null
}

draw() { # a file of texts: name, model, options
  [ -f "$out/texts/$1.json" ] || "$python" run.py sample "$out/$2" --batch 100 --json "$out/texts/$1.json" \
    --precision bf16 "${@:3}" >/dev/null
}

texts() { # 300 of a model at L; 100 at 2 L, and 100 until they end by themselves
  local how=(--nucleus 0.9)
  case "$1" in # T steps a window of 256 tokens
    mdlm | sedd) how+=(--steps 64) ;;
  esac
  draw "$1-256" "$1" --num 300 --length 256 --stop none "${how[@]}"
  if [ "$1" = sedd ]; then # as in the report, one window
    draw "$1-long" "$1" --num 100 --length 256 --stop eos,entropy --seed 1 "${how[@]}"
  else
    draw "$1-512" "$1" --num 100 --length 512 --stop none "${how[@]}"
    draw "$1-long" "$1" --num 100 --length 4096 --stop eos,entropy --seed 1 "${how[@]}"
  fi
}

case "${1:-}" in
  data)
    mkdir -p $out
    [ -d runs/docs/text ] || "$python" -m data_prep.python_docs runs/docs/text
    [ -d $out/tokenizer ] || "$python" -m data_prep.train_tokenizer --source runs/docs/text/train.jsonl \
      --vocab-size 4096 --out $out/tokenizer
    for part in train valid; do
      [ -d $out/data/$part ] || "$python" -m data_prep.prepare --source runs/docs/text/$part.jsonl \
        --tokenizer $out/tokenizer --length 256 --workers 1 --frame none --out $out/data/$part
    done
    ;;
  diffusion) # as the paper does: block sizes start from full diffusion, here for the last 300 of 1,200 steps
    train mdlm 1200 objective.name=mdlm
    for size in 16 8 4; do
      train bd3-$size 300 objective.block_size=$size train.init_from=$out/mdlm/exports/step-00000900
    done
    ;;
  causal) # the judge has other seeds and another order; SEDD is here to fill the second core
    train ar 1200 objective.name=ar
    train judge 600 objective.name=ar seed=2 data.shuffle_seed=1
    train sedd 1200 objective.name=sedd eval.estimator=mc
    ;;
  texts)
    for model in "${@:2}"; do texts "$model"; done
    ;;
  *) echo "usage: benchmarks/generation.sh data | diffusion | causal | texts MODEL …" >&2; exit 2 ;;
esac
