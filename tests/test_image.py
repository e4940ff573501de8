"""The container image, as far as it can be held to without building it."""

import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "cluster/Dockerfile"
LINES = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)).splitlines()
TARGETS = ("cpu", "cuda")


def instructions(name, target):
    """What a target says of one instruction, itself and its base, in order."""
    found, stage = [], None
    for line in LINES:
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stage = rest.split(" AS ")[1]
        if word == name and stage in ("base", target):
            found.append(rest)
    return found


def pip_installs(target):
    runs = " && ".join(instructions("RUN", target))
    return [each for each in runs.split("&&") if "pip install" in each]


def dependencies():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def pins(path):
    return {Requirement(line).name for line in path.read_text().splitlines() if "==" in line}


def test_the_linter_finds_nothing():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    found = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
    assert re.findall(r"hadolint ignore=(.*)", DOCKERFILE.read_text()) == ["DL3008"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_base_is_pinned_to_a_patch_of_a_python_that_raybert_runs_on(target):
    (base,) = [line for line in LINES if re.match(r"FROM (?!base )", line)]
    version = re.fullmatch(r"FROM python:(3\.\d+\.\d+)-slim-bookworm AS base", base)[1]
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{python}").specifier.contains(version)
    assert f"FROM base AS {target}" in LINES


def test_the_image_holds_the_dependencies_of_raybert(tmp_path):
    (command,) = [each for each in instructions("RUN", "cpu") if each.endswith("> requirements.txt")]
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    command = command.replace("python", f"'{sys.executable}'", 1)
    subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "requirements.txt").read_text().splitlines() == dependencies()


@pytest.mark.parametrize("target", TARGETS)
def test_every_version_in_the_image_is_a_tested_one(target):
    installs = pip_installs(target)
    assert installs and all(" -c constraints.txt " in each for each in installs)
    assert " -r requirements.txt" in installs[-1]
    pinned = {canonicalize_name(name) for name in pins(ROOT / "constraints.txt")}
    assert not {canonicalize_name(Requirement(each).name) for each in dependencies()} - pinned
    launcher = (ROOT / "cluster/launcher.txt").read_text().splitlines()
    assert all("==" in line or line.startswith("#") for line in launcher)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_compiled_and_nothing_is_left_over(target):
    assert all(" --only-binary :all: " in each and " --no-cache-dir " in each for each in pip_installs(target))
    runs = instructions("RUN", target)
    assert all("rm -rf /var/lib/apt/lists/*" in each for each in runs if "apt-get" in each)


@pytest.mark.parametrize("target", TARGETS)
def test_nodes_run_as_a_user_without_privileges(target):
    assert instructions("USER", target) == ["1000:1000"]
    assert "--uid 1000 --gid ray --create-home" in " ".join(instructions("RUN", target))
    assert not any("sudo" in each for each in instructions("RUN", target))


@pytest.mark.parametrize("target", TARGETS)
def test_ray_is_closed_unless_somebody_opens_it(target):
    variables = dict(each.split("=") for line in instructions("ENV", target) for each in line.split())
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["HOME"] == "/home/ray"
    assert not [name for name in variables if re.search("TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", name)]
    assert not [each for each in instructions("ARG", target) if each != "TORCH_INDEX"]


def test_the_image_names_no_package_index():
    assert "://" not in DOCKERFILE.read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_what_ray_up_and_kuberay_call(target):
    installed = re.search(r"--no-install-recommends ([^&]*)", " ".join(instructions("RUN", target)))[1].split()
    assert {"openssh-client", "rsync"} <= set(installed)  # bash and python are the base's, ray is pip's
    assert any(Requirement(each).name == "ray" and "default" in Requirement(each).extras for each in dependencies())


def test_the_builder_sees_what_the_image_is_made_of_and_nothing_else():
    copied = {
        source
        for target in TARGETS
        for line in instructions("COPY", target)
        for source in line.removeprefix("--chown=1000:1000 ").split()[:-1]
    }
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"  # with it .git, .venv, runs, tests and whatever else lies about
    assert {line.removeprefix("!") for line in rest if line.startswith("!")} == copied
    assert [line for line in rest if not line.startswith("!")] == ["**/__pycache__"]
    assert all((ROOT / source).exists() for source in copied)
