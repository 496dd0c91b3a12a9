"""The model as lm-evaluation-harness sees it: its `HFLM`, with what is wrong there for this model put right.

Forward passes need no help: the harness pads rows on the right and passes no mask, which a causal model does not see
in the positions that are scored, and it passes a mask with the rows that it pads on the left to generate from.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import GenerationConfig

import hymba  # noqa: F401  (registers the Auto classes)
from hymba.chat import released_template
from hymba.eval import DEFAULT_MODEL
from hymba.quantization import quantization_config

_TOKENS_AT_ONCE = 8192


@register_model("hymba")
class HymbaLM(HFLM):
    """`HFLM` for Hymba checkpoints. It differs from `--model hf` in this:

    * Without `pretrained` it is the model inside the package.
    * What `generation_config.json` says about decoding (a repetition penalty, sampling) is not used: a task's
      generation arguments are all there is, and they are greedy by default.
    * Rolling log-likelihoods score the text. HFLM puts the prefix token before tokens that begin with a
      beginning-of-text token already, and counts the second one as text. Windows of all texts are batched by length.
    * A request's tokens are those of its text. Where context and continuation share a token, HFLM runs the context's
      tokens followed by a piece of the whole text's, which together are another text; here the shared token belongs to
      the continuation. With tokenizers like the release's, whose words begin with their space, this does not happen.
    * A tokenizer without a chat template gets the released one (`--apply_chat_template`).
    * `batch_size=auto` tries batches of the longest request, not of the model's longest context; on a CPU, which has
      no error to catch, it takes as many rows as make 8,192 tokens.

    Args:
        pretrained: folder, hub id or a model.
        batch_size: rows of a forward pass, or "auto".
        quantization: "int8" or "int4": round the large weights while they are read.
        **kwargs: those of `HFLM` (`peft`, `dtype`, `max_length`, `add_bos_token`, `parallelize`, `load_in_8bit`, ...).
    """

    _max_length: int | None

    def __init__(
        self,
        pretrained: Any = None,
        batch_size: int | str | None = 1,
        quantization: str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("backend", "causal")
        if quantization is not None:
            kwargs["quantization"] = quantization  # handed on to _create_model
        if pretrained is None:
            pretrained = str(DEFAULT_MODEL)
        super().__init__(pretrained, batch_size=batch_size, **kwargs)
        plain = GenerationConfig.from_dict(
            {name: getattr(self.model.generation_config, name) for name in ("bos_token_id", "eos_token_id")}
        )
        plain.pad_token_id = self.tokenizer.pad_token_id
        # An adapter's model keeps a copy of its own beside the base model's.
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        for model in (self.model, inner):
            model.generation_config = plain
        if not self.tokenizer.chat_template:
            self.tokenizer.chat_template = released_template()
        self._longest = 0

    def _create_model(self, pretrained: str, quantization: str | None = None, **kwargs: Any) -> None:
        if quantization is not None:
            kwargs["quantization_config"] = quantization_config(
                quantization, config=self.config, device=str(self.device)
            )
        super()._create_model(pretrained, **kwargs)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy continuation) of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or _quiet())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, behind the prefix token, in windows of `max_length` tokens."""
        windows: list[Any] = []
        counts = []
        for (text,) in (request.args for request in requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(part)) for part in parts]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm or _quiet()))
        totals = [sum(score for score, _ in itertools.islice(scores, count)) for count in counts]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to a stop string or the most tokens."""
        for context, arguments in (request.args for request in requests):
            new = normalize_gen_kwargs(dict(arguments), self.max_gen_toks)["max_gen_toks"]
            self._longest = max(self._longest, len(self.tok_encode(context)) + new)
        return super().generate_until(requests, disable_tqdm=disable_tqdm or _quiet())

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of the context and of what is scored; together they are the ids of the whole text."""
        context_ids, rest = super()._encode_pair(context, continuation)
        whole = self.tok_encode(context + continuation)
        if context_ids + rest == whole:
            return context_ids, rest
        shared = next((i for i, (a, b) in enumerate(zip(context_ids, whole)) if a != b), len(context_ids))
        # At least one token to predict from, and one to predict.
        shared = min(shared, len(whole) - 1)
        return (whole[:shared], whole[shared:]) if shared else ([self.prefix_token_id], whole)

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if requests:
            _, context, continuation = requests[pos]
            length = min(len(context) + len(continuation), self.max_length)
        else:
            length = min(self._longest or self.max_length, self.max_length)
        most = self.max_batch_size or 64
        if self.device.type == "cpu":
            return max(1, min(most, _TOKENS_AT_ONCE // max(1, length)))
        kept, self._max_length = self._max_length, length  # pragma: gpu
        try:  # pragma: gpu
            return super()._detect_batch_size(requests, pos)
        finally:  # pragma: gpu
            self._max_length = kept


def _quiet() -> bool:
    """Whether bars would go to a file."""
    return not sys.stderr.isatty()
