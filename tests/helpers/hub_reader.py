"""One who has transformers and not this package: scripts run in an interpreter of their own that cannot see it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# What one who has transformers alone would write. torchvision has no operators beside a CPU-only torch, and
# transformers imports it; declaring them is this environment's business.
READER = """
import json, sys
import torch
assert not any(name.split(".")[0] == "bd3_ds" for name in sys.modules)
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
             "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
    try:
        library.define(name)
    except RuntimeError:
        pass
import transformers
torch.set_num_threads(1)
try:
    import bd3_ds
except ImportError:
    pass
else:
    raise AssertionError("the package is in reach")
"""
LOGITS = """
for folder, inputs, auto in json.load(open(sys.argv[1])):
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    found = {}
    for name in ("AutoModel", auto):
        model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
        with torch.no_grad():
            found[name] = model(**given).logits
    torch.save(found, f"{folder}.pt")
"""
TOKENIZER = """
texts = json.load(open(sys.argv[3]))
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
special = [tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
print(json.dumps([ids, special, len(tokenizer), tokenizer.decode(ids[0])]))
"""


def reader(tmp_path: Path, script: str, *words: str, **environment: str) -> str:
    """Run a script in an interpreter that cannot see this package; what it prints."""
    (tmp_path / "reader.py").write_text(READER + script)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_ENDPOINT", "HF_TOKEN")}
    kept |= {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    # -I: neither the working directory nor PYTHONPATH is on sys.path
    command = [sys.executable, "-I", str(tmp_path / "reader.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
