"""PPO on CartPole in JAX, in the manner of PureJaxRL (Lu et al. 2022): one jitted iteration.

Rollout (``lax.scan``), GAE and every epoch of minibatches are one compiled program. Axes: ``T``
step, ``B`` environment. Equations of the environment and settings are those of this package.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

HIDDEN, OBS, ACTIONS = 64, 4, 2
DISCOUNT, LAMBDA, CLIP, VALUE_COEF, MAX_NORM, RATE, EPS = 0.99, 0.95, 0.2, 0.5, 0.5, 3e-4, 1e-5


class State(NamedTuple):
    """The state that an iteration changes."""

    params: Any
    moments: Any
    count: jax.Array
    env: jax.Array  # [B, 4]
    elapsed: jax.Array  # [B]
    key: jax.Array


def build(  # noqa: PLR0915 - one program
    num_envs: int, steps: int, epochs: int, minibatches: int
) -> tuple[Any, State]:
    """The jitted iteration ``state -> (state, metrics)``, and the initial state."""
    key, weights, first = jax.random.split(jax.random.key(0), 3)
    params = _params(weights)
    zeros = jax.tree.map(jnp.zeros_like, params)
    env = jax.random.uniform(first, (num_envs, OBS), minval=-0.05, maxval=0.05)
    elapsed = jnp.zeros(num_envs, jnp.int32)
    state = State(params, (zeros, zeros), jnp.zeros((), jnp.int32), env, elapsed, key)

    def act_and_step(carry: Any, _: Any) -> Any:
        params, env, elapsed, key = carry
        key, noise, reset = jax.random.split(key, 3)
        logits, value = _forward(params, env)
        action = jax.random.categorical(noise, logits)
        log_prob = _log_prob(logits, action)
        reached, terminated = _advance(env, action)
        elapsed = elapsed + 1
        truncated = (elapsed >= 500) & ~terminated
        ended = terminated | truncated
        fresh = jax.random.uniform(reset, env.shape, minval=-0.05, maxval=0.05)
        after = jnp.where(ended[:, None], fresh, reached)
        row = (env, action, log_prob, value, reached, terminated, ended)
        return (params, after, jnp.where(ended, 0, elapsed), key), row

    def minibatch(carry: Any, batch: Any) -> Any:
        params, (m, v), count = carry
        (_, kl), grad = jax.value_and_grad(_loss, has_aux=True)(params, batch)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grad)))
        grad = jax.tree.map(lambda g: g * jnp.minimum(1.0, MAX_NORM / (norm + 1e-6)), grad)
        count = count + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grad)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grad)
        first, second = 1.0 - 0.9**count, 1.0 - 0.999**count

        def stepped(p: Any, m: Any, v: Any) -> Any:
            return p - RATE * (m / first) / (jnp.sqrt(v / second) + EPS)

        return (jax.tree.map(stepped, params, m, v), (m, v), count), kl

    @jax.jit
    def iterate(state: State) -> tuple[State, Any]:
        carry = (state.params, state.env, state.elapsed, state.key)
        carry, rows = lax.scan(act_and_step, carry, None, steps)
        _, env, elapsed, key = carry
        obs, action, log_prob, value, reached, terminated, ended = rows
        _, next_value = _forward(state.params, reached)
        delta = 1.0 + DISCOUNT * jnp.where(terminated, 0.0, next_value) - value
        decay = jnp.where(ended, 0.0, DISCOUNT * LAMBDA)

        def back(tail: Any, row: Any) -> Any:
            tail = row[0] + row[1] * tail
            return tail, tail

        _, advantage = lax.scan(back, jnp.zeros(num_envs), (delta, decay), reverse=True)
        target = advantage + value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        flat = jax.tree.map(
            lambda x: x.reshape(steps * num_envs, *x.shape[2:]),
            (obs, action, log_prob, advantage, target),
        )

        def epoch(carry: Any, key: Any) -> Any:
            order = jax.random.permutation(key, steps * num_envs)
            batches = jax.tree.map(lambda x: x[order].reshape(minibatches, -1, *x.shape[1:]), flat)
            return lax.scan(minibatch, carry, batches)

        key, *keys = jax.random.split(key, epochs + 1)
        carry = (state.params, state.moments, state.count)
        (params, moments, count), kl = lax.scan(epoch, carry, jnp.stack(keys))
        metrics = (kl.mean(), ended.sum())
        return State(params, moments, count, env, elapsed, key), metrics

    return iterate, state


def _params(key: jax.Array) -> Any:
    def layer(key: Any, inputs: int, outputs: int, gain: float) -> Any:
        weight = jax.nn.initializers.orthogonal(gain)(key, (inputs, outputs))
        return weight, jnp.zeros(outputs)

    keys = jax.random.split(key, 6)
    root = math.sqrt(2.0)

    def tower(keys: Any, outputs: int, gain: float) -> Any:
        return [
            layer(keys[0], OBS, HIDDEN, root),
            layer(keys[1], HIDDEN, HIDDEN, root),
            layer(keys[2], HIDDEN, outputs, gain),
        ]

    return {"actor": tower(keys[:3], ACTIONS, 0.01), "critic": tower(keys[3:], 1, 1.0)}


def _tower(layers: Any, x: jax.Array) -> jax.Array:
    for weight, bias in layers[:-1]:
        x = jnp.tanh(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def _forward(params: Any, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _tower(params["actor"], obs), _tower(params["critic"], obs)[..., 0]


def _log_prob(logits: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], -1)[..., 0]


def _loss(params: Any, batch: Any) -> Any:
    obs, action, old, advantage, target = batch
    logits, value = _forward(params, obs)
    log_ratio = _log_prob(logits, action) - old
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - CLIP, 1.0 + CLIP)
    policy = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    return policy + VALUE_COEF * ((value - target) ** 2).mean(), (ratio - 1.0 - log_ratio).mean()


def _advance(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, x_dot, theta, theta_dot = state.T
    force = jnp.where(action == 1, 10.0, -10.0)
    sin, cos = jnp.sin(theta), jnp.cos(theta)
    push = (force + 0.05 * theta_dot**2 * sin) / 1.1
    angular = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos**2 / 1.1))
    rate = jnp.stack([x_dot, push - 0.05 / 1.1 * angular * cos, theta_dot, angular], -1)
    reached = state + 0.02 * rate
    fallen = jnp.abs(reached[:, 2]) > math.radians(12)
    return reached, (jnp.abs(reached[:, 0]) > 2.4) | fallen
