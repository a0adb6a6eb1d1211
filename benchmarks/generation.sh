#!/usr/bin/env bash
# The models of docs/sampling.md's quality tables, from text to exports: one process each, one core, about two hours.
#   benchmarks/generation.sh data | diffusion | causal      (`data` first; the other two may run side by side)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
out=runs/gen
export OMP_NUM_THREADS=1

train() { # name, then what differs from the recipe: 1,200 steps of 16 x 256 tokens, 4 layers of width 256
  "$python" run.py train configs/recipes/docs_pretrain.yaml run_dir="$out/$1" data.train=$out/data/train \
    data.length=256 "eval.sets={valid: $out/data/valid}" model.layers=4 train.micro_batch=16 \
    train.activation_checkpointing=none train.total_steps=1200 train.export_every=300 train.checkpoint_every=300 \
    optim.ema_decay=0.995 "${@:2}" </dev/null
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
    train mdlm objective.name=mdlm
    for size in 16 8 4; do
      train bd3-$size objective.block_size=$size train.total_steps=300 train.init_from=$out/mdlm/exports/step-00000900
    done
    ;;
  causal) # the judge has other seeds and another order; SEDD is here to fill the second core
    train ar objective.name=ar
    train judge objective.name=ar seed=2 data.shuffle_seed=1
    train sedd objective.name=sedd eval.estimator=mc
    ;;
  *) echo "usage: benchmarks/generation.sh data | diffusion | causal" >&2; exit 2 ;;
esac
