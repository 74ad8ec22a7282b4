"""A video shows the best, the median and the worst of ten episodes as they are played."""

import math
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from esper_lightning import PPO, PPOConfig
from esper_lightning.envs import CartPole, Gymnasium
from esper_lightning.training import video
from esper_lightning.training.video import (
    Frame,
    VideoCallback,
    frames_of,
    record_video,
    rendering_env,
)

# imageio-ffmpeg leaves the pipes of its process to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
CPU = torch.device("cpu")
SMALL = PPOConfig(rollout_steps=8, minibatches=1, epochs=1)


def model_of(env, **kwargs) -> PPO:
    return PPO(env=env, ppo=SMALL, compile="off", **kwargs)


def read(path) -> tuple[dict, list[np.ndarray]]:
    frames = imageio_ffmpeg.read_frames(str(path))
    meta = next(frames)
    width, height = meta["size"]
    return meta, [np.frombuffer(each, np.uint8).reshape(height, width, 3) for each in frames]


def test_the_episodes_that_are_shown_are_those_that_were_ranked(tmp_path):
    model = model_of(CartPole(num_envs=4, time_limit=60))
    shown = record_video(model, tmp_path / "v.mp4", device=CPU)
    assert shown == sorted(shown, reverse=True)
    meta, frames = read(tmp_path / "v.mp4")
    assert meta["fps"] == 50
    assert len(frames) == max(shown)  # CartPole returns the length of an episode
    assert frames[0].shape[1] > 2 * frames[0].shape[0]
    assert list(tmp_path.iterdir()) == [tmp_path / "v.mp4"]


def test_an_ended_episode_stays_dim_until_all_have_ended():
    def frame(value: int, *returns: float) -> Frame:
        pictures = torch.full((3, 2, 2, 3), value, dtype=torch.uint8)
        return Frame(pictures, torch.tensor(returns))

    nan, shown = math.nan, []
    frames = [frame(100, nan, nan, nan), frame(50, 7.0, nan, nan), frame(20, 1.0, nan, 3.0)]
    pictures = [*video._side_by_side(frames, [0, 2], shown)]
    assert [picture[0, 0, 0].item() for picture in pictures] == [100, 177]
    assert [picture[0, -1, 0].item() for picture in pictures] == [100, 50]
    assert shown == [7.0, 3.0]


def test_gymnasium_draws_the_environments_that_are_played():
    spec = rendering_env(Gymnasium(id="CartPole-v1", num_envs=4, workers=2), 2)
    assert (spec.workers, spec.num_envs) == (0, 2)
    env = spec.build(CPU, 0)
    model = model_of(Gymnasium(id="CartPole-v1", num_envs=4))
    first, second = (next(frames) for frames in [frames_of(model, env)] * 2)
    assert first.pictures.shape == (2, 400, 600, 3)
    assert not torch.equal(first.pictures, second.pictures)
    assert env.frames_per_s == 50
    env.close()


def test_what_draws_nothing_is_one_line(tmp_path):
    class Plain(CartPole):
        render = None

    with pytest.raises(ValueError, match="must have a method render"):
        record_video(model_of(Plain(num_envs=2)), tmp_path / "v.mp4", device=CPU)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_video_is_not_replaced(tmp_path):
    (tmp_path / "v.mp4").write_text("mine")
    with pytest.raises(ValueError, match="must name a new file or an earlier video"):
        record_video(model_of(CartPole(num_envs=2)), tmp_path / "v.mp4", device=CPU)


def test_without_the_encoder_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"pip install 'esper_lightning\[video\]'"):
        record_video(model_of(CartPole(num_envs=2)), tmp_path / "v.mp4", device=CPU)


def fit(tmp_path, model: PPO, callback: VideoCallback) -> None:
    Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        max_steps=4,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    ).fit(model)


def test_every_second_evaluation_of_a_run_is_recorded(tmp_path, monkeypatch):
    paths: list[str] = []
    monkeypatch.setattr(video, "record_video", lambda _, path, device: paths.append(path.name))
    monkeypatch.setattr(video, "run_directory", lambda _: tmp_path)
    model = model_of(CartPole(num_envs=2, time_limit=8), iterations_per_epoch=1, eval_episodes=2)
    fit(tmp_path, model, VideoCallback(every=2))
    assert paths == ["000000000032.mp4", "000000000064.mp4"]


def test_a_video_that_fails_is_one_warning_and_training_goes_on(tmp_path, monkeypatch):
    class Plain(CartPole):
        render = None

    monkeypatch.setattr(video, "run_directory", lambda _: tmp_path)
    model = model_of(Plain(num_envs=2, time_limit=8), iterations_per_epoch=1, eval_episodes=2)
    with pytest.warns(UserWarning, match="No videos are recorded: Plain must have") as caught:
        fit(tmp_path, model, VideoCallback())
    assert len([each for each in caught if "No videos" in str(each.message)]) == 1
    assert model.iteration == 4


def test_a_shared_simulator_is_not_recorded_while_it_is_trained(tmp_path, monkeypatch):
    class Shared(CartPole):
        shared = True

    monkeypatch.setattr(video, "run_directory", lambda _: tmp_path)
    model = model_of(Shared(num_envs=2, time_limit=8), iterations_per_epoch=2, eval_episodes=2)
    with pytest.warns(UserWarning, match="must build simulators of its own"):
        fit(tmp_path, model, VideoCallback())


def test_a_number_of_evaluations_below_one_is_refused():
    with pytest.raises(ValueError, match=r"VideoCallback\.every must be at least 1"):
        VideoCallback(every=0)
