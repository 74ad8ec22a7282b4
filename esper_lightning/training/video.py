"""Videos of a policy: its best, its median and its worst episode, side by side.

Axes: ``B`` environment, ``H`` row of pixels, ``W`` column.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from esper_lightning.callbacks.run_directory import run_directory
from esper_lightning.core.errors import require
from esper_lightning.core.paths import require_output
from esper_lightning.core.seeding import stream_seed
from esper_lightning.core.shapes import UInt8
from esper_lightning.envs.base import BatchedEnv, EnvSpec, built_env, spec_name, takes_num_envs
from esper_lightning.forensics.files import replacing
from esper_lightning.ppo.agent import prepare_obs
from esper_lightning.ppo.collect import Normalize
from esper_lightning.ppo.evaluation import DeterministicPlay, evaluate_policy
from esper_lightning.training.module import PPO
from esper_lightning.training.specs import evaluation_spec

__all__ = ["Frame", "VideoCallback", "frames_of", "record_video", "refuse_video", "rendering_env"]

VIDEO_BEGINS = rb".{4}ftyp"
"""Regular expression for the first bytes of a video in the MP4 format."""
_EPISODES = 10  # of which the best, the median and the worst are shown
_GAP = 8  # pixels between pictures
_PAPER = 255
_FRAMES_PER_S = 30.0
_LONGEST = 5_000  # frames; a longer episode is cut
_INSTALL = "pip install 'esper_lightning[video]'"


class Frame(NamedTuple):
    """What is seen between two steps.

    Attributes:
        pictures: Pictures of all environments.
        episode_return: Return of the episode that the step before has ended; NaN where none ended.
    """

    pictures: UInt8[Tensor, "B H W 3"]
    episode_return: Tensor  # [B]


def rendering_env(spec: EnvSpec, num_envs: int) -> EnvSpec:
    """The spec of environments that draw pictures: ``rendering_spec`` where a spec has it.

    Args:
        spec: Spec of the task.
        num_envs: Number of environments, where the spec can be copied with another number.
    """
    rendering = getattr(spec, "rendering_spec", None)
    spec = spec if rendering is None else rendering()
    return evaluation_spec(spec, num_envs) if takes_num_envs(spec) else spec


@torch.no_grad()
def frames_of(model: PPO, env: BatchedEnv) -> Generator[Frame]:
    """Frames of a deterministic policy in environments, without end.

    Args:
        model: Module with the policy, on the device of the environments.
        env: Environments, which are reset first.

    Raises:
        ValueError: If the environments have no method ``render``, or it returns something else than
            pictures.
    """
    owner = spec_name(model.env)
    render = getattr(env, "render", None)
    hint = "It returns pictures as uint8 [B, H, W, 3]."
    require(callable(render), owner, "have a method render() to be shown", type(env).__name__, hint)
    assert render is not None
    play, ended = DeterministicPlay(model.policy, _normalizer(model), env), None
    while True:
        pictures: Any = render()
        is_tensor = isinstance(pictures, Tensor)
        form = f"{pictures.dtype} {list(pictures.shape)}" if is_tensor else type(pictures).__name__
        ok = is_tensor and pictures.dtype == torch.uint8 and pictures.ndim == 4
        require(ok, f"{owner}.render", "return pictures as uint8 [B, H, W, 3]", form)
        if ended is None:
            ended = torch.full((len(pictures),), torch.nan)
        yield Frame(pictures.cpu(), ended)
        ended = play.step().episode_return.cpu()


def refuse_video(path: str | Path) -> Path:
    """The file of a video, with symbolic links resolved, before anything is played.

    Raises:
        ValueError: If ``imageio-ffmpeg`` is missing, no file can be written there, or something
            other than a video is there.
    """
    _encoder()
    return require_output("--video", path, "video", VIDEO_BEGINS)


def record_video(model: PPO, path: str | Path, *, device: torch.device) -> list[float]:
    """Write a video of the best, the median and the worst of ten deterministic episodes.

    An episode that has ended stays dim until all have ended.

    Args:
        model: Trained module, whose policy is on ``device``.
        path: File to write, as MP4. An earlier video at the same place is replaced.
        device: Device on which the episodes are played.

    Returns:
        Returns of the episodes that are shown, the best first.

    Raises:
        ValueError: If the environments draw no pictures, ``imageio-ffmpeg`` is missing, or
            something other than a video is at ``path``.
        OSError: If the file cannot be written.
    """
    path, encoder = refuse_video(path), _encoder()
    spec = rendering_env(model.env, _EPISODES)
    seed = stream_seed(model.seed, rank=0, purpose="video")
    with torch.inference_mode(False), torch.no_grad():
        with built_env(spec, device, seed) as env:
            played = evaluate_policy(model.policy, _normalizer(model), env).episode_return
        order = cast(list[int], played.argsort(descending=True).tolist())
        rows = list(dict.fromkeys((order[0], order[len(order) // 2], order[-1])))
        shown: list[float] = []
        with built_env(spec, device, seed) as env:  # the same episodes again
            rate = float(getattr(env, "frames_per_s", _FRAMES_PER_S))
            pictures = _side_by_side(frames_of(model, env), rows, shown)
            first = next(pictures)
            height, width = first.shape[0] // 2 * 2, first.shape[1] // 2 * 2
            with replacing(path) as temporary:
                video = encoder.write_frames(
                    str(temporary),
                    (width, height),
                    fps=rate,
                    macro_block_size=2,
                    output_params=["-f", "mp4", "-movflags", "+faststart"],
                )
                video.send(None)
                for picture in itertools.chain([first], pictures):
                    video.send(picture[:height, :width].contiguous().numpy())
                video.close()
    return shown


def _normalizer(model: PPO) -> Normalize:
    return functools.partial(prepare_obs, normalizer=model.obs_normalizer)


def _encoder() -> Any:
    try:
        import imageio_ffmpeg  # noqa: PLC0415  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise ValueError(f"A video needs imageio-ffmpeg: {_INSTALL}") from error
    return imageio_ffmpeg


def _side_by_side(
    frames: Iterable[Frame], rows: Sequence[int], shown: list[float]
) -> Iterator[UInt8[Tensor, "H W 3"]]:
    """Pictures of some environments in a row, until the first episode of each has ended.

    Args:
        frames: Frames of all environments.
        rows: Environments to show.
        shown: Gets the returns of their episodes at the end.
    """
    last: dict[int, Tensor] = {}
    returns: dict[int, float] = {}
    for pictures, episode_return in itertools.islice(frames, _LONGEST):
        for row in rows:
            if row not in returns and not episode_return[row].isnan():
                returns[row] = episode_return[row].item()
                last[row] = last[row] // 2 + _PAPER // 2  # it stays, dim
            if row not in returns:
                last[row] = pictures[row]
        if len(returns) == len(rows):
            break
        yield _in_a_row([last[row] for row in rows])
    shown += [returns.get(row, float("nan")) for row in rows]


def _in_a_row(pictures: Sequence[Tensor]) -> UInt8[Tensor, "H W 3"]:
    gap = torch.full((pictures[0].shape[0], _GAP, 3), _PAPER, dtype=torch.uint8)
    return torch.cat([each for picture in pictures for each in (gap, picture)][1:], dim=1)


class VideoCallback(Callback):
    """Records a video at the evaluations of a run, and hands it to the loggers.

    Videos are ``videos/<env steps>.mp4`` of the run directory, with the best, the median and the
    worst of ten episodes. W&B and MLflow get the file, TensorBoard its path as a text. Only the
    first rank records. A video that cannot be recorded is one warning, and training continues.

    The class is no module of ``callbacks``, whose modules know nothing of policies and
    environments: it plays the policy of a ``PPO`` module.

    Args:
        every: Evaluations from one video to the next.

    Raises:
        ValueError: If ``every`` is less than 1.
    """

    def __init__(self, every: int = 1) -> None:
        require(every >= 1, "VideoCallback.every", "be at least 1", every)
        self._every, self._evaluations = every, 0
        self._failed = False

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a video after an evaluation during training."""
        directory = run_directory(trainer)
        if trainer.sanity_checking or not trainer.is_global_zero or directory is None:
            return
        self._evaluations += 1
        if self._failed or self._evaluations % self._every or not isinstance(pl_module, PPO):
            return
        path = directory / "videos" / f"{pl_module.env_steps:012d}.mp4"
        try:
            shared = bool(getattr(pl_module.env, "shared", False))
            rule = "build simulators of its own to be recorded during training"
            require(not shared, spec_name(pl_module.env), rule, "one that is shared")
            record_video(pl_module, path, device=pl_module.device)
            for logger in trainer.loggers:
                _hand_over(logger, path, pl_module.env_steps)
        except Exception as error:  # a user's environment may raise anything
            self._failed = True
            warnings.warn(f"No videos are recorded: {error}", stacklevel=1)


def _hand_over(logger: Any, path: Path, env_steps: int) -> None:
    log_video: Callable[..., object] | None = getattr(logger, "log_video", None)  # W&B
    log_artifact = getattr(logger.experiment, "log_artifact", None)  # MLflow
    if callable(log_video):
        log_video("video", [str(path)], step=env_steps)
    elif callable(log_artifact) and hasattr(logger, "run_id"):
        log_artifact(logger.run_id, str(path), "videos")
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("video", str(path), env_steps)
