"""The one form of the weights carries what a deeper model needs:
shared loops, two lanes, adapters of each application.

A toy of three banks' rows applied five times, the last two blocks in two lanes, built from Block, Weights and
BlockWeights alone and compared with products of bank rows in float64.
"""

from dataclasses import replace

import pytest
import torch
from test_model import SMALL, random_ids, random_model
from torch import nn

import train_gpt
from train_gpt import PRODUCTS, BlockWeights

LOOPED = replace(
    SMALL,
    num_layers=3,
    block_order="0,1,2,1,2",
    xsa_last_n=2,
    unet_skips=False,
    ve_enabled=False,
    ve_layers="",
)
SITES = ("qkv", "o", "up", "down", "attn", "mlp")


@pytest.fixture
def model():
    """Applications 3 and 4 are the modules of 1 and 2, not copies of them."""
    model = random_model(LOOPED)
    model.blocks = nn.ModuleList(model.blocks[i] for i in (0, 1, 2, 1, 2))
    return model


def adapters_of(model, rows: int) -> list[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """For every application and batch row its own A (rows, 2, in) and B (rows, out, 2), at every site."""
    c, generator = model.config, torch.Generator().manual_seed(5)
    d, kv, m = c.model_dim, c.kv_dim, c.mlp_dim
    shapes = dict(
        qkv=[(d, d), (d, kv), (d, kv)], o=[(d, d)], up=[(d, m)], down=[(m, d)], attn=[(d, d)], mlp=[(d, d)]
    )

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [
        {site: [(draw(2, i), draw(o, 2)) for i, o in shapes[site]] for site in SITES} for _ in model.blocks
    ]


def lanes(model, ids, products) -> torch.Tensor:
    """The toy's forward: three blocks in one lane, then two whose attention and MLP read and write apart."""
    x = x0 = model.embed(ids)
    context = model.attention_context(ids, x)
    for block, w in zip(model.blocks[:3], products[:3], strict=True):
        x = block(x, x0, w, context, None, None)
    one = two = x
    for block, w in zip(model.blocks[3:], products[3:], strict=True):
        a, b = block.attention_update(block.mix(one, x0), w, context, None), block.mlp_update(two, w)
        one, two = 1.1 * one + 0.7 * a + 0.2 * b, 0.9 * two - 0.3 * a + 0.5 * b
    return model.head((one + two) / 2)


class Reference:
    """The same products from the bank rows; the scales multiply the outputs, including the adapters'."""

    adapters = ()

    def __init__(self, model, application: int, adapters):
        self.model, self.block, self.pairs = model, model.blocks[application], adapters[application]

    def low_rank(self, name, x):
        return torch.cat([torch.einsum("bor,bri,bti->bto", b, a, x) for a, b in self.pairs[name]], dim=-1)

    def scale(self, name):
        return {"o": self.block.attn_scale, "attn": self.block.attn_scale, "down": self.block.mlp_scale,
                "mlp": self.block.mlp_scale}.get(name, 1.0)  # fmt: skip

    def product(self, name, x):
        rows = [(bank, half * LOOPED.num_layers + self.block.layer) for bank, half in PRODUCTS[name][1]]
        y = torch.cat(
            [torch.einsum("oi,bti->bto", getattr(self.model, bank)[row], x) for bank, row in rows], dim=-1
        )
        return self.scale(name) * (y + self.low_rank(name, x))

    def adapted(self, name, x, y):
        return y + self.scale(name) * self.low_rank(name, x)


def scaled(model, adapters) -> list[dict]:
    """The adapters as BlockWeights has them: those that end in the residual stream carry its scale."""
    found = []
    for block, each in zip(model.blocks, adapters, strict=True):
        scales = dict(o=block.attn_scale, attn=block.attn_scale, down=block.mlp_scale, mlp=block.mlp_scale)
        found.append({
            site: [(a, scales[site].unsqueeze(-1) * b) if site in scales else (a, b) for a, b in pairs]
            for site, pairs in each.items()
        })  # fmt: skip
    return found


def test_a_shared_loop_with_two_lanes_and_adapters_of_each_application(model):
    ids = random_ids(3, 11)
    adapters = adapters_of(model, 3)
    leaves = [t for each in adapters for pairs in each.values() for pair in pairs for t in pair]
    parameters = [p for name, p in model.named_parameters() if not name.startswith("ve_")]
    results = []
    plain = model.block_weights(model.weights(), {}, None)
    own = [w._replace(adapters=pairs) for w, pairs in zip(plain, scaled(model, adapters), strict=True)]
    for products in (own, [Reference(model, i, adapters) for i in range(5)]):
        logits = lanes(model, ids, products)
        loss = train_gpt.nll(logits, random_ids(3, 11, 1)).mean()
        results.append((logits.detach(), torch.autograd.grad(loss, [*parameters, *leaves])))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-10)
    for ours, expected in zip(results[0][1], results[1][1], strict=True):
        assert expected.abs().max() > 1e-9
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-12)


def test_the_gradient_of_a_shared_module_is_the_sum_of_its_copies(model):
    """The copies are those of a model in which every application has a module of its own."""
    ids, targets = random_ids(2, 9), random_ids(2, 9, 1)
    apart = random_model(LOOPED)
    for block, shared in zip(apart.blocks, model.blocks, strict=True):
        block.load_state_dict(shared.state_dict())
    train_gpt.nll(model(ids), targets).mean().backward()
    train_gpt.nll(apart(ids), targets).mean().backward()
    assert sum(p.numel() for p in model.blocks.parameters()) == 3 * sum(
        p.numel() for p in apart.blocks[0].parameters()
    )
    for first, again in ((1, 3), (2, 4)):
        copies = [dict(apart.blocks[i].named_parameters()) for i in (first, again)]
        for name, p in model.blocks[first].named_parameters():
            assert p.grad.abs().max() > 1e-9
            torch.testing.assert_close(
                p.grad, copies[0][name].grad + copies[1][name].grad, rtol=1e-9, atol=1e-13
            )


def test_weights_of_documents_reach_every_application(model):
    """A set of banks and scales for each row of the batch equals a pass for each of them."""
    ids, others = random_ids(3, 9), [random_model(LOOPED, seed=seed) for seed in (1, 2, 3)]
    banks = {name: torch.stack([getattr(other, name) for other in others]) for name in model.BANKS}
    scale = torch.stack([other.blocks[1].attn_scale for other in others]).unsqueeze(1)  # (documents, 1, d)
    together = torch.func.functional_call(model, {**banks, "blocks.1.attn_scale": scale}, (ids,))
    for b in range(3):
        one = {name: bank[b] for name, bank in banks.items()} | {"blocks.1.attn_scale": scale[b, 0]}
        alone = torch.func.functional_call(model, one, (ids[b : b + 1],))
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-10)
    assert isinstance(model.block_weights(model.weights(), {}, None)[4], BlockWeights)
