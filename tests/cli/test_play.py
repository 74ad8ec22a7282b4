"""``esper play`` serves a page with the pictures of a policy."""

import io
import json
import threading
import urllib.request

import pytest
import torch
from matplotlib.image import imread

from esper_lightning import PPO, PPOConfig
from esper_lightning.cli import play
from esper_lightning.cli.main import main
from esper_lightning.envs import CartPole


def test_a_png_has_the_pixels_of_the_picture():
    picture = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(0))
    read = imread(io.BytesIO(play.png(picture.to(torch.uint8))))
    assert (torch.from_numpy(read * 255).round().long() == picture).all()


@pytest.fixture
def address():
    model = PPO(env=CartPole(num_envs=2), ppo=PPOConfig(rollout_steps=8, minibatches=1))
    server = play._Server(("127.0.0.1", 0), play._Handler)
    server.show = play._Show(model, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_the_page_shows_a_stream_of_pictures(address):
    with urllib.request.urlopen(f"{address}/", timeout=20) as answer:
        assert '<img src="/frames"' in answer.read().decode()
    with urllib.request.urlopen(f"{address}/frames", timeout=20) as answer:
        assert answer.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
        content = answer.read(20_000)
    assert content.count(b"--frame\r\nContent-Type: image/png") > 1


def test_other_paths_are_not_there(address):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}/etc/passwd", timeout=20)
    assert caught.value.code == 404
    caught.value.close()


def test_a_seed_that_no_generator_takes_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["play", "--ckpt_path", "x", "--seed", "9" * 30])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), "--seed must be an integer from 0 to" in err) == (1, True)


def test_no_checkpoint_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["play", "--ckpt_path", json.dumps(str(tmp_path))])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
