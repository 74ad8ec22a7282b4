"""The environment ``Morphogenesis``: it trains ``B`` hosts, for one epoch in each step.

A step applies the action, advances the life cycles of seeds, trains, validates and rewards: the
reward belongs to the action of the same step. All state is in tensors with a row for each
environment.
"""

import math
import weakref
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.compiling.loops import capture_function
from esper_lightning.core.errors import require
from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.tensor_trees import leaves, map_tree, named_tensors, rebuild
from esper_lightning.core.types import StepResult
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS, count_parameters
from esper_lightning.envs.morphogenesis.lifecycle import LIVE, Action, LifeCycle, Op, Slots, is_in
from esper_lightning.envs.morphogenesis.observation import Vitals, action_mask, observe
from esper_lightning.envs.morphogenesis.population import Kinds
from esper_lightning.envs.morphogenesis.precision import own_precision
from esper_lightning.envs.morphogenesis.reward import (
    REWARD_TERMS,
    RewardWeights,
    reward_terms,
    stage_potential,
)
from esper_lightning.envs.morphogenesis.state import HostInitializer, Hosts
from esper_lightning.envs.morphogenesis.trainer import HostTrainer
from esper_lightning.envs.morphogenesis.training import Measured, Trained

__all__ = ["MorphogenesisEnv", "StepReport"]


class StepReport(NamedTuple):
    """Measurements of a step that are for metrics and figures, and not for the agent."""

    terms: dict[str, Float[Tensor, " B"]]  # terms of the reward by name
    ended: Bool[Tensor, " B"]
    diverged: Bool[Tensor, " B"]
    accuracy: Float[Tensor, " B"]  # on the validation split
    loss: Float[Tensor, " B"]  # on the validation split, nats
    grown_parameters: Int[Tensor, " B"]
    stage: Int[Tensor, "B S"]  # before any reset
    blueprint: Int[Tensor, "B S"]  # position in BLUEPRINTS; 0 where there is no seed
    alpha: Float[Tensor, "B S"]
    test_accuracy: Float[Tensor, " B"]  # NaN where no episode ended, or if not asked for


class _Advanced(NamedTuple):
    """Results of a step: the hosts after it, and what the step returns."""

    hosts: Hosts
    result: StepResult
    report: StepReport


class MorphogenesisEnv:
    """``BatchedEnv`` of ``Morphogenesis``, which builds its parts; on CUDA a step is one graph.

    Args:
        num_envs: Number of environments, ``B``.
        epochs: Number of steps of an episode.
        spaces: Observation and action spaces of one environment.
        reward_weights: Weights of the terms of the reward.
        lifecycle: Life cycle of seeds.
        initializer: Creates hosts and seeds.
        trainer: Trains and measures hosts.
        device: Device of the hosts.
        seed: Seed of all random numbers.
        hide_training: Whether observations hide what is measured in the training of a host.

    Attributes:
        num_envs: Number of environments.
        spaces: Observation and action spaces of one environment.
        epochs: Number of steps of an episode.
        lifecycle: Life cycle of seeds.
        trainer: Trains and measures hosts.
        architecture: Layers of the hosts.
        blueprints: Names of the modules that can be grown.
        host_parameters: Number of parameters of a host on which nothing has grown.
        hosts: State of the hosts, which baselines and tables may read.
        report: Measurements of the last step; ``None`` before the first one.
        tests_ends: Whether to measure test accuracy where an episode ends. Where the host must not
            wait for the device, test accuracy is measured in every step.
    """

    def __init__(
        self,
        *,
        num_envs: int,
        epochs: int,
        spaces: EnvSpaces,
        reward_weights: RewardWeights,
        lifecycle: LifeCycle,
        initializer: HostInitializer,
        trainer: HostTrainer,
        device: torch.device,
        seed: int,
        hide_training: bool = False,
    ) -> None:
        self.report, self.tests_ends = cast(StepReport | None, None), False
        self.epochs, self.lifecycle, self.trainer = epochs, lifecycle, trainer
        self.architecture, self.blueprints = trainer.architecture, trainer.blueprints
        self.num_envs, self.spaces = num_envs, spaces
        self._reward_weights, self._initializer = reward_weights, initializer
        self._device, self._seed = device, seed
        self._static, self._hide_training = trainer.static, hide_training
        widths = self.architecture.channels
        counts = [[count_parameters(name, width) for width in widths] for name in BLUEPRINTS]
        self._seed_parameters = torch.tensor(counts, device=device)  # [blueprint, S]
        self.host_parameters = sum(part.size for part in self.architecture.parts())
        self.hosts = initializer.hosts(seed, torch.zeros(num_envs, device=device).long())
        self._advance: dict[bool, Callable[..., _Advanced]] = {}
        self._sums: Tensor | None = None
        self._steps = 0

    @torch.no_grad()
    def reset(self) -> tuple[Float[Tensor, "B O"], Bool[Tensor, "B K"]]:
        """Start to train a new host in every environment."""
        self.hosts = self._initializer.hosts(self._seed, self.hosts.episode + 1)
        return self._observe(self.hosts), self.action_mask()

    @torch.no_grad()
    def step(self, action: Int[Tensor, "B 4"]) -> StepResult:
        """Act, then train every host for an epoch; start a new host where an episode ended.

        An op that is not legal does nothing.
        """
        if self.tests_ends not in self._advance:
            self._advance[self.tests_ends] = capture_function(
                "step of Morphogenesis", self._advance_when(self.tests_ends), device=self._device
            )
        if self._static:  # a graph may write into the memory of its first action
            action = action.clone(memory_format=torch.contiguous_format)
        with own_precision(self._device):
            advanced = self._advance[self.tests_ends](self.hosts, action)
        if self._static:  # a graph overwrites what it returned
            shown = map_tree(torch.clone, (advanced.result, advanced.report))
            advanced = _Advanced(advanced.hosts, *shown)
        self.hosts, result, self.report = advanced
        self._add_up(advanced.report)
        return result

    def reseed(self, seed: int) -> bool:
        """Have the next ``reset`` start the hosts that new environments with this seed start.

        Args:
            seed: Seed of all random numbers. A captured step serves no other seed than its own.

        Returns:
            True: every reset can be seeded.
        """
        if seed != self._seed:
            self._advance.clear()
        self._seed = seed
        self.hosts = self.hosts._replace(episode=torch.zeros_like(self.hosts.episode))
        self.report, self._sums, self._steps = None, None, 0
        return True

    def metrics(self) -> dict[str, Float[Tensor, ""]]:
        """Means over hosts and steps since the last call; NaN if there was no step.

        Returns:
            Terms of the reward, grown parameters, and the share of hosts that diverged.
        """
        names = [*(f"reward_{name}" for name in REWARD_TERMS), "grown_parameters", "diverged"]
        sums = torch.full((len(names),), math.nan, device=self._device)
        if self._sums is not None:
            sums = self._sums / self._steps
        self._sums, self._steps = None, 0
        return dict(zip(names, sums.unbind(), strict=True))

    def _add_up(self, report: StepReport) -> None:
        terms = [report.terms[name] for name in REWARD_TERMS]
        means = torch.stack([*terms, report.grown_parameters, report.diverged], 1).mean(0)
        self._sums = means if self._sums is None else self._sums + means
        self._steps += 1

    def _advance_when(self, tests_ends: bool) -> Callable[[Hosts, Tensor], _Advanced]:
        """A step as a function that does not keep these environments alive.

        Otherwise environments and their graph, which holds the function, would wait for the garbage
        collector, with all the memory of their hosts.
        """
        advanced = weakref.WeakMethod(self._advanced)

        def advance(before: Hosts, action: Tensor) -> _Advanced:
            step = advanced()
            assert step is not None
            return step(before, action, tests_ends=tests_ends)

        return advance

    def _advanced(
        self, before: Hosts, action: Int[Tensor, "B 4"], *, tests_ends: bool
    ) -> _Advanced:
        """Compute a step; weights and velocity of the hosts are changed in place."""
        choice = Action(*action.unbind(1))
        slots, changed = self.lifecycle.apply(before.slots, self._name_blueprint(choice))
        germinated = changed & (choice.op == Op.GERMINATE).unsqueeze(1)
        self._initializer.germinate(self._seed, before, slots, germinated, static=self._static)
        slots = self.lifecycle.tick(slots)
        kinds = self.trainer.kinds(before, self._seed)
        trained = self.trainer.train(before, slots, self._seed, kinds)
        validation = self.trainer.splits.validation
        measured = self.trainer.measure(before.weights, slots, validation, kinds)
        diverged = ~trained.finite | ~measured.loss.isfinite()
        vitals = _next_vitals(before.vitals, slots, trained, measured, choice, changed)
        ended = diverged | (vitals.step >= self.epochs)
        slots = slots._replace(measured=slots.measured | measured.judged)
        grown = self.grown_parameters(slots)
        dtype = before.episode_return.dtype
        terms = reward_terms(
            self._reward_weights,
            gain=vitals.accuracies[:, 0] - before.vitals.accuracies[:, 0],
            grown=grown / self.host_parameters,
            intervened=choice.op != Op.WAIT,
            diverged=diverged,
            potential=stage_potential(slots.stage, dtype).masked_fill(ended, 0.0),
            potential_before=stage_potential(before.slots.stage, dtype),
        )
        reward = sum(terms.values(), torch.zeros_like(before.episode_return))
        episode_return = before.episode_return + reward
        reached = before._replace(
            slots=slots,
            vitals=vitals,
            episode=before.episode + ended,
            episode_return=episode_return.masked_fill(ended, 0.0),
        )
        reached_obs = self._observe(reached)
        test_accuracy = self._test(reached, ended, kinds, wanted=tests_ends)
        hosts = self._restart(reached, ended)
        result = StepResult(
            obs=torch.where(ended.unsqueeze(1), self._observe(hosts), reached_obs),
            reward=reward,
            terminated=ended,
            truncated=torch.zeros_like(ended),
            reached_obs=reached_obs,
            action_mask=self._action_mask(hosts),
            episode_return=episode_return.masked_fill(~ended, math.nan),
            episode_length=vitals.step.masked_fill(~ended, 0),
        )
        report = StepReport(
            terms,
            ended,
            diverged,
            vitals.accuracies[:, 0],
            vitals.losses[:, 0],
            grown,
            slots.stage,
            slots.blueprint.masked_fill(~is_in(slots.stage, LIVE), 0),
            slots.alpha,
            test_accuracy,
        )
        return _Advanced(hosts, result, report)

    def action_mask(self) -> Bool[Tensor, "B K"]:
        """Mask of the actions that are allowed in the current state."""
        return self._action_mask(self.hosts)

    def _action_mask(self, hosts: Hosts) -> Bool[Tensor, "B K"]:
        legal = self.lifecycle.legal(hosts.slots)
        return action_mask(legal, len(self.blueprints), self.lifecycle.ramps)

    def legal(self) -> Bool[Tensor, "B O S"]:
        """Whether each op may be applied to each slot in the current state."""
        return self.lifecycle.legal(self.hosts.slots)

    def grown_parameters(self, slots: Slots) -> Int[Tensor, " B"]:
        """Number of parameters of all live seeds, from their blueprints."""
        column = torch.arange(slots.stage.shape[1], device=self._device)
        count = self._seed_parameters[slots.blueprint, column]
        return count.masked_fill(~is_in(slots.stage, LIVE), 0).sum(1)

    @torch.no_grad()
    def test_accuracy(self) -> Float[Tensor, " B"]:
        """Accuracy of the current hosts on the test split, which no agent may see."""
        hosts, test, kinds = self.hosts, self.trainer.splits.test, self.kinds()
        with own_precision(self._device):
            found = self.trainer.measure(hosts.weights, hosts.slots, test, kinds, switch=False)
        return found.accuracy

    @torch.no_grad()
    def kinds(self) -> Kinds | None:
        """The kinds of the current hosts, which no agent may see; ``None`` if all are alike."""
        return self.trainer.kinds(self.hosts, self._seed)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of hosts, seeds, their momentum, life cycles and counters."""
        return {name: tensor.clone() for name, tensor in named_tensors(self.hosts)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state_dict`` bit for bit.

        Raises:
            ValueError: If the state comes from an environment with other settings; nothing is
                changed then.
        """
        field = "Morphogenesis.load_state_dict()"
        expected = dict(named_tensors(self.hosts))
        require(state.keys() == expected.keys(), field, f"get {sorted(expected)}", sorted(state))
        for name, tensor in expected.items():
            rule = f"be {tensor.dtype} of shape {list(tensor.shape)}"
            got = (state[name].dtype, list(state[name].shape))
            hint = "It was saved with other settings."
            ok = got == (tensor.dtype, list(tensor.shape))
            require(ok, f"{field}[{name!r}]", rule, got, hint)
        copies = [state[name].to(self._device, copy=True) for name in expected]
        self.hosts = cast(Hosts, rebuild(self.hosts, copies))
        seed = int(state["seed"])
        if seed != self._seed:
            self._advance.clear()  # captured graphs hold the old seed
        self._seed = seed

    def _name_blueprint(self, choice: Action) -> Action:
        """The action with its blueprint as a position in ``BLUEPRINTS``, not in the settings."""
        kinds = self._initializer.kinds
        return choice._replace(blueprint=kinds[choice.blueprint.clamp(0, kinds.shape[0] - 1)])

    def _test(
        self, hosts: Hosts, ended: Bool[Tensor, " B"], kinds: Kinds | None, *, wanted: bool
    ) -> Float[Tensor, " B"]:
        if not wanted or not (self._static or bool(ended.any())):
            return torch.full_like(hosts.episode_return, math.nan)
        test = self.trainer.splits.test
        found = self.trainer.measure(hosts.weights, hosts.slots, test, kinds, switch=False)
        return found.accuracy.masked_fill(~ended, math.nan)

    def _observe(self, hosts: Hosts) -> Float[Tensor, "B O"]:
        return observe(
            hosts.slots,
            hosts.vitals,
            self.grown_parameters(hosts.slots) / self.host_parameters,
            epochs=self.epochs,
            classes=self.architecture.classes,
            hide_training=self._hide_training,
        )

    def _restart(self, hosts: Hosts, ended: Bool[Tensor, " B"]) -> Hosts:
        if not self._static and not bool(ended.any()):
            return hosts
        fresh = self._initializer.hosts(self._seed, hosts.episode)._replace(
            episode_return=hosts.episode_return
        )
        pairs = zip(leaves(hosts), leaves(fresh), strict=True)
        chosen = [
            old if old.dim() == 0 else torch.where(ended.view(-1, *[1] * (old.dim() - 1)), new, old)
            for old, new in pairs
        ]
        return cast(Hosts, rebuild(hosts, chosen))


def _next_vitals(
    vitals: Vitals,
    slots: Slots,
    trained: Trained,
    measured: Measured,
    choice: Action,
    changed: Bool[Tensor, "B S"],
) -> Vitals:
    germinated = changed & (choice.op == Op.GERMINATE).unsqueeze(1)
    live = is_in(slots.stage, LIVE)
    slot_count = slots.stage.shape[1]
    return Vitals(
        step=vitals.step + 1,
        losses=torch.cat((measured.loss.unsqueeze(1), vitals.losses[:, :-1]), dim=1),
        accuracies=torch.cat((measured.accuracy.unsqueeze(1), vitals.accuracies[:, :-1]), dim=1),
        contribution=torch.where(
            measured.judged, measured.contribution, vitals.contribution.masked_fill(~live, 0.0)
        ),
        contribution_age=(vitals.contribution_age + 1).masked_fill(measured.judged | ~live, 0),
        germination_accuracy=torch.where(
            germinated, vitals.accuracies[:, :1], vitals.germination_accuracy
        ),
        grad_norm=trained.grad_norm.masked_fill(~live, 0.0),
        last_op=choice.op.clamp(0, len(Op) - 1),
        last_slot=choice.slot.clamp(0, slot_count - 1),
        changed=changed.any(1),
    )
