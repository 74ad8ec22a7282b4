"""``esper export``: a trained policy as a file that other programs load."""

from typing import get_args

from esper_lightning.cli.errors import CommandParser
from esper_lightning.cli.mistakes import settings_come_first
from esper_lightning.cli.policy import add_policy_option, load_policy
from esper_lightning.training.export import ExportFormat, export_policy, output_at

__all__ = ["run"]


def run(arguments: list[str]) -> None:
    """Write the policy and print what was written; a mistake is one line and exit status 2."""
    parser = CommandParser(
        "esper export",
        "Write the deterministic policy of a checkpoint, with its observation "
        "statistics, after comparing it with the original on random observations.",
    )
    add_policy_option(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="new, or an earlier export")
    parser.add_argument(
        "--format",
        choices=get_args(ExportFormat),
        default="torch",
        help="torch for torch.export.load, or onnx (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    with settings_come_first():
        output_at(options.output)  # refuses a bad path before any work is done
        path, model = load_policy(options.ckpt_path)
        exported = export_policy(model, options.output, options.format)
    print(f"Checkpoint: {path} (iteration {model.iteration:,})")
    for arrow, tensors in (("->", exported.inputs), ("<-", exported.outputs)):
        for name, value in tensors.items():
            axes = ", ".join(["batch", *map(str, value.shape[1:])])
            print(f"{arrow} {name}: {str(value.dtype).removeprefix('torch.')} [{axes}]")
    print(
        f"Differs from the original by at most {exported.difference:.3g} "
        f"over {exported.samples:,} random observations"
    )
    print(f"Policy: {options.output}")
