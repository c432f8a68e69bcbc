"""The ZAYA network over a token layout.

Invariants:
- One forward serves training, scoring and decoding; the layout says what differs.
- Parameter and buffer names are those of `transformers.ZayaForCausalLM`, so a state dict of either loads in the other.
- The residual stream stays in float32 (or wider, for a float64 policy).

Legend: T rows, R rows of interest, D hidden, V vocabulary, L layers, E router classes, K rank of the Markov head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels.dispatch import takes_triton
from ..kernels.linear import linear_float32, linear_float32_into
from ..kernels.residual import Scales, scale_residual, scale_residual_norm
from ..kernels.transfer import upload
from .arguments import is_whole, require, short
from .cca import Attention, Projection
from .experts import MixtureOfExperts, RMSNorm
from .layout import TokenLayout
from .linear import Linear
from .paged import PagedPlan
from .plan import PlainPlan, Plan
from .rotary import rotary_embedding
from .state import SequenceState
from .vocabulary import recomputed
from .zaya_config import ZayaConfig


@dataclass
class Routing:
    """Filled by a forward pass on request: expert_T and router probabilities probs_TE of each layer."""

    expert_LT: list[torch.Tensor]
    probs_LTE: list[torch.Tensor]


class ResidualScale(nn.Module):
    """Learned scale and bias of a branch and of the residual stream."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.hidden_states_scale, self.residual_scale = (nn.Parameter(torch.ones(size)) for _ in range(2))
        self.hidden_states_bias, self.residual_bias = (nn.Parameter(torch.zeros(size)) for _ in range(2))

    @property
    def scales(self) -> Scales:
        """As `kernels.residual` takes them."""
        return Scales(self.hidden_states_scale, self.hidden_states_bias, self.residual_scale, self.residual_bias)

    def forward(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
        return scale_residual(hidden_TD, residual_TD, self.scales)


class Layer(nn.Module):
    """Attention, then experts, each on a scaled residual."""

    def __init__(self, config: ZayaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MixtureOfExperts(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_residual_scale = ResidualScale(config.hidden_size)
        self.post_mlp_residual_scale = ResidualScale(config.hidden_size)

    def forward(
        self,
        residual_TD: torch.Tensor,
        router_TP: torch.Tensor | None,
        plan: Plan,
        rope: tuple[torch.Tensor, torch.Tensor],
        state: SequenceState | None,
        routing: Routing | None,
        normed_TD: torch.Tensor | None = None,
        after: RMSNorm | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns the residual stream, the router state, and the stream normed by `after`, which is computed in one pass with the
        residual.

        Args:
            after: the norm that follows this layer; None computes none, and None is returned in its place.
            normed_TD: the normed stream that the layer below returned; None in the first layer.
        """
        if normed_TD is None:
            normed_TD = self.input_layernorm(residual_TD)
        attended_TD = self.self_attn(normed_TD, plan, rope, state)
        norm = self.post_attention_layernorm
        residual_TD, normed_TD = scale_residual_norm(
            attended_TD, residual_TD, self.post_attention_residual_scale.scales, norm.weight, norm.eps
        )
        mixed_TD, router_TP, expert_T, probs_TE = self.mlp(normed_TD, router_TP)
        if routing is not None:
            routing.expert_LT.append(expert_T)
            routing.probs_LTE.append(probs_TE)
        scale = self.post_mlp_residual_scale
        if after is None:
            return scale(mixed_TD, residual_TD), router_TP, None
        residual_TD, normed_TD = scale_residual_norm(mixed_TD, residual_TD, scale.scales, after.weight, after.eps)
        return residual_TD, router_TP, normed_TD


class Embedding(nn.Embedding):
    """An embedding that draws no first values on the meta device. To draw none, torch imports its compiler: 90 MB, 1 s."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Trunk(nn.Module):
    """Everything between token ids and final hidden states (`model`)."""

    def __init__(self, config: ZayaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config)
        self.input_hidden_states_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.input_hidden_states_bias = nn.Parameter(torch.zeros(config.hidden_size))


class MarkovHead(nn.Module):
    """A bigram of rank K that lets each draft know the one before it (arXiv 2607.05147):

        bias_V = next_VK . previous_VK[token before]

    It is added to the logits of a mask row. The mask rows of a block are computed at once, so without it no draft knows
    which token was drawn before its own, nor the first one which token was sampled after the accepted ones.
    """

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.previous = Embedding(vocab_size, rank)
        self.next = nn.Linear(rank, vocab_size, bias=False)

    @property
    def rank(self) -> int:
        """K."""
        return self.next.in_features

    def forward(self, previous: torch.Tensor) -> torch.Tensor:
        """What the tokens `previous` (int64[...]) add to the logits of the mask rows after them, [..., V]."""
        return self.next(self.previous(previous))


class Policy(nn.Module):
    """A ZAYA policy: AR rows give p, mask rows give q.

    Attributes:
        config: the checkpoint's `ZayaConfig`, with its `diffusion` section.
        block_size: mask rows of a block the policy was converted for.
        draft_temperature: temperature at which drafts are drawn from q, as a multiple of the request's
            (`diffusion.draft_temperature` in config.json; 1 where it has none). Below 1 a draft is more often the most probable
            token of q. It changes how many drafts are accepted, and not what `lossless` and `coupled` sample. Training does not
            use it.
        mask_token_id: the token id of mask rows.
        tokenizer: the checkpoint's tokenizer, or None.
        hops: tokens the CCA convolutions look back.
        markov: the head that conditions a draft on the token before it; None where the policy has none.
        recompute_layers: keep only each layer's input for the backward pass and compute the layer again there.
    """

    def __init__(self, config: ZayaConfig) -> None:
        super().__init__()
        require(isinstance(config, ZayaConfig), "config", f"{short(config)} is no ZayaConfig", "give one, or use load_policy")
        self.config = config
        diffusion: dict[str, Any] = getattr(config, "diffusion", None) or {}
        self.block_size: int = diffusion.get("block_size", 16)
        self.draft_temperature: float = float(diffusion.get("draft_temperature", 1.0))
        self.mask_token_id: int = diffusion.get("mask_token_id", config.vocab_size - 1)
        self.converted = bool(diffusion)
        self.tokenizer: Any = None
        self.recompute_layers = False
        self.hops = config.cca_time0 + config.cca_time1 - 2
        self.windows = {kind: config.sliding_window if kind == "hybrid_sliding" else None
                        for kind in sorted(set(config.layer_types))}
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        rank: int = diffusion.get("markov_rank", 0)
        self.markov: MarkovHead | None = MarkovHead(config.vocab_size, rank) if rank else None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.embed_tokens.weight.device

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        eos = self.config.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    def pack(self) -> Policy:
        """Lay out the projections in memory for decoding; see `Projection.pack`."""
        for module in self.modules():
            if isinstance(module, Projection):
                module.pack()
        return self

    def plan(self, layout: TokenLayout, state: SequenceState | None = None) -> Plan:
        """The plan of a layout, on the policy's device; best from a layout that is still on the host."""
        layout = layout.to("cpu")
        if self.paged:
            return upload(self.paged_plan(layout, state), self.device)
        plan = self.plain_plan(layout, state)
        return plan if state is None else upload(plan, self.device)

    def plain_plan(self, layout: TokenLayout, state: SequenceState | None) -> PlainPlan:
        """The plan for torch of a host layout: on the host over a cache, else on the policy's device."""
        return PlainPlan.of(layout, state, self.hops, self.windows, self.device if state is None else torch.device("cpu"))

    def paged_plan(self, layout: TokenLayout, state: SequenceState | None) -> PagedPlan:
        """The plan for kernels on pages of a host layout, on the host."""
        config = self.config
        return PagedPlan.of(
            layout, state, self.hops, self.windows, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, dtype=self.dtype,
        )  # fmt: skip

    @property
    def paged(self) -> bool:
        """Attention and CCA run as kernels on the cache's pages."""
        return self.dtype != torch.float64 and takes_triton(self.model.embed_tokens.weight)

    def forward(
        self,
        layout: TokenLayout,
        state: SequenceState | None = None,
        routing: Routing | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """Final hidden states, hidden_TD, of every row; `head` turns the rows of interest into logits.

        Args:
            state: the cache; None without one.
            routing: filled with the experts chosen.
            plan: of this layout and state, where the caller has made it.
        """
        plan = self.plan(layout, state) if plan is None else plan
        trunk = self.model
        hidden_TD = trunk.embed_tokens(layout.token_T)
        hidden_TD = (hidden_TD + trunk.input_hidden_states_bias) * trunk.input_hidden_states_scale
        ropes = {kind: tuple(x[0] for x in trunk.rotary_emb(hidden_TD, layout.position_T[None], kind))
                 for kind in self.windows}
        residual_TD = hidden_TD.to(torch.promote_types(self.dtype, torch.float32))
        router_TP = normed_TD = None
        for kind, layer, after in zip(self.config.layer_types, trunk.layers, self._norms_after(plan), strict=True):
            inputs = residual_TD, router_TP, plan, ropes[kind], state, routing, normed_TD, after
            residual_TD, router_TP, normed_TD = recomputed(layer, *inputs) if self.recompute_layers else layer(*inputs)
        return trunk.norm(residual_TD) if normed_TD is None else normed_TD

    def _norms_after(self, plan: Plan | PagedPlan) -> list[RMSNorm | None]:
        """The norm after each layer, where kernels take it in with the layer's residual. Elsewhere each layer norms its own
        input: a norm of another layer may lie in another shard."""
        if not isinstance(plan, PagedPlan):
            return [None] * len(self.model.layers)
        layers = [layer for layer in self.model.layers if isinstance(layer, Layer)]
        return [*(layer.input_layernorm for layer in layers[1:]), self.model.norm]

    def head(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """logits_RV of the given rows: p's of clean rows; of mask rows q's, before the Markov head. float32 where the policy is
        narrower."""
        head = self.lm_head
        if head.weight.dtype.itemsize > 2:
            return head(hidden_RD)
        return linear_float32(hidden_RD.to(head.weight.dtype), head.weight, head.bias)

    def head_into(self, hidden_RD: torch.Tensor, logits_RV: torch.Tensor) -> None:
        """Write the logits of `head` into `logits_RV`, contiguous and of their dtype. Without gradients."""
        head = self.lm_head
        if head.weight.dtype.itemsize > 2 or head.bias is not None:
            logits_RV.copy_(self.head(hidden_RD))
        else:
            linear_float32_into(hidden_RD.to(head.weight.dtype), head.weight, logits_RV)

    def draft_head(self, hidden_RD: torch.Tensor, previous_R: torch.Tensor) -> torch.Tensor:
        """logits_RV of q for mask rows whose preceding tokens are `previous_R` (int64)."""
        return self.conditioned(self.head(hidden_RD), previous_R)

    def conditioned(self, logits_RV: torch.Tensor, previous_R: torch.Tensor) -> torch.Tensor:
        """q's logits from `head`'s of mask rows and the tokens before them: what the Markov head adds."""
        return logits_RV if self.markov is None else logits_RV + self.markov(previous_R)

    def logprobs(
        self, prompt_tokens: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[torch.Tensor]:
        """log p of each token of a batch of samples, differentiable; see `model.logprobs.logprobs`."""
        from .logprobs import logprobs

        return logprobs(self, prompt_tokens, tokens, temperature)

    @torch.no_grad()
    def add_markov(self, rank: int, generator: torch.Generator) -> None:
        """Give the policy a Markov head that changes no logit until it is trained; one it has is replaced."""
        require(is_whole(rank) and rank > 0, "rank", f"{short(rank)} is no whole number from 1", "give the rank of the head")
        head = MarkovHead(self.config.vocab_size, rank)
        head.previous.weight.normal_(generator=generator)
        head.next.weight.zero_()
        self.markov = head.to(device=self.device, dtype=self.dtype)
        self.config.diffusion = {**(getattr(self.config, "diffusion", None) or {}), "markov_rank": rank}

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Policy:
        """Fresh weights for training from nothing: normal projections, unit scales and key temperatures."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith(("scale", "norm.weight", "layernorm.weight", "temp")):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, std, generator=generator)
        return self
