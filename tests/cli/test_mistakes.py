"""Every mistake in the settings is one short line on stderr, and exit status 2."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from esper_lightning.cli.errors import one_line
from esper_lightning.cli.lightning_cli import EsperCLI
from esper_lightning.cli.main import main

CARTPOLE = str(Path(__file__).parents[2] / "configs" / "cartpole.yaml")
LONG = "x" * 300

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is called with Trainer configured with multiple",
)

# A user's own classes.
MODULES = {
    "raises": "raise RuntimeError('of the\\nuser')",
    "imports": "import there_is_no_such_module",
    "no_python": "def f(:",
    "exits": "import sys; sys.exit(0)",
    "leaves": """
import sys

from esper_lightning.envs import CartPole


class Leaves(CartPole):
    def __post_init__(self):
        sys.exit(0)
""",
    "mine": """
from dataclasses import dataclass

from esper_lightning.envs import CartPole, EnvSpec
from lightning.pytorch import Callback


class NoSpec:
    pass


class HasNoBuild(EnvSpec):
    def spaces(self):
        pass


@dataclass(frozen=True, kw_only=True)
class Raises(CartPole):
    speed: float = 1.0

    def __post_init__(self):
        raise KeyError("of the user")


@dataclass(frozen=True, kw_only=True)
class Refuses(CartPole):
    def __post_init__(self):
        raise ValueError("speed is too high")


@dataclass(frozen=True, kw_only=True)
class HasNoSpaces(CartPole):
    def spaces(self):
        return 1 / 0


class Silent(CartPole):
    def __post_init__(self):
        raise ValueError


class SaysNothing(Callback):
    def __init__(self):
        raise ValueError


class Needs(Callback):
    def __init__(self, port: int):
        pass


class Negative(Callback):
    def __init__(self):
        raise ValueError("negative!")


class Speechless(ValueError):
    def __str__(self):
        raise RuntimeError("no text")


class OfSpeechlessSpaces(CartPole):
    def spaces(self):
        raise Speechless


class OfSpeechless(Callback):
    def __init__(self):
        raise Speechless
""",
}

REPEATED = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join(10 * ['*' + old])}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
# Config files, and the errors about them.
FILES = {
    "twice.yaml": (
        "model:\n  env: CartPole\n  seed: 1\n  seed: 2\n",
        "twice.yaml:4:3: the key 'seed' stands here again.",
    ),
    "twice_at_the_top.yaml": (
        "model:\n  env: CartPole\nmodel:\n  env: Acrobot\n",
        "twice_at_the_top.yaml:3:1: the key 'model' stands here again.",
    ),
    "twice_in_a_list.yaml": (
        "trainer:\n  callbacks: [{class_path: History, class_path: EarlyStopping}]\n",
        "twice_in_a_list.yaml:2:37: the key 'class_path' stands here again.",
    ),
    "dotted.yaml": (
        "model.seed: 7\nmodel: {env: CartPole, total_env_steps: 128}\n",
        "dotted.yaml:1:1: the key 'model.seed' stands beside 'model': write 'seed' below it.",
    ),
    "dotted_after.yaml": (
        "model: {env: CartPole}\nmodel.sed: 7\n",
        "dotted_after.yaml:2:1: the key 'model.sed' stands beside 'model': write 'sed' below it.",
    ),
    "dotted_twice.yaml": (
        "model.env.num_envs: 3\nmodel.env: CartPole\n",
        "dotted_twice.yaml:1:1: the key 'model.env.num_envs' stands beside 'model.env': write",
    ),
    "dotted_twice_after.yaml": (
        "model.ppo: {clip: 0.1}\nmodel.ppo.epochs: 3\n",
        "dotted_twice_after.yaml:2:1: the key 'model.ppo.epochs' stands beside 'model.ppo': write",
    ),
    "dots.yaml": (100 * "a." + "a: 1\n", "dots.yaml:1:1: nested more than 50 deep."),
    "of_ppo_twice.yaml": ("clip: 0.1\nclip: 0.2\n", "of_ppo_twice.yaml:2:1: the key 'clip' stands"),
    "of_ppo_open.yaml": ("clip: [1\n", "of_ppo_open.yaml:2:1: not valid YAML: did not find"),
    "of_ppo_type.yaml": ("clip: x\n", "of_ppo_type.yaml: 'clip' is no setting."),
    "names_twice.yaml": (
        "model: {env: CartPole, ppo: of_ppo_twice.yaml}\n",
        "error: of_ppo_twice.yaml:2:1: the key 'clip' stands here again.",
    ),
    "names_open.yaml": (
        "model: {env: CartPole, ppo: of_ppo_open.yaml}\n",
        "error: of_ppo_open.yaml:2:1: not valid YAML: did not find expected ',' or ']'.",
    ),
    "names_type.yaml": (
        "model: {env: CartPole, ppo: of_ppo_type.yaml}\n",
        "error: model.ppo.clip must be a number, got 'x'.",
    ),
    "of_model.yaml": (
        "env: CartPole\nppo: of_ppo_twice.yaml\n",
        "' is no setting.",
    ),
    "names_names_twice.yaml": (
        "model: of_model.yaml\n",
        "error: of_ppo_twice.yaml:2:1: the key 'clip' stands here again.",
    ),
    "inline_twice.yaml": (
        "model: {env: CartPole, policy: '{a: 1, a: 2}'}\n",
        "model.policy:1:8: the key 'a' stands here again.",
    ),
    "dotted_below.yaml": (
        "model:\n  env: CartPole\n  ppo.clip: 0.1\n  ppo: {epochs: 1}\n",
        "dotted_below.yaml:3:3: the key 'ppo.clip' stands beside 'ppo': write 'clip' below it.",
    ),
    "only_dotted.yaml": (
        "model.env: CartPole\nmodel.seed: 7\nmodel.ppo.clip: 2.0\n",
        "PPOConfig.clip must lie in (0, 1), got 2.0.",
    ),
    "deep.yaml": ("model:\n  env: " + 5000 * "[", "deep.yaml:2:56: nested more than 50 deep."),
    "deep_mappings.yaml": ("{a: " * 3000 + "1" + "}" * 3000, "nested more than 50 deep."),
    "itself.yaml": ("model: &m\n  env: *m\n", "itself.yaml:2:8: *m is a part of itself."),
    "itself_in_a_list.yaml": ("&l [*l]\n", "*l is a part of itself."),
    "laughs.yaml": (REPEATED, "more than 100,000 values."),
    "empty.yaml": ("", "empty.yaml must hold settings by their names (model: ..., trainer: ...)."),
    "comment.yaml": ("# nothing\n", "comment.yaml must hold settings by their names"),
    "list.yaml": ("- 1\n- 2\n", "list.yaml must hold settings by their names"),
    "scalar.yaml": ("hello\n", "scalar.yaml must hold settings by their names"),
    "open.yaml": (
        "model: [1, 2\n",
        "open.yaml:2:1: not valid YAML: did not find expected ',' or ']'.",
    ),
    "indent.yaml": (
        "model:\n  env: CartPole\n   seed: 1\n",
        "indent.yaml:3:8: not valid YAML: mapping values are not allowed in this context.",
    ),
    "tab.yaml": (
        "model:\n\tenv: CartPole\n",
        "tab.yaml:2:1: not valid YAML: found character that cannot",
    ),
    "quote.yaml": (
        "model: 'x\n",
        "quote.yaml:2:1: not valid YAML: found unexpected end of stream.",
    ),
    "two.yaml": (
        "model: {}\n---\nmodel: {}\n",
        "two.yaml:2:1: not valid YAML: but found another document",
    ),
    "code.yaml": (
        "model: !!python/name:os.system\n",
        "code.yaml:1:8: not valid YAML: could not determine",
    ),
    "no_anchor.yaml": ("model: *m\n", "no_anchor.yaml:1:8: not valid YAML: found undefined alias."),
    "merge.yaml": (
        "model:\n  <<: 3\n",
        "merge.yaml:2:7: not valid YAML: expected a mapping or list",
    ),
    "number.yaml": ("1: 2\n", "number.yaml: 1 is no setting: their names are text."),
    "key.yaml": ("? [1]\n: 2\n", "key.yaml:1:3: not valid YAML: found unhashable key."),
    "space.yaml": ("model:\n  e nv: 1\n", "space.yaml: Spaces not allowed in keys"),
    "nul.yaml": ("model: \0\n", "nul.yaml: not valid YAML: control characters are not allowed."),
    "group.yaml": ("modle:\n  env: CartPole\n", "'modle' is no setting. The nearest is 'model'."),
    "setting.yaml": (
        "model:\n  env: CartPole\n  ppo:\n    rolout_steps: 3\n",
        "model.ppo.rolout_steps is no setting. The nearest is 'model.ppo.rollout_steps'.",
    ),
    "of_a_class.yaml": (
        "model:\n  env:\n    class_path: CartPole\n    init_args:\n      num_env: 3\n",
        "model.env.num_env is no setting. The nearest is 'num_envs'.",
    ),
    "class.yaml": ("model:\n  env: CartPoll\n", "got 'CartPoll'. The nearest is 'CartPole'."),
    "no_env.yaml": ("model:\n  seed: 1\n", "model.env must be given. Name one, or a config"),
    "no_model.yaml": ("model: null\n", "model must hold settings by their names, or name a file"),
    "list_of_a_group.yaml": (
        "model: {env: CartPole, ppo: [1]}\n",
        "model.ppo must hold settings by their names, or name a file with some, got '[1]'.",
    ),
    "null_of_a_group.yaml": (
        "model: {env: CartPole, ppo: null}\n",
        "model.ppo must hold settings by their names, or name a file with some, got 'None'.",
    ),
    "trainer.yaml": (
        "model: {env: CartPole}\ntrainer: []\n",
        "trainer must hold settings by their names, or name a file with some, got '[]'.",
    ),
    "flag_of_a_group.yaml": (
        "trainer: true\n",
        "trainer must hold settings by their names, or name a file with some, got 'True'.",
    ),
    "init_args.yaml": (
        "model: {env: {class_path: CartPole, init_args: 3}}\n",
        "model.env.init_args must hold settings by their names.",
    ),
    "null_init_args.yaml": (
        "model: {env: CartPole, policy: {class_path: MLP, init_args: null}}\n",
        "model.policy.init_args must hold settings by their names.",
    ),
    "class_path.yaml": (
        "model: {env: {class_path: [1], init_args: {}}}\n",
        "model.env.class_path must be the name of a class of EnvSpec, got a value of type 'list'.",
    ),
    "two_loggers.yaml": (
        "model: {env: CartPole}\ntrainer: {logger: [TensorBoardLogger, CSVLogger]}\n",
        "error: trainer.logger.save_dir must be given.\n",
    ),
    "flat.yaml": ("model: CartPole\n", "model must hold settings by their names, or name a file"),
    "flat_list.yaml": ("model: [1]\n", "model"),
    "type.yaml": (
        "model:\n  env: CartPole\n  seed: [1]\n",
        "model.seed must be an integer, got '[1]'.",
    ),
    "nested_type.yaml": (
        "model: {env: CartPole, policy: {class_path: MLP, init_args: {hidden_sizes: x}}}\n",
        "model.policy.hidden_sizes must be a list of integers, got 'x'.",
    ),
}
BYTES = {
    "binary.yaml": (bytes(range(256)), "binary.yaml must be text in UTF-8: invalid start byte."),
    "huge.yaml": (bytes(10_000_001), "huge.yaml must be a file of settings, got 10,000,001 bytes."),
    "latin1.yaml": ("model: é\n".encode("latin-1"), "latin1.yaml must be text in UTF-8: "),
}

# Words that follow `esper fit --config configs/cartpole.yaml`, and the errors about them.
FIT = {
    # Names of settings.
    "--model.ppo.clib 0.2": "model.ppo.clib is no setting. The nearest is 'model.ppo.clip'.",
    "--model.ppo.clib=0.2": "model.ppo.clib is no setting. The nearest is 'model.ppo.clip'.",
    "--model.sed 3": "model.sed is no setting. The nearest is 'model.seed'.",
    "--modle.seed 3": "modle.seed is no setting. The nearest is 'model.seed'.",
    "--trainer.max_epoch 2": "The nearest is 'trainer.max_epochs'.",
    "--trainer.gpus 2": "trainer.gpus is no setting.",
    "--seed 2": "seed is no setting.",
    "--ckpt last": "ckpt is no setting. The nearest is 'ckpt_path'.",
    "--model.policy.hiden 3": "model.policy.hiden is no setting. The nearest is 'hidden_sizes'.",
    "--model.env.num_env 3": "model.env.num_env is no setting. The nearest is 'num_envs'.",
    "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filenam x": "nearest is 'filename'",
    "--": "'--' must be followed by the name of a setting (--model.seed, for example), got '--'.",
    "-- --model.seed 3": "'--' must be followed by the name of a setting",
    "--=3": "must be followed by the name of a setting (--model.seed, for example), got '--=3'.",
    "''": "'' is no setting: their names begin with --.",
    "extra": "'extra' is no setting: their names begin with --.",
    "evaluate": "'evaluate' is no setting",
    "--model.env.num_envs 4 5": "'5' is no setting",
    "--print_config=all": 'Invalid option "all" for --print_config',
    # Values that are absent.
    "--model.ppo.clip": "argument --model.ppo.clip: expected one argument",
    "--model": "argument --model: expected one argument",
    "--config": "expected one argument",
    "--ckpt_path": "argument --ckpt_path: expected one argument",
    # Values of another type.
    "--model.seed x": "model.seed must be an integer, got 'x'.",
    "--model.seed 1.5": "model.seed must be an integer, got '1.5'.",
    "--model.seed ''": "model.seed must be an integer, got ''.",
    "--model.seed true": "model.seed must be an integer, got 'True'.",
    "--model.ppo.clip abc": "model.ppo.clip must be a number, got 'abc'.",
    "--model.ppo.normalize_obs maybe": "model.ppo.normalize_obs must be true or false, got 'maybe'",
    "--model.ppo.rollout_steps 1e3": "model.ppo.rollout_steps must be an integer, got '1",
    "--model.total_env_steps many": "must be an integer, or null, got 'many'.",
    "--model.compile fast": "model.compile must be one of off, auto, default, max, got 'fast'.",
    "--model.compile defalt": "got 'defalt'. The nearest is 'default'.",
    "--model.env.num_envs 1_000x": "model.env.num_envs must be an integer, got '1_000x'.",
    "--model.env.num_envs ''": "model.env.num_envs must be an integer, got ''.",
    "--model.policy.hidden_sizes x": "hidden_sizes must be a list of integers, got 'x'.",
    "--model 3": "model must hold settings by their names, or name a file with some, got '3'.",
    "--model.ppo 3": "model.ppo must hold settings by their names, or name a file with some",
    "--trainer 3": "trainer must hold settings by their names, or name a file with some",
    "--model.policy '{a: 1, a: 2}'": "model.policy:1:8: the key 'a' stands here again.",
    "--trainer.detect_anomaly maybe": "trainer.detect_anomaly must be true or false, got 'maybe'.",
    "--trainer.deterministic sure": "must be one of warn, or true or false, or null, got 'sure'.",
    "--trainer.precision 8": "trainer.precision must be one of 64, 32, 16, ",
    "--trainer.max_epochs all": "trainer.max_epochs must be an integer, or null, got 'all'.",
    "--seed_everything x": "seed_everything must be true or false, or an integer, got 'x'.",
    "--seed_everything -5": "seed_everything must be true or false, or an integer from 0",
    "--seed_everything 4294967296": "seed_everything must be true or false, or an integer",
    # Settings below a value.
    "--model.seed.x 3": "model.seed must be an integer, and has no setting 'x'.",
    "--model.env.num_envs.x 3": "model.env.num_envs must be an integer, and has no setting 'x'.",
    "--model.total_env_steps.x 3": "must be an integer, or null, and has no setting 'x'.",
    "--trainer.default_root_dir.x 3": "must be text, or a path, or null, and has no",
    # Values out of range.
    "--model.ppo.clip 2": "PPOConfig.clip must lie in (0, 1), got 2.0. Usual values",
    "--model.ppo.minibatches 7": "PPOConfig.minibatches must divide",
    "--model.env.num_envs 0": "CartPole.num_envs must be at least 1, got 0.",
    "--model.env.num_envs -3": "CartPole.num_envs must be at least 1, got -3.",
    "--model.total_env_steps 3": "PPO.total_env_steps must be at least env.num_envs = 64, got 3.",
    # Classes.
    "--model.env CartPoll": "The nearest is 'CartPole'. Known are Acrobot, Brax, CartPole, Custom,"
    " EnvPool, FrameStack, Gymnasium, Gymnax, Morph",
    "--model.env 5": "model.env must be the name of a class of EnvSpec, got '5'. Known are",
    "--model.env 6": "..., or an import path.",
    "--model.env '{class_path: 3}'": "error: model.env.class_path must be the name of a class of "
    "EnvSpec, got a value of type 'int'. Known are",
    "--model.env null": "model.env must be the name of a class of EnvSpec, got 'None'.",
    "--model.env ''": "model.env must be the name of a class of EnvSpec, got ''.",
    "--model.env MLP": "model.env must be the name of a class of EnvSpec, got 'MLP'.",
    "--model.env torch.nn.Linear": "a class of EnvSpec, got 'torch.nn.Linear'. Known are Acrobot",
    "--model.env no_such.Env": "'no_such'. Install it, or add its folder to PYTHONPATH.",
    "--model.env torch.NoSuchEnv": "module 'torch' has no attribute 'NoSuchEnv'.",
    "--model.policy MPL": "got 'MPL'. The nearest is 'MLP'. Known are CNN, Composed, MLP,"
    " Recurrent, or an import path.",
    "--model.policy CartPole": "must be the name of a class of PolicySpec, got 'CartPole'",
    "--trainer.logger TensorBord": "got 'TensorBord'. The nearest is 'TensorBoardLogger'.",
    "--trainer.logger CSVLogger": "trainer.logger.save_dir must be given.",
    "--trainer.callbacks EarlyStoping": "got 'EarlyStoping'. The nearest is 'EarlyStopping'.",
    "--trainer.callbacks+=Histry": "got 'Histry'. The nearest is 'History'.",
    "--trainer.plugins Foo": "trainer.plugins must be the name of a class of ",
    "--ckpt_path ''": "ckpt_path must name a checkpoint, got ''.",
    "--ckpt_path http://host//x": "must name a checkpoint on this machine, got 'http://host//x'.",
    # The user's own.
    "--model.env raises.Env": "RuntimeError: of the user (raises.py, line 1)",
    "--model.env imports.Env": "got 'imports.Env': No module named 'there_is_no_such_module'.",
    "--model.env no_python.Env": "model.env: SyntaxError: invalid syntax (no_python.py, line 1)",
    "--model.env mine.Nothing": "module 'mine' has no attribute 'Nothing'.",
    "--model.env mine.NoSpec": "must be the name of a class of EnvSpec, got 'mine.NoSpec'.",
    "--model.env mine.HasNoBuild": "got 'mine.HasNoBuild'. It lacks build.",
    "--model.env mine.Raises": "KeyError: 'of the user' (mine.py, line 22)",
    "--model.env mine.Raises --model.env.speed fast": "env.speed must be a number, got 'fast'.",
    "--model.env mine.Refuses": "speed is too high (mine.py, line 28)",
    "--model.env mine.HasNoSpaces": "ZeroDivisionError: division by zero (mine.py, line 34)",
    "--model.env mine.Silent": "ValueError:  (mine.py, line 39)".replace("  ", " "),
    "--model.env exits.Env": "must not end the process, got 0 (exits.py, line 1)",
    "--model.env leaves.Leaves": "must not end the process, got 0 (leaves.py, line 9)",
    "--trainer.callbacks+=mine.SaysNothing": "error: SaysNothing: ValueError: (mine.py, line 44)",
    "--trainer.callbacks+=mine.Needs": "trainer.callbacks.port must be given.",
    "--trainer.callbacks+=mine.Negative": "error: Negative: negative! (mine.py, line 54)",
    "--trainer.callbacks '{class_path: mine.Negative}'": "error: Negative: negative! (mine.py, l",
    "--trainer.callbacks '[{class_path: mine.Negative}]'": "error: Negative: negative! (mine.py, l",
    "--model.env mine.OfSpeechlessSpaces": "error: Speechless: (mine.py, line 64)",
    "--trainer.callbacks mine.OfSpeechless": "error: OfSpeechless: Speechless: (mine.py, line 69)",
    "--trainer.callbacks+=mine.OfSpeechless": "error: OfSpeechless: Speechless: (mine.py, line 69)",
    # What the Trainer refuses.
    "--trainer.accelerator quantum": "invalid accelerator name: `accelerator='quantum'`. Available",
    "--trainer.accelerator tpu": "torch_xla",
    "--trainer.devices 0": "`Trainer(devices='0')` value is not a valid input using",
    "--trainer.devices -3": "should be an int > 0.",
    "--trainer.devices two": "should be an int > 0.",
    "--trainer.strategy magic": "must be 'ddp', or 'auto' with one device, got 'magic'.",
    "--trainer.strategy dpp": "got 'dpp'. The nearest is 'ddp'.",
    "--trainer.strategy ddp_spawn": "got 'DDPStrategy by _MultiProcessingLauncher'. Its child",
    "--trainer.strategy fsdp": "trategy",
    "--trainer.max_time soon": "trainer.max_time must be DD:HH:MM:SS, or a mapping of days, hours, "
    "minutes and seconds, got 'soon'.",
    "--trainer.max_time '{weekz: 1}'": "trainer.max_time must be DD:HH:MM:SS, or a mapping of",
    "--trainer.max_time '{days: 99999999999999}'": "trainer.max_time must be DD:HH:MM:SS, or",
    "--trainer.max_time '{days: -1}'": "trainer.max_time must be DD:HH:MM:SS, or a mapping of",
    "--trainer.callbacks Timer --trainer.callbacks.duration '{weekz: 1}'": "'weekz'",
    "--trainer.callbacks '{class_path: Timer, init_args: {duration: foo}}'": "error: "
    "`Timer(duration='foo')` is not a valid duration. Expected a string in the format DD:HH:MM:SS.",
    "--trainer.callbacks '{class_path: ModelCheckpoint, init_args: {monitor: nope, save_top_k: -2}}"
    "'": "error: ModelCheckpoint: Invalid value for save_top_k=-2.",
    "--trainer.callbacks '{class_path: 3}'": "error: trainer.callbacks",
    "--trainer.callbacks '[{class_path: 3}]'": "error: trainer.callbacks",
    "--trainer.profiler fast": "error: trainer.profiler must be one of simple, advanced, pytorch, "
    "xla, or name a class of Profiler, got 'fast'.",
    "--trainer.profiler simpel": "got 'simpel'. The nearest is 'simple'.",
    "--trainer.profiler '{class_path: PyTorchProfiler, init_args: {schedule: 3}}'": "error: "
    "trainer.profiler.schedule is no setting.",
    "--trainer.profiler '{class_path: 3}'": "error: trainer.profiler",
    "--trainer.num_nodes 0": "`num_nodes` must be a positive integer, but got 0.",
    "--trainer.max_epochs -7": "`max_epochs` must be a non-negative integer or -1.",
    "--trainer.max_steps -7": "`max_steps` must be a non-negative integer or -1",
    "--trainer.fast_dev_run -1": "fast_dev_run=-1 is not a valid configuration. It should be >= 0.",
    "--trainer.limit_val_batches 2.5": "invalid value 2.5 for limit_val_batches",
    "--trainer.val_check_interval 2.5": "invalid value 2.5 for val_check_interval",
    "--trainer.overfit_batches 7.5": "invalid value 7.5 for overfit_batches",
    "--trainer.reload_dataloaders_every_n_epochs -1": "should be an int >= 0, got -1.",
    "--trainer.barebones true --trainer.logger true": "(barebones=True, logger=True)",
    "--trainer.callbacks ModelCheckpoint --trainer.enable_checkpointing false": "ModelCheckpoint",
    # What PPO refuses of the Trainer.
    "--trainer.gradient_clip_val 1": "Trainer.gradient_clip_val must be None, got 1.",
    "--trainer.accumulate_grad_batches 2": "Trainer.accumulate_grad_batches must be 1, got 2.",
    "--trainer.precision 16-true": "Trainer.precision must be one of 32-true, bf16-mixed",
    "--trainer.min_epochs 3": "Trainer.min_epochs must be None",
    "--trainer.default_root_dir /proc/x": "trainer.default_root_dir must be null, got '/proc/x'.",
    "--trainer.limit_train_batches 0": "Trainer.limit_train_batches must leave an iteration",
    "--trainer.accelerator mps": "trainer.accelerator must be one that this machine has",
    "--trainer.overfit_batches 0.3": "Trainer.overfit_batches must be 0, got 0.3.",
    "--trainer.log_every_n_steps -1": "Trainer.log_every_n_steps must be at least 0, got -1.",
    "--trainer.num_sanity_val_steps -3": "Trainer.num_sanity_val_steps must be at least 0, or -1",
    "--trainer.min_steps -3 --trainer.max_steps 9 --model.total_env_steps null": "error: "
    "Trainer.min_steps must be at least 0, got -3.",
    "--trainer.min_epochs -3 --trainer.max_epochs 9 --model.total_env_steps null": "error: "
    "Trainer.min_epochs must be at least 0, got -3.",
    "--trainer.val_check_interval 0.0": "or a share of an epoch above 0, got 0.0.",
    "--trainer.callbacks [{}]": "Trainer.callbacks must be of classes derived from Callback, got "
    "'Callback'. It does nothing.",
    "--trainer.callbacks {}": "must be of classes derived from Callback",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor loss/value "
    "--trainer.callbacks.patience -1": "EarlyStopping.patience must be at least 0, got -1.",
    "--trainer.callbacks+=LearningRateFinder": "must tune nothing, got 'LearningRateFinder'.",
    "--trainer.logger false --trainer.callbacks+=LearningRateMonitor": "error: "
    "Trainer.logger must be there for what callbacks log, got none for LearningRateMonitor.",
    "--trainer.logger false --trainer.callbacks+=DeviceStatsMonitor": "got none for DeviceStatsMon",
    "--trainer.callbacks+=GradientAccumulationScheduler --trainer.callbacks.scheduling '{0: 4}'": (
        "Trainer.callbacks must accumulate no gradients, got 'GradientAccumulationScheduler'."
    ),
    "--trainer.callbacks+=StochasticWeightAveraging --trainer.callbacks.swa_lrs 0.1": "error: "
    "Trainer.callbacks must average no weights, got 'StochasticWeightAveraging'.",
    "--trainer.callbacks BackboneFinetuning": "error: "
    "Trainer.callbacks must freeze no weights, got 'BackboneFinetuning'. PPO steps all weights as",
    "--trainer.callbacks ModelSummary --trainer.callbacks.max_depth -5": "error: "
    "ModelSummary.max_depth must be at least -1, got -5.",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor ''": "error: "
    "EarlyStopping.monitor must name a metric, got ''.",
    "--trainer.callbacks BestCheckpoint --trainer.callbacks.monitor ''": "error: "
    "BestCheckpoint.monitor must name a metric, got ''.",
    # Metrics that the run does not have.
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor los/value": "error: "
    "EarlyStopping.monitor must be a metric of this run, got 'los/value'. The nearest are "
    "'loss/value', 'loss/policy'.",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor x --trainer.callbacks.strict "
    "false": "got 'x'. Known are rollout/episode_return_mean, ",
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.monitor eval/return_mean": "error: "
    "ModelCheckpoint.monitor must be a metric of this run, got 'eval/return_mean'. The nearest",
    "--trainer.callbacks BestCheckpoint --trainer.callbacks.monitor reward": "error: "
    "BestCheckpoint.monitor must be a metric of this run, got 'reward'.",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor eval/episodes "
    "--trainer.limit_val_batches 0": "got 'eval/episodes'. Nothing is evaluated with Trainer(limit",
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.filename 'a\0b'": "error: "
    r"ModelCheckpoint.filename must name a file, got 'a\x00b'.",
    "--trainer.profiler esper_lightning.WindowProfiler --trainer.profiler.filename ''": "error: "
    "WindowProfiler.filename must name a file, got ''.",
    "--trainer.limit_val_batches 0.5": "Trainer.limit_val_batches must be 0, or at least 1, got",
    "--trainer.val_check_interval 00:00:00:05": "Trainer.val_check_interval must be a number of",
    "--trainer.val_check_interval '{seconds: 5}'": "or a share of an epoch, got 5.0 s.",
    "--model.ppo.rollout_steps 100_000_000_000": "must give a rollout that fits into the memory",
    "--model.env.num_envs 100_000_000_000 --model.total_env_steps null": "fits into the memory",
    "--model.eval_episodes 1_000_000_000_000": "PPO.eval_episodes must give an evaluation that fits"
    " into the memory",
    "--trainer.check_val_every_n_epoch 0": "Trainer.check_val_every_n_epoch must be at least 1, or",
    "--trainer.val_check_interval 60": "Trainer.val_check_interval must be at most 50, the",
    "--trainer.val_check_interval 0": "Trainer.val_check_interval must be at least 1 iteration",
    "--trainer.limit_train_batches 0.001": "limit_train_batches",
    "--model.total_env_steps null": "PPO.total_env_steps must be known for PPOConfig.learning_rate",
    "--model.total_env_steps null --trainer.max_time 00:00:00:09": "must be known for PPOConfig.",
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.dirpath file": "error: "
    "ModelCheckpoint.dirpath must be a folder that can be made (",
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.dirpath file/x": "folder that can be",
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.filename '{nothing:d'": "error: "
    "ModelCheckpoint.filename must be a name with formats (",
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.dirpath /proc/x": "error: "
    "ModelCheckpoint.dirpath must be a folder that can be made (No such file or directory), got",
    f"--trainer.callbacks ModelCheckpoint --trainer.callbacks.dirpath {LONG}": "(File name too lo",
    f"--trainer.callbacks ModelCheckpoint --trainer.callbacks.filename {LONG}": "error: "
    "ModelCheckpoint.filename must give names of at most 200 bytes, got ",
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.filename /proc/x/y": "got '/proc/x'.",
    "--trainer.callbacks OnExceptionCheckpoint --trainer.callbacks.dirpath /proc/x": "error: "
    "OnExceptionCheckpoint.dirpath must be a folder that can be made (",
    f"--trainer.callbacks OnExceptionCheckpoint --trainer.callbacks.dirpath x "
    f"--trainer.callbacks.filename {LONG}": "OnExceptionCheckpoint.filename must give names of at",
    "--trainer.callbacks ModelPruning --trainer.callbacks.pruning_fn l1_unstructured": "error: "
    "Trainer.callbacks must prune no weights, got 'ModelPruning'. PPO steps all weights as one",
    "--trainer.callbacks SpikeDetection": "error: Trainer.callbacks must watch no loss of a step, "
    "got 'SpikeDetection'. PPO has a loss for each minibatch, and none for an iteration.",
    "--trainer.strategy DDPStrategy --trainer.strategy.process_group_backend foo": "error: "
    "DDPStrategy.process_group_backend must be one that torch has here: 'gloo', or 'nccl' on CUDA",
    "--trainer.barebones true --run_dir x": "--run_dir must be null with trainer.barebones=true, "
    "got 'x'. Such a run writes no files.",
    # What a class refuses of which a setting is one of several.
    "--trainer.callbacks FlightRecorder --trainer.callbacks.dirpath ''": "error: "
    "FlightRecorder.dirpath must name a directory, got ''.",
    "--trainer.callbacks FlightRecorder --trainer.callbacks.dirpath 'a\0b'": "error: "
    r"FlightRecorder.dirpath must name a directory, got 'a\x00b'.",
    "--trainer.callbacks FlightRecorder --trainer.callbacks.hang_timeout_s -1": "error: "
    "FlightRecorder.hang_timeout_s must",
    "--trainer.logger.save_dir x": "trainer.logger.save_dir must follow the name of a class",
    # Checkpoints.
    "--ckpt_path none.ckpt": "ckpt_path must name an existing checkpoint, got 'none.ckpt'.",
    "--ckpt_path folder": "got 'folder'. It is a directory.",
    "--ckpt_path file": "got 'file'. It begins with b'no f', which is no file of torch.save.",
    "--ckpt_path torn.ckpt": "got 'torn.ckpt'. It is torn",
    "--ckpt_path void.ckpt": "got 'void.ckpt'. It is empty.",
    "--ckpt_path other.ckpt": "ckpt_path must name a checkpoint of PPO, got 'other.ckpt'.",
    "--ckpt_path best": "is not configured to save the best model.",
    "--ckpt_path hpc": "no HPC checkpoint was found.",
    "--ckpt_path 'a\0b'": r"got 'a\x00b'.",
    f"--ckpt_path {LONG}": "File name too long",
    "--model.warm_start ''": "PPO.warm_start must name a checkpoint, got ''.",
    "--model.warm_start none.ckpt": "PPO.warm_start must name an existing checkpoint",
    "--model.warm_start other.ckpt": "must name a checkpoint of PPO, got 'other.ckpt'.",
    # Run directories that cannot be.
    "--run_dir ''": "--run_dir must name a directory, got ''.",
    "--run_dir ' '": "--run_dir must name a directory, got ' '.",
    "--run_dir file": "--run_dir must be a folder that can be made (File exists), got 'file'.",
    "--run_dir file/below": "that can be made (Not a directory), got 'file/below'.",
    "--run_dir copied": "'. It holds checkpoints/last.ckpt, which no run wrote.",
    "--run_dir dangling": "--run_dir must be a folder that can be made (File exists)",
    "--run_dir /proc/none/run": "(No such file or directory), got '/proc/none/run'.",
    "--run_dir s3://bucket/run": "The run directory must be a place that this machine can reach,"
    " got 's3://bucket/run'. Install s3fs",
    "--run_dir http://host/run": "error: The run directory must be a path, or an address that can "
    "be written to, got 'http://host/run'.",
    "--run_dir https://host/run": "an address that can be written to, got 'https://host/run'.",
    "--run_dir zip://run": "an address that can be written to, got 'zip://run'.",
    "--run_dir nothing://run": "or an address of a protocol that fsspec knows, got 'nothing://run'.",
    "--trainer.logger CSVLogger --trainer.logger.save_dir http://host/x": "an address that can be",
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.dirpath http://host/x": "error: "
    "ModelCheckpoint.dirpath must be a path, or an address that can be written to, got 'http://host",
    "--run_dir 'a\0b'": "--run_dir must name a directory, got 'a\\x00b'.",
    f"--run_dir {LONG}": "--run_dir must be a folder that can be made (File name too long)",
    "--trainer.logger CSVLogger --trainer.logger.save_dir file": "(Not a directory)",
    "--run_dir new/../file/below": "(Not a directory), got 'new/../file/below'.",
    "--trainer.logger TensorBoardLogger --trainer.logger.save_dir new --trainer.logger.name ../file"
    "/below": "(Not a directory)",
    # Config files.
    "--config none.yaml": "--config must name a file with settings: File does not exist: '",
    "--config folder": "--config must name a file with settings: Path is not a file: '",
    "--config ''": "--config must hold settings by their names",
    "--config /dev/zero": "must name a file with settings: Path is not a file: '/dev/zero'",
    "--config '{a: 1, a: 2}'": "--config:1:8: the key 'a' stands here again.",
    """--config '{"trainer": {"default_root_dir": "a\\0b"}}'""": (
        "the text 'a\\x00b' holds a NUL byte."
    ),
    "--config none+s3://x.yaml": "--config must name a file with settings: File does not exist: '",
    "--config [1": "--config:2:1: not valid YAML: did not find expected ',' or ']'.",
}

# Whole command lines.
OTHERS = {
    "evaluate --ckpt_path http://host//x": "on this machine, got 'http://host//x'.",
    "export --ckpt_path '' --output x": "or last.ckpt, got ''.",
    "crash ''": "RUN_DIR must name a folder on this machine, got ''.",
    "report http://host//x": "RUN_DIR must name a folder on this machine, got 'http://host//x'.",
    "compare ''": "RUN must name a folder on this machine, got ''.",
    "": "must be followed by one of fit, evaluate, play, bench, export, report, crash, replay, "
    "compare, sweep, list, doctor, init.",
    "fitt": "got 'fitt'. The nearest is 'fit'.",
    "evalute": "got 'evalute'. The nearest is 'evaluate'.",
    "FIT": "compare, sweep, list, doctor, init, got 'FIT'.",
    "''": "got ''.",
    "--config x.yaml fit": "got '--config'.",
    "--versions": "got '--versions'.",
    "fit": "model.env must be given. Name one, or a config that does",
    "evaluate": "--ckpt_path must be given, got None.",
    "evaluate --ckpt_path": "argument --ckpt_path: expected one argument",
    "evaluate --ckpt_pth x": "--ckpt_path must be given, got None.",
    "evaluate --ckpt_path none": "ckpt_path must name an existing checkpoint, got 'none'.",
    "evaluate --ckpt_path last": "ckpt_path must name an existing checkpoint, got 'last'.",
    "evaluate --ckpt_path ''": "or a run directory with checkpoints/best.ckpt or last.ckpt",
    "evaluate --ckpt_path folder": "or a run directory with checkpoints/best.ckpt or last.ckpt",
    "evaluate --ckpt_path file": "got 'file'. It begins with b'no f', which is no file of",
    "evaluate --ckpt_path torn.ckpt": "got 'torn.ckpt'. It is torn",
    "evaluate --ckpt_path other.ckpt": "ckpt_path must name a checkpoint of PPO",
    "evaluate --ckpt_path 'a\0b'": r"got 'a\x00b'.",
    f"bench --config {CARTPOLE} --num_envs 0": "num_envs must be at least 1, got 0.",
    f"bench --config {CARTPOLE} --num_envs [4,-4]": "num_envs must be at least 1, got -4.",
    f"bench --config {CARTPOLE} --seconds 0": "seconds must be positive, got 0.0.",
    f"bench --config {CARTPOLE} --model.seed.x 3": "model.seed must be an integer, and has no",
    f"bench --config {CARTPOLE} --model.warm_start none.ckpt": "must name an existing checkpoint",
    f"bench --config {CARTPOLE} --output file": "--output must name a new file or an earlier file",
    "export": "the following arguments are required: --ckpt_path, --output",
    "export --ckpt_path none --output x": "must name an existing checkpoint, got 'none'.",
    "export --ckpt_path last --output x": "must name an existing checkpoint, got 'last'.",
    "export --ckpt_path torn.ckpt --output x": "got 'torn.ckpt'. It is torn",
    "export --ckpt_path 'a\0b' --output x": r"got 'a\x00b'.",
    "export --ckpt_path none --output file": "--output must name a new file or an earlier export,"
    " got 'file'. Something else is there.",
    "export --ckpt_path none --output fifo": "got 'fifo'. Something else is there.",
    "export --ckpt_path none --output dangling": "No file can be written there: No such file",
    "export --ckpt_path none --output folder": "got 'folder'. It is a folder.",
    "export --ckpt_path none --output other.ckpt": "or an earlier export, got 'other.ckpt'.",
    "export --ckpt_path none --output ''": "--output must name a new file or an earlier export",
    "export --ckpt_path none --output file/x": "No file can be written there: Not a directory.",
    "export --ckpt_path none --output /proc/x/y.pt2": "--output must name a new file or an earlier",
    "export --ckpt_path none --output 'a\0b'": "written there: embedded null byte.",
    f"export --ckpt_path none --output {LONG}": "written there: File name too long.",
    f"export --ckpt_path none --output new/{LONG}": "written there: File name too long.",
    "export --ckpt_path x --output y --format tflite": "--format: invalid choice: 'tflite'",
    "export --ckpt_path x --output y --frmat onnx": "The nearest is '--format'.",
    "crash": "the following arguments are required: RUN_DIR",
    "crash none": "RUN_DIR must hold rank folders (rank0, ...), got 'none'.",
    "crash file": "RUN_DIR must hold rank folders (rank0, ...), got 'file'.",
    "crash folder": "RUN_DIR must hold rank folders (rank0, ...), got 'folder'.",
    "crash folder file": "RUN_DIR must hold rank folders (rank0, ...), got 'folder'.",
    "crash folder --jsn": "unrecognized arguments: --jsn. The nearest is '--json'.",
    "crash 'a\0b'": "RUN_DIR must hold rank folders",
    f"crash {LONG}": "RUN_DIR must ",  # the rest depends on the version of Python
    "report": "the following arguments are required: RUN_DIR",
    "report none": "none/config.yaml must be",
    "report file": "file/config.yaml must be",
    "report 'a\0b'": "embedded null ",
    f"report {LONG}": "File name too long",
    "report folder --jsn": "unrecognized arguments: --jsn. The nearest is '--json'.",
    "compare": "the following arguments are required: RUN",
    "compare none": "RUN must be a run directory, or have some below it",
    "compare folder file": "RUN must be a run directory",
    "compare folder --score best": "argument --score: invalid choice: 'best'",
    "compare folder --baseline": "argument --baseline: expected one argument",
    "compare none --output file/x": "--output must be a folder that can be made (Not a directory)",
    "compare none --output file": "--output must be a folder that can be made (Not a directory)",
    "compare none --output pipes": "--output must name a new file or an earlier comparison, got "
    "'pipes/comparison.md'. Something else is there.",
    "compare none --output texts": "--output must name a new file or an earlier comparison, got "
    "'texts/comparison.png'. Something else is there.",
    "compare none --output links": "--output must name a new file or an earlier comparison, got "
    "'links/comparison.md'. No file can be written there: No such file",
    "compare none --output /proc/x": "--output must be a folder that can be made (",
    "compare none --output 'a\0b'": "--output must be a folder that can be made (embedded null",
    f"compare none --output {LONG}": "--output must be a folder that can be made (File name too",
    "compare 'a\0b'": "RUN must be a run directory",
    f"compare {LONG}": "File name too long",
}


def fit(more: str) -> list[str]:
    return ["fit", "--config", CARTPOLE, *shlex.split(more)]


TABLE = [
    *((["fit", "--config", name], said) for name, (_, said) in (FILES | BYTES).items()),
    *((fit(more), said) for more, said in FIT.items()),
    *((shlex.split(line), said) for line, said in OTHERS.items()),
]


@pytest.fixture(scope="module")
def _folder_of_mistakes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    for name, (text, _) in FILES.items():
        (folder / name).write_text(text)
    for name, (content, _) in BYTES.items():
        (folder / name).write_bytes(content)
    (folder / "file").write_text("no folder")
    (folder / "folder").mkdir()
    (folder / "copied" / "checkpoints").mkdir(parents=True)
    (folder / "copied" / "checkpoints" / "last.ckpt").write_bytes(b"of another machine")
    os.mkfifo(folder / "fifo")
    for name in ("pipes", "texts", "links"):
        (folder / name).mkdir()
    os.mkfifo(folder / "pipes" / "comparison.md")
    (folder / "texts" / "comparison.png").write_text("no picture")
    (folder / "links" / "comparison.md").symlink_to("nowhere")
    (folder / "dangling").symlink_to("nowhere")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.5.0"}, folder / "other.ckpt")
    (folder / "torn.ckpt").write_bytes((folder / "other.ckpt").read_bytes()[:-100])
    (folder / "void.ckpt").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def _parsers():
    """Build parsers once, which takes most of the time of a mistake."""
    made: dict[str, dict] = {}

    def setup_parser(cli, *arguments):
        if cli._command not in made:
            LightningCLI.setup_parser(cli, *arguments)
            names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            made[cli._command] = {name: getattr(cli, name) for name in names}
        vars(cli).update(made[cli._command])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EsperCLI, "setup_parser", setup_parser)
        yield


@pytest.fixture(autouse=True)
def _within(_folder_of_mistakes, _parsers, monkeypatch):
    monkeypatch.chdir(_folder_of_mistakes)
    monkeypatch.syspath_prepend(_folder_of_mistakes)
    monkeypatch.setattr("sys.argv", ["esper"])
    monkeypatch.setattr("sys.dont_write_bytecode", True)


def test_the_table_is_long_enough():
    assert len({tuple(arguments) for arguments, _ in TABLE}) == len(TABLE) >= 150


@pytest.mark.parametrize(
    ("arguments", "said"),
    TABLE,
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_a_mistake_is_one_short_line_and_status_2_and_leaves_nothing(arguments, said, capsys):
    before = sorted(os.listdir())  # noqa: PTH208
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert err == f"{line}\n"
    assert line.startswith("esper: error: ")
    assert len(line) <= 200
    assert said in err
    assert sorted(os.listdir()) == before  # noqa: PTH208


@pytest.mark.parametrize(
    "arguments",
    [
        fit("--run_dir file/below"),  # the last that is checked
        ["crash", "none"],
    ],
    ids=lambda arguments: arguments[-1],
)
def test_nothing_else_is_on_the_streams_of_a_process(arguments):
    command = [sys.executable, "-m", "esper_lightning", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("esper: error: ")
    assert len(line) <= 200


def test_the_traceback_of_a_mistake_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ZeroDivisionError):
        main(fit("--model.env mine.HasNoSpaces"))


@pytest.mark.parametrize(
    "text", ["a\nb\tc", "a\x1b[31m b\x85c\u2028d\udcff", "x" * 5000, "x " * 5000]
)
def test_a_line_is_one_line_of_printable_characters(text):
    line = one_line(text)
    assert line.splitlines() == [line]
    assert line.isprintable()
    assert len(line) <= 200


def test_a_line_that_is_too_long_keeps_both_ends_of_a_path_and_what_follows():
    path = f"/first/{'x' * 200}/last.ckpt"
    line = one_line(f"ckpt_path must be whole, got {path!r}. It is torn.")
    assert line.startswith("ckpt_path must be whole, got '/first/x")
    assert line.endswith("x/last.ckpt'. It is torn.")


def test_a_remote_config_without_the_package_that_reads_it_is_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "s3://bucket/x.yaml"])
    said = "esper: error: --config must name a file that can be read: Install s3fs to access S3.\n"
    assert capsys.readouterr().err == said
