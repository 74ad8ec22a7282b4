"""One of several ranks: ``python ranks.py SETTINGS``, started once; Lightning starts the others.

``SETTINGS`` is JSON: ``directory``, ``devices``, and what else ``main`` takes.
"""

import hashlib
import itertools
import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from esper_lightning import MLP, PPO, PPOConfig, Recurrent
from esper_lightning.callbacks.run_directory import end_run
from esper_lightning.envs import CartPole, Gymnasium, Morphogenesis
from esper_lightning.train import begin_run, run_callbacks, run_plugins

ENVS = {"plain": CartPole}


class Slow(CartPole):
    """No episode ends on any rank but the first."""

    def build(self, device, seed):
        env = super().build(device, seed)
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            step = env.step
            env.step = lambda action: without_ends(step(action))
        return env


def without_ends(result):
    no = torch.zeros_like(result.terminated)
    return result._replace(
        terminated=no,
        truncated=no,
        reached_obs=result.obs,
        episode_return=torch.full_like(result.episode_return, torch.nan),
        episode_length=torch.zeros_like(result.episode_length),
    )


class Breaks(CartPole):
    """Observations of all ranks but the first are no numbers after a while."""

    def build(self, device, seed):
        env = super().build(device, seed)
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            step, steps = env.step, itertools.count()
            env.step = lambda action: broken(step(action), next(steps))
        return env


def broken(result, steps):
    bad = torch.full_like(result.reward, torch.nan)
    return result._replace(reward=bad) if steps >= 40 else result


def grows(num_envs):
    return Morphogenesis.synthetic(
        num_envs=num_envs,
        image=(1, 4),
        channels=(4, 4),
        kernels=(3, 1),
        pools=(2, 1),
        classes=3,
        epochs=11,  # no rollout of 16 steps ends where episodes do
        train_batches=2,
        batch_size=8,
        validation_size=32,
        ramp_epochs=(7, 8),  # so that some environment is always ramping
    )


def simulator(num_envs):
    return Gymnasium(id="CartPole-v1", num_envs=num_envs, workers=2)


ENVS |= {
    "gymnasium": simulator,
    "never ends elsewhere": Slow,
    "breaks elsewhere": Breaks,
    "grows": grows,
}


class Digesting(PPO):
    """Adds the bits of all weights and statistics to the row of each iteration."""

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        digest = hashlib.sha256()
        for value in self.state_dict().values():
            digest.update(value.numpy().tobytes())
        outputs["row"]["digest"] = digest.hexdigest()
        return outputs


class Dying(Callback):
    """May end the process in the middle of an iteration."""

    def __init__(self, dies_in, delay_s, fault, rank):
        self.dies_in, self.delay_s, self.fault, self.rank = dies_in, delay_s, fault, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.iteration + 1 == self.dies_in and trainer.global_rank == self.rank:
            if self.fault == "drift":
                with torch.no_grad():
                    next(pl_module.parameters()).add_(1e-6)
                return
            self.trainer = trainer
            threading.Timer(self.delay_s, self.die).start()

    def die(self):
        if self.fault == "stop":
            self.trainer.should_stop = True
            return
        os.kill(os.getpid(), getattr(signal, self.fault))


def main(
    *,
    directory,
    devices,
    ppo=None,
    env="plain",
    num_envs=4,
    budget=None,
    dies_in=None,
    delay_s=0.0,
    fault="SIGKILL",
    rank=1,
    resumes=False,
    every=2,
    compile="off",  # noqa: A002
    evaluates=True,
    remembers=False,
    redeal=False,
    elsewhere=None,  # settings of PPO on the other ranks
    config_file=None,  # content, for the run directory, which is claimed before the ranks begin
):
    torch.set_num_threads(1)
    # "{rank}" in it: hosts that share no disk.
    directory = directory.format(rank=os.environ.get("LOCAL_RANK", "0"))
    ppo = {"rollout_steps": 16, "minibatches": 2, "epochs": 2, **(ppo or {})}
    if os.environ.get("LOCAL_RANK", "0") != "0":
        ppo |= elsewhere or {}
    config = PPOConfig(**ppo)
    model = Digesting(
        ENVS[env](num_envs=num_envs),
        Recurrent(memory_size=8) if remembers else MLP(),
        config,
        total_env_steps=budget,
        eval_episodes=3,
        iterations_per_epoch=every,
        compile=compile,
        redeal=redeal,
    )
    last = Path(directory) / "checkpoints" / "last.ckpt"
    ours = run_callbacks(evaluates=evaluates, shows_progress=False)
    ours.insert(1, Dying(dies_in, delay_s, fault, rank))
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=-1,
        logger=TensorBoardLogger(directory, name="", version=""),
        callbacks=ours,
        plugins=run_plugins(),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        limit_val_batches=1 if evaluates else 0,
    )
    path = last if resumes and last.exists() else None
    if config_file is not None:
        begin_run(trainer, model.env, directory, config_file)
    try:
        trainer.fit(model, ckpt_path=path, weights_only=True)
    finally:
        end_run(trainer)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
