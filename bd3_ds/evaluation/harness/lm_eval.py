"""Our models in EleutherAI's lm-evaluation-harness (`lm_eval`), as its model `bd3`.

lm_eval is an optional package (`requirements-extra.txt`). All but its interface is in `continuations.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from bd3_ds.evaluation.options import open_device
from bd3_ds.runtime.errors import UserError

NAME = "bd3"


def with_device(argv: list[str]) -> list[str]:
    """The words of a command line that runs a model, with a device that is there; lm_eval would say cuda:0 anywhere."""
    named = {word.partition("=")[0] for word in argv}
    if "--device" in named or "--model" not in named:
        return argv
    return [*argv, "--device", str(open_device(None))]


@lru_cache(maxsize=1)
def harness_model() -> type:
    """The class that lm_eval knows as `bd3` from now on; raises UserError where lm_eval is not installed."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError(
            f"lm_eval cannot be imported ({error}); `pip install -r requirements-extra.txt` installs it"
        ) from None

    @register_model(NAME)
    class HarnessModel(LM):
        """An export for lm_eval; requests carry their arguments as `args`, and are answered in their order.

        export: a directory under RUN_DIR/exports, or RUN_DIR for its newest. estimator, views, seed and options of the
        sampler: as for `Continuations`. Batch sizes are lm_eval's; a pass is filled by its tokens whatever they say.
        """

        def __init__(
            self,
            export: str | None = None,
            device: str | None = None,
            batch_size: int | str | None = None,
            max_batch_size: int | None = None,
            **options: Any,
        ):
            super().__init__()
            if export is None:
                raise UserError("--model_args lacks export=RUN_DIR, or a directory under RUN_DIR/exports")
            from bd3_ds.evaluation.api import LanguageModel
            from bd3_ds.evaluation.arguments import usable_device
            from bd3_ds.evaluation.exports import open_export
            from bd3_ds.evaluation.harness.continuations import Continuations

            place = open_device(None) if device is None else usable_device(device)
            self.continuations = Continuations(LanguageModel(open_export(str(export)), place), **options)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return self._answer("loglikelihood", [request.args for request in requests], disable_tqdm)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return self._answer("loglikelihood_rolling", [request.args[0] for request in requests], disable_tqdm)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return self._answer("generate_until", [request.args for request in requests], disable_tqdm)

        def _answer(self, kind: str, asked: list[Any], disable_tqdm: bool) -> list[Any]:
            from tqdm import tqdm

            ask: Callable[..., list[Any]] = getattr(self.continuations, kind)
            with tqdm(total=len(asked), desc=kind, disable=disable_tqdm or None) as bar:  # None: on a terminal only
                answers = ask(asked, progress=bar.update)
            for question, answer in zip(asked, answers, strict=True):
                self.cache_hook.add_partial(kind, question if isinstance(question, tuple) else (question,), answer)
            return answers

    return HarnessModel
