"""``esper play``: watch a policy act, in a browser, as fast as the simulated time."""

import http.server
import itertools
import socketserver
import struct
import threading
import time
import webbrowser
import zlib
from collections.abc import Generator
from typing import Any, cast

import torch
from torch import Tensor

from esper_lightning.cli.errors import CommandParser, fail
from esper_lightning.cli.mistakes import settings_come_first
from esper_lightning.cli.pages.elements import element, page
from esper_lightning.cli.policy import add_policy_option, load_policy
from esper_lightning.core.errors import require
from esper_lightning.core.shapes import UInt8
from esper_lightning.envs.base import built_env, spec_name
from esper_lightning.training.module import PPO
from esper_lightning.training.video import Frame, frames_of, rendering_env

__all__ = ["png", "run"]

_BOUNDARY = b"frame"
_MOST_SEED = 2**32 - 1
_RATE = 30.0  # frames a second of environments that do not say


def run(arguments: list[str]) -> None:
    """Serve pictures of a policy until Ctrl-C; a mistake is one line and exit status 2."""
    parser = CommandParser("esper play", "Watch the policy of a checkpoint act, in a browser.")
    add_policy_option(parser)
    parser.add_argument("--port", type=int, default=8017, help="port of the page (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episodes (%(default)s)")
    options = parser.parse_args(arguments)
    with settings_come_first():
        fits = 0 <= options.seed <= _MOST_SEED
        require(fits, "--seed", f"be an integer from 0 to {_MOST_SEED}", options.seed)
        path, model = load_policy(options.ckpt_path)
        spec = rendering_env(model.env, 1)
        with torch.inference_mode(False), built_env(spec, torch.device("cpu"), options.seed) as env:
            next(frames_of(model, env))  # refuses environments that draw nothing
    try:
        server = _Server(("127.0.0.1", options.port), _Handler)
    except (OSError, OverflowError) as error:
        fail(f"--port must be one that is free, got {options.port}: {error}")
    server.show = _Show(model, options.seed)
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    print(f"Checkpoint: {path}\nWatch: {address} (Ctrl-C ends)", flush=True)
    threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
    with server:
        server.serve_forever()


class _Show:
    """The frames of a policy, at the speed of the simulated time, for one viewer each."""

    def __init__(self, model: PPO, seed: int) -> None:
        self._model, self._seed = model, seed
        self._lock = threading.Lock()  # a policy is played by one viewer at a time

    @property
    def title(self) -> str:
        """Name of the task and the age of the policy."""
        return f"{spec_name(self._model.env)}, after {self._model.env_steps:,} environment steps"

    def frames(self) -> Generator[Frame]:
        """Frames without end; returns where another viewer watches."""
        if not self._lock.acquire(blocking=False):
            return
        spec = rendering_env(self._model.env, 1)
        try:
            with (
                torch.inference_mode(False),
                built_env(spec, torch.device("cpu"), self._seed) as env,
            ):
                pause_s = 1.0 / float(getattr(env, "frames_per_s", _RATE))
                due_s = time.monotonic()
                for frame in frames_of(self._model, env):
                    time.sleep(max(0.0, due_s - time.monotonic()))
                    due_s = max(due_s, time.monotonic() - pause_s) + pause_s
                    yield frame
        finally:
            self._lock.release()


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A server of this machine alone."""

    daemon_threads = True
    show: _Show


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the page, or with a stream of pictures."""

    def do_GET(self) -> None:
        """Answer a request of a browser."""
        if self.path == "/":
            show = self._show
            picture = element("img", src="/frames", alt=show.title, style="width: 100%")
            content = page(show.title, picture).encode()
            self._begin("text/html; charset=utf-8")
            self.wfile.write(content)
        elif self.path == "/frames":
            self._begin(f"multipart/x-mixed-replace; boundary={_BOUNDARY.decode()}")
            try:
                for pictures, _ in self._show.frames():
                    data = png(pictures[0])
                    head = b"--%s\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
                    self.wfile.write(head % (_BOUNDARY, len(data)) + data + b"\r\n")
            except (BrokenPipeError, ConnectionResetError):
                pass  # the viewer has left
        else:
            self.send_error(404)

    @property
    def _show(self) -> _Show:
        return cast(_Server, self.server).show

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        """Print nothing for each request."""


def png(picture: UInt8[Tensor, "H W 3"]) -> bytes:
    """A picture in the PNG format (ISO 15948)."""
    height, width, _ = picture.shape
    rows = (b"\0" + row.contiguous().numpy().tobytes() for row in picture)  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, red, green, blue
    parts = {b"IHDR": header, b"IDAT": zlib.compress(b"".join(rows), 1), b"IEND": b""}
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )
    return b"".join(itertools.chain([b"\x89PNG\r\n\x1a\n"], chunks))
