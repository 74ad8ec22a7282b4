"""Ways in which a run directory is damaged: bytes, structure, and other kinds of files."""

import contextlib
import gzip
import io
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

# Spelled in a file as they are, which no writer of ours would do.
RAW = {
    "@huge": "9" * 5000,
    "@infinite": "1e999",
    "@deep": "[" * 100_000 + "]" * 100_000,
    "@nan": "NaN",
}
RAW_YAML = {
    "@huge": "9" * 5000,
    "@infinite": ".inf",
    "@deep": "[" * 2000 + "]" * 2000,
    "@nan": "!!timestamp x",
    "@self": "&self [*self]",
    "@laughs": "\n".join(
        ["{a0: &a0 [x, x]", *(f", a{k}: &a{k} [{f'*a{k - 1}, ' * 9}]" for k in range(1, 12)), "}"]
    ).replace("\n", ""),
}
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 3, 1.5, 10**17, 10**30, 1e308, -1e308, "", "5", "text", "NaN"),
    *("\x1b[31mred\x1b[0m\n\r\x07", "\ud800", "\u202e", "x" * 3000, "a/../../b", "\0", "$\\frac"),
    *([], {}, [[]], ["text"], [None], {"text": {"path": 1}}, {"": {}}, [[1, {"a": [2]}]]),
    *(RAW),
)
FOLDERS = ("rank007", "rank-1", "rank99999999999999999999", "rank3", "rank", "rank1.5", "rank٣")


def replace_within(chance: random.Random, tree: Any, odd: Callable[[], Any]) -> Any:
    """The tree with a value somewhere in it replaced, removed, or given twice."""
    inside = tree if isinstance(tree, dict | list) and tree else None
    if inside is None or chance.random() < 0.1:
        return odd()
    keys: list[Any] = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
    key = chance.choice(keys)
    kind = chance.random()
    if kind < 0.15:
        del inside[key]
    elif kind < 0.2 and isinstance(inside, list):
        inside.insert(key, inside[key])
    else:
        inside[key] = replace_within(chance, inside[key], odd)
    return inside


def bytes_of(chance: random.Random, content: bytes) -> bytes:
    """Content that was cut, flipped, blanked, doubled or replaced."""
    at, end = sorted(chance.choices(range(len(content) + 1), k=2))
    cases = (
        lambda: content[:at],
        lambda: content[at:],
        lambda: content[:at] + chance.randbytes(min(64, end - at)) + content[end:],
        lambda: content[:at] + b"\0" * (end - at) + content[end:],
        lambda: content[:end] + content[at:],
        lambda: content[:at] + chance.choice((b"\n", b"\xff\xfe", b"\x1b[2J", b"{", b"[")) * 9,
        lambda: content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :],
        lambda: content.replace(b"\n", b""),
        lambda: chance.randbytes(chance.choice((0, 1, 4, 3000))),
    )
    return chance.choice(cases)()


def rows_of(chance: random.Random, content: bytes) -> bytes:
    """Rows that were doubled, removed, reordered, or changed."""
    rows = content.splitlines()
    at = chance.randrange(len(rows))
    kind = chance.randrange(7)
    if kind == 0:
        rows += rows
    elif kind == 1:
        rows = [row for row in rows for _ in range(2)]
    elif kind == 2:
        chance.shuffle(rows)
    elif kind == 3:
        del rows[at]
    elif kind == 4:
        rows.insert(at, rows[0])
    elif kind == 5:
        row = json.loads(rows[at]) | {"iteration": chance.choice(ODD)}
        rows[at] = spelled(json.dumps(row))
    else:
        row = replace_within(chance, json.loads(rows[at]), lambda: chance.choice(ODD))
        rows[at] = spelled(json.dumps(row))
    return b"\n".join(rows) + b"\n"


def spelled(text: str, raw: dict[str, str] = RAW, quote: str = '"') -> bytes:
    """JSON or YAML with the raw values in their places."""
    for name, value in raw.items():
        text = text.replace(f"{quote}{name}{quote}", value)
    return text.encode("utf-8", "surrogatepass")


def structure_of(chance: random.Random, path: Path, content: bytes) -> bytes:
    """A value of another kind somewhere in a file that is JSON, YAML, rows or a trace."""
    if path.suffix == ".jsonl":
        return rows_of(chance, content)
    if path.suffix == ".yaml":
        odd = (*(x for x in ODD if x != "\ud800"), *RAW_YAML)
        tree = replace_within(chance, yaml.safe_load(content), lambda: chance.choice(odd))
        return spelled(yaml.safe_dump(tree), RAW_YAML, quote="'")
    if path.suffix == ".ckpt":
        tree = torch.load(io.BytesIO(content), weights_only=True)
        file = io.BytesIO()
        torch.save(replace_within(chance, tree, lambda: odd_in_checkpoint(chance)), file)
        return file.getvalue()
    packed = path.suffix == ".gz"
    tree = json.loads(gzip.decompress(content) if packed else content)
    part = tree.get("traceEvents") or tree
    changed = spelled(
        json.dumps(tree if replace_within(chance, part, lambda: chance.choice(ODD)) else {})
    )
    return gzip.compress(changed, compresslevel=1) if packed else changed


def odd_in_checkpoint(chance: random.Random) -> Any:
    nan = torch.full((64, 64), torch.nan)
    odd = (
        nan,
        torch.zeros(2, 3),
        torch.zeros(64, dtype=torch.int64),
        torch.zeros(()).expand(10**9),
    )
    odd += (
        torch.eye(3).to_sparse(),
        torch.zeros(4, dtype=torch.complex64),
        torch.empty(2, device="meta"),
    )
    return chance.choice((*odd, *(x for x in ODD if x != "\ud800")))


def put_in_place(chance: random.Random, path: Path) -> None:
    """Replace a file by a directory, a link, a pipe or another thing that is no regular file."""
    path.unlink()
    kind = chance.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.symlink_to("nowhere")
    elif kind == 5:
        here = os.open(path.parent, os.O_RDONLY)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


def corrupt(chance: random.Random, directory: Path, suffixes: tuple[str, ...]) -> str:
    """Damage one file of a run; returns a description of the damage."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.suffix in suffixes)
    path = chance.choice(files)
    said = str(path.relative_to(directory))
    kind = chance.random()
    if kind < 0.1:
        put_in_place(chance, path)
        return f"{said}: no file"
    content = path.read_bytes()
    whole = path.suffix in (".jsonl", ".json", ".yaml", ".gz", ".ckpt")
    if whole and kind < 0.75:
        with contextlib.suppress(Exception):  # what was damaged before has no structure
            path.write_bytes(structure_of(chance, path, content))
            return f"{said}: structure"
    if kind < 0.78:
        (directory / chance.choice(FOLDERS)).mkdir(exist_ok=True)
        return "a folder"
    path.write_bytes(bytes_of(chance, content))
    return f"{said}: bytes"
