"""Times of the published code (kuleshov-group/bd3lms) on two cores of an AMD EPYC, and the rates of that machine.

Forward, backward and AdamW; medians of quiet steps. They are here to see that `reference.py` is not slower than the
code it stands for: its time must agree with these, scaled by the rates that the two machines reach.
"""

from __future__ import annotations

CEILINGS = {  # FLOP/s of the head's and a body product, bytes/s of a copy, numbers/s of exp
    "fp32": {"head": 109e9, "body": 170e9, "copy": 63e9, "exp": 2.65e9},
    "bf16": {"head": 316e9, "body": 733e9, "copy": 63e9, "exp": 2.65e9},
}

SECONDS = {  # (configuration, objective): per step
    ("a", "bd3"): {"fp32": 1.23, "bf16": 0.66},
    ("a", "mdlm"): {"fp32": 0.87, "bf16": 0.36},
    ("b", "bd3"): {"fp32": 19.7, "bf16": 8.5},
    ("b", "mdlm"): {"fp32": 8.5, "bf16": 4.6},
    ("c", "bd3"): {"fp32": 6.5, "bf16": 2.9},
}

# Where forward and backward of BD3 go: products of the head, elementwise work on logits, attention, products of the
# body, its elementwise work. Measured for these; another precision or objective is taken to be like its neighbour.
SHARES = {
    ("a", "fp32"): (0.27, 0.34, 0.06, 0.20, 0.11),
    ("b", "fp32"): (0.23, 0.38, 0.23, 0.10, 0.06),
    ("b", "bf16"): (0.14, 0.39, 0.33, 0.05, 0.08),
    ("c", "fp32"): (0.22, 0.14, 0.08, 0.47, 0.08),
}


def scaled_seconds(configuration: str, objective: str, precision: str, rates: dict[str, float]) -> float:
    """What the published code would take where `rates` were measured (`costs.ceilings`).

    Products go by their own rates, elementwise work by the copy and exp in equal parts, attention by the body's
    products and exp.
    """
    shares = SHARES.get((configuration, precision), SHARES[configuration, "fp32"])
    slower = {name: CEILINGS[precision][name] / rates[name] for name in rates}
    attention = (slower["body"] + slower["exp"]) / 2
    elementwise = (slower["copy"] + slower["exp"]) / 2
    factors = (slower["head"], elementwise, attention, slower["body"], elementwise)
    scale = sum(share * factor for share, factor in zip(shares, factors, strict=True)) / sum(shares)
    return SECONDS[configuration, objective][precision] * scale
