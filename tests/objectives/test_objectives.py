"""Every objective against hand-computed values and the properties that a game must have."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from sparring.objectives import OBJECTIVES, Dft, Dpo, Rft, Sdft, Sft, Sipo, Space, Spin, Ssimpo, Tspin, TspinRef
from sparring.types import Lengths, Objective, Scores

GAMES: list[Objective] = [
    Spin(),
    Spin(lambda_=5.0, loss="hinge"),
    Spin(loss="exponential"),
    Spin(loss="correlation"),
    Tspin(),
    Tspin(beta=0.0),
    Tspin(alpha=0.5, beta=0.5, loss="exponential"),
    Tspin(average_logprobs=True),
    Space(),
    Space(mu=3.0),
    Space(mu=0.5),
    Sipo(),
    Sipo(tau=0.5, average_logprobs=True),
    Ssimpo(),
    TspinRef(),
    TspinRef(beta=0.0, loss="exponential"),
]
EVERY: list[Objective] = [*GAMES, Sft(), Sft(average_logprobs=False), Dft(), Rft(), Sdft(), Sdft(kl="reverse"), Dpo()]


def scores(real: float, generated: float | list[float], proto: float | None = None) -> Scores:
    """Log-probs of one example."""
    drawn = generated if isinstance(generated, list) else [generated]
    one = {"real": torch.tensor([float(real)]), "generated": torch.tensor([drawn], dtype=torch.float32)}
    if proto is not None:
        one["proto"] = torch.tensor([float(proto)])
    return one


def ones(policy: Scores) -> Lengths:
    return {role: torch.ones_like(value, dtype=torch.long) for role, value in policy.items()}


def by_token(objective: Objective, logprobs: Scores) -> Scores:
    """Responses of one token, in the shapes that the objective reads. The token is a teacher's only candidate."""

    def read(value: torch.Tensor) -> torch.Tensor:
        return (
            value[..., None] if objective.needs.teacher is None else value[..., None, None].expand(*value.shape, 1, 2)
        )

    return {role: read(value) if role in objective.needs.per_token else value for role, value in logprobs.items()}


def loss(objective: Objective, policy: Scores, opponent: Scores | None = None) -> float:
    return objective(by_token(objective, policy), by_token(objective, opponent or {}), ones(policy)).per_example.item()


# methods as published, single samples computed by hand
@pytest.mark.parametrize(
    ("objective", "policy", "opponent", "expected"),
    [
        (Spin(), scores(-9, -10), scores(-11, -10), 0.598139),
        (Spin(), scores(-12, -9), scores(-11, -10), 0.798139),
        (Spin(lambda_=1.0, loss="hinge"), scores(-10.6, -10), scores(-11, -10), 0.6),
        (Spin(lambda_=0.5, loss="exponential"), scores(-9, -10), scores(-11, -10), math.exp(-1)),
        (Spin(lambda_=0.5, loss="correlation"), scores(-9, -10), scores(-11, -10), 0.0),
        (Tspin(), scores(-9, -10, -12), None, 0.325954),
        (Tspin(beta=0.0), scores(-9, -10), None, math.log1p(math.exp(-1))),
        (Space(), scores(2, -1), scores(0, 0), 0.440190),
        (Space(mu=3.0), scores(2, -1), scores(0, 0), 0.687766),
        (Sft(), scores(-9, -10), None, 9.0),
        (Dft(), scores(-0.5, -10), None, 0.5 * math.exp(-0.5)),
        (Rft(), scores(-9, -10), None, 9.0),
        # one candidate and the rest: p log(p/q) + (1-p) log((1-p)/(1-q))
        (Sdft(), scores(-9, math.log(0.5)), scores(-9, math.log(0.8)), 0.8 * math.log(1.6) + 0.2 * math.log(0.4)),
        (Sdft(kl="reverse"), scores(-9, -3), scores(-9, -1), 6.0),  # (-3 + 1) * -3
        (Sipo(tau=0.25), scores(-9, -10), scores(-11, -10), 0.0),  # a gap of 2 nats is its target
        (Sipo(tau=0.5), scores(-9, -10), scores(-11, -10), 1.0),
        (Ssimpo(beta=2.0, gamma=0.5), scores(-9, -10), None, math.log1p(math.exp(-1.5))),
        (
            TspinRef(alpha=0.5, beta=0.2),
            scores(-9, -10, -12),
            scores(-11, -10, -12),
            math.log1p(math.exp(-1)) + 0.2 * math.log(2),
        ),
    ],
)
def test_hand_computed(objective: Objective, policy: Scores, opponent: Scores | None, expected: float) -> None:
    assert loss(objective, policy, opponent) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("objective", GAMES, ids=repr)
def test_start_loss_is_the_loss_of_equal_models(objective: Objective) -> None:
    same = scores(-31.5, [-20.25, -25.5], -22)
    if objective.start_loss is None:
        assert not objective.needs.opponent
    else:
        assert loss(objective, same, same) == pytest.approx(objective.start_loss, rel=1e-6)


def test_published_start_losses() -> None:
    assert Spin().start_loss == pytest.approx(0.693147, abs=1e-6)
    assert [Space(mu=mu).start_loss for mu in (0.5, 1, 3, 7)] == pytest.approx(
        [0.954771, 1.386294, 2.249341, 3.014161], abs=1e-6
    )


@pytest.mark.parametrize("objective", GAMES, ids=repr)
def test_gradient_pushes_real_up_and_generated_down_at_the_start(objective: Objective) -> None:
    start = torch.tensor([-12.0, -8.0], dtype=torch.float64)
    real = start.clone().requires_grad_()
    generated = start[:, None].clone().requires_grad_()
    policy = {"real": real, "generated": generated, "proto": start.clone()}
    opponent = {"real": start, "generated": start[:, None], "proto": start}
    objective(policy, opponent, ones(policy)).per_example.sum().backward()
    assert real.grad is not None and generated.grad is not None
    assert (real.grad < 0).all()
    assert (generated.grad > 0).all()


@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_rows_do_not_mix(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(0)
    real, proto = torch.randn(2, 4, generator=generator)
    generated = torch.randn(4, 3, generator=generator)
    policy = {"real": real, "generated": generated, "proto": proto, "rejected": proto - 1}
    opponent = {role: value + 0.1 for role, value in policy.items()}
    together = objective(by_token(objective, policy), by_token(objective, opponent), ones(policy)).per_example
    for row in range(4):
        alone = {role: value[row : row + 1] for role, value in policy.items()}
        against = {role: value[row : row + 1] for role, value in opponent.items()}
        one = objective(by_token(objective, alone), by_token(objective, against), ones(alone)).per_example
        assert one.item() == pytest.approx(together[row].item())


@pytest.mark.parametrize("objective", EVERY, ids=repr)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_finite_at_the_extremes(objective: Objective, size: float) -> None:
    if getattr(objective, "loss", "") == "exponential":
        pytest.skip("exp(-z) overflows by definition; the training loop stops before the update")
    if objective.needs.per_token and size > 0:
        pytest.skip("a token has no positive log-prob")
    policy = {
        "real": torch.tensor([size], requires_grad=True),
        "generated": torch.tensor([[-size]], requires_grad=True),
        "proto": torch.tensor([size], requires_grad=True),
        "rejected": torch.tensor([-size], requires_grad=True),
    }
    opponent = {role: torch.zeros_like(value) for role, value in policy.items()}
    value = objective(by_token(objective, policy), by_token(objective, opponent), ones(policy)).per_example
    value.sum().backward()
    assert value.isfinite().all()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in policy.values())


def test_equal_answers_have_no_gradient_in_spin_but_have_one_in_space() -> None:
    def gradient(objective: Objective) -> float:
        logprob = torch.tensor([-5.0], requires_grad=True)
        policy = {"real": logprob, "generated": logprob[:, None]}
        opponent = {"real": torch.tensor([-7.0]), "generated": torch.tensor([[-7.0]])}
        objective(policy, opponent, ones(policy)).per_example.sum().backward()
        assert logprob.grad is not None
        return logprob.grad.item()

    assert gradient(Spin()) == 0
    assert gradient(Tspin(beta=0.0)) == 0
    assert gradient(Space()) == pytest.approx(-1 / (1 + math.exp(2)) + 1 / (1 + math.exp(-2)))


def test_tspin_history_has_no_gradient_where_generated_is_proto() -> None:
    drawn = torch.tensor([-5.0], requires_grad=True)
    policy = {"real": torch.tensor([-4.0]), "generated": drawn[:, None], "proto": drawn}
    history = Tspin()(policy, {}, ones(policy)).metrics["loss/history"]
    assert history.item() == pytest.approx(math.log(2))
    history.sum().backward()
    assert drawn.grad is not None and drawn.grad.item() == 0


def test_tspin_terms_each_have_their_own_link_and_gradient() -> None:
    policy = {
        role: torch.tensor(value, requires_grad=True)
        for role, value in {"real": [-9.0], "generated": [[-10.0]], "proto": [-12.0]}.items()
    }
    Tspin(beta=0.5)(policy, {}, ones(policy)).per_example.sum().backward()
    gradients = {role: value.grad.item() for role, value in policy.items() if value.grad is not None}
    current, history = 1 / (1 + math.exp(1)), 0.5 / (1 + math.exp(2))
    assert gradients == pytest.approx({"real": -current, "generated": current - history, "proto": history})


def test_tspin_without_history_is_spin_without_a_reference() -> None:
    policy = scores(-9, [-10, -14])
    zero = scores(0, [0, 0])
    assert loss(Tspin(alpha=0.3, beta=0.0), policy) == pytest.approx(loss(Spin(lambda_=0.3), policy, zero))


def test_space_at_mu_one_is_binary_cross_entropy_on_log_ratios() -> None:
    policy, opponent = scores(-9, -10), scores(-10.5, -9.25)
    logits = torch.tensor([policy["real"] - opponent["real"], policy["generated"][0] - opponent["generated"][0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]), reduction="sum")
    assert loss(Space(), policy, opponent) == pytest.approx(expected.item())


def test_space_weighs_several_samples_as_one_of_weight_mu() -> None:
    one, three = scores(-9, -10), scores(-9, [-10, -10, -10])
    opponent_one, opponent_three = scores(-9.5, -9), scores(-9.5, [-9, -9, -9])
    assert loss(Space(mu=3.0), three, opponent_three) == pytest.approx(loss(Space(mu=3.0), one, opponent_one))


def test_averaged_logprobs_divide_by_length() -> None:
    policy = scores(-9, -10)
    lengths = {"real": torch.tensor([3]), "generated": torch.tensor([[5]])}
    averaged = Tspin(beta=0.0, average_logprobs=True)(policy, {}, lengths).per_example.item()
    assert averaged == pytest.approx(loss(Tspin(beta=0.0), scores(-3, -2)))
    assert Sft()(policy, {}, lengths).per_example.item() == pytest.approx(3.0)
    assert Sft(average_logprobs=False)(policy, {}, lengths).per_example.item() == pytest.approx(9.0)


def test_the_family_s_relations() -> None:
    policy, opponent, zero = scores(-9, [-10, -14]), scores(-11, [-10, -12]), scores(0, [0, 0])
    assert loss(TspinRef(alpha=0.3, beta=0.0), policy, opponent) == pytest.approx(
        loss(Spin(lambda_=0.3), policy, opponent)
    )
    assert loss(Ssimpo(beta=0.3, gamma=0.0), policy) == pytest.approx(loss(Tspin(alpha=0.3, beta=0.0), policy))
    assert loss(Ssimpo(beta=0.3, gamma=0.0), policy) == pytest.approx(loss(Spin(lambda_=0.3), policy, zero))
    pair = {"real": torch.tensor([-9.0]), "rejected": torch.tensor([-10.0])}
    reference = {"real": torch.tensor([-11.0]), "rejected": torch.tensor([-10.0])}
    assert loss(Dpo(), pair, reference) == pytest.approx(0.598139, abs=1e-6)


def test_dft_weights_each_token_by_its_probability() -> None:
    """Its gradient is SFT's, token by token, times the probability; padding, which has log-prob 0, adds nothing."""
    tokens = torch.tensor([[-0.1, -2.0, -7.0], [-1.0, 0.0, 0.0]], requires_grad=True)
    lengths = {"real": torch.tensor([3, 1])}
    value = Dft()({"real": tokens}, {}, lengths).per_example
    value.sum().backward()
    expected = [sum(-x * math.exp(x) for x in (-0.1, -2.0, -7.0)) / 3, math.exp(-1.0)]
    assert value.tolist() == pytest.approx(expected)
    assert tokens.grad is not None
    assert tokens.grad[0].tolist() == pytest.approx([-math.exp(x) / 3 for x in (-0.1, -2.0, -7.0)])


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_sdft_pulls_each_token_toward_its_teacher_and_padding_adds_nothing(kl: Literal["forward", "reverse"]) -> None:
    """Two responses of two tokens and of one, with two candidates: the sampled token is the first one."""
    p = torch.tensor([[[[0.5, 0.5, 0.3], [0.2, 0.2, 0.7]], [[0.6, 0.6, 0.1], [1.0, 1.0, 1.0]]]])
    q = torch.tensor([[[[0.9, 0.9, 0.05], [0.1, 0.1, 0.8]], [[0.9, 0.9, 0.05], [1.0, 1.0, 1.0]]]])
    ours = p.log().requires_grad_()
    lengths = {"generated": torch.tensor([[2, 1]])}
    found = Sdft(kl=kl)({"generated": ours}, {"generated": q.log()}, lengths)
    found.per_example.sum().backward()
    assert ours.grad is not None

    def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
        if kl == "reverse":
            return ((p[0] / q[0]).log() * p[0].log()).item()
        full_p, full_q = torch.cat([p[1:], 1 - p[1:].sum(0, True)]), torch.cat([q[1:], 1 - q[1:].sum(0, True)])
        return (full_q * (full_q / full_p).log()).sum().item()

    each = [divergence(p[0, i, j], q[0, i, j]) for i, j in ((0, 0), (0, 1), (1, 0))]
    assert found.per_example.tolist() == pytest.approx([((each[0] + each[1]) / 2 + each[2]) / 2], abs=1e-6)
    of_token = ours.grad[0, :, :, 1 if kl == "forward" else 0]
    assert of_token[0, 0] < 0 < of_token[0, 1], "up where the teacher finds the token likelier, down where it does not"
    gap = ((math.log(5 / 9) + math.log(2)) / 2 + math.log(6 / 9)) / 2
    assert found.metrics["kl_from_teacher"].tolist() == pytest.approx([gap], abs=1e-6)


def test_unread_responses_are_not_asked_for() -> None:
    assert "proto" not in Tspin(beta=0.0).needs.roles
    assert "proto" in Tspin().needs.roles
    assert Sft().needs.rounds == 0
    assert [Spin().needs.rounds, replace(Spin(), rounds=1).needs.rounds] == [2, 1]


def test_every_objective_is_in_the_table_and_has_a_page() -> None:
    from pathlib import Path

    pages = {page.stem for page in (Path(__file__).parents[2] / "docs" / "objectives").glob("*.md")}
    for name, kind in OBJECTIVES.items():
        assert kind().name == name
        assert name in pages
