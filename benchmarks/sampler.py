"""How fast texts come: with the cache and without it, one and many at a time, near and far into a text.

    python -m benchmarks.sampler [--model tiny] [--length 1024] [--block-size 16] [--vocab 50258] [--batch 32]
                                 [--far 1024 2048 4096 8192 16384] [--repeats 1 --warmup 0] [--json FILE]

Weights are random, normal with 0.02; the time does not depend on them. First hitting, so that a token is an evaluation.
`texts`: whole texts of --length tokens from BOS on, in turn:
  bd3 cached        clean tokens run once, each evaluation its block
  bd3 recomputed    no cache, the least that then has to be done: each evaluation runs the clean tokens and its block
  bd3 training pass no cache, each evaluation a training pass over the text so far, noisy beside clean tokens
  ar cached         each evaluation one token
  ar recomputed     each evaluation all tokens so far
and the cached ones --batch at a time. In fp32 the variants must draw the same tokens, which is asserted.
`far`: milliseconds a token behind so many clean tokens, block diffusion and AR, a block's share of its cache-writing
pass included; and of the layers' attention alone, run by itself on keys of that length.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from bd3_ds.model.dit import DiT
from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.sampling.denoiser import CausalDenoiser, ReadLogits, RecomputingDenoiser, SamplingDenoiser, in_chunks
from bd3_ds.sampling.draw import SampledTokens
from bd3_ds.sampling.options import WindowPlan
from bd3_ds.sampling.sampler import Samples, denoiser_of, sample
from benchmarks.measure import ROOT, finish, interleaved, parser, rate, say, summary

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FAR_BLOCKS = 4  # blocks written at each distance


class TrainingPass(RecomputingDenoiser):
    """Each evaluation is a training pass over the text so far."""

    def predict(self, block: Tensor, at: Tensor, sigma: Tensor | None, read: ReadLogits) -> SampledTokens:
        """See `SamplingDenoiser`."""
        text = block if self.clean is None else torch.cat([self.clean, block], dim=1)
        rows, places = at // block.shape[1], at % block.shape[1]
        of_text = rows * text.shape[1] + len(self) + places
        drawn: SampledTokens = self.model(
            text, text, block_size=self.block_size, at=of_text, read=in_chunks(read, self.vocab_size)
        )
        return drawn


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="tiny", help="a name in configs/model")
    options.add_argument("--length", type=int, default=1024, help="tokens of a text")
    options.add_argument("--block-size", type=int, default=16)
    options.add_argument("--vocab", type=int, nargs="+", default=[50258], help="[MASK], the last one, included")
    options.add_argument("--batch", type=int, nargs="+", default=[32], help="texts drawn side by side, beside one")
    options.add_argument("--far", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    options.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options.add_argument("--warmup", type=int, default=1, help="runs of each variant that do not count")
    options.add_argument("--training-pass", action="store_true", help="measure that variant too; it is slow")
    asked = options.parse_args(argv)
    results: list[dict[str, Any]] = []
    for vocab in asked.vocab:
        for precision in asked.precision:
            networks = {kind: make_network(asked, precision, vocab, kind == "ar") for kind in ("bd3", "ar")}
            results += whole_texts(asked, precision, vocab, networks)
    for distance in asked.far:
        networks = {kind: make_network(asked, "fp32", asked.vocab[0], kind == "ar") for kind in ("bd3", "ar")}
        results += far_into_a_text(asked, networks, distance)
    finish("sampler", asked, results, asked.json)
    return 0


def whole_texts(
    asked: argparse.Namespace, precision: str, vocab: int, networks: dict[str, DiT]
) -> list[dict[str, Any]]:
    """One dictionary a variant, and what it is to the others."""
    say(f"{precision}, vocabulary {vocab}")
    bd3, ar, size = networks["bd3"], networks["ar"], asked.block_size
    kinds: dict[str, tuple[SamplingDenoiser, int, int]] = {
        "bd3 cached": (denoiser_of(bd3, size), size, 1),
        "bd3 recomputed": (RecomputingDenoiser(bd3, size), size, 1),
        "ar cached": (denoiser_of(ar, 1), 1, 1),
        "ar recomputed": (RecomputingDenoiser(ar, 1), 1, 1),
    }
    if asked.training_pass:
        kinds["bd3 training pass"] = (TrainingPass(bd3, size), size, 1)
    for batch in asked.batch:
        kinds[f"bd3 cached, {batch} texts"] = (denoiser_of(bd3, size), size, batch)
        kinds[f"ar cached, {batch} texts"] = (denoiser_of(ar, 1), 1, batch)
    drawn: dict[str, Samples] = {}

    def variant(name: str) -> Callable[[], None]:
        denoiser, block, num = kinds[name]

        def draw() -> None:
            drawn[name] = texts(denoiser, asked.length, block, vocab, num)

        return draw

    seconds = interleaved({name: variant(name) for name in kinds}, asked.repeats, asked.warmup)
    results: list[dict[str, Any]] = []
    for name, samples in drawn.items():
        alone = drawn[f"{name.split()[0]} cached"]
        same = int((samples.tokens[0] == alone.tokens[0]).sum())
        if precision == "fp32" and same != asked.length:
            raise AssertionError(f"{name}: {same} of {asked.length} tokens are those of the cache")
        written, times = int(samples.nfe.sum()), summary(seconds[name])
        results.append(
            {
                "what": "texts",
                "precision": precision,
                "vocab": vocab,
                "variant": name,
                "texts": len(samples.tokens),
                "evaluations_a_text": int(samples.nfe[0]),
                "cache_forwards_a_text": int(samples.cache_forwards[0]),
                "same_tokens_in_row_0": same,
                "seconds": times,
                "tokens_per_s": rate(written, times),
            }
        )
    one = {result["variant"]: result["tokens_per_s"]["median"] for result in results}
    for result in results:
        own = result["tokens_per_s"]["median"]
        result["times_recomputed"] = own / one[f"{result['variant'].split()[0]} recomputed"]
        result["times_one_text"] = own / one[f"{result['variant'].split()[0]} cached"]
        result["times_ar_cached"] = own / one["ar cached" + result["variant"].partition("cached")[2]]
        say(f"{result['variant']}: {own:.1f} tokens/s")
    return results


def texts(
    denoiser: SamplingDenoiser, length: int, block: int, vocab: int, num: int, prompt: Tensor | None = None
) -> Samples:
    """Texts behind the prompt, which is BOS (token 0) where there is none, in one window."""
    plan = WindowPlan(length, block, length, block)
    given = torch.zeros(1, dtype=torch.long) if prompt is None else prompt
    return sample(denoiser, plan, given, num=num, mask_id=vocab - 1, seed=1)


def far_into_a_text(asked: argparse.Namespace, networks: dict[str, DiT], distance: int) -> list[dict[str, Any]]:
    """What a token costs behind `distance` clean ones."""
    vocab = asked.vocab[0]
    prompt = torch.randint(0, vocab - 1, (1, distance), generator=torch.Generator().manual_seed(0))
    results = []
    for name, model in networks.items():
        size = 1 if name == "ar" else asked.block_size
        more = FAR_BLOCKS * asked.block_size
        prepared = denoiser_of(model, size)

        def prefill(denoiser: SamplingDenoiser = prepared) -> None:
            denoiser.restart()
            if isinstance(denoiser, CausalDenoiser):  # its keys are made by an evaluation
                texts(denoiser, distance, 1, vocab, 1, prompt[:, :-1])
            else:
                denoiser.extend(prompt)

        def write(denoiser: SamplingDenoiser = prepared, size: int = size, more: int = more) -> None:
            texts(_Resumed(denoiser), distance + more, size, vocab, 1, prompt)

        times = []
        for number in range(asked.warmup + max(3, asked.repeats)):
            prefill()
            taken = interleaved({"write": write}, repeats=1, warmup=0)["write"]
            if number >= asked.warmup:
                times += taken
        attention = summary(attention_seconds(model, size, distance, max(3, asked.repeats)))
        results.append(
            {
                "what": "far",
                "model": name,
                "distance": distance,
                "ms_a_token": 1e3 * summary(times)["median"] / more,
                "attention_ms_an_evaluation": 1e3 * attention["median"],
                "ms_a_token_but_for_attention": 1e3 * (summary(times)["median"] / more - attention["median"]),
            }
        )
        say(f"{name} behind {distance}: {results[-1]['ms_a_token']:.2f} ms a token")
    return results


class _Resumed:
    """A denoiser that has its clean tokens already and is not made to forget them."""

    def __init__(self, denoiser: SamplingDenoiser):
        self.denoiser = denoiser

    def restart(self) -> None:
        """The window goes on."""

    def __len__(self) -> int:
        return len(self.denoiser)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)


@torch.no_grad()
def attention_seconds(model: DiT, size: int, distance: int, repeats: int) -> list[float]:
    """All layers' attention of one evaluation, on buffers as the cache has them."""
    network = model.network
    parameter = next(model.parameters())

    def made(tokens: int) -> Tensor:
        return torch.randn(1, network.heads, tokens, network.head_width, device=parameter.device, dtype=parameter.dtype)

    pairs = [(made(distance + size + 64), made(distance + size + 64)) for _ in range(network.layers)]
    q = made(size)

    def run() -> None:
        for keys, values in pairs:
            F.scaled_dot_product_attention(q, keys[:, :, : distance + size], values[:, :, : distance + size], scale=1.0)

    return interleaved({"attention": run}, repeats * 3)["attention"]


def make_network(asked: argparse.Namespace, precision: str, vocab: int, causal: bool) -> DiT:
    """The network of configs/model with random weights."""
    files = ("base.yaml", f"model/{asked.model}.yaml")
    sizes = OmegaConf.merge(*(OmegaConf.load(ROOT / "configs" / name) for name in files)).model
    torch.manual_seed(0)
    shape = DiTConfig(vocab, sizes.hidden_size, sizes.layers, sizes.heads, sizes.mlp_ratio, sizes.cond_size, causal)
    model = DiT(shape)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.02)
    return model.to("cuda" if torch.cuda.is_available() else "cpu", PRECISIONS[precision]).eval()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
