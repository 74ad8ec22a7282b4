"""The Lightning hooks of PPO that save, load and resume checkpoints."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from esper_lightning.callbacks.checkpoint_internals import checkpoint_to_load
from esper_lightning.core.ranks import SINGLE_RANK, Ranks
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.policies.base import Policy
from esper_lightning.ppo.extension import Extensions
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.optimizer import trained_parameters
from esper_lightning.training.checkpoint.content import STATE_KEY, refuse_not_ours
from esper_lightning.training.checkpoint.meeting import meet
from esper_lightning.training.checkpoint.resumption import (
    Resumption,
    rank_states,
    refuse_other_ranks,
    refuse_other_weights_of_ranks,
)
from esper_lightning.training.checkpoint.sharing import SharedCheckpoint
from esper_lightning.training.checkpoint.spaces import SPACES, env_of_checkpoint, spaces_to_data
from esper_lightning.training.checkpoint.stages import (
    STAGES,
    program_of_stages,
    resume_stages,
    stages_to_data,
)
from esper_lightning.training.checkpoint.states import (
    keep_own_extensions,
    load_checkpoint,
    load_weights,
    refuse_checkpoint,
    refuse_huge,
    refuse_other_weights,
)
from esper_lightning.training.evaluation import Evaluation
from esper_lightning.training.progress import Progress
from esper_lightning.training.settings import PPOSettings

__all__ = ["CheckpointHooks"]

_log = logging.getLogger(__name__)
_LOADED: ContextVar[str] = ContextVar("loaded", default="a file without a path")


class CheckpointHooks(LightningModule):
    """A LightningModule with settings, counters and a learner that are saved and resumed.

    Attributes:
        settings: Settings of the module.
        progress: Counters of the run.
        env_spaces: Observation and action spaces of the environments.
        policy: Actor and critic.
        saves_alone: Whether this rank saves the next checkpoint without the others, which may be
            gone. The checkpoint then holds the environments of this rank only.
    """

    settings: PPOSettings
    progress: Progress
    env_spaces: EnvSpaces
    policy: Policy
    extensions: Extensions
    evaluation: Evaluation
    saves_alone: bool = False
    _within_iteration: bool = False
    _resumption: Resumption | None = None  # until training starts
    _ranks: Ranks = SINGLE_RANK
    _program: Mapping[str, str] = MappingProxyType({})  # of the stages of a run

    @property
    def is_resuming(self) -> bool:
        """Whether a checkpoint was loaded to be resumed, and training has not started."""
        return self._resumption is not None

    @override
    def on_fit_start(self) -> None:
        """Load the weights of a warm start, unless this run is resumed."""
        path = self.settings.warm_start
        if path is not None and self.progress.iteration == 0 and self._resumption is None:
            load_weights(self, path)

    def start_learner(self, learner: Learner, optimizer: torch.optim.Adam) -> None:
        """Resume the episodes of the checkpoint, or start new ones.

        Args:
            learner: Learner of this rank, which has not started.
            optimizer: Adam over the trained weights, with its state restored.

        Raises:
            ValueError: If the checkpoint belongs to other environments.
        """
        resumption = self._resumption or Resumption(rank_state=None)
        self._program = program_of_stages(learner, self.settings)
        data = (resumption.rank_state or {}).get(STAGES)
        resume_stages(data, learner, self.evaluation, self._program)
        resumed = resumption.start(learner, optimizer)
        self.progress.new_episodes = self.is_resuming and not resumed
        self.progress.redealt_to = resumption.redealt_to
        self._resumption = None
        if self.progress.new_episodes:
            state = resumption.rank_state
            others = state is not None and state["env"] is not None
            _log.warning(
                "The checkpoint holds no environments of rank %d%s: new episodes begin there.",
                self.global_rank,
                " for this kind of device" if others else "",
            )

    def refuse_other_ranks(self) -> None:
        """Compare all ranks, which are connected for it, before the run writes anything.

        This is a collective.

        Raises:
            RanksDisagreeError: If ranks would start with different settings or in different states.
        """
        trainer = self.trainer
        if trainer.world_size > 1:
            meet(trainer)
            refuse_other_ranks(
                Ranks(trainer.world_size),
                self.settings,
                self,
                iteration=self.progress.iteration,
                resumes_from=checkpoint_to_load(trainer),
                share=SharedCheckpoint(trainer).share,
                load=trainer.strategy.checkpoint_io.load_checkpoint,
            )

    @override
    def on_train_epoch_end(self) -> None:
        """Stop the run where the weights of ranks differ, before they are saved.

        Raises:
            RuntimeError: If the weights of any rank differ; the error is raised on every rank.
        """
        if self._ranks.size > 1:
            refuse_other_weights_of_ranks(self._ranks, self, iteration=self.progress.iteration)

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle, which is everything but the learner of a run."""
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_learner"}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters and, between iterations, environments and random streams of every rank.

        This is a collective, unless ``saves_alone``.
        """
        learner = None if self._within_iteration else getattr(self, "_learner", None)
        alone = self.saves_alone

        def stages(learner: Learner) -> dict[str, Any]:
            return {STAGES: stages_to_data(learner, self.evaluation, self._program)}

        checkpoint[STATE_KEY] = {
            **self.progress.state_dict(),
            SPACES: spaces_to_data(self.env_spaces, self.settings.env.num_envs),
            "world_size": self._ranks.size,
            "ranks": rank_states(
                learner, self._ranks, rank=self.global_rank, alone=alone, more=stages
            ),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the counters, and refuse a checkpoint that this module cannot use.

        Raises:
            ValueError: If PPO did not write the checkpoint, if it is of another environment or
                policy, or if it is not finite.
        """
        trainer = self._trainer
        path = _LOADED.get()
        if trainer is not None:
            path = str(checkpoint_to_load(trainer) or path)
        refuse_not_ours(checkpoint, path)
        if trainer is None:  # load_from_checkpoint is building this module
            keep_own_extensions(checkpoint, self)
            refuse_other_weights(self, checkpoint, path)
        else:
            resumes, ranks = trainer.state.fn == TrainerFn.FITTING, trainer.world_size
            callbacks, world_size = trainer.callbacks, ranks if resumes else None
            self.refuse_checkpoint(checkpoint, path, world_size=world_size, callbacks=callbacks)
            self._resumption = None
            if resumes:
                self._resumption = Resumption.read(
                    checkpoint,
                    self.settings,
                    rank=self.global_rank,
                    world_size=ranks,
                    device=trainer.strategy.root_device,
                )
        self.progress.load_state_dict(checkpoint[STATE_KEY])

    @classmethod
    @override
    def load_from_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, checkpoint_path: str | Path, **kwargs: Any
    ) -> Self:
        """A module with the weights, normalisers and settings of a checkpoint.

        Where the package of the environments is not installed, the module has the spaces that the
        checkpoint holds: its policy acts and is exported, and cannot be trained or evaluated.

        Args:
            checkpoint_path: Path of a checkpoint that the Trainer wrote.
            **kwargs: Settings that replace those of the checkpoint, and Lightning's argument
                ``map_location``.

        Raises:
            ValueError: If the file is no checkpoint of PPO, or a class that it names cannot be
                imported.
        """
        checkpoint = load_checkpoint(checkpoint_path)
        if "env" not in kwargs:
            kwargs["env"] = env_of_checkpoint(checkpoint)
        settings = PPOSettings.from_data(checkpoint["hyper_parameters"], **kwargs)
        arguments: dict[str, Any] = {**settings.arguments(), **kwargs}
        token = _LOADED.set(str(checkpoint_path))
        try:
            with refuse_huge(checkpoint):
                return super().load_from_checkpoint(checkpoint_path, weights_only=True, **arguments)
        except ValueError:
            raise
        except Exception as error:  # settings and weights that do not fit may fail anywhere
            message = (
                f"ckpt_path must hold PPO's settings and weights, got {str(checkpoint_path)!r}"
            )
            raise ValueError(f"{message}. {' '.join(str(error).split())}") from error
        finally:
            _LOADED.reset(token)

    def refuse_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str,
        *,
        world_size: int | None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Refuse a checkpoint that this module cannot use: of other settings, or not finite.

        Args:
            checkpoint: A checkpoint of PPO.
            path: Path of the checkpoint, for the error.
            world_size: Number of ranks that resume training; ``None`` for an evaluation.
            callbacks: Callbacks that will load their states when training is resumed.

        Raises:
            ValueError: If the checkpoint does not fit. The error names what does not fit.
        """
        refuse_checkpoint(
            checkpoint,
            path,
            module=self,
            settings=self.settings,
            trained=trained_parameters(self.policy, self.extensions),
            world_size=world_size,
            callbacks=callbacks,
        )
