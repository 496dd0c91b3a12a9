"""`HymbaModel` and `HymbaForCausalLM`: the only readers of the configuration."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hymba.cache import HymbaCache, as_hymba_cache
from hymba.config import HymbaConfig, check_attention_implementation
from hymba.generation import HymbaGenerationMixin
from hymba.inputs import Compaction, InputError, check_ids, check_keywords, check_mask, documents, readable
from hymba.layout import LayerSpec
from hymba.loading import CheckpointMixin
from hymba.nn import AttentionHeads, Collected, HymbaBlock, LayerState, MetaTokens, PrefixRun, RMSNorm, SharedKV, Span
from hymba.nn.init import initialise
from hymba.ops.recompute import recomputed
from hymba.training import ActivationMixin, can_fuse_loss, fused_loss

# What transformers' collators, Trainer and generate() send along and the model has no use for.
_IGNORED = frozenset(
    "cu_seq_lens_k max_length_q max_length_k max_seq_lens cache_position token_type_ids is_first_iteration "
    "num_items_in_batch output_router_logits".split()
)
_FORWARD = (
    "input_ids attention_mask position_ids past_key_values inputs_embeds labels use_cache logits_to_keep "
    "output_attentions output_hidden_states seq_idx cu_seq_lens_q return_logits return_dict"
).split()

# Guards the count of open frozen_meta_state() scopes, which threads may share.
_SCOPES = threading.Lock()


def _mixer_arguments(config: HymbaConfig, spec: LayerSpec) -> dict[str, Any]:
    """Keyword arguments of a layer's mixer."""
    arguments: dict[str, Any] = {"bias": config.mamba_proj_bias}
    if spec.attends:
        heads, kv_heads, v_head_dim = config.attention_shape(spec)
        arguments |= {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": config.head_dim,
            "v_head_dim": v_head_dim,
            "window": spec.window,
            "borrows_kv": spec.kv_from is not None,
            "rope_base": config.rope_base,
            "qk_norm": config.kq_norm,
            "dropout": float(config.attention_dropout),
        }
    if spec.scans:
        arguments |= {
            "expand": config.mamba_expand,
            "d_state": config.mamba_d_state,
            "d_conv": config.mamba_d_conv,
            "dt_rank": int(config.mamba_dt_rank),
            "ssm": spec.ssm,
            "ssm_head_dim": spec.ssm_head_dim,
            "ssm_groups": spec.ssm_groups,
        }
    if spec.mixer == "hybrid":
        arguments["fusion"] = spec.fusion
    return arguments


class HymbaPreTrainedModel(CheckpointMixin, ActivationMixin, PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = HymbaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HymbaBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # Nothing to roll back an SSM state with: generate() refuses assisted decoding.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            initialise(
                self,
                std=self.config.initializer_range,
                embedding_std=self.config.embedding_initializer_range,
                skip=lambda parameter: getattr(parameter, "_is_hf_initialized", False),
            )

    def initialize_weights(self) -> None:
        """Initialise every parameter that was not loaded, by the table in `hymba.nn.init`."""
        self._init_weights(self)
        for module in self.modules():
            module._is_hf_initialized = True

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        check_attention_implementation(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self._set_attention()

    def _set_attention(self) -> None:
        eager = self.config._attn_implementation == "eager"
        for module in self.modules():
            if isinstance(module, AttentionHeads):
                module.implementation = "eager" if eager else "sdpa"


class HymbaModel(HymbaPreTrainedModel):
    """The network without its head.

    The meta tokens are run once per call or cache, at batch 1, and every row starts from the state that they leave
    behind (`hymba.nn.PrefixRun`); this is exactly the prepended form of the paper's section 2.3.
    """

    # A language model's checkpoint loads into the bare model.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: HymbaConfig) -> None:
        # Fields may have been assigned since the configuration was made.
        config.validate_architecture()
        super().__init__(config)
        specs = config.layers
        self.lenders = tuple(spec.kv_from for spec in specs)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.meta_tokens = None
        if config.num_memory_tokens:
            self.meta_tokens = MetaTokens(num_tokens=config.num_memory_tokens, hidden_size=config.hidden_size)
        self.layers = nn.ModuleList(
            HymbaBlock(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size if spec.ffn else None,
                activation=config.mlp_hidden_act,
                eps=config.rms_norm_eps,
                kind=spec.mixer,
                **_mixer_arguments(config, spec),
            )
            for spec in specs
        )
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = self.selective_checkpointing = False
        self._checkpoint_every = 1
        self._frozen: dict[Any, list[LayerState]] | None = None
        self._open_scopes = 0
        self.post_init()
        self._set_attention()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    # Meta tokens.

    def meta_state(self, device: torch.device | None = None) -> list[LayerState]:
        """The state of every layer after the meta tokens, batch 1, with gradients to meta tokens and weights.

        Computed from the current weights at each call; inside `frozen_meta_state()` once, unless gradients are on.

        Args:
            device: where the text is, for autocast's sake; by default where the meta tokens are.
        """
        prefix = self._prefix(device)
        return prefix.finish() if isinstance(prefix, PrefixRun) else prefix

    def _prefix(self, device: torch.device | None) -> list[LayerState] | PrefixRun:
        """`meta_state`, or what gives it layer by layer."""
        if self.meta_tokens is None:
            return [LayerState() for _ in self.layers]
        if self._frozen is None or torch.is_grad_enabled():
            return self._run_meta_tokens()
        kind = (self.meta_tokens.weight.device if device is None else device).type
        key = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if key not in self._frozen:
            self._frozen[key] = self._run_meta_tokens().finish()
        return self._frozen[key]

    def _run_meta_tokens(self) -> PrefixRun:
        assert self.meta_tokens is not None
        tokens, dtype = self.meta_tokens(), self.embed_tokens.weight.dtype
        # As wide as text, should the file hold them in another dtype.
        tokens = tokens.to(dtype) if dtype.is_floating_point else tokens
        return PrefixRun(self.layers, tokens, lenders=self.lenders)

    @contextlib.contextmanager
    def frozen_meta_state(self) -> Iterator[None]:
        """Keep the meta state between calls, for as long as this scope is open.

        Promise: nothing changes the weights, adapters or hooks inside. Outside such a scope the meta state is computed
        anew for every cache and every call without one, because no counter shows that weights have changed.
        """
        with _SCOPES:
            self._open_scopes += 1
            self._frozen = {} if self._frozen is None else self._frozen
        try:
            yield
        finally:
            with _SCOPES:
                self._open_scopes -= 1
                if not self._open_scopes:
                    self._frozen = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside a scope is not in it: nobody would close the copy's.
        return {**self.__dict__, "_frozen": None, "_open_scopes": 0}

    # Forward.

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run text through the network.

        Args:
            input_ids: (b, l) token ids; or `inputs_embeds` (b, l, hidden_size).
            attention_mask: (b, past + l), 1 for real tokens, 0 for padding, which may stand anywhere. A masked
                position changes nothing and gets zeros.
            position_ids: text positions from 0. Without a cache they may start again at each document of a packed
                row; with a cache they are counted by it and must agree.
            past_key_values: a `HymbaCache`, or an empty stock cache, which is turned into one.
            use_cache: return a cache; by default when not training and nothing is packed.
            seq_idx, cu_seq_lens_q: documents of packed rows, as transformers' padding-free collators send them.
            output_attentions: attention weights (b, heads, l, meta + past + l) per layer, meta columns first; `None`
                for a layer without attention heads.

        Returns:
            `last_hidden_state` (b, l, hidden_size): one row per text token, as in all of the output.
        """
        check_keywords(kwargs, _IGNORED, _FORWARD, "HymbaModel.forward")
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.hidden_size or 0 in inputs_embeds.shape:
            raise InputError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; expected (batch, tokens from 1, "
                f"{self.config.hidden_size})"
            )
        rows, length = inputs_embeds.shape[:2]
        device = inputs_embeds.device

        packed = seq_idx is not None or cu_seq_lens_q is not None
        cache = None if past_key_values is None else as_hymba_cache(past_key_values, self.config)
        if cache is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training and not packed and position_ids is None
            if use_cache:
                cache = HymbaCache(self.config)
        if packed and cache is not None:
            raise InputError(
                "seq_idx and cu_seq_lens_q describe packed documents, which have no cache; set use_cache=False"
            )

        columns = 0 if cache is None else cache.columns
        compaction = None
        if attention_mask is not None:
            given = past_key_values is None
            check_mask(attention_mask, rows=rows, columns=columns + length, need_real=given)
            if cache is not None and readable(attention_mask):
                cache.check_mask(attention_mask)
            new = attention_mask[:, columns:]
            if not (readable(new) and bool(new.all())):
                compaction = Compaction.of(new.to(device))
                inputs_embeds = compaction.pack(inputs_embeds)
        lengths = None if compaction is None else compaction.lengths

        span = self._span(cache, rows, length, device, lengths, compaction, position_ids, seq_idx, cu_seq_lens_q)
        start = self._start(cache, rows, device)
        if cache is not None:
            cache.interrupted = True
        x, hidden, weights = self._run(inputs_embeds, start, span, cache, output_hidden_states, output_attentions)
        if cache is not None:
            cache.advance(span, None if compaction is None else compaction.valid)
            cache.interrupted = False

        x = self.final_norm(x)
        if hidden is not None:
            hidden.append(x)
        if compaction is not None:
            x = compaction.unpack(x)
            hidden = None if hidden is None else [compaction.unpack(h) for h in hidden]
        attentions = None
        if weights is not None:
            valid = None if cache is None else cache.valid_columns()
            attentions = tuple(None if w is None else self._by_column(w, span, compaction, valid) for w in weights)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if use_cache is not False else None,
            hidden_states=None if hidden is None else tuple(hidden),
            attentions=attentions,
        )

    def _span(
        self,
        cache: HymbaCache | None,
        rows: int,
        length: int,
        device: torch.device,
        lengths: Tensor | None,
        compaction: Compaction | None,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        cu_seq_lens: Tensor | None,
    ) -> Span:
        meta = self.config.num_memory_tokens
        if cache is not None:
            span = cache.span(length, lengths, rows=rows, device=device)
            if position_ids is not None and position_ids.device.type == "cpu":
                self._check_positions(position_ids, span, compaction)
            return span
        span = Span.following(length, lengths=lengths, offset=meta, last=True, device=device)
        packed = documents(
            rows=rows,
            length=length,
            device=device,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens=cu_seq_lens,
            compaction=compaction,
        )
        if packed is not None:
            span.positions, span.seq_idx = packed
        return span

    @staticmethod
    def _check_positions(position_ids: Tensor, span: Span, compaction: Compaction | None) -> None:
        given = position_ids.reshape(-1, position_ids.shape[-1])
        if given.shape[1] != span.length:
            raise InputError(f"position_ids has shape {tuple(position_ids.shape)}; expected (batch, {span.length})")
        expected = span.positions.cpu()
        if compaction is not None:
            valid = compaction.valid.cpu()
            expected = compaction.unpack(expected.expand(valid.shape[0], -1))
            given, expected = torch.where(valid, given, 0), torch.where(valid, expected, 0)
        if not bool((given == expected).all()):
            raise InputError(
                f"position_ids={position_ids.tolist()} are not the positions that the cache counts, "
                f"{expected.tolist()}; leave them out, or set use_cache=False for packed documents"
            )

    def _start(self, cache: HymbaCache | None, rows: int, device: torch.device) -> Callable[[int], LayerState]:
        """Gives the state that a layer starts from, when the layer is reached."""
        first = cache is None or not cache.started
        prefix = self._prefix(device) if first else None

        def start(i: int) -> LayerState:
            own = None if prefix is None else prefix[i]
            if cache is None:
                assert own is not None
                return own
            if own is not None:
                cache.begin(i, own, rows)
            return cache.functional(i, own) if torch.is_grad_enabled() else cache.layers[i]

        if cache is not None:
            cache.started = True
        return start

    def _run(
        self,
        x: Tensor,
        start: Callable[[int], LayerState],
        span: Span,
        cache: HymbaCache | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> tuple[Tensor, list[Tensor] | None, list[list[Tensor] | None] | None]:
        """All layers; the hidden states before each and the attention weights with their key positions."""
        want_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        want_weights = self.config.output_attentions if output_attentions is None else output_attentions
        hidden: list[Tensor] | None = [] if want_hidden else None
        weights: list[list[Tensor] | None] | None = [] if want_weights else None
        # Keys and values go with their last borrower, and keep no projection alive that nothing else keeps.
        last = {lender: i for i, lender in enumerate(self.lenders) if lender is not None}
        shared: dict[int, SharedKV] = {}
        # A compiler decides by itself what backward makes again.
        selective = self.selective_checkpointing and self.training and torch.is_grad_enabled()
        selective = selective and not torch.compiler.is_compiling()
        lean = not torch.is_grad_enabled() or (self.gradient_checkpointing and self.training)
        for i, layer in enumerate(self.layers):
            if hidden is not None:
                hidden.append(x)
            lender = self.lenders[i]
            collected = None if weights is None else Collected()
            call = partial(layer.__call__, span=span, weights=collected)
            if self.gradient_checkpointing and self.training and i % self._checkpoint_every == 0:
                x, state, kv = self._gradient_checkpointing_func(
                    partial(call, kv=None if lender is None else shared[lender]), x, start(i)
                )
            else:
                first = start(i)
                with recomputed() if selective else contextlib.nullcontext():
                    x, state, kv = call(x, first, kv=None if lender is None else shared[lender])
            if i in last:
                assert kv is not None
                shared[i] = kv.apart() if lean and not span.columns else kv
            elif lender is not None and last[lender] == i:
                del shared[lender]
            if cache is not None:
                cache.put(i, state)
            if weights is not None and collected is not None:
                # A layer without attention heads has none.
                weights.append(None if kv is None else [collected.tensors[0], kv.visibility.key])
            del state, kv
        return x, hidden, weights

    def _by_column(
        self, weights_and_keys: list[Tensor], span: Span, compaction: Compaction | None, valid: Tensor | None
    ) -> Tensor:
        """Attention weights by input column: (b, h, l, meta + columns), zero where nothing is seen."""
        weights, positions = weights_and_keys
        b, heads, length, keys = weights.shape
        meta = keys - positions.shape[1]
        total = span.columns + span.length
        text = weights[..., meta:]
        if span.seq_idx is None:
            ranks = positions.clamp(min=0).expand(b, -1)[:, None, None].expand(b, heads, length, -1).to(weights.device)
            text = weights.new_zeros(b, heads, length, total).scatter_add(3, ranks, text)
        # Keys of packed rows stand in order already, and their positions start again at each document.
        if compaction is not None:
            valid = compaction.valid if valid is None else valid
        if valid is not None:
            valid = valid.to(weights.device)
            column = (valid.cumsum(dim=1) - 1).clamp(min=0)
            text = text.gather(3, column[:, None, None].expand(b, heads, length, -1)) * valid[:, None, None]
        out = torch.cat([weights[..., :meta], text], dim=3)
        if compaction is not None:
            out = compaction.unpack(out.transpose(1, 2)).transpose(1, 2)
        return out


class HymbaForCausalLM(HymbaPreTrainedModel, HymbaGenerationMixin):
    """Hymba with a language-model head; logits in float32."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.model = HymbaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._fused_loss = False
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def use_fused_loss(self, enable: bool = True) -> None:
        """In training mode, leave the logits out where labels are given (`return_logits` of `forward`)."""
        self._fused_loss = enable

    def frozen_meta_state(self) -> contextlib.AbstractContextManager[None]:
        """`HymbaModel.frozen_meta_state`."""
        return self.model.frozen_meta_state()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`HymbaModel.forward`, then the head.

        Args:
            labels: (b, l) targets, -100 to leave out; shifted inside. The loss is the mean over targets, or their sum
                over `num_items_in_batch` when the Trainer passes it.
            logits_to_keep: logits of the last n positions only (0 for all), or of the positions in a tensor.
            return_logits: False leaves the logits out when there are labels: the loss is then computed some rows at a
                time, and the logits of the whole batch never exist. By default they are left out in training mode
                after `use_fused_loss()`, and returned otherwise.

        Returns:
            `logits` (b, kept, vocab) float32 or `None` and, with labels, `loss`.
        """
        check_keywords(kwargs, _IGNORED | {"shift_labels"}, _FORWARD, "HymbaForCausalLM.forward")
        loss_kwargs = {k: kwargs.pop(k) for k in ("num_items_in_batch", "shift_labels") if k in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            **kwargs,
        )
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise InputError(f"logits_to_keep={logits_to_keep}: allowed: integers from 0 (all), or a tensor of indices")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        if labels is not None and labels.shape != hidden.shape[:2]:
            expected = tuple(hidden.shape[:2])
            raise InputError(f"labels has shape {tuple(labels.shape)}; expected {expected}, one target for each logit")
        if return_logits is None:
            return_logits = not (self._fused_loss and self.training)
        loss = logits = None
        if labels is not None and not return_logits and can_fuse_loss(self.lm_head, self.loss_function):
            loss = fused_loss(hidden, self.lm_head.weight, labels, **loss_kwargs)
        else:
            logits = self.lm_head(hidden).float()
            if labels is not None:
                vocabulary = self.lm_head.out_features
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **loss_kwargs)
                logits = logits if return_logits else None
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
