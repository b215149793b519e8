"""What the image is: its size, its packages, its layers, its manners."""

from __future__ import annotations

import ensurepip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import cli
from benchmarks import image as image_benchmark
from image.conftest import CANARY, HARDENED, Built, Workspace
from replica.replica import Replica
from replica_fixtures import HostProject, _copy_tree
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.image import engine as image_engine
from tunesmith.image import measure
from tunesmith.project import Project
from tunesmith.stack.definition import driver_requirement
from tunesmith.stack.sources import app_tar

pytestmark = pytest.mark.image

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", re.MULTILINE)
# What conda puts into an environment beside the lock.
CONDAS_OWN = {"pip", "setuptools", "wheel", "packaging"}


def docker(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    argv = ["docker", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, check=check)


def layers(built: Built) -> list[str]:
    return list(built.client.images.get(built.name).attrs["RootFS"]["Layers"])


def sized_layers(built: Built) -> image_benchmark.Layers:
    return image_benchmark.layers_of(layers(built), built.client.images.get(built.name).history())


def test_verify_asks_it_what_a_host_is_asked(built: Built) -> None:
    done = built.inv("image.verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llamafactory-cli version answers with the stack's version" in done.stdout
    assert "tunesmith there is this clone's" in done.stdout
    assert "conda" not in done.stdout
    assert "0 promises" not in done.stdout


def test_size(built: Built) -> None:
    """No more than the lock unpacked and 350 MB: CUDA once, no headers of a second one."""
    size = built.client.images.get(built.name).attrs["Size"]
    assert size <= built.project.stack.flavour().size_bytes + 350_000_000
    shown = built.inv("image.sizes").stdout
    assert "site-packages/nvidia" in shown
    assert "layer: install_lock.sh" in shown


def test_nothing_that_is_left_out_is_missed(built: Built) -> None:
    """Every module that lost its tests and static libraries imports, read-only."""
    modules = "pandas scipy.stats sklearn numba numba.cuda sympy pyarrow.parquet matplotlib.pyplot"
    modules += " networkx gradio triton.profiler llamafactory.webui.interface llamafactory.api.app"
    code = f"import importlib; [importlib.import_module(m) for m in {modules.split()}]"
    argv = ["run", "--rm", *HARDENED, "--entrypoint", "python", built.name, "-I", "-c", code]
    done = docker(*argv, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_building_again_is_fast_and_changes_one_layer_only(
    built: Built, root: Path, tmp_path: Path
) -> None:
    before = layers(built)
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        built.build()
        seconds.append(time.monotonic() - began)
    assert layers(built) == before
    # Made anew it takes minutes; how quick it is: benchmarks/image.py.
    assert min(seconds) <= 20

    # A clone with other modes and times, so that only the change counts.
    _copy_tree(root, tmp_path / "clone")
    changed = tmp_path / "clone/src/tunesmith/core/errors.py"
    changed.write_text(changed.read_text() + "# changed\n")
    for path in (tmp_path / "clone/src").rglob("*.py"):
        path.chmod(0o600)
    began = time.monotonic()
    replace(built, project=Project(tmp_path / "clone", tmp_path / "home")).build()
    assert time.monotonic() - began <= 60
    after = layers(built)
    # Not the last one either, though it was made again on top of what changed.
    assert len(after) == len(before)
    assert [n for n, one in enumerate(after) if one != before[n]] == [len(before) - 2]
    # Readable for any user, whatever the umask of who cloned.
    done = docker("run", "--rm", *HARDENED, "--user", "4321:4321", built.name, "version")
    assert "LLaMA-Factory" in done.stdout
    drifted = built.inv("image.verify")
    assert drifted.returncode == 1
    assert "the image differs from this clone in tunesmith's sources" in drifted.stderr
    built.build()
    assert layers(built) == before


def test_a_line_of_any_part_moves_less_than_a_megabyte(
    built: Built, root: Path, tmp_path: Path
) -> None:
    """The parts of docker/install_app.sh are layers that change apart from one another."""
    _copy_tree(root, tmp_path / "clone")
    clone = replace(built, project=Project(tmp_path / "clone", tmp_path / "home"))
    before = sized_layers(built)
    for file in image_benchmark.PARTS.values():
        changed = tmp_path / "clone" / file
        text = changed.read_text()
        changed.write_text(f"{text}# changed\n")
        clone.build()
        after = sized_layers(built)
        moved = image_benchmark.moved_bytes(before, after)
        assert 0 < moved < 1_000_000, file
        assert len(set(after) - set(before)) == 1, file
        changed.write_text(text)
    clone.build()
    assert sized_layers(built) == before


def test_an_extra_is_in_the_image_that_asks_for_it_and_in_no_other(built: Built) -> None:
    """Galore is built from its sources: the whole way of `--with`."""
    before = layers(built)
    done = built.inv("image.build", "--mirror", str(built.mirror), "--with", "galore")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    script = "import json, sys, galore_torch; print(open(sys.prefix + '/' + sys.argv[1]).read())"
    python = ("run", "--rm", *HARDENED, "--entrypoint", "python", built.name, "-I", "-c", script)
    try:
        marker = json.loads(docker(*python, ENVIRONMENT_MARKER).stdout)
        assert list(marker["extras"]) == ["galore"]
        labels = built.client.images.get(built.name).labels
        assert image_engine.extras_of(labels) == marker["extras"]
        verified = built.inv("image.verify")
        assert verified.returncode == 0, verified.stdout + verified.stderr
    finally:
        built.build()
    assert layers(built) == before
    lacking = docker(*python, ENVIRONMENT_MARKER, check=False)
    assert "No module named 'galore_torch'" in lacking.stderr


def test_the_parts_are_the_whole(built: Built, root: Path) -> None:
    """No source file falls between the parts; bytecode, made as it is imported, is not there."""
    script = 'cd "$1" && find . -type f -exec sha256sum {} +'
    argv = ["run", "--rm", *HARDENED, "--entrypoint", "sh", built.name, "-c", script, "sh"]
    lines = docker(*argv, "/opt/tunesmith/app").stdout.splitlines()
    there = {line[66:].removeprefix("./"): line[:64] for line in lines}
    with tarfile.open(fileobj=io.BytesIO(app_tar(root))) as archive:
        here = {
            entry.name: hashlib.sha256(archive.extractfile(entry).read()).hexdigest()  # type: ignore[union-attr]
            for entry in archive
        }
    assert len(here) > 90
    assert here.items() <= there.items()
    sources = {name for name in there if name.startswith("src/")}
    # The verbs of the image are not what goes to a host: they are there besides.
    left = ("__pycache__", "~", "/.")
    assert sources == {
        file.relative_to(root).as_posix()
        for file in (root / "src/tunesmith").rglob("*")
        if file.is_file() and not any(word in str(file.relative_to(root)) for word in left)
    }
    tops = {name.partition("/")[0] for name in there}
    assert tops == {"configs", "data", "pyproject.toml", "src"}


def test_no_secret_and_nothing_regional_is_in_it(built: Built) -> None:
    """The certificates given to the build held a canary, the mirror a name of its own."""
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", built.name).stdout
    inspected = docker("image", "inspect", built.name).stdout
    for text in (history, inspected):
        assert CANARY not in text
        assert "pypi.org" not in text
        assert "HF_ENDPOINT" not in text
    # grep reads what every layer holds, as it is saved.
    script = 'docker save "$1" | grep --count --text --fixed-strings "$2"'
    found = subprocess.run(
        ["sh", "-c", script, "sh", built.name, CANARY], capture_output=True, text=True
    )
    assert found.stdout.strip() == "0", found


def test_labels_and_the_driver_it_asks_for(built: Built) -> None:
    image = built.client.images.get(built.name)
    flavour = built.project.stack.flavour()
    variables = dict(line.split("=", 1) for line in image.attrs["Config"]["Env"])
    assert variables["NVIDIA_REQUIRE_CUDA"] == driver_requirement(flavour)
    assert image.labels["tunesmith.lock.sha256"] == flavour.lock_sha256
    assert image.labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert image.attrs["Config"]["User"] == "1000:1000"
    assert image.attrs["Config"]["Entrypoint"][0] == "tini"
    tags = built.inv("image.tags").stdout.split()
    cuda = flavour.cuda.replace(".", "")
    what = f"tunesmith:py3.10-cu{cuda}-lf{built.project.stack.llamafactory}"
    assert what in tags
    assert all(tag.startswith((what, f"tunesmith:cu{cuda}")) for tag in tags)


def test_sbom(built: Built, tmp_path: Path) -> None:
    done = built.inv("image.sbom", "--output", str(tmp_path / "sbom.json"))
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "sbom.json").read_text())
    assert document["bomFormat"] == "CycloneDX"
    urls = {part["purl"] for part in document["components"]}
    lock = PIN.findall(built.project.stack.flavour().lock.read_text(encoding="utf-8"))
    missing = {f"pkg:pypi/{measure.normal(n)}@{v}" for n, v in lock} - urls
    assert not missing
    assert any(url.startswith("pkg:deb/debian/gcc@") for url in urls)


def test_it_is_what_a_host_is(built: Built, provisioned_host: tuple[HostProject, Replica]) -> None:
    """`pip freeze` of a provisioned host and of the image say the same."""
    made, replica = provisioned_host
    name = made.project.stack.environment_name
    there = replica.sh(f"{replica.options.mount}/tunesmith/envs/{name}/bin/python -m pip freeze")
    wheel = next((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    argv = ["run", "--rm", *HARDENED, "--volume", f"{wheel}:/{wheel.name}:ro"]
    argv += ["--entrypoint", "python", built.name, f"/{wheel.name}/pip", "freeze"]
    here = docker(*argv).stdout

    def frozen(text: str) -> set[str]:
        lines = {line.partition(" @ ")[0] for line in text.splitlines() if line.strip()}
        return {line for line in lines if line.partition("==")[0] not in CONDAS_OWN}

    assert len(frozen(here)) > 130
    assert frozen(there) == frozen(here)


# --- used wrongly --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words", "told"),
    [
        (
            [],
            ["trian"],
            "there is no command 'trian'\nhint: did you mean `docker run ... IMAGE train`?",
        ),
        ([], ["train", "configs/train/smollm2_135m_lora_sft.yaml"], 'add `-v "$PWD:/workspace"`'),
        ([], ["webui"], 'add `-v "$PWD:/workspace"`'),
        (["-v", "WS:/workspace"], ["train", "/home/me/x.yaml"], "/home/me/x.yaml: not in the con"),
        (["-v", "WS:/workspace"], ["train", "tiny.yaml", "bf61=true"], "did you mean `bf16`?"),
        (
            ["-v", "WS:/workspace"],
            ["train", "tiny.yaml", "dataloader_num_workers=2"],
            "dataloader_num_workers is 2, which pass data through it\nhint: add `--shm-size 8g`",
        ),
        (
            ["-v", "WS:/workspace", "--user", "1000:1000"],
            ["train", "tiny.yaml"],
            "and this container runs as 1000:1000\nhint: add `--user 4321:4321`",
        ),
        (
            ["-e", "API_HOST=0.0.0.0"],
            ["api", "x.yaml"],
            "api on 0.0.0.0 without an API_KEY would serve anybody",
        ),
    ],
)
def test_bad_use_is_an_error_and_a_hint(
    built: Built,
    workspace: Callable[[], Workspace],
    options: list[str],
    words: list[str],
    told: str,
) -> None:
    folder = workspace().folder
    given = [word.replace("WS", str(folder)) for word in options]
    if options and "--user" not in options:
        given += ["--user", "4321:4321"]
    done = docker("run", "--rm", *HARDENED, *given, built.name, *words, check=False)
    assert told in cli.refusal(done)
    assert not (folder / ".tunesmith/runs").exists()


def test_no_word_prints_help(built: Built) -> None:
    done = docker("run", "--rm", *HARDENED, built.name)
    assert done.stdout.startswith("tunesmith: fine-tune")


def test_the_root_and_a_read_only_mount_cannot_be_written(
    built: Built, workspace: Callable[[], Workspace]
) -> None:
    mount = ["--volume", f"{workspace().folder}:/workspace:ro"]
    script = (
        "touch /x; touch /opt/tunesmith/x; touch /workspace/x; id -u; grep CapEff /proc/1/status"
    )
    argv = ["run", "--rm", *HARDENED, *mount, "--entrypoint", "sh", built.name, "-c", script]
    done = docker(*argv, check=False)
    assert done.stderr.count("Read-only file system") == 3
    assert done.stdout.split() == ["1000", "CapEff:", "0" * 16]


def test_plain_docker_build_knows_the_same_stages(root: Path) -> None:
    """The Dockerfiles are good by hadolint's rules, and the last stage is the image."""
    hadolint = shutil.which("hadolint", path=str(root / ".venv/bin")) or "hadolint"
    files = [root / "docker/Dockerfile", root / "benchmarks/reference.Dockerfile"]
    done = subprocess.run([hadolint, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    stages = re.findall(
        r"^FROM (\S+)(?: AS (\S+))?$", (root / "docker/Dockerfile").read_text(), re.M
    )
    assert stages[-1] == ("image", "")
