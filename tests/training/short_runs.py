"""Short runs in any environment."""

from lightning.pytorch import Trainer

from esper_lightning import MLP, PPO, PPOConfig

SMALL = PPOConfig(rollout_steps=8, minibatches=2, epochs=1)


def fit(env, *callbacks, iterations=4, ckpt_path=None, evaluates=True, **kwargs):
    """Train for a few iterations, with an evaluation after every second one.

    Args:
        env: Spec of the environments.
        callbacks: Callbacks of the Trainer.
        iterations: Number of iterations in the run.
        ckpt_path: Checkpoint to resume from.
        evaluates: Whether there are evaluations.
        kwargs: Other arguments of ``PPO``.
    """
    given = {"ppo": SMALL, "policy": MLP(hidden_sizes=(8,)), "iterations_per_epoch": 2, **kwargs}
    model = PPO(env=env, **given)
    trainer = Trainer(
        max_steps=iterations,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1.0 if evaluates else 0,
        callbacks=list(callbacks),
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer
