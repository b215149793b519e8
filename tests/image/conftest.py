"""The image, built once a session by the user's own command, and folders to mount into it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

import cli
from image.base import build_base
from replica.build import BUNDLE, Images
from support import lacking
from tunesmith.core.files import read_json
from tunesmith.image import engine as image_engine
from tunesmith.job.run.folder import RunFolder
from tunesmith.project import Project

# Nobody in particular: no account has it, as with `--user $(id -u)` of a stranger.
UID = 4321
TEMPLATE = "smollm"
STANDINS = Path(__file__).resolve().parent.parent / "standins"
CANARY = "canary-of-a-secret-that-was-given-to-the-build"
# How every container of these tests is started: with as little as docs/image.md says.
HARDENED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
HARDENED += ["--security-opt", "no-new-privileges"]


@dataclass(frozen=True)
class Built:
    """The image, and what building it again needs."""

    name: str
    base: str
    mirror: Path
    project: Project
    client: docker.DockerClient

    def inv(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `inv` in the clone as a user would."""
        environment = {**os.environ, "BASE_IMAGE": self.base, **variables}
        # An image is built within the time of the test that asks for it.
        return cli.run(self.project.root, *words, env=environment, timeout=3600)

    def build(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `inv image.build` with the base and the certificates of this machine."""
        done = self.inv("image.build", "--mirror", str(self.mirror), **variables)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done


@pytest.fixture(scope="session")
def built(images: Images, project: Project, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The image of the default flavour, of this very tree.

    After the replicas' images, because making these empties the engine's cache of builds.
    """
    assert images
    if not BUNDLE.is_file():
        lacking(f"no {BUNDLE}", "`apt-get install ca-certificates`")
    mirror = tmp_path_factory.mktemp("mirror") / "here.yml"
    # A secret of the build, which must not be found in the image.
    bundle = mirror.with_name("bundle.pem")
    bundle.write_text(f"# {CANARY}\n{BUNDLE.read_text()}")
    content = yaml.safe_load((project.root / "configs/mirrors/default.yml").read_text())
    mirror.write_text(yaml.safe_dump(content | {"ca_bundle": str(bundle)}))
    name = image_engine.tag_of(project.stack.flavour())
    made = Built(name, build_base(), mirror, project, image_engine.connect())
    made.build()
    return made


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, training_python: Path, base_model: Path
) -> Path:
    """A random Llama of 200 kB layers with SmolLM2's tokenizer: seconds instead of minutes."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    subprocess.run(
        [training_python, STANDINS / "tiny_llama.py", base_model, folder, "bfloat16"], check=True
    )
    return folder


class Workspace:
    """A user's folder, mounted on /workspace; its owner is UID."""

    def __init__(self, built: Built, folder: Path) -> None:
        self.built = built
        self.folder = folder
        self.containers: list[str] = []

    def argv(self, *words: str, options: tuple[str, ...] = ()) -> list[str]:
        """Return the docker command for the image with this folder."""
        mount = ["--volume", f"{self.folder}:/workspace", "--user", f"{UID}:{UID}"]
        return ["docker", "run", *HARDENED, *mount, *options, self.built.name, *words]

    def run(self, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run the image to its end."""
        argv = self.argv(*words, options=("--rm", *options))
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    def start(self, *words: str) -> Any:
        """Start the image in the background; return its container."""
        argv = self.argv(*words, options=("--detach",))
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        self.containers.append(done.stdout.strip())
        return self.built.client.containers.get(self.containers[-1])

    def runs(self) -> list[RunFolder]:
        """Return the run folders, oldest first."""
        folders = sorted((self.folder / ".tunesmith/runs").glob("*/run.json"))
        return [RunFolder(file.parent) for file in folders]

    def wait_for_step(self, step: int, seconds: float = 900) -> RunFolder:
        """Return the only run when its training has reached `step`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for run in self.runs():
                try:
                    if read_json(run.heartbeat_file)["step"] >= step:
                        return run
                except FileNotFoundError:
                    continue
            time.sleep(0.05)
        raise AssertionError(f"no step {step} in {seconds} s")


@pytest.fixture
def workspace(built: Built, tiny_model: Path, tmp_path: Path) -> Iterator[Callable[[], Workspace]]:
    """Make user folders with the tiny model, a data set and a config."""
    made: list[Workspace] = []

    def make() -> Workspace:
        folder = tmp_path / f"workspace {len(made)}"
        fill(folder, tiny_model)
        made.append(Workspace(built, folder))
        return made[-1]

    yield make
    for one in made:
        for container in one.containers:
            subprocess.run(["docker", "rm", "--force", container], check=True, capture_output=True)


def fill(folder: Path, model: Path, owner: int = UID) -> None:
    """Make a user's folder: model, data, and a config that takes seconds."""
    shutil.copytree(model, folder / "model")
    chance = random.Random(0)
    words = ["river", "stone", "lamp", "quiet", "seven", "paper", "orbit", "green", "letter"]
    rows = [
        {
            "instruction": f"Say {' '.join(chance.choices(words, k=6))}",
            "input": "",
            "output": " ".join(chance.choices(words, k=12)),
        }
        for _ in range(48)
    ]
    (folder / "data").mkdir()
    (folder / "data/rows.json").write_text(json.dumps(rows))
    registry = {"rows": {"file_name": "rows.json"}}
    (folder / "data/dataset_info.json").write_text(json.dumps(registry))
    values = {
        "model_name_or_path": "model",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_target": "all",
        "lora_dropout": 0.1,
        "dataset": "rows",
        "template": TEMPLATE,
        "cutoff_len": 128,
        "output_dir": "saves/tiny",
        "logging_steps": 1,
        "save_steps": 5,
        "save_total_limit": 2,
        "max_steps": 300,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0e-3,
        "seed": 7,
        "overwrite_output_dir": True,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    predict = {
        key: values[key] for key in ("model_name_or_path", "stage", "template", "cutoff_len")
    }
    predict |= {"do_predict": True, "eval_dataset": "rows", "predict_with_generate": True}
    predict |= {"max_samples": 4, "max_new_tokens": 8, "output_dir": "saves/tiny-predict"}
    predict |= {"finetuning_type": "lora", "do_sample": False, "per_device_eval_batch_size": 4}
    (folder / "predict.yaml").write_text(yaml.safe_dump(predict))
    subprocess.run(["chown", "-R", f"{owner}:{owner}", folder], check=True)
