"""Clean rows of the packed backend, to the last bit; what it serves; and the functions between its products."""

from __future__ import annotations

import clean_rows
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockroll.kernels.compiled import compiled, exponential
from blockroll.kernels.experts.numba import gelu_line, silu_line
from blockroll.model.backends import choose, products
from blockroll.model.backends.packed.backend import PackedBackend
from blockroll.model.backends.plain import PlainBackend
from blockroll.model.layout import DecodeRows, causal, decode
from blockroll.model.scoring import score
from blockroll.rollout.cache import PagedCache

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "dot", "linear", "matmul", "einsum", "_scaled_dot_product_attention_math"}


class CalledOperations(TorchDispatchMode):
    """Names of torch's operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function._schema.name.removeprefix("aten::"))
        return function(*arguments, **(options or {}))


@compiled()
def lines_of_experts(x, bias, up, gelu, silu):
    gelu_line(x, 0, bias, 0, gelu, 0, len(x))
    silu_line(x, 0, up, 0, silu, 0, len(x))


@pytest.mark.parametrize("kind", clean_rows.KINDS, ids=str)
def test_a_clean_row_depends_on_its_prefix_alone(make_policy, kind):
    """To the last bit: in one pass without a cache, row by row, in chunks beside others, behind or before mask rows."""
    assert clean_rows.differing(make_policy(torch.float32, seed=4, **kind)) == []


def test_a_product_with_another_order_for_few_rows_is_seen(make_policy):
    """On every machine: where the library's has one order for 1 to 3 rows and for many, others have not."""
    policy = make_policy(torch.float32, seed=4, **clean_rows.KINDS[0])
    with clean_rows.multiplied_by(clean_rows.few_rows_backwards):
        found = clean_rows.differing(policy)
    assert {"row by row, text 0", "in chunks", "mixed"} <= set(found)


@torch.inference_mode()
def test_no_product_of_the_library_runs(make_policy):
    """Neither in scoring nor in decoding, whatever order its products have on this machine."""
    policy = make_policy(torch.float32, seed=4)
    packed = PackedBackend(policy)
    cache = PagedCache(policy, 24, 4, 1, 8)
    sequence = cache.open()
    assert cache.reserve(sequence, 12)
    prefill, step = (
        decode([DecodeRows(rows, start, proposals, 4)], policy.mask_token_id)
        for rows, start, proposals in (([5, 6, 7], 0, ()), ([8], 3, (1,)))
    )
    called = CalledOperations()
    with called:
        for layout in (prefill, step):
            view = cache.view([sequence], layout)
            packed.head(packed.forward(*packed.prepare(layout, view), view))
        score(policy, [([5, 6], [7, 8]), ([9], [3])])
    assert "empty" in called.names
    assert called.names.isdisjoint(PRODUCTS), called.names & PRODUCTS
    with called:
        policy.head(policy(prefill))
    assert called.names & PRODUCTS, "the network itself calls them, and they are seen"


def test_scores_do_not_depend_on_neighbours_of_other_lengths(make_policy):
    """One long text beside many short ones, whose padding would not fit."""
    policy = make_policy(torch.float32, seed=4, max_position_embeddings=4096)
    draw = np.random.default_rng(0)
    pairs = [(draw.integers(0, 40, 3).tolist(), draw.integers(0, 40, n).tolist()) for n in (3000, 1, 2, *[5] * 40)]
    among = score(policy, pairs)
    assert len(pairs) * 3003**2 > 2**28
    for number in (0, 1, 2, 3, 42):
        assert np.array_equal(score(policy, pairs[number : number + 1])[0], among[number])


def test_what_is_not_served(make_policy):
    assert isinstance(choose(make_policy(torch.float32)), PackedBackend)
    assert type(choose(make_policy(torch.float64))) is type(choose(make_policy(torch.bfloat16))) is PlainBackend
    assert products(make_policy(torch.bfloat16)).startswith("the library's")
    assert products(make_policy(torch.float32)).startswith("fixed order")


def test_the_markov_head_as_a_table(make_policy):
    policy = make_policy(torch.float32, seed=4)
    policy.add_markov(3, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(policy.markov.next.weight)
    previous = torch.arange(policy.config.vocab_size).flip(0).view(2, -1)
    with torch.inference_mode():
        torch.testing.assert_close(PackedBackend(policy).markov(previous), policy.markov(previous))


def test_functions_between_the_products():
    """exp, gelu and silu as the stages compute them, beside torch's."""
    x = np.linspace(-86, 80, 5003, dtype=np.float32)
    got = np.array([exponential(number) for number in x])
    np.testing.assert_allclose(got, np.exp(x.astype(np.float64)), rtol=3e-7)
    x, bias, up = np.linspace(-9, 9, 5003, dtype=np.float32), np.full(5003, 0.25, np.float32), np.full(5003, 1.5, np.float32)
    got, activated = np.empty_like(x), np.empty_like(x)
    lines_of_experts(x, bias, up, got, activated)
    wide = torch.from_numpy(x).double()
    np.testing.assert_allclose(got, torch.nn.functional.gelu(wide + 0.25).numpy(), atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(activated, torch.nn.functional.silu(wide).numpy() * 1.5, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same():
    scope = {"compiled": compiled}
    exec("@compiled()\ndef double(x):\n    return 2 * x\n", scope)
    assert scope["double"](3) == 6


def test_working_memory_of_shapes_that_alternate_is_kept_until_it_moves(make_policy):
    """The two passes of `two_pass` take turns. Memory that grows lies elsewhere: then nothing holds on to the smaller one."""
    policy = make_policy(torch.float32, seed=4)
    packed = PackedBackend(policy)
    run(packed, policy, 3)
    space = packed._workspace
    asked, take = [], space._memory.take
    space._memory.take = lambda name, *shape: (asked.append(name), take(name, *shape))[1]
    first = [run(packed, policy, rows) for rows in (3, 70)]
    grown = len(asked)
    again = [run(packed, policy, rows) for _ in range(3) for rows in (3, 70)]
    assert grown > 0 and len(asked) <= 2 * grown, "at most what lay in smaller memory is asked for once more"
    assert all(torch.equal(a, b) for a, b in zip(first * 3, again, strict=True))
    run(packed, policy, 200)
    assert list(space._works) == [256] and len(space._lines) == 1, "the smaller memory is still held"
    assert torch.equal(run(packed, policy, 3), first[0])


def test_working_memory_serves_passes_of_fewer_rows(make_policy):
    """A batch that grows by a row a step would otherwise make it anew at every step. What longer passes have left in it is not
    read."""
    policy = make_policy(torch.float32, seed=4)
    packed, expected = PackedBackend(policy), {rows: run(PackedBackend(policy), policy, rows) for rows in (1, 7, 64, 65, 100)}
    for rows in (100, 1, 65, 64, 7, 100):
        assert torch.equal(run(packed, policy, rows), expected[rows])
    assert set(packed._workspace._works) == {64, 128}


def run(packed, policy, rows):
    return packed.forward(*packed.prepare(decode([DecodeRows([5] * rows, 0, (), 0)], policy.mask_token_id)))


@torch.inference_mode()
def test_an_embedding_may_lie_in_any_order(make_policy):
    """Its rows are copied from flat memory."""
    layout, found = causal([[1, 2, 3]]), []
    for turned in (False, True):
        policy = make_policy(torch.float32, seed=4)
        if turned:
            embedding = policy.model.embed_tokens
            embedding.weight = torch.nn.Parameter(embedding.weight.t().contiguous().t(), requires_grad=False)
        packed = PackedBackend(policy)
        found.append(packed.forward(*packed.prepare(layout)))
    assert torch.equal(*found)
