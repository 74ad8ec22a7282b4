"""The environment: ``B`` host trainings, of which each step is one epoch.

A step applies the action, lets the life cycle tick, trains, validates and rewards: the reward is
what the action led to. Everything is a tensor with a row for each environment.
"""

import math
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.tensor_trees import leaves, named_tensors, rebuild
from esper_lightning.core.types import StepResult
from esper_lightning.core.validate import require
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS, Part, parts
from esper_lightning.envs.morphogenesis.data import Split, Splits, load
from esper_lightning.envs.morphogenesis.layout import unflatten
from esper_lightning.envs.morphogenesis.lifecycle import LIVE, Action, LifeCycle, Op, Slots, is_in
from esper_lightning.envs.morphogenesis.network import Weights
from esper_lightning.envs.morphogenesis.observation import HISTORY, Vitals, action_mask, observe
from esper_lightning.envs.morphogenesis.reward import reward_terms, stage_potential
from esper_lightning.envs.morphogenesis.streams import Place, Purpose, integers, normals
from esper_lightning.envs.morphogenesis.training import Measured, Trained, measure, train

if TYPE_CHECKING:
    from esper_lightning.envs.morphogenesis.settings import Morphogenesis

__all__ = ["Hosts", "MorphogenesisEnv", "StepReport"]

_CACHE_BYTES = 8 << 20  # activations of the first block of a chunk
_IMAGES = 150  # that a chunk looks at together in validation, at most


class Hosts(NamedTuple):
    """Everything that decides the future of the environments."""

    weights: Weights
    velocity: Weights
    slots: Slots
    vitals: Vitals
    episode: Int[Tensor, " B"]
    episode_return: Float[Tensor, " B"]
    seed: Int[Tensor, ""]  # of all random numbers


class StepReport(NamedTuple):
    """What a step tells a report, not the agent."""

    terms: dict[str, Float[Tensor, " B"]]  # of the reward
    ended: Bool[Tensor, " B"]
    diverged: Bool[Tensor, " B"]
    accuracy: Float[Tensor, " B"]  # on the validation split
    grown_parameters: Int[Tensor, " B"]
    stage: Int[Tensor, "B S"]  # before any reset
    alpha: Float[Tensor, "B S"]
    test_accuracy: Float[Tensor, " B"]  # NaN where no episode ended, or if not asked for


class MorphogenesisEnv:
    """``BatchedEnv`` of ``Morphogenesis``.

    Attributes:
        spec: The settings.
        hosts: The state; baselines and reports may read it.
        report: What the last step tells a report.
        tests_ends: Whether to measure test accuracy where an episode ends. Where the device must
            not be waited for this costs in each step.
    """

    def __init__(
        self,
        spec: "Morphogenesis",
        *,
        device: torch.device,
        seed: int,
        dtype: torch.dtype = torch.float32,
        static: bool | None = None,
    ) -> None:
        ok = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32
        require(ok, "Morphogenesis.build().seed", "be an integer in [0, 2**32)", seed)
        self.spec, self.report, self.tests_ends = spec, cast(StepReport | None, None), False
        self._device, self._dtype, self._seed = device, dtype, seed
        self._static = device.type != "cpu" if static is None else static
        self._spaces = spec.spaces()
        self._architecture = spec.architecture()
        self._splits = self._load()
        self._lifecycle = LifeCycle(
            ramp_choices=spec.ramp_epochs,
            ramp_shape=spec.ramp_shape,
            min_training_epochs=spec.min_training_epochs,
            fade_epochs=spec.fade_epochs,
            cooldown_epochs=spec.cooldown_epochs,
            device=device,
        )
        side, item = self._architecture.image[1], torch.empty(0, dtype=dtype).element_size()
        per_host = spec.batch_size * spec.channels[0] * side**2 * item
        self._chunk = max(1, _CACHE_BYTES // per_host) if device.type == "cpu" else spec.num_envs
        self._images_at_once = _IMAGES if device.type == "cpu" else spec.validation_size
        self._host_init = _initial([self._architecture.parts()], device)
        self._seed_init = [
            _initial([list(parts(name, channels).values()) for name in spec.blueprints], device)
            for channels in spec.channels
        ]
        self._kinds = torch.tensor([BLUEPRINTS.index(name) for name in spec.blueprints]).to(device)
        counts = [
            [
                sum(part.size for part in parts(name, channels).values())
                for channels in spec.channels
            ]
            for name in BLUEPRINTS
        ]
        self._seed_parameters = torch.tensor(counts, device=device)  # [blueprint, S]
        self.host_parameters = sum(part.size for part in self._architecture.parts())
        self._env = torch.arange(spec.num_envs, device=device)
        self.hosts = self._fresh(torch.zeros_like(self._env))

    @property
    def num_envs(self) -> int:
        """``B``."""
        return self.spec.num_envs

    @property
    def spaces(self) -> EnvSpaces:
        """What it shows and takes."""
        return self._spaces

    @torch.no_grad()
    def reset(self) -> tuple[Float[Tensor, "B O"], Bool[Tensor, "B K"]]:
        """Start to train a new host everywhere."""
        self.hosts = self._fresh(self.hosts.episode + 1)
        return self._observe(self.hosts), self.action_mask()

    @torch.no_grad()
    def step(self, action: Int[Tensor, "B 4"]) -> StepResult:
        """Act, then train every host for an epoch; start a new host where an episode ended.

        An op that is not legal does nothing.
        """
        choice = Action(*action.unbind(1))
        before = self.hosts
        slots, changed = self._lifecycle.apply(before.slots, self._name_blueprint(choice))
        self._germinate(before, slots, changed & (choice.op == Op.GERMINATE).unsqueeze(1))
        slots = self._lifecycle.tick(slots)
        trained = self._train(before, slots)
        measured = self._measure(before.weights, slots, self._splits.validation)
        diverged = ~trained.finite | ~measured.loss.isfinite()
        vitals = _next_vitals(before.vitals, slots, trained, measured, choice, changed)
        ended = diverged | (vitals.step >= self.spec.epochs)
        slots = slots._replace(measured=slots.measured | measured.judged)
        reward = self._reward(before, slots, vitals, choice, diverged, ended)
        episode_return = before.episode_return + reward
        reached = before._replace(
            slots=slots,
            vitals=vitals,
            episode=before.episode + ended,
            episode_return=episode_return.masked_fill(ended, 0.0),
        )
        reached_obs = self._observe(reached)
        self._test(reached, ended)
        self.hosts = self._restart(reached, ended)
        return StepResult(
            obs=torch.where(ended.unsqueeze(1), self._observe(self.hosts), reached_obs),
            reward=reward,
            terminated=ended,
            truncated=torch.zeros_like(ended),
            reached_obs=reached_obs,
            action_mask=self.action_mask(),
            episode_return=episode_return.masked_fill(~ended, math.nan),
            episode_length=vitals.step.masked_fill(~ended, 0),
        )

    def action_mask(self) -> Bool[Tensor, "B K"]:
        """What is allowed now."""
        legal = self._lifecycle.legal(self.hosts.slots)
        return action_mask(legal, len(self.spec.blueprints), len(self.spec.ramp_epochs))

    def legal(self) -> Bool[Tensor, "B O S"]:
        """Which op may be applied to which slot now."""
        return self._lifecycle.legal(self.hosts.slots)

    def grown_parameters(self, slots: Slots) -> Int[Tensor, " B"]:
        """Parameters of all live seeds, as their blueprints need them."""
        column = torch.arange(slots.stage.shape[1], device=self._device)
        count = self._seed_parameters[slots.blueprint, column]
        return count.masked_fill(~is_in(slots.stage, LIVE), 0).sum(1)

    @torch.no_grad()
    def test_accuracy(self) -> Float[Tensor, " B"]:
        """Accuracy of the hosts as they are now on the test split; for reports alone."""
        hosts = self.hosts
        return self._measure(hosts.weights, hosts.slots, self._splits.test, switch=False).accuracy

    def state_dict(self) -> dict[str, Tensor]:
        """Hosts, seeds, their momentum, life cycles and counters, copied."""
        return {name: tensor.clone() for name, tensor in named_tensors(self._named(self.hosts))}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state_dict`` bit for bit.

        Raises:
            ValueError: If it comes from an environment with other settings; nothing is changed
                then.
        """
        field = "Morphogenesis.load_state_dict()"
        expected = dict(named_tensors(self._named(self.hosts)))
        require(state.keys() == expected.keys(), field, f"get {sorted(expected)}", sorted(state))
        for name, tensor in expected.items():
            rule = f"be {tensor.dtype} of shape {list(tensor.shape)}"
            got = (state[name].dtype, list(state[name].shape))
            hint = "It was saved with other settings."
            ok = got == (tensor.dtype, list(tensor.shape))
            require(ok, f"{field}[{name!r}]", rule, got, hint)
        copies = [state[name].to(self._device, copy=True) for name in expected]
        self.hosts = cast(Hosts, rebuild(self.hosts, copies))
        self._seed = int(state["seed"])

    @staticmethod
    def _named(hosts: Hosts) -> dict[str, object]:
        tree: dict[str, object] = {}
        for name, value in hosts._asdict().items():
            tree[name] = value._asdict() if hasattr(value, "_asdict") else value
        return tree

    def _load(self) -> Splits:
        spec = self.spec
        splits = load(
            spec.dataset,
            folder=spec.folder,
            image=self._architecture.image,
            classes=self._architecture.classes,
            noise=spec.noise,
            device=self._device,
        )
        most = splits.validation.label.shape[0]
        rule = f"be at most {most} for {spec.dataset!r}"
        ok = spec.validation_size <= most
        require(ok, "Morphogenesis.validation_size", rule, spec.validation_size)
        few = Split(*(tensor[: spec.validation_size] for tensor in splits.validation))
        return Splits(
            *(
                Split(image.to(self._dtype), label)
                for image, label in (splits.training, few, splits.test)
            )
        )

    def _name_blueprint(self, choice: Action) -> Action:
        """From a position among the settings' blueprints to one among all."""
        position = choice.blueprint.clamp(0, self._kinds.shape[0] - 1)
        return choice._replace(blueprint=self._kinds[position])

    def _germinate(self, hosts: Hosts, slots: Slots, germinated: Bool[Tensor, "B S"]) -> None:
        """New parameters where a seed was put, in place."""
        rows = self._rows(germinated.any(1))
        if rows is not None and rows.shape[0] == 0:
            return
        place = self._place(hosts, rows)
        most = max(mean.shape[1] for mean, _ in self._seed_init)
        drawn = normals(self._seed, Purpose.SEED, place, count=most)
        for s, (mean, std) in enumerate(self._seed_init):
            mine, kind = germinated[:, s], slots.blueprint[:, s]
            seed, speed = hosts.weights.seeds[s], hosts.velocity.seeds[s]
            if rows is not None:
                mine, kind = mine[rows], kind[rows]
            # Position among the settings' blueprints; whose slot did not germinate may have none.
            at = (kind.unsqueeze(1) == self._kinds).int().argmax(1)
            fresh = (mean[at] + std[at] * drawn[:, : mean.shape[1]]).to(self._dtype)
            _overwrite(seed, fresh, mine, rows)
            _overwrite(speed, torch.zeros_like(fresh), mine, rows)

    def _train(self, hosts: Hosts, slots: Slots) -> Trained:
        spec, training = self.spec, self._splits.training
        count, high = spec.train_batches * spec.batch_size, training.label.shape[0]
        place = self._place(hosts, None)
        index = integers(self._seed, Purpose.BATCHES, place, count=count, high=high)
        return train(
            hosts.weights,
            hosts.velocity,
            slots,
            *training,
            unflatten(index, 1, (spec.train_batches, spec.batch_size)),
            self._architecture,
            spec.sgd(),
            enabled=spec.blueprints,
            chunk=self._chunk,
            static=self._static,
        )

    def _measure(
        self, weights: Weights, slots: Slots, split: Split, *, switch: bool = True
    ) -> Measured:
        return measure(
            weights,
            slots,
            *split,
            self._architecture,
            enabled=self.spec.blueprints,
            chunk=self._chunk,
            images_at_once=self._images_at_once,
            static=self._static,
            switch=switch,
        )

    def _reward(
        self,
        before: Hosts,
        slots: Slots,
        vitals: Vitals,
        choice: Action,
        diverged: Bool[Tensor, " B"],
        ended: Bool[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        potential = stage_potential(slots.stage, self._dtype)
        grown = self.grown_parameters(slots)
        terms = reward_terms(
            self.spec.reward_weights(),
            gain=vitals.accuracies[:, 0] - before.vitals.accuracies[:, 0],
            grown=grown / self.host_parameters,
            intervened=choice.op != Op.WAIT,
            diverged=diverged,
            potential=potential.masked_fill(ended, 0.0),
            potential_before=stage_potential(before.slots.stage, self._dtype),
        )
        self.report = StepReport(
            terms,
            ended,
            diverged,
            vitals.accuracies[:, 0],
            grown,
            slots.stage,
            slots.alpha,
            torch.full_like(before.episode_return, math.nan),
        )
        return sum(terms.values(), torch.zeros_like(grown, dtype=self._dtype))

    def _test(self, hosts: Hosts, ended: Bool[Tensor, " B"]) -> None:
        if not self.tests_ends or not (self._static or bool(ended.any())):
            return
        found = self._measure(hosts.weights, hosts.slots, self._splits.test, switch=False)
        assert self.report is not None
        accuracy = found.accuracy.masked_fill(~ended, math.nan)
        self.report = self.report._replace(test_accuracy=accuracy)

    def _observe(self, hosts: Hosts) -> Float[Tensor, "B O"]:
        return observe(
            hosts.slots,
            hosts.vitals,
            self.grown_parameters(hosts.slots) / self.host_parameters,
            epochs=self.spec.epochs,
            classes=self._architecture.classes,
        )

    def _restart(self, hosts: Hosts, ended: Bool[Tensor, " B"]) -> Hosts:
        if not self._static and not bool(ended.any()):
            return hosts
        fresh = self._fresh(hosts.episode)._replace(episode_return=hosts.episode_return)
        pairs = zip(leaves(hosts), leaves(fresh), strict=True)
        chosen = [
            old if old.dim() == 0 else torch.where(ended.view(-1, *[1] * (old.dim() - 1)), new, old)
            for old, new in pairs
        ]
        return cast(Hosts, rebuild(hosts, chosen))

    def _fresh(self, episode: Int[Tensor, " B"]) -> Hosts:
        """Hosts that nobody has trained yet."""
        spec, count, slots = self.spec, self.num_envs, len(self.spec.channels)
        mean, std = self._host_init
        place = Place(self._env, episode, torch.zeros_like(episode))
        drawn = normals(self._seed, Purpose.HOST, place, count=mean.shape[1])
        host = (mean + std * drawn).to(self._dtype)
        empty = host.new_zeros
        seeds = tuple(empty(count, init.shape[1]) for init, _ in self._seed_init)
        means = tuple(empty(count, channels) for channels in spec.channels)
        ones = tuple(mean + 1.0 for mean in means)
        number, share = torch.zeros_like(episode), empty(count, slots)
        classes = self._architecture.classes
        vitals = Vitals(
            step=number,
            losses=empty(count, HISTORY) + math.log(classes),
            accuracies=empty(count, HISTORY) + 1 / classes,
            contribution=share,
            contribution_age=share.long(),
            germination_accuracy=share.clone(),
            grad_norm=share.clone(),
            last_op=number.clone(),
            last_slot=number.clone(),
            changed=number.bool(),
        )
        return Hosts(
            Weights(host, seeds, means, ones),
            Weights(torch.zeros_like(host), tuple(map(torch.zeros_like, seeds)), (), ()),
            Slots.empty(count, slots, dtype=self._dtype, device=self._device),
            vitals,
            episode.clone(),
            empty(count),
            torch.full((), self._seed, dtype=torch.int64, device=self._device),
        )

    def _place(self, hosts: Hosts, rows: Tensor | None) -> Place:
        place = Place(self._env, hosts.episode, hosts.vitals.step)
        return place if rows is None else Place(*(axis[rows] for axis in place))

    def _rows(self, wanted: Bool[Tensor, " B"]) -> Tensor | None:
        """The environments meant, or ``None`` where asking would wait for the device."""
        return None if self._static else wanted.nonzero().squeeze(1)


def _overwrite(target: Tensor, fresh: Tensor, mine: Tensor, rows: Tensor | None) -> None:
    if rows is None:
        target.copy_(torch.where(mine.unsqueeze(1), fresh, target))
    else:
        target[rows[mine]] = fresh[mine]


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


def _initial(rows: list[list[Part]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each parameter, a row for each list of parts, zeros at the end."""
    most = max(sum(part.size for part in row) for row in rows)
    mean = torch.zeros(len(rows), most, dtype=torch.float64)
    std = torch.zeros_like(mean)
    for number, row in enumerate(rows):
        start = 0
        for part in row:
            mean[number, start : start + part.size] = part.mean
            std[number, start : start + part.size] = part.std
            start += part.size
    return mean.to(device), std.to(device)
