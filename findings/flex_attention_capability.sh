#!/usr/bin/env bash
# torch 2.13.0, CPU with AVX-512: compiled flex_attention taken from a cache that a process with another
# ATEN_CPU_CAPABILITY filled is wrong, without an error or a warning.
#
# The variable is the documented way to see how a program does on an older processor; eager operators obey it. A good
# guess was that the cache of compiled code knows it, since the width of a vector depends on it, or that compiled code
# ignores it. Code compiled with it is right where it is compiled; a later process with another value finds it in the
# cache, and its numbers are off by more than 1 where values are of size 1. So it is in both directions. What helps is
# a TORCHINDUCTOR_CACHE_DIR of its own for each value.
#
# Seen: "plain 0.000000, avx2 from that cache above 1; avx2 0.000000, plain from that cache above 1".
# Fails if that changes; says so and ends where the processor has no AVX-512.
set -euo pipefail
grep -q avx512f /proc/cpuinfo || { echo "this processor has no AVX-512: nothing to see"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.1.3
cd "$folder"
cat >differ.py <<'END'
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

torch.manual_seed(0)
q, k, v = (torch.randn(2, 2, 64, 16) for _ in range(3))
mask = create_block_mask(lambda b, h, i, j: i // 4 >= j // 4, None, None, 64, 64, device="cpu")
block = torch.arange(64) // 4
with torch.no_grad():
    compiled = torch.compile(flex_attention)(q, k, v, block_mask=mask)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=block[:, None] >= block[None])
print(f"{(compiled - dense).abs().max():.6f}")
END
differ() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" differ.py; }
plain=$(differ one)
avx2_after=$(ATEN_CPU_CAPABILITY=avx2 differ one)
avx2=$(ATEN_CPU_CAPABILITY=avx2 differ two)
plain_after=$(differ two)
echo "largest difference from dense attention: plain $plain, avx2 from that cache $avx2_after;" \
  "avx2 $avx2, plain from that cache $plain_after"
"$folder/venv/bin/python" - "$plain" "$avx2" "$avx2_after" "$plain_after" <<'END'
import sys

plain, avx2, *after = map(float, sys.argv[1:])
assert plain < 1e-5 and avx2 < 1e-5 and min(after) > 0.5, "behaviour has changed"
END
