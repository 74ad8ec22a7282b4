"""Make the pictures of the docs, from real runs: ``docs/pictures/*.png``.

Trains Acrobot with two learning rates and three seeds, kills a run of CartPole, and photographs in
a headless Chromium what a user sees of them: the page of a run, of a comparison and of a death,
``esper crash`` in a terminal, TensorBoard, and a frame of a video.
"""

import argparse
import io
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as imageio
from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ESPER = (sys.executable, "-m", "esper_lightning")
WIDTH = 1100  # pixels
COLUMNS = 112  # of the terminal
PATIENCE_MS = 20_000  # TensorBoard's page loads its curves after itself
CURVES = "#scalars&tagFilter=return_mean%7Centropy%7Cexplained%7Cnorm&_smoothingWeight=0"


def say(*command: object, cwd: Path) -> str:
    """What a command prints; its errors go to the terminal."""
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    done = subprocess.run(words, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def photograph(browser: str, address: str, picture: Path, height: int) -> None:
    """Write what a browser shows at an address, the top ``height`` pixels of it."""
    window = [f"--window-size={WIDTH},{height}", f"--screenshot={picture}", "--hide-scrollbars"]
    patience = f"--virtual-time-budget={PATIENCE_MS}"
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", patience, *window, address]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    with Image.open(picture) as drawn:
        fewer_colours = drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    fewer_colours.save(picture, optimize=True)


def killed_run(folder: Path, steps: int) -> None:
    """Train CartPole in ``folder/runs/killed``, and end it with SIGKILL after ``steps`` steps."""
    words = ["fit", "--config", "cartpole", "--run_dir", "runs/killed"]
    process = subprocess.Popen(
        [*ESPER, *words, "--model.total_env_steps", "20_000_000"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    history = folder / "runs/killed/rank0/history.jsonl"
    rows = steps // 2048
    while process.poll() is None:
        if history.exists() and history.read_text().count("\n") >= rows:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.05)
    raise RuntimeError("the run that was to be killed ended by itself")


def terminal(command: str, output: str, page: Path) -> int:
    """Draw a command and its output in a terminal.

    Returns:
        The height of the drawing, pixels, where it is ``WIDTH`` pixels wide.
    """
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(f"$ {command}\n{output}"))
    drawing = console.export_svg(title="esper_lightning")
    page.write_text(drawing)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    assert size is not None
    return round(WIDTH * float(size[2]) / float(size[1]))


@contextmanager
def tensorboard(logs: str, folder: Path) -> Generator[str]:
    """The address of a TensorBoard that shows ``folder/logs`` and ends with the block."""
    words = ["-m", "tensorboard.main", "--logdir", logs, "--port", "0", "--load_fast=false"]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        address = next(filter(None, (re.search(r"http://\S+", line) for line in process.stderr)))
        yield address[0]
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/pictures", metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, help="of each learning rate")
    parser.add_argument("--env_steps", type=int, default=1_000_000, help="of each run")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"needs one of {', '.join(BROWSERS)}")
    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variants = ["--variant", "base", "--variant", "slow: --model.ppo.learning_rate 3e-4"]
        say(
            *(sys.executable, ROOT / "scripts/ab.py", "--config", ROOT / "configs/acrobot.yaml"),
            *("--seeds", *range(options.seeds), *variants, "--output", "runs/acrobot", "--"),
            *("--model.total_env_steps", options.env_steps),
            cwd=folder,
        )
        run = "runs/acrobot/base/seed0"
        say(*ESPER, "report", run, "--html", "report.html", cwd=folder)
        photograph(browser, (folder / "report.html").as_uri(), output / "report.png", 1400)
        say(*ESPER, "compare", "runs/acrobot", "--output", "compared", cwd=folder)
        page = next((folder / "compared").glob("*.html"))
        photograph(browser, page.as_uri(), output / "comparison.png", 1400)

        say(*ESPER, "evaluate", "--ckpt_path", run, "--video", "video.mp4", cwd=folder)
        frames = imageio.imread(folder / "video.mp4", plugin="FFMPEG")
        imageio.imwrite(output / "video.png", frames[len(frames) // 4])
        with tensorboard("runs/acrobot/base", folder) as address:
            photograph(browser, address + CURVES, output / "tensorboard.png", 960)

        killed_run(folder, min(575_000, options.env_steps))
        command = "esper crash runs/killed"
        printed = say(*ESPER, *command.split()[1:], cwd=folder)
        page = folder / "terminal.svg"
        photograph(browser, page.as_uri(), output / "crash.png", terminal(command, printed, page))
        say(*ESPER, "report", "runs/killed", "--html", "death.html", cwd=folder)
        photograph(browser, (folder / "death.html").as_uri(), output / "death.png", 1190)


if __name__ == "__main__":
    main()
