# SPDX-License-Identifier: Apache-2.0
"""A small mixture-of-experts model trains the same with deep_ep over several ranks as in plain torch."""
import unittest

import deep_ep
import torch
import torch.distributed as dist
from ranks import PLACE, generator, must, run
from test_callers import FusedCombine, FusedDispatch

H, F, E, K, T, STEPS, LAYERS, RATE = 32, 48, 12, 2, 24, 10, 2, 0.5


def parameters():
    rng = generator(0, salt=1)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, device="cpu").to(PLACE[0]) * shape[-2] ** -0.5
    return [dict(router=draw(H, E), up=draw(E, H, F), down=draw(E, F, H)) for _ in range(LAYERS)]


def batch(rank, step):
    rng = generator(rank, salt=100 + step % 2)
    x = torch.randn(T - rank, H, generator=rng, device="cpu").to(PLACE[0])
    return x, torch.sin(3 * x.flip(1))


def route(h, router):
    probs, ids = torch.topk(torch.softmax(h @ router, 1), K, dim=1)
    return ids, probs


def grouped(rows, ids, probs, up, down):
    """Each row by each of its experts here, weighed and summed."""
    out = torch.zeros_like(rows)
    for expert in range(up.shape[0]):
        token, k = torch.nonzero(ids == expert, as_tuple=True)
        if len(token):
            made = torch.relu(rows[token] @ up[expert]) @ down[expert]
            out = out.index_add(0, token, made * probs[token, k][:, None])
    return out


def reference(ranks):
    layers = parameters()
    leaves = [p.requires_grad_(True) for layer in layers for p in layer.values()]
    losses = []
    for step in range(STEPS):
        loss = 0
        for rank in range(ranks):
            h, want = batch(rank, step)
            for layer in layers:
                ids, probs = route(h, layer["router"])
                h = h + grouped(h, ids, probs, layer["up"], layer["down"])
            loss = loss + (h - want).square().mean() / ranks
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves)):
            leaf.data -= RATE * grad
        losses.append(float(loss))
    return losses, [leaf.detach() for leaf in leaves]


def train(rank, ranks):
    per_rank = E // ranks
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    layers = [dict(router=p["router"], up=p["up"][mine].clone(), down=p["down"][mine].clone()) for p in parameters()]
    leaves = [p.requires_grad_(True) for layer in layers for p in layer.values()]
    buffer = deep_ep.Buffer(dist.group.WORLD, 1 << 20, 0)
    losses = []
    for step in range(STEPS):
        h, want = batch(rank, step)
        for layer in layers:
            ids, probs = route(h, layer["router"])
            rows, here, got, _, handle = FusedDispatch.apply(h, ids, probs, E, buffer)
            made = grouped(rows, here, got, layer["up"], layer["down"])
            h = h + FusedCombine.apply(made, buffer, handle)
        loss = (h - want).square().mean() / ranks
        grads = torch.autograd.grad(loss, leaves)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
        for number, (leaf, grad) in enumerate(zip(leaves, grads)):
            grad = grad.clone()
            if number % 3 == 0:  # the router is everybody's
                dist.all_reduce(grad)
            leaf.data -= RATE * grad
    want_losses, want_leaves = reference(ranks)
    must(want_losses[-1] < want_losses[0], f"it learns: {want_losses}")
    for got, want in zip(losses, want_losses):
        must(abs(got - want) < 2e-5 * abs(want), f"loss {losses}, in plain torch {want_losses}")
    for number, (got, want) in enumerate(zip(leaves, want_leaves)):
        want = want if number % 3 == 0 else want[mine]
        must(float((got - want).abs().max()) < 2e-5, f"parameter {number} after {STEPS} steps")
    dist.barrier()
    return losses


class TrainTest(unittest.TestCase):
    def test_the_same_losses(self):
        print("losses:", [round(value, 5) for value in run(3, train)[0]])


if __name__ == "__main__":
    unittest.main()
