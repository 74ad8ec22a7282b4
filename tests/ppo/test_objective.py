"""The objective for each sample, and the gradient of its mean, where both are known."""

import torch

from esper_lightning import PPOConfig
from esper_lightning.core.types import Samples
from esper_lightning.policies.base import Evaluation
from esper_lightning.ppo.objective import ppo_loss_terms, total_loss

M = 6
CONFIG = PPOConfig(clip=0.2, value_clip=None, value_coef=0.5, entropy_coef=0.01)


def samples(generator: torch.Generator, weight: torch.Tensor | None = None) -> Samples:
    log_prob, advantage, value, target = torch.randn(4, M, generator=generator)
    return Samples(
        obs=torch.zeros(M, 1),
        action=torch.zeros(M, dtype=torch.int64),
        log_prob=log_prob,
        action_mask=None,
        advantage=advantage,
        value=value,
        value_target=target,
        actor_weight=weight,
    )


def evaluation(batch: Samples) -> Evaluation:
    """The samples under the weights that acted: all ratios are 1."""
    log_prob, value = (x.clone().requires_grad_() for x in (batch.log_prob, batch.value))
    return Evaluation(log_prob, torch.full((M,), 0.7, requires_grad=True), value)


def test_at_the_weights_that_acted_the_gradient_is_that_of_the_plain_policy_gradient(generator):
    batch = samples(generator)
    now = evaluation(batch)
    terms = ppo_loss_terms(now, batch, CONFIG)
    total_loss(terms, {}, CONFIG).mean().backward()
    torch.testing.assert_close(now.log_prob.grad, -batch.advantage / M)
    torch.testing.assert_close(now.entropy.grad, torch.full((M,), -0.01 / M))
    # Half of a squared error has the error as its gradient.
    torch.testing.assert_close(now.value.grad, (batch.value - batch.value_target) / M)


def test_beyond_the_clip_a_step_that_would_go_further_has_no_gradient(generator):
    batch = samples(generator)
    moved = torch.where(batch.advantage > 0, 0.5, -0.5)  # in the direction of the advantage
    log_prob = (batch.log_prob + moved).requires_grad_()
    now = evaluation(batch)._replace(log_prob=log_prob)
    ppo_loss_terms(now, batch, CONFIG).policy.mean().backward()
    assert (log_prob.grad == 0.0).all()
    back = (batch.log_prob - moved).requires_grad_()
    ppo_loss_terms(now._replace(log_prob=back), batch, CONFIG).policy.mean().backward()
    assert (back.grad != 0.0).all()


def test_steps_without_a_choice_do_not_count_for_the_actor_and_count_for_the_critic(generator):
    batch = samples(generator, torch.tensor([0.0, 2.0, 0.0, 2.0, 0.0, 2.0]))
    now = evaluation(batch)
    terms = ppo_loss_terms(now, batch, CONFIG)
    total_loss(terms, {}, CONFIG).mean().backward()
    assert now.log_prob.grad[::2].abs().sum() == 0.0
    torch.testing.assert_close(now.log_prob.grad[1::2], -batch.advantage[1::2] / (M / 2))
    assert (now.value.grad != 0.0).all()


def test_terms_of_extensions_are_added_as_they_are(generator):
    batch = samples(generator)
    terms = ppo_loss_terms(evaluation(batch), batch, CONFIG)
    first, second = torch.randn(2, M, generator=generator)
    plain = total_loss(terms, {}, CONFIG)
    both = total_loss(terms, {"first": first, "second": second}, CONFIG)
    torch.testing.assert_close(both - plain, first + second, rtol=1e-4, atol=1e-5)
