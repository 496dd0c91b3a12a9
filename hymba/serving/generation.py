"""One answer after another on one thread, each ending where the release ends it or when its client leaves.

transformers' server keeps a thread for every model and runs `generate` there, so that requests wait for one another
and each runs as it would alone. Every request gets a cache of its own: an SSM state has no prefix that another request
could share without a copy, and transformers' server shares none outside continuous batching.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cli.serving.utils import (
    GenerateManager,
    GenerationState,
    _StreamError,
    response_events_to_chunks,
)

from hymba.chat import Detokenizer, Listener, end_tokens, stop_tokens
from hymba.serving.requests import RequestError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase
    from transformers.utils.chat_parsing import ResponseParser

    from hymba.model import HymbaForCausalLM

DEFAULT_NEW_TOKENS = 1024
"""For a request that names no limit, as in transformers' server, when neither does the model's file."""


class Failure(_StreamError):
    """The end of an answer that went wrong, as transformers' handlers take it from the queue."""

    def __init__(self, error: Exception) -> None:
        # The handlers write the text between quotes into JSON as it is.
        text = " ".join(str(error).split()).replace("\\", "/").replace('"', "'")
        super().__init__(text or type(error).__name__)
        self.error = error


class _Over(Exception):
    """Raised inside `generate` to end it: the answer is complete, or nobody waits for it."""


class Answer:
    """What one request generates: a streamer for `generate`, and the source of the response's pieces.

    Pieces go to `queue`, then `None`, or a `Failure`.

    Attributes:
        total_tokens: generated so far, an end token included.
        ids: these tokens. text: theirs, without a stop string and what follows it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: list[int],
        *,
        stops: list[str],
        ends: list[int],
        parser: ResponseParser | None = None,
    ) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._parser = parser
        self._listener = Listener(Detokenizer(tokenizer, prompt), None, stops, ends, self._say)
        self._in_prompt = True
        self.cancelled = False
        self.ids: list[int] = []
        self.text = ""
        if parser is not None:
            self._events(parser.initial_events)

    @property
    def total_tokens(self) -> int:
        return len(self.ids)

    # On the thread that generates.

    def put(self, value: Tensor) -> None:
        """Takes the prompt, then each token."""
        if self.cancelled:
            raise _Over
        if self._in_prompt:
            self._in_prompt = False
            return
        for token in value.reshape(-1).tolist():
            self.ids.append(token)
            if self._listener.hear(token):
                raise _Over

    def end(self) -> None:
        """Asked by `generate` when it comes to an end by itself; `finish` does it for all ways to end."""

    def finish(self) -> None:
        """Hand on what was held back, and the end."""
        listener = self._listener
        if listener.stopped_at is None:
            listener.text += listener.detokenizer.flush()
            listener.show(len(listener.text))
        if self._parser is not None:
            # A call that the limit of tokens has cut is no call.
            with contextlib.suppress(ValueError, RuntimeError):
                self._events(self._parser.finalize()[1])
        self._pass(None)

    def fail(self, error: Exception) -> None:
        self._pass(Failure(error))

    def _say(self, text: str) -> None:
        self.text += text
        if self._parser is None:
            self._pass(text)
        else:
            self._events(self._parser.feed(text))

    def _events(self, events: list[dict[str, Any]]) -> None:
        for item in response_events_to_chunks(events):
            self._pass(item)

    def _pass(self, item: Any) -> None:
        # A server that shuts down closes its loop while the thread goes on.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)

    # On the event loop.

    def cancel(self) -> None:
        """Nobody waits any more: the next token ends the generation, and a request in the queue does not start."""
        self.cancelled = True


class Generation(GenerateManager):
    """transformers' manager of one model's thread, with `Answer` in place of its streamer.

    Args:
        max_model_len: tokens of prompt and answer together.
        default_new_tokens: for requests that name no limit, as far as the context has room.
    """

    def __init__(self, max_model_len: int, default_new_tokens: int = DEFAULT_NEW_TOKENS) -> None:
        super().__init__()
        self.max_model_len, self.default_new_tokens = max_model_len, default_new_tokens

    def generate_streaming(
        self,
        model: HymbaForCausalLM,
        processor: PreTrainedTokenizerBase,
        inputs: dict[str, Tensor],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: ResponseParser | None = None,
    ) -> tuple[asyncio.Queue[Any], Answer]:
        """Put a request in the queue; returns the answer's pieces as they come, and the answer.

        inputs: `input_ids` (1, length) and `attention_mask`. `gen_config.max_new_tokens` becomes what the context has
        room for when the request names no limit; its attribute `sampling_seed` is the request's seed.

        Raises:
            RequestError: a prompt or answer that does not fit into the context, beam search.
        """
        config = self._checked(gen_config, inputs["input_ids"])
        stops = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings or ())
        ends = sorted({*end_tokens(config, processor), *stop_tokens(processor, stops)})
        config.stop_strings, config.eos_token_id = None, ends or None
        if config.pad_token_id is None:
            config.pad_token_id = ends[0] if ends else 0
        seed = config.sampling_seed
        del config.sampling_seed
        answer = Answer(processor, inputs["input_ids"][0].tolist(), stops=stops, ends=ends, parser=response_parser)
        # Tokenizers add inputs for other models.
        tensors = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}

        def run() -> None:
            try:
                if not answer.cancelled:
                    with _seeded(seed, model.device):
                        model.generate(**tensors, generation_config=config, streamer=answer)
            except _Over:
                pass
            except Exception as error:
                answer.fail(error)
                return
            answer.finish()

        self.submit(run)
        return answer.queue, answer

    async def generate_non_streaming(
        self,
        model: HymbaForCausalLM,
        processor: PreTrainedTokenizerBase,
        inputs: dict[str, Tensor],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, list[int]]:
        """Wait for a whole answer; returns its text, the prompt's length and the generated ids.

        Raises:
            RequestError: as `generate_streaming`, and inputs that the model refuses.
        """
        queue, answer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Failure):
                    if isinstance(item.error, (ValueError, TypeError)):
                        # Settings that generate() refuses, or more than fits into memory.
                        raise RequestError(str(item.error)) from item.error
                    raise GenerationFailed(str(item.error)) from item.error
        except asyncio.CancelledError:
            answer.cancel()
            raise
        return answer.text, int(inputs["input_ids"].shape[-1]), answer.ids

    def _checked(self, config: GenerationConfig, ids: Tensor) -> GenerationConfig:
        """The request's settings with a limit that fits; changes `max_new_tokens` of `config` as well."""
        prompt, limit = int(ids.shape[-1]), self.max_model_len
        if not prompt:
            raise RequestError("the prompt has no tokens; allowed: at least one")
        beams, sequences = config.num_beams or 1, config.num_return_sequences or 1
        if beams > 1 or sequences > 1:
            raise RequestError(
                f"generation_config: num_beams={beams}, num_return_sequences={sequences}; allowed: 1 and 1",
                param="generation_config",
            )
        room = limit - prompt
        wanted = config.max_new_tokens
        if room < 1 or (wanted is not None and wanted > room):
            asked = f"{prompt} tokens of prompt" + ("" if wanted is None else f" and {wanted} of answer")
            raise RequestError(
                f"{asked} do not fit into the context of {limit} tokens; shorten the prompt or lower the limit of new "
                "tokens (the server's --max-model-len sets the context)",
                code="context_length_exceeded",
            )
        # The handlers compare it with the tokens of the answer to name the reason why it ended.
        config.max_new_tokens = min(room, self.default_new_tokens) if wanted is None else wanted
        return copy.deepcopy(config)


class GenerationFailed(RuntimeError):
    """`generate` raised something that is not the request's fault."""


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Any:
    """Random numbers of this request alone: what others draw stays as random as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class State(GenerationState):
    """transformers' register of managers, with one in it."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._one = generation

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generation:
        return self._one
