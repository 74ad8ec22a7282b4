"""Iterations on a fake CUDA device: a program that prints what was found as JSON.

``python -m tests.gpu_proof.with_fake_cuda FOLDER tests.gpu_proof.on_cuda GROUP ...`` shows for each
case of the groups, and each mode, what read the host or copied between host and device after the
first iteration, and how many kernels are launched. With ``--write`` in place of groups, the numbers
of kernels go to ``kernels.json``.
"""

import dataclasses
import json
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch

from esper_lightning import CNN, MLP, RND, Composed, PPOConfig, Recurrent
from esper_lightning.compiling import loops, stepwise, tracing
from esper_lightning.core import distributions, last_obs
from esper_lightning.core.running_stats import ObsNormalizer, RunningStats
from esper_lightning.envs import (
    Acrobot,
    CartPole,
    FrameStack,
    Morphogenesis,
    MountainCar,
    Pendulum,
)
from esper_lightning.envs.morphogenesis import data, operations
from esper_lightning.envs.morphogenesis.population import DIGITS_KINDS
from esper_lightning.policies.encoders import Flat, Groups
from esper_lightning.policies.images import Image
from esper_lightning.ppo.agent import Agent, prepare_obs
from esper_lightning.ppo.evaluation import Stride, evaluate_policy
from esper_lightning.ppo.extension import Extensions
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.optimizer import build_optimizer
from tests.envs.pictures import Pictures
from tests.gpu_proof.fake_cuda import FakeCuda, move

PLAIN = PPOConfig(rollout_steps=2, epochs=1, minibatches=2, max_grad_norm=None)
FULL = PPOConfig(
    rollout_steps=2, epochs=1, minibatches=2, target_kl=0.02, normalize_obs=True,
    normalize_reward=True, value_clip=0.2,
)  # fmt: skip
FEW = {"num_envs": 8}
GROWTH = Morphogenesis.synthetic(**FEW, train_batches=1)
MIXED = dataclasses.replace(GROWTH, population=DIGITS_KINDS)
ENVS = {
    "cartpole": CartPole(**FEW),
    "acrobot": Acrobot(**FEW),
    "mountain car": MountainCar(**FEW),
    "pendulum": Pendulum(**FEW),
    "stack": FrameStack(env=CartPole(**FEW), frames=2),
    "growth": GROWTH,
}
POLICIES = {"mlp": MLP(hidden_sizes=(16,)), "gru": Recurrent(), "lstm": Recurrent(cell="lstm")}
ADAPTIVE = dataclasses.replace(FULL, learning_rate_schedule="adaptive")
HIDDEN = dataclasses.replace(GROWTH, hide_training=True)
HIDDEN_MIXED = dataclasses.replace(MIXED, hide_training=True)
PICTURES = Pictures(num_envs=8, shape=(1, 36, 36))
STACKED = FrameStack(env=PICTURES, frames=2, channel_order="first")
OWN = Composed(encoder=Groups(encoders={"image": Image(), "vector": Flat()}))
OWN_SEPARATE = Composed(encoder=Flat(), trunk="separate")
OWN_TANH = Composed(encoder=Flat(), hidden_sizes=(8,), action_bounds="tanh")
SHARED, TANH = MLP(trunk="shared"), MLP(action_bounds="tanh")
CASES = {
    **{
        f"{env}, {policy}, {options}": (ENVS[env], POLICIES[policy], config, ())
        for env in ENVS
        for policy in POLICIES
        for options, config in (("plain", PLAIN), ("full", FULL))
    },
    "special, shared": (ENVS["cartpole"], SHARED, FULL, ()),
    "special, tanh": (ENVS["pendulum"], TANH, FULL, ()),
    "special, distillation": (ENVS["cartpole"], POLICIES["mlp"], FULL, (RND(),)),
    "special, mixed hosts": (MIXED, POLICIES["mlp"], FULL, ()),
    "special, pictures": (PICTURES, CNN(), FULL, ()),
    "special, own networks": (dataclasses.replace(PICTURES, grouped=True), OWN, FULL, ()),
    "special, stack of pictures": (STACKED, CNN(), FULL, ()),
    "special, adaptive": (ENVS["cartpole"], POLICIES["mlp"], ADAPTIVE, ()),
    "adaptive, gru": (ENVS["pendulum"], POLICIES["gru"], ADAPTIVE, ()),
    "own network, plain": (ENVS["cartpole"], OWN_SEPARATE, PLAIN, ()),
    "own network, tanh": (ENVS["pendulum"], OWN_TANH, FULL, ()),
    "own network, growth": (GROWTH, Composed(encoder=Flat()), FULL, ()),
    "hidden training, mlp": (HIDDEN, POLICIES["mlp"], FULL, ()),
    "hidden training, gru": (HIDDEN, POLICIES["gru"], FULL, ()),
    "hidden training, mixed hosts": (HIDDEN_MIXED, POLICIES["mlp"], FULL, ()),
    "stack of pictures, plain": (STACKED, CNN(), PLAIN, ()),
}  # fmt: skip
# Every environment, policy and option is in a few cases; all combinations take minutes.
FEW_CASES = [
    "cartpole, mlp, plain",
    *(f"{env}, mlp, full" for env in ENVS),
    "cartpole, gru, full",
    "pendulum, lstm, full",
    *(name for name in CASES if name.startswith("special")),
]
GROUPS = {"few": FEW_CASES, "others": [name for name in CASES if name not in FEW_CASES]}
MODES = ("off", "default")
KERNELS = Path(__file__).with_name("kernels.json")


class OnCuda:
    """A learner on the fake device, and the stages of its iterations."""

    def __init__(self, case, mode):
        self.spec, policy, self.config, extensions = case
        spaces, weights = self.spec.spaces(), torch.Generator()
        policy = policy.build(spaces, weights)
        added = Extensions.build(extensions, spaces, weights)
        clip = self.config.obs_clip
        normalizer = ObsNormalizer(spaces.obs, clip=clip) if self.config.normalize_obs else None
        stats = RunningStats(()) if self.config.normalize_reward else None
        self._parts = policy, added, normalizer, stats
        self._mode = mode

    def build(self):
        """The learner; called within the context of the device."""
        device = torch.device("cuda", 0)
        policy, added, self.normalizer, stats = (
            None if part is None else move(part) for part in self._parts
        )
        self.policy = policy
        self.learner = Learner(
            self.spec,
            self.spec.build(device, 0),
            Agent(policy, self.normalizer, added),
            self.config,
            stats,
            exploration=torch.Generator(device),
            sample_order=torch.Generator(device),
            mode=self._mode,
            device=device,
        )
        # The first steps are inspected on the host, as meant: these have gone by.
        self.learner._first_steps.left = 0
        self.learner._first_steps._is_of_known_kind = lambda result: True
        self.learner.start(build_optimizer(policy, self.config, added), None)

    def iterate(self, found):
        """One iteration; the number of kernels of each stage."""
        learner, counts = self.learner, {}
        before = found.count()
        rollout = learner.rollout(self.config.rollout_steps)
        counts["rollout"] = found.count() - before
        targets = learner.compute_targets(rollout)
        counts["advantages"] = found.count() - before - counts["rollout"]
        update = learner.update(targets, learning_rate=3e-4)
        counts["update"] = found.count() - before - sum(counts.values())
        if self.normalizer is not None:
            self.normalizer.update(rollout.obs)
        self.results = rollout, targets, update
        return counts

    def read(self):
        """Whether the one read of an iteration, and nothing before it, asks the host."""
        learner = self.learner
        rollout, targets, update = self.results
        try:
            learner.to_host(rollout, targets, update, iteration=1)
        except Exception as error:  # of fake tensors, which have no numbers
            return "_local_scalar_dense" in str(error)
        return False


def run(case, mode, *, shorter):
    """What one case shows; with ``shorter``, also the kernels of one step."""
    case, shown = OnCuda(case, mode), {}
    data.load.cache_clear()  # fake tensors of an earlier context
    operations._taps.cache_clear()
    with FakeCuda() as found:
        # The package makes real ones, also where other tensors have no numbers.
        nodes = torch.empty(32, device="cuda:0")
        distributions._HERMITE[nodes.device] = nodes, torch.empty_like(nodes)
        case.build()
        case.iterate(found)
        found.copies.clear()
        whole = case.iterate(found)
        shown["kernels"] = {**whole, "iteration": sum(whole.values())}
        shown["reads where it must"] = case.read()
        shown["copies"] = dict(found.copies)
        if shorter:
            shown["kernels"] |= _of_one_step(case, found, whole)
    ways = [
        case.learner.collector._loop,
        case.learner._updater._loop,
        case.learner._prepare,
    ]
    shown["compiled"] = all(len(getattr(way, "_ways", [0, 0])) == 2 for way in ways)
    return shown


def _of_one_step(case, found, whole):
    """Kernels of one step of a rollout and of one gradient step."""
    learner, steps = case.learner, case.config.rollout_steps
    before = found.count()
    learner.rollout(steps - 1)
    rollout = whole["rollout"] - (found.count() - before)
    order = learner.order
    updater, samples = learner._updater, case.results[1].samples
    state, counts = learner._parameters.state, []
    for some in (order[:1], order[:2]):
        before = found.count()
        updater.update(
            state,
            learner.agent.weights,
            samples,
            some,
            learning_rate=learner._learning_rate,
            healthy=case.results[1].healthy,
        )
        counts.append(found.count() - before)
    return {"rollout step": rollout, "gradient step": counts[1] - counts[0]}


def step_of_hosts():
    """Kernels with the settings of ``Morphogenesis.digits``: of a step, without test accuracy, and
    of one of its updates.
    """
    data.load.cache_clear()
    operations._taps.cache_clear()
    with FakeCuda() as found:
        env = Morphogenesis.digits(num_envs=64).build(torch.device("cuda", 0), 0)
        env.reset()
        action = torch.zeros(64, 4, dtype=torch.int64, device="cuda:0")
        env.step(action)
        update, updates = env.trainer._update, []

        def counted(*args):
            before = found.count()
            result = update(*args)
            updates.append(found.count() - before)
            return result

        env.trainer._update = counted
        before = found.count()
        env.step(action)
        (each,) = set(updates)
        return {"step of hosts": found.count() - before, "update of hosts": each}


def evaluation(case):
    """Where an evaluation first reads the host, and after how many steps."""
    case = OnCuda(case, "off")
    steps = 0
    with FakeCuda() as found:
        case.build()
        env = case.spec.build(torch.device("cuda", 0), 0)
        transition, normalizer = env.transition, case.normalizer

        def counted(*args):
            nonlocal steps
            steps += 1
            return transition(*args)

        env.transition = counted
        device = torch.device("cuda", 0)
        stride = Stride(case.policy, normalizer, env, mode="auto", device=device)
        found.copies.clear()
        try:
            normalize = partial(prepare_obs, normalizer=normalizer)
            evaluate_policy(case.policy, normalize, env, stride=stride, max_steps=100)
        except Exception as error:  # of fake tensors
            message = str(error)
    return {
        "steps": steps,
        "reads": "_local_scalar_dense" in message,
        "copies": dict(found.copies),
    }


def main(groups):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Compiled code is the traced operations; a compiler changes nothing that is asked here.
    for module in (stepwise, tracing):
        module.compile_graph = lambda graph: graph
    loops.CapturedFunction = lambda function: function  # the graph of an environment
    Morphogenesis._check_population = lambda *_: None  # reads labels once, before any step
    last_obs._SHARE = 1  # rollouts of images have room for every end, so that none must be counted
    writes = groups == ["--write"]
    found = {}
    for name in [name for group in (GROUPS if writes else groups) for name in GROUPS[group]]:
        for mode in MODES[:1] if writes else MODES:
            try:
                found[f"{name}, {mode}"] = run(CASES[name], mode, shorter=mode == "off")
            except Exception as error:  # it is the result
                found[f"{name}, {mode}"] = {
                    "error": "".join(traceback.format_exception(error)[-6:])
                }
    whole = writes or "others" in groups
    hosts = step_of_hosts() if whole else {}
    if writes:
        kernels = {name.removesuffix(", off"): one["kernels"] for name, one in found.items()}
        KERNELS.write_text(json.dumps(kernels | hosts, indent=1) + "\n")
        return
    played = evaluation(CASES["cartpole, gru, full"])
    print(json.dumps({"cases": found, "hosts": hosts, "evaluation": played}))


if __name__ == "__main__":
    main(sys.argv[1:])
