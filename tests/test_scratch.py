"""Scratch directories go with their process, however it ends."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from raybert.scratch import PREFIX, scratch

HOLDER = """
from raybert.scratch import scratch
with scratch() as path:
    (path / "file").write_text("content")
    print(path, flush=True)
    input()
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty directory in the place of the machine's for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def start_holder(temporary):
    """Another process that has a scratch directory, and the name of that."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return holder, holder.stdout.readline().strip()


def test_a_directory_is_gone_after_its_context(temporary):
    with pytest.raises(KeyError), scratch() as path:
        (path / "folder").mkdir()
        assert path.parent == temporary
        raise KeyError
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_has_is_not(temporary):
    (dead, left), (alive, kept) = start_holder(temporary), start_holder(temporary)
    with dead, alive:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert sorted(map(str, temporary.iterdir())) == sorted([left, kept])
        with scratch() as own, scratch() as other:
            assert sorted(map(str, temporary.iterdir())) == sorted([kept, str(own), str(other)])
        alive.communicate("\n")
        assert alive.returncode == 0
    assert list(temporary.iterdir()) == []


def test_what_is_not_scratch_stays(temporary):
    for name in (f"{PREFIX}file", "raybert-another"):
        (temporary / name).mkdir() if name != f"{PREFIX}file" else (temporary / name).write_text("")
    (temporary / "raybert-another" / "file").write_text("")
    with scratch():
        pass
    assert sorted(path.name for path in temporary.iterdir()) == ["raybert-another", f"{PREFIX}file"]
