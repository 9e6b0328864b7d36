"""The shipped objectives, unchanged, in a game small enough to be exact: their optima are the closed forms.

A policy is a softmax over five outcomes. Expectations are sums over all pairs and triples of outcomes, so there
is no sampling; the minimum is found with L-BFGS in float64. The numbers are those of the golden toy.
The figures of docs/objectives are of the same game (scripts/draw_exact_games).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparring.objectives import Dft, Sdft, Sipo, Space, Spin, Ssimpo, Tspin, TspinRef
from sparring.types import Loss, Objective, Scores

P_DATA = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
P_OPPONENT = torch.tensor([0.10, 0.30, 0.20, 0.15, 0.25], dtype=torch.float64)
P_FIRST = torch.tensor([0.20, 0.20, 0.10, 0.20, 0.30], dtype=torch.float64)


def expected_loss(objective: Objective, logp: Tensor, opponent: Tensor, noise: Tensor, first: Tensor) -> Tensor:
    """E over real ~ p_data, generated ~ noise, proto ~ first, by summing over all their outcomes."""
    n = len(logp)
    real, generated, proto = (i.flatten() for i in torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij"))
    weight = P_DATA[real] * noise[generated] * first[proto]
    policy = {"real": logp[real], "generated": logp[generated][:, None], "proto": logp[proto]}
    reference = opponent.log()
    against = {"real": reference[real], "generated": reference[generated][:, None], "proto": reference[proto]}
    lengths = {role: torch.ones_like(value, dtype=torch.long) for role, value in policy.items()}
    return (weight * objective(policy, against, lengths).per_example).sum()


def solve(objective: Objective, opponent: Tensor, noise: Tensor | None = None, first: Tensor = P_FIRST) -> Tensor:
    logits = opponent.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_loss(objective, logits.log_softmax(0), opponent, opponent if noise is None else noise, first)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return logits.detach().softmax(0)


def tilted(exponent: float, base: Tensor = P_OPPONENT, against: Tensor | None = None) -> Tensor:
    """base * (p_data / against) ** exponent, normalised."""
    weights = base * (P_DATA / (base if against is None else against)) ** exponent
    return weights / weights.sum()


def total_variation(p: Tensor) -> float:
    return 0.5 * (p - P_DATA).abs().sum().item()


@pytest.mark.parametrize(
    ("objective", "closed_form"),
    [
        (TspinRef(alpha=2.0, beta=0.0), tilted(0.5)),
        (Ssimpo(beta=2.0, gamma=0.0), tilted(0.5, torch.ones(5, dtype=torch.float64), P_OPPONENT)),
        *((Spin(lambda_=scale), tilted(1 / scale)) for scale in (0.5, 1.0, 2.0)),
        *((Spin(lambda_=scale, loss="exponential"), tilted(1 / (2 * scale))) for scale in (0.5, 1.0)),
        (Tspin(beta=0.0), tilted(1.0, torch.ones(5, dtype=torch.float64), P_OPPONENT)),
        (Tspin(alpha=2.0, beta=0.0), tilted(0.5, torch.ones(5, dtype=torch.float64), P_OPPONENT)),
        *((Space(mu=mu), P_DATA) for mu in (0.5, 1.0, 3.0, 7.0)),
    ],
    ids=repr,
)
def test_optimum_is_the_closed_form(objective: Objective, closed_form: Tensor) -> None:
    torch.testing.assert_close(solve(objective, P_OPPONENT), closed_form, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("objective", "noise", "golden"),
    [
        (Spin(lambda_=0.5), None, [0.767386, 0.099920, 0.095923, 0.031974, 0.004796]),
        (Spin(lambda_=2.0), None, [0.220231, 0.301563, 0.220231, 0.134863, 0.123113]),
        (Spin(lambda_=1.0), (P_FIRST + P_OPPONENT) / 2, [0.276481, 0.311041, 0.276481, 0.088869, 0.047127]),
        (Tspin(beta=0.0), None, [0.597015, 0.124378, 0.149254, 0.099502, 0.029851]),
        (Tspin(alpha=2.0, beta=0.0), None, [0.386355, 0.176346, 0.193178, 0.157729, 0.086392]),
        (Tspin(beta=0.1), None, [0.537655, 0.141865, 0.170483, 0.107442, 0.042555]),
    ],
    ids=repr,
)
def test_golden_optima(objective: Objective, noise: Tensor | None, golden: list[float]) -> None:
    assert solve(objective, P_OPPONENT, noise).tolist() == pytest.approx(golden, abs=2e-6)


@pytest.mark.parametrize(
    ("objective", "minimum"),
    [(Spin(lambda_=scale), 0.530485) for scale in (0.5, 1.0, 2.0)]
    + [(Space(mu=mu), loss) for mu, loss in ((0.5, 0.836760), (1, 1.209836), (3, 1.977838), (7, 2.688473))],
    ids=repr,
)
def test_golden_minima(objective: Objective, minimum: float) -> None:
    at_best = solve(objective, P_OPPONENT).log()
    assert expected_loss(objective, at_best, P_OPPONENT, P_OPPONENT, P_FIRST).item() == pytest.approx(minimum, abs=1e-6)


def test_dft_goes_to_the_mode() -> None:
    """Its flow is the replicator equation with p_data as fitness: it ends at the likeliest outcome, not at p_data."""
    logits = P_OPPONENT.log().clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(4000):
        optimizer.zero_grad()
        tokens = logits.log_softmax(0)[:, None]
        loss = Dft()({"real": tokens}, {}, {"real": torch.ones(5, dtype=torch.long)}).per_example
        (P_DATA * loss).sum().backward()
        optimizer.step()
    assert logits.softmax(0).argmax() == P_DATA.argmax() and logits.softmax(0).max() > 0.99


def taught_loss(objective: Sdft, logp: Tensor, teacher: Tensor, top_k: int) -> Tensor:
    """E over generated ~ the opponent, whose probabilities are `teacher` where its prompt shows it the answer."""
    top = teacher.topk(top_k).indices
    targets = torch.cat([torch.arange(5)[:, None], top.expand(5, top_k)], dim=1)
    policy, against = ({"generated": values[targets][:, None, None]} for values in (logp, teacher.log()))
    one = {"generated": torch.ones(5, 1, dtype=torch.long)}
    return (P_OPPONENT * objective(policy, against, one).per_example).sum()


@pytest.mark.parametrize("top_k", [5, 4, 2])
def test_sdft_ends_at_its_teacher(top_k: int) -> None:
    """At the candidates' probabilities; the others together have the rest."""
    logits = P_OPPONENT.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = taught_loss(Sdft(), logits.log_softmax(0), P_DATA, top_k)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    found, candidates = logits.detach().softmax(0), P_DATA.topk(top_k).indices
    torch.testing.assert_close(found[candidates], P_DATA[candidates], atol=1e-5, rtol=0)
    assert taught_loss(Sdft(), found.log(), P_DATA, top_k).item() == pytest.approx(0, abs=1e-8)


def test_the_first_step_of_reverse_sdft_is_that_of_the_kl_from_its_teacher() -> None:
    """With true samples, while the policy is the opponent; where it is also the teacher, the gradient is 0."""
    for teacher in (P_DATA, P_OPPONENT):
        found, expected = (P_OPPONENT.log().clone().requires_grad_() for _ in range(2))
        taught_loss(Sdft(kl="reverse"), found.log_softmax(0), teacher, 1).backward()
        logp = expected.log_softmax(0)
        (logp.exp() * (logp - teacher.log())).sum().backward()
        assert found.grad is not None and expected.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-12, rtol=1e-9)


def gradient(objective: Objective, p: Tensor) -> Tensor:
    logits = p.log().clone().requires_grad_()
    expected_loss(objective, logits.log_softmax(0), p, p, P_FIRST).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize(
    ("objective", "scale"),
    [
        *((Spin(lambda_=scale), scale / 2) for scale in (0.1, 0.5, 2.0)),
        *((Space(mu=mu), mu / (1 + mu)) for mu in (0.5, 1.0, 3.0, 7.0)),
    ],
    ids=repr,
)
def test_the_first_step_is_a_scaled_sft_step(objective: Objective, scale: float) -> None:
    """With true samples: lambda/2 (SPIN), mu/(1+mu) (SPACE) times the gradient of E_data[-log p]."""
    logits = P_OPPONENT.log().clone().requires_grad_()
    (-(P_DATA * logits.log_softmax(0)).sum()).backward()
    assert logits.grad is not None
    torch.testing.assert_close(gradient(objective, P_OPPONENT), scale * logits.grad)


def greedy(p: Tensor) -> Tensor:
    return (p == p.max()).to(p.dtype)


def truncated(p: Tensor, top_p: float = 0.8) -> Tensor:
    """The most likely outcomes that together reach top_p."""
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
    q = torch.zeros_like(p)
    q[kept] = p[kept]
    return q / q.sum()


@pytest.mark.parametrize("noise", [greedy, truncated])
@pytest.mark.parametrize("objective", [Spin(lambda_=2.0), *(Space(mu=mu) for mu in (0.5, 1.0, 3.0, 7.0))], ids=repr)
def test_greedy_and_truncated_samples_break_the_sft_identity(
    objective: Objective, noise: Callable[[Tensor], Tensor]
) -> None:
    """The first step then turns away from what is sampled too often, and p_data is no fixed point any more."""
    for p in (P_OPPONENT, P_DATA):
        logits = p.log().clone().requires_grad_()
        expected_loss(objective, logits.log_softmax(0), p, noise(p), P_FIRST).backward()
        assert logits.grad is not None
        true = gradient(objective, p)
        assert (logits.grad - true).abs().max() > 0.02
        oversampled = (noise(p) - p).argmax()
        assert logits.grad[oversampled] > true[oversampled]


@pytest.mark.parametrize(
    "objective",
    [
        Spin(lambda_=0.1),
        Spin(lambda_=5.0),
        *(Space(mu=mu) for mu in (0.5, 1.0, 3.0, 7.0)),
        Sipo(),
        TspinRef(beta=0.0),
    ],
    ids=repr,
)
def test_the_data_distribution_is_a_fixed_point(objective: Objective) -> None:
    torch.testing.assert_close(gradient(objective, P_DATA), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_data_distribution_is_no_fixed_point_of_tspin() -> None:
    flat = torch.full((5,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(solve(Tspin(beta=0.0), P_DATA), flat, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("mu", "past"), [(1.0, 0.25), (1.0, 0.5), (3.0, 0.5)])
def test_space_against_a_pool_of_opponents_keeps_its_optimum_and_its_fixed_point(mu: float, past: float) -> None:
    """Answers from a mixture of iterations, rewards against that mixture's density: p_data again, and no signal there.

    With the last iteration's density alone, or the mixture of log-probs, the same answers lead elsewhere.
    """
    pool = past * P_FIRST + (1 - past) * P_OPPONENT
    torch.testing.assert_close(solve(Space(mu=mu), pool), P_DATA, atol=1e-6, rtol=0)
    at_data = past * P_FIRST + (1 - past) * P_DATA
    logits = P_DATA.log().clone().requires_grad_()
    expected_loss(Space(mu=mu), logits.log_softmax(0), at_data, at_data, P_FIRST).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits.grad), atol=1e-12, rtol=0)
    geometric = (past * P_FIRST.log() + (1 - past) * P_OPPONENT.log()).softmax(0)
    for reference in (P_OPPONENT, geometric):
        assert total_variation(solve(Space(mu=mu), reference, noise=pool)) > 0.005


def test_s_ipo_halves_the_distance_in_an_iteration() -> None:
    p = P_FIRST
    for _ in range(8):
        following = solve(Sipo(tau=0.5), p)
        assert 0.4 < total_variation(following) / total_variation(p) < 0.6
        p = following


def test_s_ipo_does_not_reach_the_data_in_one_iteration() -> None:
    assert total_variation(solve(Sipo(tau=0.5), P_OPPONENT)) > 0.02


def test_an_sft_term_keeps_space_s_optimum_and_moves_t_spin_s_towards_the_data() -> None:
    def best(objective: Objective, weight: float) -> Tensor:
        class WithSft:
            def __call__(self, *scores: Scores) -> Loss:
                return Loss(objective(*scores).per_example - weight * scores[0]["real"])  # type: ignore[arg-type]

        return solve(WithSft(), P_OPPONENT)  # type: ignore[arg-type]

    torch.testing.assert_close(best(Space(), 3.0), P_DATA, atol=1e-6, rtol=0)
    far = [total_variation(best(Tspin(beta=0.0), weight)) for weight in (0.0, 0.3, 3.0)]
    assert far == sorted(far, reverse=True) and far[0] > 2 * far[-1]


def distances(round_of: Callable[[int, Tensor], Tensor], rounds: int) -> list[float]:
    p, found = P_FIRST, []
    for t in range(rounds):
        p = round_of(t, p)
        found.append(total_variation(p))
    return found


def test_exact_play() -> None:
    """Whole games: SPIN contracts for lambda above 1/2, diverges below; T-SPIN oscillates, damped by history."""
    assert distances(lambda t, p: solve(Spin(lambda_=2.0), p), 4) == pytest.approx(
        [0.139, 0.062, 0.030, 0.015], abs=1e-3
    )
    assert distances(lambda t, p: solve(Spin(lambda_=5.0), p), 4) == pytest.approx(
        [0.259, 0.192, 0.144, 0.108], abs=1e-3
    )
    assert distances(lambda t, p: solve(Spin(lambda_=0.4), p), 4) == pytest.approx(
        [0.214, 0.772, 0.320, 0.942], abs=2e-3
    )
    assert distances(lambda t, p: solve(Tspin(beta=0.0), p), 4) == pytest.approx([0.138, 0.350, 0.138, 0.350], abs=1e-3)
    damped = distances(lambda t, p: solve(Tspin(beta=0.1 if t else 0.0), p), 5)
    assert damped == pytest.approx([0.138, 0.236, 0.113, 0.168, 0.120], abs=1e-3)
    assert distances(lambda t, p: solve(Space(), p), 2) == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize(("scale", "factor"), [(0.4, 1.5), (0.5, 1.0), (1.0, 0.0), (2.0, 0.5), (5.0, 0.8)])
def test_spin_contracts_only_above_one_half(scale: float, factor: float) -> None:
    """log p_(t+1)/p_data = (1 - 1/lambda) log p_t/p_data + constant, round after round."""

    def deviation(p: Tensor) -> float:
        ratio = (p / P_DATA).log()
        return (ratio - ratio.mean()).norm().item()

    p = P_OPPONENT
    for _ in range(3):
        following = solve(Spin(lambda_=scale), p)
        assert deviation(following) == pytest.approx(factor * deviation(p), abs=1e-4)
        p = following


def test_tspin_swings_with_period_two_and_history_damps_it() -> None:
    """Without history and at alpha 1: p -> p_data / p, twice is the identity. With it: settles near sqrt(p_data)."""
    once = solve(Tspin(beta=0.0), P_FIRST)
    torch.testing.assert_close(solve(Tspin(beta=0.0), once), P_FIRST, atol=1e-6, rtol=0)
    p, steps = once, []
    for _ in range(30):
        following = solve(Tspin(beta=0.1), p)
        steps.append((following - p).abs().sum().item())
        p = following
    assert steps[-1] < 0.02 * steps[0]
    flattened = P_DATA.sqrt() / P_DATA.sqrt().sum()
    assert 0.5 * (p - flattened).abs().sum() < 0.05 < total_variation(p)


def test_spin_start_loss_is_exact() -> None:
    assert expected_loss(Spin(), P_OPPONENT.log(), P_OPPONENT, P_OPPONENT, P_FIRST).item() == pytest.approx(math.log(2))
