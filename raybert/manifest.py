"""Manifests: which checkpoints a run has, and whether each is intact; complete or absent.

Written last, manifest.json has a digest of every other file: a directory without it is not a checkpoint. A checkpoint
knows no world size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raybert.errors import UserError
from raybert.storage import Directory

CHECKPOINTS = "checkpoints"
MANIFEST, STATE, OPTIMIZER, MODEL = "manifest.json", "state.json", "optimizer.safetensors", "model.safetensors"
FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8,})-attempt-(\d{4,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Args:
        directory: where it is.
        name: step-SSSSSSSS-attempt-AAAA.
        step: global batches consumed.
        state: content of state.json.
    """

    directory: Directory
    name: str
    step: int
    state: Mapping[str, Any]


def checkpoint_name(step: int, attempt: int) -> str:
    return f"step-{step:08d}-attempt-{attempt:04d}"


def find_checkpoints(run: Directory) -> list[str]:
    """Names of all checkpoint directories of a run, newest first, complete or not."""
    names = [name for name in (run / CHECKPOINTS).names() if _NAME.fullmatch(name)]
    return sorted(names, key=place, reverse=True)


def place(name: str) -> tuple[int, int]:
    """Step and attempt of a checkpoint's name.

    Raises:
        ValueError: it is no checkpoint's name.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is no name of a checkpoint")
    return int(match[1]), int(match[2])


def newest_checkpoint(run: Directory, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint of a run; damaged ones are passed over with a warning.

    Raises:
        OSError: the storage could not be read; never taken for "there is none".
    """
    for name in find_checkpoints(run):
        directory = run / CHECKPOINTS / name
        if not directory.exists(MANIFEST):
            continue
        damage = find_damage(run, name)
        if damage is None:
            return open_checkpoint(run, name)
        warn(f"Checkpoint {directory.uri} is damaged ({damage}); falling back to the one before.")
    return None


def open_checkpoint(run: Directory, name: str) -> Checkpoint:
    """A checkpoint that is known to be intact.

    Raises:
        UserError: another version of raybert has written it.
    """
    directory = run / CHECKPOINTS / name
    state = json.loads(directory.read(STATE))
    if state["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{directory.uri} is of format {state['format_version']}, and this raybert reads format {FORMAT_VERSION}; "
            "go on with the version that began the run, or begin a new one with training.init_checkpoint set to it."
        )
    return Checkpoint(directory, name, int(state["step"]), state)


def find_damage(run: Directory, name: str) -> str | None:
    """What is wrong with a checkpoint that has a manifest; None if it is intact."""
    directory = run / CHECKPOINTS / name
    try:
        manifest = json.loads(directory.read(MANIFEST))
        files, of = dict(manifest["files"]), (manifest["step"], manifest["attempt"])
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is unreadable: {error!r}"
    unlisted = {MODEL, OPTIMIZER, STATE} - files.keys()
    if of != place(name) or unlisted:
        what = f"lists no {min(unlisted)}" if unlisted else f"is of step {of[0]!r}, attempt {of[1]!r}"
        return f"{MANIFEST} {what}"
    for file, expected in files.items():
        try:
            found = directory.digest(file)
        except FileNotFoundError:
            return f"{file} is missing"
        if found != expected:
            return f"{file} has digest {found[:12]}, expected {str(expected)[:12]}"
    return None
