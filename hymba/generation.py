"""What `generate` needs to know about Hymba: entry checks, cache choice, rows that end early."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

from hymba.cache import HymbaCache, as_hymba_cache
from hymba.cost import DTYPE_BYTES
from hymba.decode_loop import run_loop
from hymba.inputs import InputError, check_ids, check_mask
from hymba.memory import MemoryBytes, check_fits, generation_bytes

_FINISHED = "finished_rows"
NO_CONTINUOUS_BATCHING = (
    "transformers' continuous batching keeps blocks of keys and values, of full or sliding attention only; a Hymba "
    "layer also has a convolution window and an SSM state, which that cache has no place for"
)
# Tokens that one call of a prefill takes in at most: longer prompts are cut, so that activations stay bounded (about
# 60 kB a token at 1.5B). Rows of a large batch get at least the second number.
_PREFILL_TOKENS = 32768
_LEAST_CHUNK = 1024


def _prefill_chunk(rows: int, length: int, asked: int | None) -> int | None:
    """Tokens of a row that a prefill takes in at a time: what is asked for, or few enough; `None` for all at once."""
    if asked is not None or rows * length <= _PREFILL_TOKENS:
        return asked
    return max(_LEAST_CHUNK, _PREFILL_TOKENS // rows)


class FinishedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows they have stopped.

    A row that has ended is fed padding until the last row ends. Its new columns are masked, so that its state stays
    what its own tokens made it, and the returned cache can be continued.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stopped = super().__call__(input_ids, scores, **kwargs)
        self.done = stopped if self.done is None else self.done | stopped
        return stopped


class HymbaGenerationMixin(GenerationMixin):
    """`GenerationMixin` for models whose rows may be padded anywhere and whose cache is a `HymbaCache`."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`, with inputs checked once on the host before anything runs.

        With `cache_implementation="static"` on CUDA the steps after the prompt are replayed as a CUDA graph
        (`disable_compile=True` leaves it out). Prompts of more than 32,768 tokens in all are taken in in pieces, as
        with `prefill_chunk_size`.

        Raises:
            InputError: ids out of range, zero tokens, a bad mask, right padding, a mask that contradicts the cache.
            hymba.memory.MemoryEstimateError: more than will fit on the GPU.
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        past = kwargs.get("past_key_values")
        if past is not None:
            past = kwargs["past_key_values"] = as_hymba_cache(past, self.config)
        if isinstance(ids, Tensor) and not (embeds is not None and ids.shape[1] == 0):
            check_ids(ids, self.config.vocab_size, read=True)
        tokens = embeds if embeds is not None else ids
        mask = kwargs.get("attention_mask")
        if isinstance(tokens, Tensor):
            self._check_batch(tokens, mask, past)
        settings = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        chunk = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        if embeds is not None and chunk is not None:
            raise InputError(
                f"prefill_chunk_size={chunk} cuts input_ids, of which inputs_embeds has none; allowed with "
                "inputs_embeds: None"
            )
        return super().generate(inputs, *args, **kwargs)

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Not possible with transformers' paged cache; `generate_batch` and `transformers serve` ask for this.

        Its allocators are chosen by layer type, and a hybrid layer has none.
        """
        raise InputError(f"{NO_CONTINUOUS_BATCHING}. Use generate() with a padded batch")

    def _check_batch(self, tokens: Tensor, mask: Tensor | None, past: HymbaCache | None) -> None:
        rows, length = tokens.shape[:2]
        columns = 0 if past is None else past.columns
        if mask is None:
            if columns and length <= columns:
                raise InputError(
                    f"input_ids has {length} tokens and the cache holds {columns}; pass the whole sequence, or the new "
                    "tokens with an attention_mask that covers the whole sequence"
                )
        else:
            check_mask(mask, rows=rows, columns=max(length, mask.shape[-1]) if columns else length, need_real=True,
                       read=True)  # fmt: skip
            if bool((mask[:, -1] == 0).any()):
                raise InputError(
                    "attention_mask ends with padding: generate() continues from the last column, so prompts are "
                    "padded on the left; set padding_side='left' on the tokenizer"
                )
        if past is not None:
            past.check_mask(mask)

    def _prepare_attention_mask_for_generation(self, inputs_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Padding is never guessed from token ids: the release pads with id 0, which is a token like any other.
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        kind = generation_config.cache_implementation
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if kind not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation={kind!r}: allowed: 'dynamic', 'static'")
        length = None
        if kind == "static":
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        room = max_cache_length if length is None else length
        self._check_memory(generation_config, model_kwargs, batch_size, room, static=length is not None)
        model_kwargs["past_key_values"] = HymbaCache(self.config, max_length=length)
        return None

    def _check_memory(
        self, settings: Any, model_kwargs: dict[str, Any], rows: int, length: int, *, static: bool
    ) -> None:
        """Refuse what will not fit, while nothing of it is allocated."""
        known = str(self.dtype).removeprefix("torch.") in DTYPE_BYTES
        if not known or len({p.device for p in self.parameters()}) > 1:
            return
        mask = model_kwargs.get("attention_mask")
        prompt = length if mask is None else int(mask.shape[1])
        whole = model_kwargs.get("inputs_embeds") is not None

        def need(batch: int, total: int) -> MemoryBytes:
            taken = min(prompt, total)
            return generation_bytes(
                self.config,
                batch=batch,
                prompt=taken,
                length=total,
                dtype=self.dtype,
                static=static,
                chunk=None if whole else _prefill_chunk(batch, taken, settings.prefill_chunk_size),
            )

        check_fits("generation", need, batch=rows, length=length, device=self.device, held=need(1, 1).weights)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # transformers looks for `inputs_embeds` by name before it passes any, and passes on what only stopping reads.
        for name in (_FINISHED, "tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        finished = updated.get(_FINISHED)
        mask = updated.get("attention_mask")
        if finished is not None and finished.done is not None and mask is not None:
            mask[:, -1] = torch.where(finished.done.to(mask.device), 0, mask[:, -1])
        return updated

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        rows, length = input_ids.shape
        if model_kwargs.get("inputs_embeds") is None and model_kwargs.get("past_key_values") is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = _prefill_chunk(rows, length, generation_config.prefill_chunk_size)
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        cache = kwargs.get("past_key_values")
        if input_ids.shape[0] > 1 and cache is not None:
            stopping_criteria = FinishedRows(stopping_criteria)
            kwargs[_FINISHED] = stopping_criteria
            if kwargs.get("attention_mask") is None:
                columns = input_ids.shape[1]
                embeds = kwargs.get("inputs_embeds")
                if embeds is not None and columns == 0:
                    columns = embeds.shape[1]
                columns = max(columns, getattr(generation_config, "_mask_length", 0) or 0)
                kwargs["attention_mask"] = input_ids.new_ones(input_ids.shape[0], columns)
        if not synced_gpus and self._replays(cache, generation_config):
            return self._sample_by_steps(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer, kwargs
            )
        return super()._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **kwargs,
        )

    def _replays(self, cache: Any, settings: Any) -> bool:
        """Whether decoding runs as `DecodeStep`: on CUDA with a static cache, unless more than scores is asked for."""
        static = isinstance(cache, HymbaCache) and cache.max_length is not None
        asked = settings.return_dict_in_generate and (settings.output_attentions or settings.output_hidden_states)
        if not static or asked or settings.disable_compile or settings.is_assistant:
            return False
        placed = {p.device for p in self.parameters()}
        return len(placed) == 1 and placed.pop().type == "cuda"

    def _sample_by_steps(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        settings: Any,
        streamer: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """`GenerationMixin._sample` with the steps after the prefill replayed over fixed addresses."""
        outputs = self._prefill(input_ids, settings, kwargs, is_first_iteration=True)
        cache = outputs.past_key_values
        whole = settings.return_dict_in_generate
        ends = any(hasattr(c, "eos_token_id") for c in criteria)
        made = run_loop(
            self, cache, outputs.logits[:, -1].float(), input_ids=input_ids, processors=processors, criteria=criteria,
            sample=bool(settings.do_sample), pad=settings._pad_token_tensor if ends else None, streamer=streamer,
            keep_scores=bool(whole and settings.output_scores), keep_logits=bool(whole and settings.output_logits),
        )  # fmt: skip
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([input_ids, made.tokens], dim=1)
        if not whole:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=made.scores, logits=made.logits, past_key_values=cache
        )
