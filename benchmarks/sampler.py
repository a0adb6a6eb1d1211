"""What the cache of keys and values saves: texts drawn with it and without it, by block diffusion and token by token.

    python -m benchmarks.sampler [--model tiny] [--length 256] [--block-size 16] [--vocab 50258] [--num 1] [--json FILE]

One sampler and one set of random numbers; only the network behind it differs, so the tokens must be the same (in fp32
this is asserted, in bf16 rounding may part them and `same_tokens` says how many stayed):
  cache       as `sample_blocks` and `sample_autoregressive` do it: clean tokens once, each evaluation its block (AR:
              one token)
  recompute   no cache, the least that then has to be done: each evaluation runs the clean tokens and its block (AR:
              all tokens so far)
  reference   no cache, each evaluation a training pass over the text up to the block's end, noisy beside clean tokens,
              of which the block's logits are used (AR has no such pass beyond `recompute`)
Weights are random, normal with 0.02; the time does not depend on them. `evaluations` is passes of the network that
wrote a token, all texts together, `cache_passes` passes that only filled the cache, `token_passes` tokens that went
through the layers. tokens/s counts written tokens of all texts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from bd3_ds.model.dit import DiT, Network
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.sampling.sampler import Samples, sample_autoregressive, sample_blocks
from benchmarks.measure import ROOT, finish, interleaved, parser, rate, say, summary

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Cached(DiT):
    """The network as it is; counts the tokens that go through it."""

    token_passes = 0

    def _run(self, first: Tensor | None, clean: Tensor | None, **options: Any) -> Any:
        self.token_passes += sum(part.numel() for part in (first, clean) if part is not None)
        return super()._run(first, clean, **options)


class Recompute(Cached):
    """Keeps the clean text instead of its keys and values; the sampler's cache stays empty, so it sends all of it."""

    def encode(self, x0: Tensor, cache: KVCache, **_options: Any) -> KVCache:
        self.text = x0
        return cache

    def decode(self, tokens: Tensor, cache: KVCache, *, start: int, block_size: int, **options: Any) -> Any:
        fresh = KVCache(self.network.layers)
        if start:
            super().encode(self.text, fresh, block_size=block_size)
        return super().decode(tokens, fresh, start=start, block_size=block_size, **options)


class Reference(Recompute):
    """Each evaluation is a training pass over the text so far."""

    def decode(
        self, tokens: Tensor, cache: KVCache, *, start: int, block_size: int, at: Tensor | None = None, **options: Any
    ) -> Any:
        assert at is not None
        text = torch.cat([self.text, tokens], dim=1) if start else tokens
        return self(text, text, block_size=block_size, at=in_text(at, tokens, start), **options)


def in_text(at: Tensor, block: Tensor, start: int) -> Tensor:
    """Places [N] in a flattened block [B, T] that begins at `start` as places of the text up to the block's end."""
    rows, places = at // block.shape[1], at % block.shape[1]
    return rows * (start + block.shape[1]) + start + places


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="tiny", help="a name in configs/model")
    options.add_argument("--length", type=int, default=256, help="tokens of a text")
    options.add_argument("--block-size", type=int, default=16)
    options.add_argument("--vocab", type=int, default=50258, help="[MASK], the last one, included")
    options.add_argument("--num", type=int, default=1, help="texts drawn side by side")
    options.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    asked = options.parse_args(argv)
    kinds: dict[str, type[Cached]] = {"cache": Cached, "recompute": Recompute, "reference": Reference}
    results = []
    for precision in asked.precision:
        for sampler in ("blocks", "autoregressive"):
            some = {name: kind for name, kind in kinds.items() if sampler == "blocks" or kind is not Reference}
            results += compare(asked, precision, sampler, some)
    finish("sampler", asked, results, asked.json)
    return 0


def compare(
    asked: argparse.Namespace, precision: str, sampler: str, kinds: dict[str, type[Cached]]
) -> list[dict[str, Any]]:
    """One dictionary a variant; the same weights and draws for all, in turn."""
    say(f"{precision}, {sampler}")
    networks = make_networks(asked, precision, sampler == "autoregressive", kinds)
    drawn: dict[str, Samples] = {}

    def variant(name: str) -> Callable[[], None]:
        def draw() -> None:
            networks[name].token_passes = 0
            drawn[name] = sample(networks[name], asked)

        return draw

    seconds = interleaved({name: variant(name) for name in kinds}, asked.repeats)
    expected = drawn["cache"].tokens
    results: list[dict[str, Any]] = []
    for name, samples in drawn.items():
        same = int((samples.tokens == expected).sum())
        if precision == "fp32" and same != expected.numel():
            raise AssertionError(f"{sampler}, {name}: {same} of {expected.numel()} tokens are those of the cache")
        written, times = int(samples.nfe.sum()), summary(seconds[name])
        results.append(
            {
                "precision": precision,
                "sampler": sampler,
                "variant": name,
                "evaluations": written,
                "cache_passes": samples.cache_forwards if name == "cache" else 0,
                "token_passes": networks[name].token_passes,
                "same_tokens": same,
                "tokens": expected.numel(),
                "seconds": times,
                "tokens_per_s": rate(written, times),
            }
        )
    for result in results:
        result["times_the_cache"] = result["seconds"]["median"] / results[0]["seconds"]["median"]
    return results


def make_networks(
    asked: argparse.Namespace, precision: str, causal: bool, kinds: dict[str, type[Cached]]
) -> dict[str, Cached]:
    """A network of each kind, all with the same random weights."""
    model: Any = OmegaConf.merge(*(OmegaConf.load(ROOT / "configs" / name) for name in ("base.yaml", _file(asked))))
    sizes = model.model
    shape = Network(asked.vocab, sizes.hidden_size, sizes.layers, sizes.heads, sizes.mlp_ratio, sizes.cond_size, causal)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    networks = {name: kind(shape).to(device, PRECISIONS[precision]).eval() for name, kind in kinds.items()}
    torch.manual_seed(0)
    first = next(iter(networks.values()))
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for network in networks.values():
        network.load_state_dict(first.state_dict())
    return networks


def _file(asked: argparse.Namespace) -> str:
    return f"model/{asked.model}.yaml"


def sample(network: Cached, asked: argparse.Namespace) -> Samples:
    """The texts, from BOS (token 0) on."""
    mask_id = asked.vocab - 1
    common: dict[str, Any] = {"num": asked.num, "length": asked.length, "mask_id": mask_id, "seed": 1}
    prompt = torch.zeros(1, dtype=torch.long)
    if network.network.causal:
        return sample_autoregressive(network, prompt=prompt, **common)
    return sample_blocks(network, prompt=prompt, block_size=asked.block_size, **common)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
