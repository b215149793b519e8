"""The plan of an image, what it is called, and the docker command that can build it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.mirrors import Mirror, load_mirror
from tunesmith.image import build, engine, measure, push
from tunesmith.image.measure import Measured, Package
from tunesmith.maintain import render
from tunesmith.project import Project
from tunesmith.stack.definition import driver_requirement, load_stack

pytestmark = pytest.mark.unit


def mirror(project: Project, name: str = "default") -> Mirror:
    return load_mirror(name, project.root / "configs" / "mirrors")


def test_a_plan_names_everything_but_the_secrets(project: Project, tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("a certificate")
    here = replace(mirror(project), ca_bundle=bundle, pypi_indexes=("https://pypi.example/simple",))
    plan = build.plan_build(project, "cu126", here, "my/base:1")
    assert plan.tag == "tunesmith:cu126"
    assert plan.argv[0] == "build"
    assert plan.argv[-1] == str(project.root)
    text = " ".join(plan.argv)
    assert "--build-arg BASE_IMAGE=my/base:1" in text
    assert "--build-arg FLAVOUR=cu126" in text
    assert f"--label tunesmith.lock.sha256={plan.flavour.lock_sha256}" in text
    # What differs per region is neither in the command nor in the history made from it.
    assert "pypi.example" not in text
    assert "certificate" not in text
    assert plan.secrets["ca"] == "a certificate"
    assert "PYPI_INDEXES=https://pypi.example/simple\n" in plan.secrets["mirror"]
    assert "pypi.example" not in plan.render()


def test_a_mirror_changes_where_the_base_comes_from_and_not_what_it_is(project: Project) -> None:
    plain = build.plan_build(project, None, mirror(project), None)
    china = build.plan_build(project, None, mirror(project, "cn"), None)
    assert plain.base == project.stack.image_base
    assert china.base == f"docker.m.daocloud.io/{project.stack.image_base}"
    assert china.base.partition("@")[2] == plain.base.partition("@")[2]


def test_a_certificate_file_that_is_not_there(project: Project) -> None:
    here = replace(mirror(project), ca_bundle=Path("/no/such.pem"))
    with pytest.raises(UsageError, match=r"/no/such.pem: no such file; mirror default names it"):
        build.plan_build(project, None, here, None)


def test_the_base_is_pinned_by_digest(project: Project, tmp_path: Path) -> None:
    (tmp_path / "locks").symlink_to(project.stack.path.parent / "locks")
    text = project.stack.path.read_text(encoding="utf-8")
    broken = tmp_path / "stack.yml"
    broken.write_text(text.replace("digest: sha256:", "digest: sha256:x"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"image.digest must be sha256:64 hex digits"):
        load_stack(broken)


def test_the_driver_an_image_asks_for_is_the_flavours(project: Project) -> None:
    flavours = project.stack.flavours
    assert driver_requirement(flavours["cu126"]) == "driver>=525"
    assert driver_requirement(flavours["cu128"]) == "driver>=570 arch<10.0,driver>=525"


def test_drift_of_the_dockerfile_is_seen(project: Project, tmp_path: Path) -> None:
    for name in ("configs", "README.md"):
        (tmp_path / name).symlink_to(project.root / name)
    (tmp_path / "docker").mkdir()
    text = (project.root / "docker/Dockerfile").read_text(encoding="utf-8")
    file = tmp_path / "docker/Dockerfile"
    copy = Project(tmp_path, tmp_path / "home")
    file.write_text(text, encoding="utf-8")
    assert render._dockerfile(copy)[file] == text
    for old, new in (('FLAVOUR="', 'FLAVOUR="x'), ('DO_NOT_TRACK="1"', 'DO_NOT_TRACK="0"')):
        file.write_text(text.replace(old, new), encoding="utf-8")
        assert render._dockerfile(copy)[file] == text  # what it should be
        assert file.read_text(encoding="utf-8") != text


def client(folder: Path, version: str, *, buildx: bool) -> Path:
    """A stand-in for a docker command: it answers for its version and for buildx only."""
    folder.mkdir(parents=True)
    program = folder / "docker"
    program.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Docker version {version}, build abc" && exit\n'
        f'[ "$1" = buildx ] && {"echo v0.12 && exit" if buildx else "exit 1"}\n'
    )
    program.chmod(0o755)
    return folder


def test_the_first_docker_that_can_build_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = client(tmp_path / "a", "28.2.2", buildx=False)
    debian = client(tmp_path / "b", "20.10.24+dfsg1", buildx=False)
    whole = client(tmp_path / "c", "28.2.2", buildx=True)
    monkeypatch.setattr(build, "_on_path", lambda _: iter([f"{newer}/docker", f"{debian}/docker"]))
    found = build.builder()
    assert (found.argv, found.env) == ((f"{debian}/docker",), {"DOCKER_BUILDKIT": "1"})
    monkeypatch.setattr(build, "_on_path", lambda _: iter([f"{whole}/docker", f"{debian}/docker"]))
    assert build.builder().argv == (f"{whole}/docker", "buildx")
    monkeypatch.setattr(build, "_on_path", lambda _: iter([f"{newer}/docker"]))
    with pytest.raises(UsageError, match="a/docker: no BuildKit") as caught:
        build.builder()
    assert "docker-buildx-plugin" in caught.value.hint
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{newer}:{newer}:{debian}")
    assert list(build._on_path("docker")) == [f"{newer}/docker", f"{debian}/docker"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="there is no docker command on PATH"):
        build.builder()


@pytest.mark.parametrize(
    ("url", "said", "told"),
    [
        ("unix:///var/run/docker.sock", "Permission denied", "`sudo usermod -aG docker $USER`"),
        ("unix:///var/run/docker.sock", "No such file", "`sudo systemctl start docker`"),
        ("tcp://10.0.0.1:2375", "refused", "DOCKER_HOST or `docker context use`"),
    ],
)
def test_why_an_engine_does_not_answer(url: str, said: str, told: str) -> None:
    message, hint = engine.reason(url, said)
    assert url in message
    assert told in hint


def test_an_engine_without_the_nvidia_toolkit_is_explained() -> None:
    said = 'could not select device driver "" with capabilities: [[gpu]]'
    assert "sudo nvidia-ctk runtime configure" in engine._hint(said)


def test_docker_host_names_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    assert engine.address() == f"unix://{tmp_path}/none.sock"
    with pytest.raises(UsageError, match="no Docker engine answers at unix://"):
        engine.connect()


def measured(**labels: str) -> Measured:
    packages = (Package("llamafactory", "0.9.3"), Package("torch", "2.8.0", "BSD-3-Clause"))
    system = (("gcc", "4:12.2.0-3", "amd64"),)
    return Measured(
        "sha256:" + "ab" * 32, labels, "3.10.12", "12.8", packages, system, ("debian", "12")
    )


def test_tags_are_made_of_what_was_found() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    found = measured(**{"org.opencontainers.image.revision": commit})
    assert measure.tags(found) == (
        "py3.10-cu128-lf0.9.3-0123456789ab",
        "py3.10-cu128-lf0.9.3",
        "cu128",
    )
    assert measure.tags(replace(measured(), cuda=None)) == ("py3.10-cpu-lf0.9.3", "cpu")


def test_an_image_of_another_clone_is_told() -> None:
    wanted = {engine.STACK: "a", engine.LOCK: "b", engine.SOURCES: "c"}
    assert measure.drift(measured(**wanted), wanted) == []
    lines = measure.drift(measured(**(wanted | {engine.LOCK: "x"})), wanted)
    assert len(lines) == 1
    assert lines[0].startswith("the image differs from this clone in the lock;")


def test_the_list_of_parts_names_what_a_scanner_looks_up() -> None:
    import json

    document = json.loads(measure.sbom(measured(), "tunesmith:cu128"))
    parts = {part["purl"]: part for part in document["components"]}
    assert "pkg:pypi/torch@2.8.0" in parts
    assert parts["pkg:pypi/torch@2.8.0"]["licenses"][0]["license"]["name"] == "BSD-3-Clause"
    assert "pkg:deb/debian/gcc@4:12.2.0-3?arch=amd64&distro=debian-12" in parts


def test_nothing_but_the_image_enters_the_build(root: Path) -> None:
    """.dockerignore lets in what the Dockerfile asks for; a run or a token never."""
    lines = (root / ".dockerignore").read_text(encoding="utf-8").split()
    assert "*" in lines
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert let_in == {
        *("docker", "configs", "data", "src", "pyproject.toml"),
        "ansible/roles/base/files/packages.sh",
    }
    assert not any(os.sep + ".tunesmith" in line for line in let_in)


def test_a_build_tells_its_steps_and_keeps_what_it_said(tmp_path: Path) -> None:
    program = tmp_path / "docker"
    program.write_text(
        "#!/bin/sh\n"
        'echo "progress $BUILDKIT_PROGRESS"\n'
        'echo "#7 [image 3/9] RUN install_lock.sh" >&2\n'
        'echo "#7 0.31 Downloading torch"\n'
        'echo "#7 DONE 3.2s"\n'
        'echo "#8 [image 4/9] COPY src /opt" >&2\n'
        'exit "$1"\n'
    )
    program.chmod(0o755)
    steps: list[str] = []
    log = tmp_path / "build.log"
    build.run_logged("t:1", [str(program), "0"], os.environ, log, steps.append)
    assert steps == ["[image 3/9] RUN install_lock.sh", "[image 4/9] COPY src /opt"]
    assert log.read_text().splitlines()[0] == "progress plain"
    assert "#7 0.31 Downloading torch" in log.read_text()
    with pytest.raises(TunesmithError) as caught:
        build.run_logged("t:1", [str(program), "5"], os.environ, log, steps.append)
    error = caught.value
    assert error.message == f"t:1: the build failed with exit code 5; all it said is in {log}"
    assert error.detail[-1] == "#8 [image 4/9] COPY src /opt"
    assert error.hint


def test_how_much_of_a_layer_is_pushed_is_read_off_the_engines_lines() -> None:
    pushing = {"status": "Pushing", "progressDetail": {"current": 512, "total": 2048}, "id": "a"}
    assert push._done(pushing) == (512, 2048)
    # tar's own headers are sent, too.
    over = pushing | {"progressDetail": {"current": 2560, "total": 2048}}
    assert push._done(over) == (2048, 2048)
    for other in ({"status": "Pushed", "progressDetail": {}, "id": "a"}, {"aux": {"Digest": "x"}}):
        assert push._done(other) is None
