"""The model card: what the model is, how it was trained, what it reached, how it is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bd3_ds.checkpoint.export import Export
from bd3_ds.config.registries import OBJECTIVES, OPTIMIZERS
from bd3_ds.config.schema import OptimConfig, RunConfig, block_size


def model_card(export: Export, evaluations: list[dict[str, Any]], parameters: int, unlike: str | None) -> str:
    """README.md of a folder for Hugging Face, in Markdown.

    `evaluations` are lines of records/eval.jsonl; `unlike` says why AutoTokenizer does not load the tokenizer.
    """
    run = export.run
    parts = [
        _front_matter(run),
        f"# {_title(export)}",
        f"This is {OBJECTIVES[run.objective.name].title} of {parameters:,} parameters, trained with bd3-ds.",
        "## Loading",
        _loading(run),
        _tokenizer(export, unlike),
        "With bd3-ds installed (`import bd3_ds.hub`) no remote code is needed; `python run.py convert --from hf FOLDER "
        "EXPORT` makes an export of this folder again, for scoring, sampling and training on.",
        "## Training",
        _table(("", ""), _recipe(export)),
        "## Perplexities",
        _perplexities(evaluations),
        "## Licence",
        "Not stated. Whoever publishes this model fills in `license:` above, with regard to the training text.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(run: RunConfig) -> str:
    task = "pipeline_tag: text-generation\n" if OBJECTIVES[run.objective.name].causal else ""
    words = "\n".join(f"- {tag}" for tag in ("bd3-ds", run.objective.name, "block-diffusion"))
    return f"---\n# license: to be filled in\nlibrary_name: transformers\n{task}tags:\n{words}\n---"


def _title(export: Export) -> str:
    run = export.run
    blocks = f", blocks of {block_size(run)}" if OBJECTIVES[run.objective.name].has_blocks else ""
    return f"{run.objective.name.upper()}{blocks}, {run.model.layers} layers of width {run.model.hidden_size}"


def _loading(run: RunConfig) -> str:
    objective, name = OBJECTIVES[run.objective.name], "AutoModelForMaskedLM"
    call, said = "input_ids=x_t", "`x_t` [B, T] holds [MASK] where a token is noise"
    if objective.causal:
        name, call = "AutoModelForCausalLM", "input_ids"
        said = "Logits at i are for token i + 1; `labels` gives a loss, `generate` texts"
    elif objective.timed:
        call += ", sigma=sigma"
        said += ", `sigma` [B] its level"
    elif objective.has_blocks:
        call += ", clean_ids=x0"
        said += (
            f"; `x0` [B, T] is the clean text, of which a block of {block_size(run)} tokens sees the earlier blocks "
            "alone"
        )
    said += "." if objective.causal else ". Logits are raw network output."
    code = (
        f"from transformers import {name}\n\nmodel = {name}.from_pretrained(FOLDER, trust_remote_code=True)\n"
        f"logits = model({call}).logits"
    )
    return f"```python\n{code}\n```\n\n{said} `AutoModel` gives the same logits."


def _tokenizer(export: Export, unlike: str | None) -> str:
    mask = f"[MASK] is id {export.run.model.mask_id}."
    if export.tokenizer is None:
        return f"The model came without a tokenizer. {mask}"
    if unlike is not None:
        loaded = 'bd3_ds.data.tokenizer.load_tokenizer("FOLDER/tokenizer")'
        if (export.tokenizer / "tokenizer.model").is_file():
            loaded = 'sentencepiece.SentencePieceProcessor(model_file="FOLDER/tokenizer/tokenizer.model")'
        return f"AutoTokenizer does not load the tokenizer: {unlike}. Load it with `{loaded}`. {mask}"
    return (
        f"`AutoTokenizer.from_pretrained(FOLDER)` gives the ids that the model was trained with (call it with "
        f"`add_special_tokens=False`; where it asks whether to run code, the tokenizer needs none). {mask}"
    )


def _recipe(export: Export) -> list[tuple[str, str]]:
    run = export.run
    model, optim, train = run.model, run.optim, run.train
    rows = [
        ("objective", run.objective.name),
        *([("block size", str(block_size(run)))] if OBJECTIVES[run.objective.name].has_blocks else []),
        ("sequence length", str(run.data.length)),
        ("vocabulary, [MASK] included", str(model.vocab_size)),
        ("layers, width, heads", f"{model.layers}, {model.hidden_size}, {model.heads}"),
    ]
    if export.step == 0:  # a converted model: what else its run says is default values
        return [*rows, ("training", "elsewhere; converted")]
    tokens = export.step * train.global_batch * run.data.length
    return [
        *rows,
        ("data", _place(run.data.train)),
        ("optimizer steps", f"{export.step:,} of {train.total_steps:,}"),
        ("sequences a step", f"{train.global_batch:,}"),
        ("tokens seen", f"{tokens:,}"),
        ("learning rate", f"{optim.lr:g}, {optim.warmup_steps:,} steps of warm-up, then {_decay(optim)}"),
        (
            OPTIMIZERS[optim.name].title,
            f"betas {optim.beta1:g} and {optim.beta2:g}, weight decay {optim.weight_decay:g}, clip {optim.clip:g}",
        ),
        ("weights", f"average over steps, decay {optim.ema_decay:g}" if optim.ema_decay else "of the last step"),
        (
            "noise schedule",
            f"{run.objective.schedule.name}, t in [{run.objective.schedule.t_min:g}, {run.objective.schedule.t_max:g}]",
        ),
        ("precision", train.precision),
        ("started from", _place(train.init_from) if train.init_from else "random weights"),
        ("seed", str(run.seed)),
    ]


def _place(address: str) -> str:
    """An address, or of a path the end: where it lies on the author's disk says nothing to a reader."""
    return f"`{address if '://' in address else '/'.join(Path(address).parts[-2:])}`"


def _perplexities(evaluations: list[dict[str, Any]]) -> str:
    if not evaluations:
        return "None on record."
    rows = []
    for line in sorted(evaluations, key=lambda line: str(line["set"])):
        error = f" ± {line['ppl'] * line['stderr']:.2g}" if line.get("stderr") else ""
        taken, there = line.get("chunks"), line.get("chunks_in_set")
        part = f" (the first {taken:,} of {there:,} sequences)" if taken and there and taken < there else ""
        ppl = f"{line['ppl']:.2f}{error}" if math.isfinite(line["ppl"]) else "not finite"
        rows.append((str(line["set"]), ppl, str(line.get("estimator", "")), f"{line.get('tokens', 0):,}{part}"))
    words = (
        "Each is exp of a bound on the negative log-likelihood (of the likelihood itself for AR), ± one standard error."
    )
    return f"{words}\n\n{_table(('set', 'perplexity', 'estimator', 'tokens'), rows)}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _decay(optim: OptimConfig) -> str:
    return optim.decay if optim.decay_share == 1 else f"{optim.decay} decay in the last {optim.decay_share:.0%}"
