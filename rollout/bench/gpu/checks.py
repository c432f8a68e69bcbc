"""Every op on this device against its reference, and what must be equal to the last bit.

Invariants:
- References run in float32 (sums of samplers in float64) on the same inputs; errors are |got - expected| / |expected| over
  the whole tensor, and NaN never passes. Fresh tensors of a kernel hold NaN until they are written.
- Inputs are random, drawn anew for every check.

Legend: S sequences, T rows, D hidden, M drafts, R = M + 1, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ....kernels import attention, cca, experts, philox, residual, verify
from ....kernels.cca import CCAInputs, Pools
from ....kernels.dispatch import using
from ....kernels.experts import RouterWeights
from ....model.layout import DecodeRows
from ....model.policy import Policy
from ...cache import BlockTable
from ...engine import Engine, EngineConfig
from ...schedule import Schedule
from ...types import RolloutRequest, SamplingParams
from .cutoff_check import check_cutoffs
from .parts import FilledCache, ForwardPass, force_experts, layers, random_policy
from .sizes import Sizes
from .timing import graph_pool
from .whole_runs import captured_and_eager

Check = Callable[[Sizes, torch.device], dict[str, Any]]
_FLOAT32, _BFLOAT16 = 1e-4, 1e-2


@contextmanager
def _poisoned() -> Iterator[None]:
    """In this context fresh tensors hold NaN, or the largest integer: torch fills them in its deterministic mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return float(difference)


def _verdict(errors: dict[str, float], factor: float = 1.0) -> dict[str, Any]:
    """Errors by name, which says the dtype; those of bfloat16 may be larger."""
    limits = {name: factor * (_BFLOAT16 if "bfloat16" in name else _FLOAT32) for name in errors}
    worst = max(errors.values(), key=lambda error: error if error == error else float("inf"))
    return {"errors": errors, "worst": worst, "ok": all(errors[name] <= limit for name, limit in limits.items())}


def _wide(arguments: Any) -> Any:
    """The same in float32; named tuples of weights stay what they are."""
    if isinstance(arguments, torch.Tensor):
        return arguments.to(torch.float32, copy=True) if arguments.is_floating_point() else arguments
    if isinstance(arguments, tuple):
        made = [_wide(each) for each in arguments]
        return type(arguments)(*made) if hasattr(arguments, "_fields") else tuple(made)
    return arguments


def _both(op: Any, function: str, arguments: Any) -> tuple[Any, Any]:
    """The results of an op, and of its reference in float32, for the same arguments."""
    return getattr(op, function)(*arguments), getattr(op.reference, function)(*_wide(arguments))


def _dtypes(sizes: Sizes) -> tuple[torch.dtype, ...]:
    return tuple(dict.fromkeys((sizes.dtype, torch.float32)))


def check_philox(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The generator's bits are those of the reference on a CPU."""
    seed, position = torch.randint(0, 2**62, (50, 1)), torch.randint(0, 2**32, (1, 7))
    vocab = sizes.zaya.vocab_size
    uniform = philox.uniform(seed.to(device), position.to(device), 1).cpu()
    noise = philox.gumbel(seed[:2, 0].to(device), position[0, :2].to(device), vocab, 2).cpu()
    errors = {
        "uniform": float((uniform - philox.reference.uniform(seed, position, 1)).abs().max()),
        "gumbel": float((noise - philox.reference.gumbel(seed[:2, 0], position[0, :2], vocab, 2)).abs().max()),
    }
    return _verdict(errors) | {"ok": errors["uniform"] == 0 and errors["gumbel"] <= 2e-6}


def check_residual(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Scaled residual and norm."""
    width = sizes.zaya.hidden_size
    errors: dict[str, float] = {}
    for dtype in _dtypes(sizes):
        for rows in sizes.kernel_rows:
            hidden, stream = (torch.randn(rows, width, device=device) for _ in range(2))
            *scales, norm = (torch.randn(width, device=device).to(dtype) for _ in range(5))
            arguments = hidden.to(dtype), stream, residual.Scales(*scales), norm, 1e-5
            got, expected = _both(residual, "scale_residual_norm", arguments)
            errors |= {f"{dtype} {rows} {name}": _error(*pair) for name, *pair in zip(("stream", "norm"), got, expected)}
    return _verdict(errors)


def router_weights(config: Any, dtype: torch.dtype, device: torch.device) -> RouterWeights:
    """Random router weights that tell rows apart."""
    d, p, classes = config.hidden_size, config.router_hidden_size, config.num_experts + 1

    def matrix(out: int, into: int) -> torch.Tensor:
        return (torch.randn(out, into, device=device) * 2 / into**0.5).to(dtype)

    def vector(size: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(size, device=device)).to(dtype)

    return RouterWeights(
        matrix(p, d), vector(p), vector(p), vector(p), matrix(p, p), vector(p), matrix(p, p), vector(p),
        matrix(classes, p), torch.zeros(classes, dtype=torch.float32, device=device),
    )  # fmt: skip


def check_experts(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Router and grouped experts, skipped rows among them."""
    config, disagree = sizes.zaya, 0.0
    errors: dict[str, float] = {}
    d, f, e = config.hidden_size, config.moe_intermediate_size, config.num_experts
    for dtype in _dtypes(sizes):
        weights = router_weights(config, dtype, device)
        gate_up, down = (
            (torch.randn(e, out, into, device=device) / into**0.5).to(dtype) for out, into in ((2 * f, d), (d, f))
        )
        for rows in sizes.kernel_rows:
            x = torch.randn(rows, d, device=device).to(dtype)
            state = torch.randn(rows, config.router_hidden_size, device=device).to(dtype)
            got, expected = _both(experts, "route", (x, state, weights, 1e-5))
            errors[f"{dtype} {rows} probs"] = _error(got[3], expected[3])
            best = expected[3].topk(2, dim=-1).values
            # In 16 bits three layers round: experts 0.07 apart have changed places.
            clear = best[:, 0] - best[:, 1] > (0.05 if dtype == torch.float32 else 0.15)
            disagree = max(disagree, float((got[0] != expected[0])[clear].float().mean()) if clear.any() else 0.0)
            chosen = torch.randint(0, e + 1, (rows,), device=device)
            weight = torch.rand(rows, device=device).to(dtype) + 0.5
            errors[f"{dtype} {rows} experts"] = _error(*_both(experts, "route_top1", (x, chosen, weight, gate_up, down)))
    verdict = _verdict(errors, 4)  # three layers of the router
    return verdict | {"other_expert_where_clear": disagree, "ok": verdict["ok"] and disagree == 0.0}


def _small(sizes: Sizes) -> Sizes:
    """Two layers of the policy's own widths."""
    kinds = ["hybrid", "hybrid"]
    return replace(sizes, config={**sizes.config, "num_hidden_layers": 2, "layer_types": kinds})


def _pack(
    sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> tuple[Policy, FilledCache, list[BlockTable], list[DecodeRows]]:
    """A policy of two layers, a filled cache, and a ragged decode step."""
    policy = random_policy(_small(sizes).zaya, dtype, device)
    for layer in layers(policy):
        layer.self_attn.qk_norm.temp.uniform_(1, 2)
    block, longest = policy.block_size, max(sizes.contexts)
    starts = [longest, 0, longest // 3, 1, longest - 1]
    filled = FilledCache(policy, sum(starts) + len(starts) * 2 * block, len(starts), sizes.page_size, block + 1)
    plans = []
    for s, start in enumerate(starts):
        clean = torch.randint(0, policy.mask_token_id, (1 + s * (block - 1) // 4,)).tolist()
        levels = tuple(sorted({1, len(clean)})) if s % 2 == 0 else ()
        plans.append(DecodeRows(clean, start, levels, block if levels else 0))
    return policy, filled, filled.held(starts, 2 * block), plans


def check_attention(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Paged attention of a ragged decode step."""
    errors = {}
    for dtype in _dtypes(sizes):
        policy, filled, held, plans = _pack(sizes, device, dtype)
        step = ForwardPass.of(policy, filled.cache, held, plans)
        config, pools, T = policy.config, step.view.pools(0), step.layout.rows
        d = config.head_dim
        q, k, v = (
            torch.randn(T, heads, d, device=device).to(dtype)
            for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        )
        rows = step.paged.rows[config.layer_types[0]]
        got, expected = _both(attention, "paged_attend", (q, k, v, pools.k, pools.v, rows, d**-0.5))
        errors[str(dtype)] = _error(got, expected)
    return _verdict(errors)


def check_cca(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Convolutions, means, norm, RoPE, and what is kept in cache and tail."""
    errors: dict[str, float] = {}
    for dtype in _dtypes(sizes):
        policy, filled, held, plans = _pack(sizes, device, dtype)
        step = ForwardPass.of(policy, filled.cache, held, plans)
        module = layers(policy)[0].self_attn
        hidden_TD = torch.randn(step.layout.rows, policy.config.hidden_size, device=device).to(dtype)
        x, current, delayed = module.qkv_proj(hidden_TD)
        rope: Any = [y[0] for y in policy.model.rotary_emb(x, step.layout.position_T[None], policy.config.layer_types[0])]
        places, pools = step.paged.places, step.view.pools(0)
        weights = module.qkv_proj.weights(module.qk_norm.temp)
        wide_pools = _wide(pools)
        arguments = CCAInputs(x, current, delayed, weights, *rope), places
        op: Any = cca
        got, expected = op.cca(*arguments, pools), op.reference.cca(*_wide(arguments), wide_pools)
        kept, tail = (at[at >= 0].long() for at in (places.write_T, places.tail_T))
        at = kept, kept, tail, tail
        stored = [[pool[i] for pool, i in zip(each, at)] for each in (pools, wide_pools)]
        named = zip(("q", "k", "v", *(f"pool {name}" for name in Pools._fields)), (*got, *stored[0]), (*expected, *stored[1]))
        errors |= {f"{dtype} {name}": _error(*pair) for name, *pair in named}
    return _verdict(errors)


def check_verify(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Draws, acceptance and residual over the whole vocabulary: tokens are those of the reference."""
    vocab, s, m = sizes.zaya.vocab_size, 8, 3
    q = torch.randn(s, m, vocab, device=device)
    p = torch.cat([q + 0.5 * torch.randn_like(q), torch.randn(s, 1, vocab, device=device)], dim=1)
    temperature = torch.full((s,), 0.8, dtype=torch.float64, device=device)
    seed, anchor = (torch.randint(0, 2**31, (s,), device=device) for _ in range(2))
    count, excluded = torch.arange(s, device=device) % (m + 1), vocab - 1
    drafts = verify.reference.sample_cdf(q, temperature, seed, anchor, excluded)
    draft = drafts.token_SR.where(torch.arange(m, device=device) < count[:, None], -1)
    mix = torch.full((s,), 0.5, dtype=torch.float64, device=device)
    cold = temperature / 2
    colder = verify.reference.sample_cdf(q, cold, seed, anchor, excluded)
    calls: dict[str, tuple[Any, ...]] = {
        "sample_gumbel": (p, temperature, seed, anchor),
        "sample_cdf": (q, temperature, seed, anchor, excluded),
        "verify_rejection": (p, q, drafts.lse_SR, draft, count, temperature, seed, anchor, excluded),
        "verify_rejection mixed": (p, q, drafts.lse_SR, draft, count, temperature, seed, anchor, excluded, mix),
        "verify_rejection colder": (
            p, q, colder.lse_SR, colder.token_SR, count, temperature, seed, anchor, excluded, mix, cold
        ),
    }
    errors, other = {}, {}
    for name, arguments in calls.items():
        function = name.split()[0]
        got, expected = (getattr(module, function)(*arguments) for module in (verify, verify.reference))
        same = got.token_SR == expected.token_SR
        other[name] = float((~same).float().mean())
        errors[name] = _error(got.logprob_SR[same], expected.logprob_SR[same])
    # A sum in another order may change a draw that falls between two tokens.
    verdict = _verdict(errors)
    return verdict | {"other_tokens": other, "ok": verdict["ok"] and max(other.values()) <= 0.05}


def check_policy(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Logits of a ragged step through two layers, kernels against plain torch."""
    errors = {}
    for dtype in _dtypes(sizes):
        policy, filled, held, plans = _pack(sizes, device, dtype)
        # Rounding must not send a row to another expert.
        force_experts(policy)
        kept = [pool.clone() for pool in (filled.cache.k, filled.cache.v, filled.cache.x, filled.cache.delayed)]
        got = policy.head(ForwardPass.of(policy, filled.cache, held, plans).run())
        for pool, before in zip((filled.cache.k, filled.cache.v, filled.cache.x, filled.cache.delayed), kept):
            pool.copy_(before)
        with using("reference"):
            expected = policy.head(ForwardPass.of(policy, filled.cache, held, plans).run())
        errors[str(dtype)] = _error(got, expected)
    return _verdict(errors, 5)


def check_batch(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """`batch_invariant`: a sequence's logits alone and among others, to the last bit; and free of it, for comparison."""
    policy = random_policy(_small(sizes).zaya, sizes.dtype, device)
    batch, context, block = max(sizes.batches[-2:]), min(sizes.contexts), policy.block_size
    filled = FilledCache(policy, batch * (context + 4 * block), batch, sizes.page_size, block + 1)
    held = filled.held([context] * batch, 2 * block)
    tokens = torch.randint(0, policy.mask_token_id, (batch, block)).tolist()
    plans = [DecodeRows(row, context, (1,), block) for row in tokens]
    equal = {}
    for name, invariant in (("batch_invariant", True), ("free", False)):
        with using(batch_invariant=invariant):
            together = policy.head(ForwardPass.of(policy, filled.cache, held, plans).run()).unflatten(0, (batch, -1))
            equal[name] = all(
                torch.equal(policy.head(ForwardPass.of(policy, filled.cache, [held[i]], [plans[i]]).run()), together[i])
                for i in sorted({0, batch // 2, batch - 1})
            )
    return {"bits_equal": equal, "batch": batch, "ok": equal["batch_invariant"]}


def check_captured(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """A captured step gives the bits of an eager one, also for tokens it was not captured with."""
    policy, filled, held, plans = _pack(sizes, device, sizes.dtype)
    step = ForwardPass.of(policy, filled.cache, held, plans)
    out: list[torch.Tensor] = []

    def run() -> None:
        out[:] = [policy.head(step.run())]

    run()
    if device.type != "cuda":
        return {"ok": True, "captured": False}
    graph = graph_pool().capture(run)
    captured = out[0]
    step.layout.token_T.copy_(torch.randint_like(step.layout.token_T, policy.mask_token_id))
    graph.replay()
    replayed = captured.clone()
    run()
    return {"ok": bool(torch.equal(replayed, out[0])), "captured": True, "error": _error(replayed, out[0])}


def check_coupled(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The engine on this device: `coupled` drafts change no token of `ar`, under `batch_invariant`. Beside it, how many
    samples plain torch makes alike: another rounding may move a token."""
    policy = random_policy(_small(sizes).zaya, torch.float32, device)
    many, length = (8, 24) if device.type == "cuda" else (2, 3)
    runs: dict[str, tuple[Any, Schedule, Any]] = {
        "ar": ("ar", Schedule("ar"), None), "coupled": ("coupled", Schedule("fused", levels=(0, 2)), None),
        "reference": ("coupled", Schedule("fused", levels=(0, 2)), "reference"),
    }  # fmt: skip
    made = {}
    for name, (sampler, schedule, implementation) in runs.items():
        params = SamplingParams(sampler=sampler, max_tokens=length, ignore_eos=True)
        requests = [RolloutRequest(str(i), (5 + i, 7, 9), params, seed=i) for i in range(many)]
        with using(implementation, batch_invariant=True):
            engine = Engine(policy, EngineConfig(schedule=schedule, max_batch=many, page_size=sizes.page_size))
            made[name] = [list(sample.tokens) for sample in engine.rollout(requests)]
    alike = {name: sum(a == b for a, b in zip(made["ar"], made[name])) for name in ("coupled", "reference")}
    return {"ok": alike["coupled"] == many, "samples": many, "equal": alike}


def check_whole_runs(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """See `whole_runs.captured_and_eager`."""
    return captured_and_eager(sizes, device, _small(sizes))


CHECKS: dict[str, Check] = {
    "philox": check_philox, "residual": check_residual, "experts": check_experts, "attention": check_attention,
    "cca": check_cca, "verify": check_verify, "cut-offs": check_cutoffs, "policy": check_policy, "captured": check_captured,
    "batch": check_batch, "coupled": check_coupled, "whole runs": check_whole_runs,
}  # fmt: skip


def checked(name: str, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """One check's result; `ok` says whether it holds."""
    torch.manual_seed(0)
    with _poisoned():
        return CHECKS[name](sizes, device)
