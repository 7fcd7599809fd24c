"""Masks: what is read off a graph equals the mask itself, for written-out families and random ones."""

from __future__ import annotations

import operator
import random

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from tq_inductor.lowering.find_calls import find_calls
from tq_inductor.lowering.graph_writer import GraphWriter
from tq_inductor.lowering.mask_form import MaskForm, mask_form, name_of
from tq_inductor.lowering.read_mask import MaskReader
from tq_inductor.lowering.visibility import Visibility
from tq_inductor.lowering.writes import Writes

from tq_inductor.reference_masks import visible_keys

B, H = 2, 2
LOWEST = torch.finfo(torch.float32).min
INT64 = torch.iinfo(torch.int64)


def read_form(graph: fx.Graph) -> tuple[MaskForm, str]:
    """The form of the mask of a graph's one attention call, and its name."""
    (sdpa,) = find_calls(graph)
    form = mask_form(sdpa, MaskReader(Writes(graph)))
    q_len, kv_len = (n.meta["example_value"].shape[-2] for n in (sdpa.query, sdpa.key))
    return form, name_of(form, sdpa.attn_mask, q_len, kv_len)


def see_through(graph: fx.Graph) -> tuple[MaskForm, str]:
    """Return `(mask, what kernels would see)` instead of attention; the form, and its name."""
    writes = Writes(graph)
    (sdpa,) = find_calls(graph)
    q_len, kv_len = (n.meta["example_value"].shape[-2] for n in (sdpa.query, sdpa.key))
    form, name = read_form(graph)
    visibility = Visibility(graph, writes)
    mask, bounds = sdpa.attn_mask, None
    if visibility.can_build(sdpa, form):
        mask, bounds = visibility.mask(sdpa, form), visibility.bounds(sdpa, form)
    with graph.inserting_before(sdpa.node):
        seen = graph.call_function(visible_keys, (mask, bounds, kv_len))
        whole = sdpa.attn_mask
        if whole is None:
            whole = graph.call_function(torch.ones, (q_len, kv_len), {"dtype": torch.bool})
            if sdpa.is_causal:
                whole = graph.call_method("tril", (whole,))
    (output,) = (n for n in graph.nodes if n.op == "output")
    output.args = ((whole, seen),)
    graph.lint()
    return form, name


def assert_same(form: MaskForm, mask: torch.Tensor, seen: tuple, q_len: int, kv_len: int) -> None:
    visible, bias = seen
    shape = (B, H, q_len, kv_len)
    visible = visible.expand(shape)
    if mask.dtype == torch.bool:
        assert torch.equal(visible, mask.expand(shape))
        return
    added = torch.zeros(()) if bias is None else bias
    added = torch.where(visible, added, float("-inf"))
    wanted = mask.float().expand(shape)
    if bias is None:  # finite but hidden: allowed where every row sees something
        assert visible.any(-1).all() or not (wanted == LOWEST).any()
        wanted = wanted.masked_fill(wanted == LOWEST, float("-inf"))
    assert torch.equal(added.expand(shape), wanted)


def compiled_form(f, *args) -> tuple[MaskForm, str]:
    """The form of the one attention call of `f(q, k, *args)`, after checking that it is right."""
    found = []

    def backend(gm, example_inputs):
        found.append(see_through(gm.graph))
        gm.recompile()

        def run(*inputs):
            found.append(gm(*inputs))
            return (torch.zeros(()),)

        return run

    torch._dynamo.reset()
    torch.compile(lambda *a: f(*a).sum(), backend=backend, fullgraph=True)(*args)
    (form, name), (mask, seen) = found
    q, k = args[:2]
    assert_same(form, mask, seen, q.shape[2], k.shape[2])
    return form, name


def attention(mask_of):
    """A function of q, k and more that attends with the mask `mask_of(q_len, kv_len, ...)`."""

    def f(q, k, *args):
        mask = mask_of(q.shape[2], k.shape[2], *args)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    return f


def arange_mask(q_len, kv_len, offset):
    return torch.arange(kv_len) <= torch.arange(q_len)[:, None] + offset


def gathered_padding(q_len, kv_len, mask_2d):
    """transformers' way: comparison of index grids, and the 2-D mask gathered by them."""
    b, q, k = torch.arange(B), torch.arange(q_len), torch.arange(kv_len)
    q, k = q[None, None, :, None], k[None, None, None, :]
    mask = q.new_ones((), dtype=torch.bool) & (k <= q)
    return (mask & mask_2d.to(torch.bool)[b[:, None, None, None], k]).expand(B, -1, q_len, kv_len)


def prefix_lm(q_len, kv_len, prefix):
    q, k = torch.arange(q_len)[:, None], torch.arange(kv_len)
    return ((k <= q) | (k < prefix[:, None, None]))[:, None]


def documents(q_len, kv_len, ids):
    same = ids[:, :, None] == ids[:, None, :]
    return (same & torch.ones(q_len, kv_len, dtype=torch.bool).tril())[:, None]


def window(q_len, kv_len, width):
    q, k = torch.arange(q_len)[:, None], torch.arange(kv_len)
    return (k <= q) & (k > q - width)


def up_to(q_len, kv_len, last):
    return (torch.arange(kv_len) <= last[:, None])[:, None, None]


def float_causal(q_len, kv_len, low):
    return torch.full((q_len, kv_len), low).triu(1)


def bert(q_len, kv_len, mask_2d):
    return (1.0 - mask_2d[:, None, None, :].to(torch.float32)) * LOWEST


def alibi(q_len, kv_len, slopes):
    return (slopes[:, None, None] * torch.arange(kv_len)) + float_causal(q_len, kv_len, float("-inf"))


PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
FAMILIES = {
    "no mask": (lambda q, k: None, (), 6, 6, "none"),
    "everything": (lambda q, k: torch.ones(q, k, dtype=torch.bool), (), 4, 6, "none"),
    "tril": (lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(), (), 6, 6, "causal"),
    "tril, top-left": (lambda q, k: torch.ones(q, k).tril().bool(), (), 3, 6, "causal top-left"),
    "tril, bottom-right": (lambda q, k: torch.ones(q, k).tril(k - q) == 1, (), 3, 6, "causal bottom-right"),
    "tril, bool bottom-right": (
        lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q), (), 3, 6, "causal bottom-right"),
    "not triu": (lambda q, k: ~torch.ones(q, k, dtype=torch.bool).triu(1), (), 6, 6, "causal"),
    "off by one": (lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(1), (), 6, 6, "causal, offset 1"),
    "arange": (arange_mask, (0,), 6, 6, "causal"),
    "arange, hides nothing": (arange_mask, (5,), 1, 6, "none"),
    "arange, on the device": (
        arange_mask, (torch.tensor(2),), 2, 6, "causal, offset on the device"),
    "a row each": (lambda q, k, n: arange_mask(q, k, n[:, None, None])[:, None],
                   (torch.tensor([3, 1]),), 1, 6, "key length"),
    "gathered": (gathered_padding, (PADDING,), 6, 6, "causal + padding"),
    "gathered, longer table": (gathered_padding, (PADDING,), 4, 4, "causal + padding"),
    "key length": (lambda q, k, n: (torch.arange(k) < n)[None], (torch.tensor(4),), 3, 6, "key length"),
    "padding": (lambda q, k, m: m.bool()[:, None, None], (PADDING,), 3, 6, "padding"),
    "padding, repeated": (
        lambda q, k, m: m.bool()[:, None, None].expand(B, 1, q, k), (PADDING,), 6, 6, "padding"),
    "prefix-LM": (prefix_lm, (torch.tensor([3, 1]),), 6, 6, "causal, offset on the device"),
    "documents": (
        documents, (torch.tensor([[0, 0, 1, 1, 1, 2]] * B),), 6, 6, "causal + packed documents"),
    "window": (window, (3,), 6, 6, "causal + window 3"),
    "window on the wrong side": (lambda q, k: torch.arange(k) >= torch.arange(q)[:, None] + 2,
                                 (), 6, 6, "at most -2 back"),
    "both ways": (lambda q, k: (torch.arange(k) - torch.arange(q)[:, None]).abs() <= 2,
                  (), 6, 6, "causal, offset 2 + window 5"),
    "causal on some rows": (
        lambda q, k: torch.where(torch.arange(q)[:, None] < 2, arange_mask(q, k, 0), True),
        (), 6, 6, "causal, offset on the device"),
    "float causal": (float_causal, (float("-inf"),), 6, 6, "causal"),
    "float causal, finite": (float_causal, (LOWEST,), 6, 6, "causal"),
    "float, finite, bottom-right": (float_causal, (LOWEST,), 3, 6, "causal top-left"),
    "where": (lambda q, k: torch.where(arange_mask(q, k, 0), 0.0, LOWEST), (), 6, 6, "causal"),
    "masked_fill": (lambda q, k: torch.zeros(q, k).masked_fill(~arange_mask(q, k, 0), float("-inf")),
                    (), 6, 6, "causal"),
    "finite padding": (bert, (PADDING,), 3, 6, "float"),
    "alibi": (alibi, (torch.tensor([0.5, 0.25]),), 6, 6, "causal + ALiBi"),
    "alibi, by distance": (
        lambda q, k, s: torch.where(
            arange_mask(q, k, 0), (torch.arange(k) - torch.arange(q)[:, None]) * s[:, None, None],
            float("-inf")),
        (torch.tensor([0.5, 0.25]),), 6, 6, "causal + ALiBi"),
    "alibi over a static cache": (
        lambda q, k, s, n: s[:, None, None] * torch.arange(k) + torch.where(
            torch.arange(k) < n, 0.0, float("-inf")),
        (torch.tensor([0.5, 0.25]), torch.tensor(4)), 1, 6, "key length + ALiBi"),
    "bytes of padding": (
        lambda q, k, m: (m > 0)[:, None, None], (PADDING.to(torch.uint8),), 3, 6, "padding"),
    "bytes of padding, at least 1": (
        lambda q, k, m: (m >= 1)[:, None, None], (PADDING.to(torch.uint8),), 3, 6, "padding"),
    "last key in a byte": (
        up_to, (torch.tensor([3, 255], dtype=torch.uint8),), 1, 6, "key length"),
    "last key in 32 bits": (
        up_to, (torch.tensor([3, 2**31 - 1], dtype=torch.int32),), 1, 6, "key length"),
    "last key, no limit": (up_to, (torch.tensor([3, INT64.max]),), 1, 6, "key length"),
    "first key, no limit": (
        lambda q, k, n: (torch.arange(k) >= n[:, None])[:, None, None],
        (torch.tensor([3, INT64.min]),), 1, 6, "first key"),
    "a byte of window": (window, (torch.tensor(3, dtype=torch.uint8),), 6, 6, "causal + first key"),
    "no window": (window, (torch.tensor(INT64.max),), 6, 6, "causal + first key"),
    "positions of slots, many empty": (
        lambda q, k, n: (n <= torch.arange(q)[:, None]) & (n >= 0),
        (torch.tensor([0, 1, INT64.min, 2, INT64.max, -1]),), 3, 6, "padding + bool"),
    "documents by hash": (
        documents, (torch.tensor([[INT64.max - 1, INT64.max, INT64.max, 0, 1, INT64.min]] * B),),
        6, 6, "causal + packed documents"),
    "values": (lambda q, k, x: x[:, None] > 0.5, (torch.rand(B, 6, 6),), 6, 6, "bool"),
    "scores": (lambda q, k, x: x[:, None], (torch.randn(B, 6, 6),), 6, 6, "float"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    mask_of, args, q_len, kv_len, expected = FAMILIES[family]
    q, k = torch.randn(B, H, q_len, 8), torch.randn(B, H, kv_len, 8)
    _, name = compiled_form(attention(mask_of), q, k, *args)
    assert name == expected


def test_the_flag_is_top_left():
    q, k = torch.randn(B, H, 3, 8), torch.randn(B, H, 6, 8)
    _, name = compiled_form(lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), q, k)
    assert name == "causal top-left"


def test_symbolic_lengths_add_no_guard():
    forms = []

    def backend(gm, example_inputs):
        forms.append(read_form(gm.graph))
        return gm.forward

    def f(q, k):
        mask = arange_mask(q.shape[2], k.shape[2], k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=True)
    for length in (5, 9, 12):
        compiled(torch.randn(B, H, 4, 8), torch.randn(B, H, length, 8))
    assert [name for _, name in forms] == ["causal bottom-right"]


class RandomMask:
    """A graph that computes a random mask, step by step, from index grids, numbers and tensors."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.q_len, self.kv_len = self.rng.choice([(1, 7), (3, 7), (5, 5), (4, 9), (1, 1), (20, 6)])
        self.graph = fx.Graph()
        torch.manual_seed(seed)
        self.inputs = {
            "query": torch.randn(B, H, self.q_len, 8),
            "key": torch.randn(B, H, self.kv_len, 8),
            "offset": torch.randint(-2, 6, ()),
            "lengths": torch.randint(0, self.kv_len + 2, (B,)),
            "padding": torch.rand(B, self.kv_len + 3) < 0.7,
            "ids": torch.randint(0, 3, (B, max(self.q_len, self.kv_len))),
            "dense": torch.rand(B, 1, self.q_len, self.kv_len) < 0.7,
        }
        mode = FakeTensorMode()
        self.nodes = {}
        for name, value in self.inputs.items():
            self.nodes[name] = self.graph.placeholder(name)
            self.nodes[name].meta["example_value"] = mode.from_tensor(value)
        self.call = GraphWriter(self.graph, self.nodes["query"]).call
        q, k = (self.call(torch.arange, n) for n in (self.q_len, self.kv_len))
        self.q = self.call("view", q, 1, 1, -1, 1)
        self.k = self.call(operator.getitem, k, (None, None, None, slice(None)))

    def integer(self, depth: int) -> fx.Node | int:
        """Positions, lengths, offsets and sums of them."""
        choice = self.rng.randrange(8 if depth else 5)
        if choice < 2:
            return self.q if choice else self.k
        if choice == 2:
            return self.rng.randrange(-3, 8)
        if choice == 3:
            return self.nodes["offset"]
        if choice == 4:
            lengths = self.nodes["lengths"]
            return self.call("view", self.call("unsqueeze", lengths, 1), B, 1, 1, 1)
        a = self.integer(depth - 1)
        if choice == 7 and isinstance(a, fx.Node):
            return self.call(operator.mul, a, self.rng.choice([-1, 1, 2]))
        b = self.integer(depth - 1)
        return self.call(self.rng.choice([operator.add, operator.sub, torch.add]), a, b) if isinstance(
            a, fx.Node) or isinstance(b, fx.Node) else a + b  # fmt: skip

    def comparison(self) -> fx.Node:
        names = ["le", "lt", "ge", "gt", "eq", "ne"]
        name = self.rng.choice(names if self.rng.random() < 0.3 else names[:4])
        a = self.k if self.rng.random() < 0.6 else self.integer(1)
        b = self.integer(2)
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            a = self.q
        if not isinstance(a, fx.Node):
            a, b = b, a
        return self.call(self.rng.choice([getattr(operator, name), getattr(torch, name), name]), a, b)

    def condition(self, depth: int) -> fx.Node:
        choice = self.rng.randrange(12 if depth else 6)
        if choice < 3:
            return self.comparison()
        if choice == 3:
            return self.padding()
        if choice == 4:
            return self.triangle()
        if choice == 5:
            return self.rng.choice([self.documents, lambda: self.nodes["dense"]])()
        a, b = self.condition(depth - 1), self.condition(depth - 1)
        if choice < 9:
            return self.call(self.rng.choice([operator.and_, torch.logical_and, operator.mul]), a, b)
        if choice == 9:
            return self.call(self.rng.choice([operator.or_, "logical_or"]), a, b)
        if choice == 10:
            return self.call(self.rng.choice([operator.invert, torch.logical_not]), a)
        return self.call(torch.where, self.comparison(), a, b)

    def padding(self) -> fx.Node:
        shift = self.rng.randrange(4)
        if self.rng.random() < 0.5:
            rows = self.call("view", self.call(torch.arange, B), B, 1, 1, 1)
            index = self.call(operator.add, self.k, shift)
            return self.call(operator.getitem, self.nodes["padding"], (rows, index))
        if self.q_len < 9 and self.rng.random() < 0.3:  # rows of a causal table, some from its end
            table = self.call("tril", self.call(torch.ones, 9, self.kv_len, dtype=torch.bool))
            rows = self.call(torch.arange, self.q_len)
            if self.rng.random() < 0.5:
                rows = self.call("clamp", self.call(operator.add, rows, self.nodes["offset"]), max=8)
            else:
                rows = self.call(operator.sub, rows, self.rng.randrange(self.q_len, 9))
            return self.call(operator.getitem, table, (None, None, rows))
        part = (slice(None), None, None, slice(shift, shift + self.kv_len))
        return self.call(operator.getitem, self.nodes["padding"], part)

    def triangle(self) -> fx.Node:
        ones = self.call(torch.ones, self.q_len, self.kv_len, dtype=torch.bool)
        return self.call(
            self.rng.choice([torch.tril, torch.triu, "tril_", "triu_"]), ones, self.rng.randrange(-3, 4)
        )

    def documents(self) -> fx.Node:
        ids = self.nodes["ids"]
        q = self.call(operator.getitem, ids, (slice(None), slice(0, self.q_len)))
        k = self.call(operator.getitem, ids, (slice(None), slice(0, self.kv_len)))
        q, k = self.call("view", q, B, 1, -1, 1), self.call("view", k, B, 1, 1, -1)
        return self.call(operator.eq, q, k)

    def write(self) -> None:
        """Something changes behind the reader's back."""
        if self.rng.random() < 0.3:
            self.call("add_", self.nodes[self.rng.choice(["offset", "lengths"])], 1)

    def mask(self) -> fx.Node:
        mask = self.condition(1)
        self.write()
        mask = self.call(operator.and_, mask, self.condition(2)) if self.rng.random() < 0.6 else mask
        if self.rng.random() < 0.4:
            mask = self.call("expand", mask, B, 1, self.q_len, self.kv_len)
        kind = self.rng.randrange(6)
        low = self.rng.choice([float("-inf"), LOWEST])
        if kind == 0:
            mask = self.call(torch.where, mask, 0.0, low)
        elif kind == 1:
            mask = self.call(operator.mul, self.call(operator.sub, 1.0, self.call("float", mask)), low)
        elif kind == 2:
            zeros = self.call(torch.zeros, self.q_len, self.kv_len)
            mask = self.call("masked_fill", zeros, self.call("logical_not", mask), low)
        self.write()
        return mask if mask.meta["example_value"].dim() else self.call("view", mask, 1, 1)


def check_random_mask(seed: int) -> tuple[MaskForm, bool]:
    made = RandomMask(seed)
    q, k, mask = made.nodes["query"], made.nodes["key"], made.mask()
    out = made.call(F.scaled_dot_product_attention, q, k, k, attn_mask=mask)
    made.graph.output((out,))
    form, _ = see_through(made.graph)
    module = fx.GraphModule({}, made.graph)
    whole, seen = module(*(x.clone() for x in made.inputs.values()))
    if whole.isnan().any():  # 0 * -inf
        return form, False
    assert_same(form, whole, seen, made.q_len, made.kv_len)
    return form, True


@pytest.mark.parametrize("chunk", range(10))
def test_random_masks(chunk):
    """The interpretation, evaluated on indices, is the mask: 200 random expressions each."""
    forms = []
    for seed in range(chunk * 200, chunk * 200 + 200):
        try:
            form, defined = check_random_mask(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        if defined:
            forms.append(form)
    assert len(forms) > 130
    assert sum(form.exact for form in forms) > 40  # and many are understood entirely
