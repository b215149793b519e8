"""What a probe said is read whole, or refused."""

from __future__ import annotations

import pytest

from tests.unit.probes.recorded import facts_of, parse
from tunesmith.core.errors import TunesmithError

pytestmark = pytest.mark.unit


def test_a_container_is_read() -> None:
    facts = facts_of("autodl")
    assert (facts.system.epoch, facts.system.os_name, facts.system.libc) == (
        1795600000,
        "Ubuntu 22.04.4 LTS",
        "glibc 2.35",
    )
    assert (facts.resources.cpus, facts.resources.cpu_count, facts.resources.memory) == (
        16.0,
        128,
        128849018880,
    )
    disk = facts.disks.disk(facts.places.data_disk)
    assert disk is not None
    assert (disk.mount, disk.total, disk.inodes_free) == ("/root/autodl-tmp", 50 << 30, 26214021)
    (gpu,) = facts.gpu.gpus
    assert (gpu.name, gpu.driver, gpu.capability) == (
        "NVIDIA GeForce RTX 4090",
        "550.127.05",
        "8.9",
    )
    assert (gpu.memory_total, gpu.memory_used) == (24564 << 20, 1 << 20)
    assert [c.version for c in facts.condas] == ["24.4.0"]
    assert [(t.kind, t.outcome, t.status) for t in facts.mirrors][:1] == [("pypi", "ok", 200)]
    assert facts.network.condarcs[0].urls[0] == "defaults"
    assert facts.network.network_turbo
    assert not facts.system.systemd


def test_what_a_login_prints_before_is_skipped() -> None:
    facts = facts_of("vm")
    assert facts.system.os_name == "Debian GNU/Linux 12 (bookworm)"
    assert facts.system.machine == "QEMU Standard PC (Q35 + ICH9, 2009)"
    assert facts.network.proxies[0] == ("http_proxy", "http://10.0.0.1:7890")


@pytest.mark.parametrize("text", ["", "tunesmith_probe=2\nepoch=1\n", "epoch=1\nend=0.10\n"])
def test_an_answer_cut_short_is_refused(text: str) -> None:
    with pytest.raises(TunesmithError, match="truncated"):
        parse(text)


def test_no_limit_has_many_spellings() -> None:
    huge = ("memory.limit=128849018880", "memory.limit=9223372036854771712")
    assert facts_of("autodl", huge).resources.memory_limit is None
    assert facts_of("vm").resources.memory_limit is None
    assert facts_of("vm").resources.cpu_limit is None


def test_a_file_system_that_counts_no_inodes() -> None:
    facts = facts_of("autodl", ("26214400 26214021 /root/autodl-tmp|", "0 0 /root/autodl-tmp|"))
    disk = facts.disks.disk("/root/autodl-tmp")
    assert disk is not None
    assert (disk.inodes, disk.inodes_free) == (None, None)


def test_escapes_come_back_and_control_characters_do_not() -> None:
    facts = parse(
        "tunesmith_probe=2\nos.name=50%25 \x1b[31mred\nnvidia_smi.text=one%0Atwo\nend=0.10\n"
    )
    assert facts.system.os_name == "50% red"
    assert facts.gpu.text == "one two"


def test_lines_that_are_no_gpu_are_words_of_nvidia_smi() -> None:
    lines = ("No devices were found", "unknown, 8.9, 1 MiB, 1 MiB, L40")
    facts = parse("\ngpu=".join(["tunesmith_probe=2", *lines]) + "\nend=0.10\n")
    assert (facts.gpu.gpus, facts.gpu.text) == ((), " ".join(lines))


def test_a_mangled_line_is_left_out() -> None:
    lines = ("disk=/", "disk=a b c d /|/", "mirror=1 hf", "gpu_process=x", "marker=[")
    facts = parse("\n".join(["tunesmith_probe=2", *lines, "end=0.10\n"]))
    assert (facts.disks.disks, facts.mirrors, facts.gpu_processes, facts.system.epoch) == (
        (),
        (),
        (),
        0,
    )


def test_a_number_that_is_none_is_refused_by_host_and_key() -> None:
    for value in ("soon", "9" * 5000, "1e9", "{{ 1 }}"):
        with pytest.raises(
            TunesmithError, match=r"^gpu1: its answer to the probe: epoch: "
        ) as told:
            parse(f"tunesmith_probe=2\nepoch={value}\nend=0.10\n", "gpu1")
        assert len(told.value.message) < 300


def test_a_silent_probe_is_unknown_not_zero() -> None:
    facts = parse("tunesmith_probe=2\nend=0.10\n")
    assert (facts.resources.cpus, facts.resources.memory, facts.disks.disks, facts.condas) == (
        None,
        None,
        (),
        (),
    )


def test_mirrors_come_back_in_the_order_of_the_profile() -> None:
    hf = [tried.url for tried in facts_of("half_mirror").mirrors if tried.kind == "hf"]
    assert hf == ["https://hf-mirror.com/", "https://huggingface.co/"]
