"""Generative perplexity: the perplexity of generated texts under a judge model.

The protocol, which is that of Arriola et al. 2025 but for what is said at 3 and 5:

1. Texts are tokenised anew by the judge's own tokenizer, so that judges of any vocabulary can be used.
2. A text longer than the window of W tokens is read in windows that begin S tokens apart. Each token is scored once, in
   the first window that holds it: given all of the text before it in the first window, at least W - S tokens later. A
   judge whose own context is shorter than W reads windows of its context.
3. Where the judge's tokenizer sets a BOS before texts (our exports do, Llama's does, GPT-2's does not), it stands
   before every text and is given; else the text's first token is given and not scored.
4. A target that is the judge's EOS is not scored.
5. Two values are given. `ppl` = exp(sum of nats / sum of scored tokens) weighs tokens alike; `mean_ppl` is the mean
   over texts of each text's own perplexity, which is what the bd3lms code prints and a few bad texts can dominate.
   Standard errors are over texts, that of `ppl` to first order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_ds.checkpoint.export import find_export, list_exports
from bd3_ds.data.streaming_import import stub_torchvision
from bd3_ds.evaluation.exports import open_export
from bd3_ds.evaluation.text.judge import ExportJudge, Judge
from bd3_ds.evaluation.text.statistics import mean_and_stderr, ratio_and_stderr
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

TOKENS_AT_ONCE = 4096  # of a pass, padding included; the logits of GPT-2's vocabulary then take 0.8 GB
PROBE = 8  # tokens of the pass that shows whether a model is causal
ROUNDING = 1e-5  # of fp32 logits, beside their largest


@dataclass(frozen=True)
class Windows:
    """How a judge reads long texts: `size` tokens at once, beginning `stride` apart."""

    size: int
    stride: int

    def of(self, tokens: int) -> list[tuple[int, int, int]]:
        """(begin, end, first scored place) of each window of a text of so many tokens; the first token is given."""
        if tokens < 2:
            return []
        found = [(0, min(self.size, tokens), 1)]
        while found[-1][1] < tokens:
            begin, end, _ = found[-1]
            found.append((begin + self.stride, min(begin + self.stride + self.size, tokens), end))
        return found


def fit_windows(size: int, stride: int, context: int | None) -> Windows:
    """Windows of `size`, or of the judge's context where that is shorter, half of it apart where `stride` is longer.

    Raises UserError for windows in which a token would have nothing before it.
    """
    if size < 2:
        raise UserError(f"--window {size} must be at least 2: a token is scored given those before it in its window")
    if not 1 <= stride < size:
        raise UserError(f"--stride {stride} must lie in 1 … {size - 1}, below --window {size}")
    if context is None or context >= size:
        return Windows(size, stride)
    if context < 2:
        raise UserError(f"the judge reads {context} token at once; a token is scored given those before it")
    return Windows(context, stride if stride < context else context // 2)


@dataclass(frozen=True)
class Scores:
    """nats: sum over the scored tokens of each text; scored: how many these are."""

    nats: list[float]
    scored: list[int]

    def perplexities(self) -> list[float | None]:
        """Each text's own perplexity; None where nothing was scored."""
        return [_exp(n / k) if k else None for n, k in zip(self.nats, self.scored, strict=True)]

    def summary(self) -> dict[str, Any]:
        """The values of the module's docstring, with counts; raises UserError where no text has a scored token."""
        pairs = [(n, k) for n, k in zip(self.nats, self.scored, strict=True) if k]
        if not pairs:
            raise UserError("the texts have no token to score: they are empty, or of one token each")
        nats, stderr = ratio_and_stderr(*zip(*pairs, strict=True))
        mean, mean_stderr = mean_and_stderr([value for value in self.perplexities() if value is not None])
        return {
            "ppl": _exp(nats),
            "ppl_stderr": None if stderr is None else _exp(nats) * stderr,
            "mean_ppl": mean,
            "mean_ppl_stderr": mean_stderr,
            "nats_per_token": nats,
            "scored_tokens": sum(self.scored),
            "scored_texts": len(pairs),
        }


def score_rows(
    judge: Judge, rows: list[list[int]], windows: Windows, progress: Callable[[int], object] | None = None
) -> Scores:
    """Nats of token rows that `judge.encode` made; `progress` is called with how many tokens have just been scored."""
    framed = [row if judge.first is None else [judge.first, *row] for row in rows]
    cut = [(text, *window) for text, row in enumerate(framed) for window in windows.of(len(row))]
    # Windows of like length go together: padding stands after them, where no causal model looks.
    cut.sort(key=lambda window: window[2] - window[1])
    nats, scored = [0.0] * len(rows), [0] * len(rows)
    for batch in _batches(cut):
        before = sum(scored)
        width = max(end - begin for _, begin, end, _ in batch)
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        for at, (text, begin, end, _) in enumerate(batch):
            tokens[at, : end - begin] = torch.tensor(framed[text][begin:end])
        found = judge.nats(tokens.to(judge.device)).double().cpu()  # [B, width - 1]
        for at, (text, begin, end, first) in enumerate(batch):
            part = slice(first - begin - 1, end - begin - 1)
            targets = tokens[at, 1:][part]
            counted = torch.ones_like(targets, dtype=torch.bool) if judge.end is None else targets != judge.end
            nats[text] += float(found[at, part][counted].sum())
            scored[text] += int(counted.sum())
        if progress is not None:
            progress(sum(scored) - before)
    return Scores(nats, scored)


def text_features(judge: Judge, rows: list[list[int]], windows: Windows) -> Tensor:
    """The judge's last hidden state [N, D] at the last token of each row's first window; empty rows are left out."""
    found = []
    for row in rows:
        framed = (row if judge.first is None else [judge.first, *row])[: windows.size]
        if row:
            found.append(judge.hidden(torch.tensor([framed], device=judge.device))[0, -1].float().cpu())
    return torch.stack(found) if found else torch.zeros(0, 0)


class TransformersJudge(Judge):
    """A causal model in Hugging Face's form, from a folder with its tokenizer; raises UserError where it is not one.

    Weights are read from safetensors only, and no code that comes with a model is run.
    """

    def __init__(self, name: str, folder: Path, device: torch.device):
        stub_torchvision()  # which transformers imports
        import transformers

        transformers.logging.set_verbosity_error()
        self.name = name
        self.device = device
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # the library raises whatever a damaged file leads to
            raise UserError(f"--judge {name}: its tokenizer cannot be read ({_line(error)})") from None
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:
            raise UserError(
                f"--judge {name} cannot be loaded as a causal model ({_line(error)}); give a folder with config.json, "
                "model.safetensors and a tokenizer, such as a copy of gpt2-large"
            ) from None
        model, loading = loaded
        if loading["missing_keys"]:
            raise UserError(
                f"--judge {name} lacks weights of a causal model ({sorted(loading['missing_keys'])[0]} and perhaps "
                "more); give a model that was trained to predict the next token"
            )
        self._model: Any = model.to(device).eval()
        self.context = getattr(model.config, "max_position_embeddings", None)
        self.end = self._tokenizer.eos_token_id
        framed = self._tokenizer("")["input_ids"]
        self.first = framed[0] if framed and framed[0] == self._tokenizer.bos_token_id else None
        if len(self._tokenizer) > model.get_input_embeddings().num_embeddings:
            raise UserError(
                f"--judge {name}: its tokenizer has more tokens than the model; the two do not belong together"
            )
        if not self._is_causal():
            raise UserError(
                f"--judge {name} is not causal: its prediction for a token depends on later ones; give a model that "
                "predicts the next token, such as gpt2-large"
            )

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]

    @torch.no_grad()
    def nats(self, tokens: Tensor) -> Tensor:
        logits = self._model(tokens, use_cache=False).logits[:, :-1].float()  # [B, T - 1, V]
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        states: Tensor = self._model.base_model(tokens, use_cache=False).last_hidden_state
        return states

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Whether predictions stay as they are when the last token becomes another."""
        length = min(PROBE, self.context or PROBE)
        tokens = torch.zeros(2, length, dtype=torch.long, device=self.device)
        tokens[1, -1] = 1
        logits = self._model(tokens).logits[:, :-1]
        moved = (logits[0] - logits[1]).abs().max()
        return bool(moved <= ROUNDING * logits.abs().max())


def open_judge(place: str, device: torch.device) -> Judge:
    """The judge at `place`: a folder of a Hugging Face causal model, an export of ours or a run, or a name on the hub.

    Raises UserError where there is none, or the hub cannot be reached.
    """
    path = Path(place).expanduser()
    if (path / "config.json").is_file():
        kind = read_json(path / "config.json", "config.json")
        if isinstance(kind, dict) and kind.get("model_type") == "bd3-ds":
            return ExportJudge(place, open_export(str(path)), device)
        return TransformersJudge(place, path, device)
    if path.is_dir():
        if not (path / "export.json").is_file() and not list_exports(path):
            raise UserError(
                f"--judge {place} holds no judge; give a Hugging Face causal model (config.json, model.safetensors and "
                "its tokenizer) or one of our exports of objective.name=ar"
            )
        return ExportJudge(place, find_export(str(path)), device)
    if path.exists() or path.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1 or not place:
        raise UserError(f"--judge {place}: there is no such directory")
    return TransformersJudge(place, _download(place), device)


def _download(name: str) -> Path:
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]
    local = "give --judge a folder of a Hugging Face causal model, or one of our exports of objective.name=ar"
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], etag_timeout=5))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"--judge {name} is neither a directory nor a public name on the hub; {local}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = "the hub cannot be reached" if isinstance(error, (LocalEntryNotFoundError, ConnectionError)) else error
        raise UserError(f"--judge {name} cannot be downloaded ({reason}); {local}") from None


def _batches(windows: list[tuple[int, int, int, int]]) -> Iterable[list[tuple[int, int, int, int]]]:
    """Windows, shortest first, in batches of at most TOKENS_AT_ONCE tokens when padded."""
    batch: list[tuple[int, int, int, int]] = []
    for window in windows:
        if batch and (len(batch) + 1) * (window[2] - window[1]) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # e^709 is the last fp64 number


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().split("\n")[0]
