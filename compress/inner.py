"""temporary"""
from __future__ import annotations
import torch
from torch import Tensor

def neuron_order(weight: Tensor, gram: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    n = len(gram)
    P = torch.linalg.inv(gram).float(); V = (torch.linalg.cholesky(metric).T @ weight.double()).float()
    alive = torch.ones(n, dtype=torch.bool); loss = [0.0]; order = []
    for _ in range(n * 5 // 8):
        sc = V.square().sum(0) / P.diagonal(); sc[~alive] = float("inf"); j = int(sc.argmin())
        loss.append(loss[-1] + float(sc[j])); order.append(j)
        p = P[:, j].clone(); pj = p[j]
        V -= torch.outer(V[:, j], p / pj); P -= torch.outer(p, p / pj); alive[j] = False; P[j, j] = 1.0
    rest = alive.nonzero()[:, 0]
    curve = torch.full((n + 1,), float("inf"), dtype=torch.float64)
    curve[n - len(order):] = torch.tensor(loss[::-1], dtype=torch.float64)
    return torch.cat((rest, torch.tensor(order[::-1]))), curve

def value_output_basis(*a): raise NotImplementedError

def permute_neurons(weights, arch, order):
    out = dict(weights)
    for k, w in weights.items():
        if k.startswith(("mlp.gate", "mlp.up")): out[k] = w[order]
        if k == "mlp.down.weight": out[k] = w[:, order]
    return out
def change_value_basis(weights, arch, basis): raise NotImplementedError
