"""The entry of a checkout: `deepspeed run.py train RECIPE …`, `python run.py MODE …`; bd3_ds/cli.py lists the modes."""

from __future__ import annotations

from bd3_ds.cli import console, main

__all__ = ["main"]

if __name__ == "__main__":
    console()
