"""A host that lies: genuine answers to our questions but for one field, which carries a payload.

It stands for a rented machine whose owner attacks whoever logs in. As the forced command of a
real sshd (`ForceCommand python hostile_host.py FOLDER`) it gets what a client asks for in
SSH_ORIGINAL_COMMAND; named `ssh`, at the front of PATH, it stands for ssh and host at once, and
no network is needed. FOLDER/plan.json says which question is answered how:

    {"question": "layout", "answer": "base=...\\n", "code": 0}

`answer` may be {"flood": "stdout" or "stderr"}: it says 1.2 GB. {"swap": [old, new]} runs
the real command and changes its output. Questions that the plan does not name get a genuine
answer of ANSWERS; what is none of these runs for real. Every question is noted in
FOLDER/asked.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

# How a question is told from others, by what is sent.
QUESTIONS = {
    "probe": "SECTIONS='user system resources ",
    "state": "SECTIONS='places findings'",
    "layout": "SECTIONS='user places environments provisioned'",
    "engine": "SECTIONS='user disks engine'",
    "container": "SECTIONS='user places environments engine'",
    "login": "SECTIONS=pythons",
    "agent": "tunesmith.job.supervisor.agent",
    "services": "tunesmith.job.services.manager",
    "models": "tunesmith-model.json",
}
_FLOOD = 20_000  # pieces of 60 kB
DIGEST = "ab" * 32
STATUS = {
    "run_id": "run-1",
    "state": "succeeded",
    "phase": "train",
    "phases": {"train": "succeeded"},
    "failure": None,
    "message": "",
    "step": 10,
    "total_steps": 10,
    "loss": 1.5,
    "learning_rate": 1e-4,
    "tokens_per_second": 100.0,
    "eta_seconds": 0.0,
    "worked_seconds": 12.0,
    "price": 1.0,
    "gpu": [{"name": "L40", "memory_used": 1, "memory_total": 2, "utilisation": 50}],
}
EVENTS = [
    {"time": 1.0, "event": "phase_started", "phase": "train", "attempt": 1},
    {"time": 2.0, "event": "log", "step": 5, "loss": 2.0},
    {"time": 3.0, "event": "eval", "step": 5, "loss": 2.0},
    {"time": 4.0, "event": "changed", "what": "a", "from": 1, "to": 2, "why": "b"},
    {"time": 5.0, "event": "note", "text": "hello"},
    {"time": 6.0, "event": "phase_ended", "phase": "train", "state": "succeeded", "seconds": 3.0},
    {"time": 7.0, "event": "summary", "metrics": {"loss": 1.0}, "output": "/data/out"},
]
REQUEST = {
    "run_id": "run-1",
    "model": {"name": "org/tiny", "files": {"model.safetensors": {"size": 10, "sha256": DIGEST}}},
    "merge": {"dtype": "float32"},
    "limits": {},
    "phases": ["train"],
    "then": [],
}
WATCH = {"status": STATUS, "events": EVENTS, "events_offset": 700, "log": "ok\n", "log_offset": 3}
AGENT = {
    "find": {"run_id": "run-1"},
    "create": {"run_id": "run-1"},
    "renew": {"run_id": "run-1"},
    "start": {"run_id": "run-1"},
    "stop": {"run_id": "run-1"},
    "show": {"request": REQUEST, "config": {"output_dir": "/data/out"}, "status": STATUS},
    "runs": {"runs": [STATUS | {"created": "2026", "title": "a run", "path": "/data/r"}]},
    "watch": WATCH,
    "manifest": {"files": {"config.yaml": {"size": 3, "sha256": DIGEST}}, "busy": False},
    "remove": {"freed": 100},
    "afterwards": {"code": 0, "why": None},
    "resume-all": {"started": ["run-1"], "refused": {"run-2": "no GPU"}},
}
SERVICE = {
    "name": "api",
    "state": "ready",
    "port": 8000,
    "serves": {"run": "run-1"},
    "version": "0.9.3",
    "log": "/data/tunesmith/services/api.log",
    "training": None,
    "reused": False,
    "key": "abcDEF_-123",
}
PROBE = {
    "tunesmith_probe": "2",
    "epoch": "1795600000",
    "os.id": "ubuntu",
    "os.name": "Ubuntu 22.04.4 LTS",
    "arch": "x86_64",
    "libc": "glibc 2.35",
    "user": "root",
    "uid": "0",
    "home": "/root",
    "sudo": "root",
    "systemd": "no",
    "pid1": "bash",
    "nvidia_smi": "/usr/bin/nvidia-smi",
    "kernel_module": "550.54.14",
    "gpu": "550.54.14, 8.9, 46068 MiB, 1 MiB, NVIDIA L40",
    "cpu.count": "16",
    "memory.total": "1056462976",
    "memory.limit": "128849018880",
    "disk": "52428800 52411392 26214400 26214021 /data|/data",
    "data_disk": "/data",
    "base": "/data/tunesmith",
    "writable": "yes",
    "environment": '/data/tunesmith/envs/llama-factory\t{"flavour": "cu128"}',
    "bashrc_seconds": "0.12",
    "end": "1.00",
}
MADE = json.dumps({"flavour": "cu128", "lock_sha256": DIGEST})
LAYOUT = {
    "tunesmith_probe": "2",
    "uid": "0",
    "provisioned": "/data/tunesmith",
    "room": "200000000 100000000 26214400 26214021 /data/tunesmith|/data",
    "environment": f"/data/tunesmith/envs/cu128\t{MADE}",
    "fingerprint": "app=0123456789abcdef,flavour=auto,mirror=default:0123456789abcdef",
    "mirror_file": "/data/tunesmith/mirror.yml",
    "hf_home": "/data/Hugging-Face",
    "end": "0.10",
}
LOGIN = {"tunesmith_probe": "2", "python": "3.12.3 /usr/bin/python3", "end": "0.10"}
ENGINE = {
    "tunesmith_probe": "2",
    "home": "/root",
    "disk": "2000 1000 - - /root|/",
    "engine": "answers",
    "image": f"sha256:{DIGEST} sha256:{DIGEST}",
    "end": "0.10",
}
CONTAINER = {
    "tunesmith_probe": "2",
    "uid": "0",
    "gid": "0",
    "base": "/data/tunesmith",
    "hf_cache": "/data/Hugging-Face",
    "environment": f"/data/tunesmith/envs/container\t{MADE}",
    "engine": "answers",
    "end": "0.10",
}
STATE = {"fingerprint": "app=1,flavour=auto", "found": ["disk=/data", "gpu=550.54, L40;"]}


def lines_of(values):
    """Return key=value lines."""
    return "".join(f"{key}={value}\n" for key, value in values.items())


def state_of(base, recorded, found):
    """Return the answer about what was recorded and what is found."""
    lines = {"tunesmith_probe": "2", "provisioned": base, "recorded": recorded}
    return lines_of(lines) + "".join(f"found={line}\n" for line in found) + "end=0.10\n"


ANSWERS = {
    "login": lines_of(LOGIN),
    "probe": lines_of(PROBE),
    "layout": lines_of(LAYOUT),
    "state": state_of("/data/tunesmith", json.dumps(STATE), STATE["found"]),
    "services": json.dumps(SERVICE) + "\n",
    "models": json.dumps({"files": {"model.safetensors": {"sha256": DIGEST}}}) + "\n4\n",
    "engine": lines_of(ENGINE),
    "container": lines_of(CONTAINER),
    **{f"agent {verb}": json.dumps(answer) + "\n" for verb, answer in AGENT.items()},
}


def question_of(command, sent):
    """Return which question is asked, or None."""
    text = f"{command}\n{sent}"
    for name, sign in QUESTIONS.items():
        if sign in text:
            if name != "agent":
                return name
            verb = next(word for word in _words(command) if word in AGENT)
            return f"agent {verb}"
    return None


def _words(command):
    # The verb comes behind the script, which is one quoted word or is sent.
    return [word.strip("'\"") for word in command.split()][::-1] if command else []


def answer(folder, command):
    """Answer a question; return the exit code."""
    plan = json.loads(Path(folder, "plan.json").read_text(encoding="utf-8"))
    stdin = b"" if _waits(command) else sys.stdin.buffer.read()
    sent = stdin.decode(errors="replace")
    question = question_of(command, sent)
    with Path(folder, "asked").open("a", encoding="utf-8") as stream:
        stream.write(f"{question}\n")
    told = plan.get("answer") if plan.get("question") in (question, "any") else None
    if told is None and question in ANSWERS:
        told = ANSWERS[question]
    if told is None or (isinstance(told, dict) and "swap" in told):
        done = subprocess.run(["/bin/sh", "-c", command], input=stdin, stdout=subprocess.PIPE)
        output = done.stdout
        if told:
            old, new = (text.encode() for text in told["swap"])
            output = re.sub(old, lambda _: new, output)
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()
        return done.returncode
    mark = re.search(r"tunesmith [0-9a-f]{16}", sent)
    if mark:
        sys.stdout.buffer.write(f"{mark[0]}\n".encode())
    if isinstance(told, dict):
        # More than anybody should read; not for ever, so that a reader that does fails.
        stream = getattr(sys, told["flood"]).buffer
        for _ in range(_FLOOD):
            stream.write(b"flood " * 10_000)
    sys.stdout.buffer.write(told.encode("utf-8", "surrogatepass"))
    sys.stdout.buffer.flush()
    return int(plan.get("code", 0))


def _waits(command):
    """Whether the client goes on sending: rsync talks both ways, and runs for real."""
    return "rsync --server" in command


def main(argv):
    """Be a forced command, or ssh itself."""
    if Path(argv[0]).name == "ssh":
        folder = os.environ["HOSTILE_HOST"]
        command = " ".join(argv[argv.index("--") + 1 :]) if "--" in argv else ""
    else:
        folder, command = argv[1], os.environ.get("SSH_ORIGINAL_COMMAND", "")
    if _waits(command):
        os.execv("/bin/sh", ["sh", "-c", command])
    return answer(folder, command)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
