"""Which neurons and value coordinates to keep: curves against brute force, choices against exhaustive ones."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from compress.allocation.selection import BLOCKS, POOL, _cheapest, _Remaining, neuron_order, value_output_basis
from compress.errors import UsageError
from compress.linalg import weighted_error
from compress.structures import SelectStructure
from compress.structures.lowrank import error_by_rank
from compress.structures.select import refit

F64 = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def moment(size: int, seed: int, decay: float = 1.0) -> Tensor:
    q = torch.linalg.qr(normal(size, size, seed=seed)).Q
    return (q / torch.arange(1, size + 1, dtype=F64) ** decay) @ q.T


def best_loss(W: Tensor, G: Tensor, H: Tensor, basis: Tensor) -> float:
    """1/2 min over B of tr(H (W - B basis^T) G (W - B basis^T)^T), basis (in, kept), by `lstsq` on square roots."""
    c, h = torch.linalg.cholesky(G), torch.linalg.cholesky(H)
    target, columns = (h.T @ W @ c).T, c.T @ basis
    if basis.shape[1] == 0:
        return float(target.square().sum()) / 2
    rest = target - columns @ torch.linalg.lstsq(columns, target, driver="gelsd").solution
    return float(rest.square().sum()) / 2


def neurons(inner: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    out = 5
    return normal(out, inner, seed=seed), moment(inner, seed + 1), moment(out, seed + 2)


@pytest.mark.parametrize("inner", [1, 2, 7, 70, 150])
def test_curve_of_neurons_is_the_least_squares_loss(inner: int) -> None:
    W, G, H = neurons(inner, seed=inner)
    order, curve = neuron_order(W, G, H)
    assert order.sort().values.tolist() == list(range(inner))
    assert curve.shape == (inner + 1,)
    assert float(curve[inner]) == 0
    assert bool((curve.diff() <= 1e-12).all())
    for kept in {0, 1, inner // 3, inner // 2, inner - 1}:
        expected = best_loss(W, G, H, torch.eye(inner, dtype=F64)[:, order[:kept]])
        assert float(curve[kept]) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_without_a_metric_it_is_the_output_error() -> None:
    W, G, _ = neurons(9, seed=3)
    order, curve = neuron_order(W, G)
    expected = best_loss(W, G, torch.eye(5, dtype=F64), torch.eye(9, dtype=F64)[:, order[:4]])
    assert float(curve[4]) == pytest.approx(expected, rel=1e-9)


def test_arguments_are_left_alone() -> None:
    W, G, _ = neurons(12, seed=3)
    before = W.clone(), G.clone()
    neuron_order(W, G)
    value_output_basis(W, G, None, 2, 3)
    assert torch.equal(W, before[0])
    assert torch.equal(G, before[1])


def exhaustive(W: Tensor, G: Tensor, H: Tensor, kept: int) -> float:
    eye = torch.eye(W.shape[1], dtype=F64)
    return min(best_loss(W, G, H, eye[:, list(stay)]) for stay in combinations(range(W.shape[1]), kept))


@pytest.mark.parametrize("seed", range(4))
def test_elimination_is_near_the_best_of_all_choices(seed: int) -> None:
    W, G, H = neurons(9, seed=10 * seed)
    _, curve = neuron_order(W, G, H)
    ratios = [float(curve[kept]) / exhaustive(W, G, H, kept) for kept in range(1, 9)]
    assert ratios[-1] == pytest.approx(1, rel=1e-9)  # one neuron: nothing greedy about it
    assert all(1 - 1e-9 <= ratio < 1.5 for ratio in ratios)
    # The choice that ignores compensation is worse.
    naive = (W * (H @ W)).sum(0) * G.diagonal()
    stay = naive.argsort(descending=True)
    plain = [best_loss(W, G, H, torch.eye(9, dtype=F64)[:, stay[:kept]]) for kept in range(1, 9)]
    assert float(curve[1:9].log().sum()) < float(torch.tensor(plain).log().sum())


def test_rounds_are_near_one_by_one() -> None:
    """256 neurons go in rounds of 4 from pools of 16; the plain greedy elimination by definition."""
    W, G, H = normal(24, 256, seed=1), moment(256, 2), moment(24, 3)
    _, curve = neuron_order(W, G, H)
    w, p, losses = W.clone(), torch.linalg.inv(G), [0.0]
    while w.shape[1]:
        scores = (w * (H @ w)).sum(0) / p.diagonal() / 2
        j = int(scores.argmin())
        losses.append(losses[-1] + float(scores[j]))
        stay = [i for i in range(w.shape[1]) if i != j]
        w = (w - torch.outer(w[:, j], p[j]) / p[j, j])[:, stay]
        p = (p - torch.outer(p[:, j], p[j]) / p[j, j])[stay][:, stay]
    exact = torch.tensor(losses, dtype=F64).flip(0)
    kept = torch.arange(8, 250)
    ratio = curve[kept] / exact[kept]
    assert float(ratio.min()) > 0.99
    assert float(ratio.max()) < 1.02


def test_of_two_equal_neurons_one_is_free_and_the_other_is_not() -> None:
    """Both look cheap; a choice that dropped them in one go by their scores would lose both."""
    X = normal(4000, 8, seed=5)
    X[:, 7] = X[:, 2] + 1e-5 * X[:, 7]
    W = normal(6, 8, seed=6)
    order, curve = neuron_order(W, X.T @ X / 4000)
    twins = {int(order[7]), 2 if int(order[7]) == 7 else 7}
    assert twins == {2, 7}
    assert float(curve[7]) < 1e-4 < 1e-2 < float(curve[6])  # not 0: so singular a moment is damped


def test_select_takes_the_predicted_loss() -> None:
    """The structure's own fit of the permuted weight ends at the predicted loss (doubled: half of the error)."""
    W, G, H = neurons(12, seed=8)
    order, curve = neuron_order(W, G, H)
    for kept in (3, 8):
        spec = SelectStructure(12, 5, kept)
        W_new, G_new = W[:, order], G[order][:, order]
        factors = spec.fit(W_new, G_new, H)
        torch.testing.assert_close(factors["weight"], refit(W_new, G_new, torch.arange(kept)))
        assert weighted_error(W_new, spec.dense(factors), G_new, H) / 2 == pytest.approx(float(curve[kept]), rel=1e-9)


@pytest.mark.parametrize("wrong", ["gram", "metric", "nan"])
def test_what_does_not_match_is_refused(wrong: str) -> None:
    W, G, H = neurons(8, seed=1)
    arguments = {"gram": (W, G[1:], H), "metric": (W, G, H[1:]), "nan": (W * torch.nan, G, H)}[wrong]
    with pytest.raises(UsageError):
        neuron_order(*arguments)
    with pytest.raises(UsageError):
        value_output_basis(*arguments, kv_heads=2, head_dim=4)


def test_singular_moments_stay_finite() -> None:
    W = normal(5, 16, seed=1)
    G = moment(16, 2)
    G[:, 9:] = 0
    G[9:] = 0
    order, curve = neuron_order(W, G, torch.zeros(5, 5))
    basis, values = value_output_basis(W, G, None, 2, 4)
    assert all(bool(torch.isfinite(t).all()) for t in (curve, basis, values))
    assert {int(i) for i in order[9:]} == set(range(9, 16))  # neurons that are never active go first


# --- values of heads --------------------------------------------------------------------------------------------------


def kept_columns(basis: Tensor, kept: int, per_group: int) -> Tensor:
    """(heads * head_dim, heads * kept): the first rows of each group's basis, for every head of the group."""
    return torch.block_diag(*[r[:kept].T for r in basis.repeat_interleave(per_group, 0)])  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("kv_heads", "per_group"), [(1, 1), (3, 1), (2, 2), (1, 3)])
def test_curve_of_values_is_the_least_squares_loss(kv_heads: int, per_group: int) -> None:
    size, inner = 6, 6 * kv_heads * per_group
    W, G, H = normal(11, inner, seed=1), moment(inner, 2), moment(11, 3)
    basis, curve = value_output_basis(W, G, H, kv_heads, size)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(size, dtype=F64).expand(kv_heads, -1, -1))
    assert curve.shape == (size + 1,)
    assert float(curve[size]) == 0
    for kept in range(size):
        columns = kept_columns(basis, kept, per_group) if kept else torch.zeros(inner, 0, dtype=F64)
        assert float(curve[kept]) == pytest.approx(best_loss(W, G, H, columns), rel=1e-8, abs=1e-12)


def test_one_head_is_the_best_low_rank() -> None:
    """Values of k coordinates are rank k of o; the optimum at every k is known, from one decomposition."""
    W, G, H = normal(9, 7, seed=1), moment(7, 2), moment(9, 3)
    _, curve = value_output_basis(W, G, H, 1, 7)
    torch.testing.assert_close(2 * curve, error_by_rank(W, G, H), rtol=1e-8, atol=1e-10)


def test_alike_heads_of_a_group_are_the_best_low_rank_of_the_stack() -> None:
    """Same moment in each head, none between them: the heads' parts of o stand below each other."""
    heads, size, out = 3, 5, 8
    W, Z, H = normal(out, heads * size, seed=4), moment(size, 5), moment(out, 6)
    G = torch.kron(torch.eye(heads, dtype=F64), Z)
    _, curve = value_output_basis(W, G, H, 1, size)
    stack = W.reshape(out, heads, size).transpose(0, 1).reshape(heads * out, size)
    expected = error_by_rank(stack, Z, torch.kron(torch.eye(heads, dtype=F64), H))
    torch.testing.assert_close(2 * curve, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("kv_heads", "per_group"), [(3, 1), (2, 2)])
def test_basis_is_near_a_local_optimum_and_beats_principal_components(kv_heads: int, per_group: int) -> None:
    size, heads = 6, kv_heads * per_group
    ratios, pca = [], []
    for seed in range(3):
        W, G, H = normal(20, heads * size, seed=seed), moment(heads * size, seed + 50), moment(20, seed + 90)
        basis, curve = value_output_basis(W, G, H, kv_heads, size)
        blocks = G.reshape(heads, size, heads, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        summed = blocks.reshape(kv_heads, per_group, size, size).sum(1)
        principal = torch.linalg.eigh(summed).eigenvectors.flip(-1).mT
        for kept in (2, 4):
            M, P = W.T @ H @ W, torch.linalg.inv(G)
            dropped = basis[:, kept:].mT.contiguous().requires_grad_()

            def loss(n: Tensor, M: Tensor = M, P: Tensor = P) -> Tensor:
                columns = torch.block_diag(*torch.linalg.qr(n).Q.repeat_interleave(per_group, 0))  # type: ignore[no-untyped-call]
                return torch.linalg.solve(columns.T @ P @ columns, columns.T @ M @ columns).trace() / 2

            optimizer = torch.optim.LBFGS([dropped], max_iter=200, line_search_fn="strong_wolfe")

            def closure(n: Tensor = dropped, optimizer: torch.optim.LBFGS = optimizer) -> float:
                optimizer.zero_grad()
                value = loss(n)
                value.backward()
                return float(value.detach())

            assert float(loss(dropped.detach())) == pytest.approx(float(curve[kept]), rel=1e-8)
            optimizer.step(closure)
            ratios.append(float(curve[kept]) / float(loss(dropped.detach())))
            pca.append(best_loss(W, G, H, kept_columns(principal, kept, per_group)) / float(curve[kept]))
    assert max(ratios) < 1.2
    assert min(pca) > 1


def test_heads_must_divide_what_o_reads() -> None:
    with pytest.raises(UsageError, match="no multiple of 2 heads of 5"):
        value_output_basis(normal(4, 12, seed=0), moment(12, 1), None, 2, 5)


# --- against the elimination by rank-2 updates ------------------------------------------------------------------------


def updated_cheapest(m: Tensor, p: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """What `_cheapest` finds, with both matrices brought up to date at every step."""
    m, p = m.clone(), p.clone()
    taken, losses, open_ = [], [], torch.ones(len(m), dtype=torch.bool)
    for _ in range(count):
        scores = torch.where(open_, m.diagonal() / p.diagonal().where(open_, 1), torch.inf)
        j = int(scores.argmin())
        taken.append(j)
        losses.append(float(scores[j]) / 2)
        open_[j] = False
        u, column = p[:, j] / p[j, j], m[:, j].clone()
        m -= torch.outer(u, column) + torch.outer(column, u) - column[j] * torch.outer(u, u)
        p -= p[j, j] * torch.outer(u, u)
    return torch.tensor(taken), losses


def updated_order(W: Tensor, G: Tensor, H: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `neuron_order` finds, with the whole problem brought up to date after every round."""
    left, names = _Remaining.of(W, G, H), torch.arange(W.shape[1])
    step = max(1, len(names) // BLOCKS)
    dropped, losses = [], [0.0]
    while len(names):
        pool = (left.whitened.square().sum(0) / left.inverse.diagonal()).argsort()[: POOL * step]
        y = left.whitened[:, pool]
        places, lost = updated_cheapest(y.T @ y, left.inverse[pool][:, pool], min(step, len(names)))
        gone = pool[places]
        stays = torch.ones(len(names), dtype=torch.bool)
        stays[gone] = False
        left.drop(gone, stays.nonzero()[:, 0])
        dropped.append(names[gone])
        losses += lost
        names = names[stays]
    return torch.cat(dropped).flip(0), torch.tensor(losses, dtype=F64).cumsum(0).flip(0)


@pytest.mark.parametrize("rank", [3, 30])
def test_the_cheapest_are_those_of_rank_two_updates(rank: int) -> None:
    y, p = normal(rank, 40, seed=1), torch.linalg.inv(moment(40, 2))
    found, lost = _cheapest(y.T @ y, p, 25)
    expected, losses = updated_cheapest(y.T @ y, p, 25)
    assert found.tolist() == expected.tolist()
    assert lost == pytest.approx(losses, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("inner", "out"), [(1, 3), (63, 20), (300, 40), (300, 400)])
def test_the_order_is_that_of_updates_of_everything(inner: int, out: int) -> None:
    W, G, H = normal(out, inner, seed=inner), moment(inner, 2), moment(out, 3)
    (order, curve), (expected, losses) = neuron_order(W, G, H), updated_order(W, G, H)
    assert order.tolist() == expected.tolist()
    torch.testing.assert_close(curve, losses, rtol=1e-10, atol=1e-12)
