"""Several processes for one training: `python -m tunesmith.job.supervisor.ranks RUN COUNT`.

torchrun's own agent starts and watches them. What it does not do is done here: a stop reaches
the ranks and has the time that the run's limits give, the rank that failed first is the one
whose words count, and what it leaves hanging in a collective is ended.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from tunesmith.core import isolated
from tunesmith.core.files import read_json, write_json
from tunesmith.job.run.exit_codes import FAILED, STOPPED
from tunesmith.job.run.failures import classify_exit
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.journal import Reporter
from tunesmith.job.run.process import WORKER_OF
from tunesmith.job.system import processes, resources

# Where the ranks leave their last words for this process.
RECORDS = "TUNESMITH_RANK_RECORDS"
# What a rank says when another has gone (gloo, NCCL and the store, torch 2.8): never the cause.
_PEER_LOST = re.compile(
    r"Connection (?:closed|reset) by peer|Broken pipe|Connection was likely closed"
    r"|\[[^\]]*gloo/|NCCL (?:error|communicator was aborted)|ncclRemoteError"
    r"|recvBytes|sendBytes|DistBackendError|DistNetworkError|Timed out waiting"
)
# What hangs in a collective without its peers has nothing to save; a traceback has been printed.
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class RankFailure:
    """The last words of a rank: its class, a line, more lines, and when (Unix time, s)."""

    failure: str
    message: str
    detail: tuple[str, ...]
    retry: bool | None
    time: float

    @property
    def of_a_peer(self) -> bool:
        """Whether it only says that another rank has gone."""
        return _PEER_LOST.search("\n".join((self.message, *self.detail))) is not None


def leave_word(failure: RankFailure) -> None:
    """Leave this rank's failure for the process that started it."""
    write_json(Path(os.environ[RECORDS]) / f"{os.environ['RANK']}.json", asdict(failure))


def words_of(folder: Path) -> dict[int, RankFailure]:
    """Read what the ranks have left in `folder`."""
    found = {}
    for file in folder.glob("[0-9]*.json"):
        record = read_json(file)
        found[int(file.stem)] = RankFailure(**{**record, "detail": tuple(record["detail"])})
    return found


def first_of(words: Mapping[int, RankFailure]) -> int | None:
    """Return the rank whose failure is the cause: the earliest that blames no other rank."""
    ranks = sorted(words, key=lambda rank: (words[rank].of_a_peer, words[rank].time))
    return ranks[0] if ranks else None


def verdict(
    codes: Mapping[int, int],
    words: Mapping[int, RankFailure],
    *,
    stopping: bool,
    oom_killed: bool,
) -> tuple[int, int | None, RankFailure | None]:
    """Return the exit code of the whole, the rank that decided it, and its words.

    `codes` are the exit codes that torchrun's agent saw first, by rank, a signal's negative. It
    ends all others then, whose words may be about that (a loader of data was terminated). Without
    words the supervisor judges by code and log. A rank that is asked to stop before it listens
    dies of that (`stopping`).
    """
    rank = first_of({rank: word for rank, word in words.items() if rank in codes})
    if rank is not None and not words[rank].of_a_peer:
        return FAILED, rank, words[rank]
    if STOPPED in codes.values() or (stopping and -signal.SIGTERM in codes.values()):
        return STOPPED, None, None
    for killed, code in sorted(codes.items()):
        if code < 0:
            failure, message = classify_exit(code, "", oom_killed=oom_killed)
            message = message.replace("the worker", f"rank {killed}")
            return FAILED, killed, RankFailure(failure, message, (), None, time.time())
    rank = first_of(words)
    if rank is not None and not words[rank].of_a_peer:
        return FAILED, rank, words[rank]
    if rank is not None:
        # Only survivors have spoken: who went silently is not known, and it may pass.
        kind = "killed" if words[rank].failure == "code" else words[rank].failure
        word = words[rank]
        return FAILED, rank, RankFailure(kind, word.message, word.detail, word.retry, word.time)
    return next((code for code in codes.values() if code), 1), None, None


def main(argv: list[str]) -> int:
    """Train in COUNT processes; end as one worker does: 0, STOPPED, or FAILED with its words."""
    run, count = RunFolder(Path(argv[0])), int(argv[1])
    # Asked for by the supervisor when no step is finished; the signal would end us otherwise.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _fit_network()
    kills = resources.oom_kills()
    # Not on the run's disk: what that refuses is among what the ranks may have to say.
    with tempfile.TemporaryDirectory(prefix="tunesmith-ranks-") as folder:
        os.environ[RECORDS] = folder
        agent = _Agent(run, count, Path(folder))
        codes = agent.run()
        if not any(codes.values()):
            return 0
        code, rank, word = verdict(
            codes,
            words_of(Path(folder)),
            stopping=agent.stopping,
            oom_killed=resources.oom_kills() > kills,
        )
    if word is not None:
        passing = {} if word.retry is None else {"retry": word.retry}
        Reporter(run)(
            "failure",
            phase="train",
            failure=word.failure,
            message=word.message,
            detail=list(word.detail),
            rank=rank,
            **passing,
        )
    return code


def arguments(run: RunFolder, count: int) -> list[str]:
    """Return torchrun's arguments: `count` workers of the train phase on this machine."""
    rank = isolated.argv(
        sys.executable,
        "tunesmith.job.supervisor.worker",
        str(run.path),
        "train",
        options=isolated.UNBUFFERED,
    )
    # The address is given: a rented container's own name often resolves nowhere.
    words = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(count)]
    return [*words, "--no-python", *rank]


class _Agent:
    """torchrun's agent in a thread, and what happens beside it.

    In a thread, because its own handling of SIGTERM, in a main thread, would end the ranks after
    30 seconds, whatever a checkpoint takes.
    """

    def __init__(self, run: RunFolder, count: int, records: Path) -> None:
        self.stopping = False
        self._run = run
        self._count = count
        self._records = records
        self._asked: set[int] = set()
        self._codes: dict[int, int] = {}
        self._unexpected: BaseException | None = None

    def run(self) -> dict[int, int]:
        """Run the ranks to their end; return exit codes by rank, all 0 when all succeeded."""
        thread = threading.Thread(target=self._launch, name="torchrun", daemon=True)
        signal.signal(signal.SIGTERM, self._request_stop)
        thread.start()
        failed_at: float | None = None
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            if self.stopping:
                self._ask_to_stop()
            if failed_at is None and any(self._records.glob("[0-9]*.json")):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _GRACE_SECONDS:
                processes.tell(self._ranks(), signal.SIGKILL)
        if self._unexpected is not None:
            raise self._unexpected
        return self._codes or dict.fromkeys(range(self._count), 0)

    def _launch(self) -> None:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import elastic_launch
        from torch.distributed.run import config_from_args, parse_args

        words = arguments(self._run, self._count)
        try:
            config, command, rest = config_from_args(parse_args(words))
            elastic_launch(config=config, entrypoint=command)(*rest)
        except ChildFailedError as error:
            self._codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._unexpected = error

    def _request_stop(self, _signum: int, _frame: FrameType | None) -> None:
        self.stopping = True

    def _ask_to_stop(self) -> None:
        """Pass a stop on, once to each rank: it seals a checkpoint between two steps and ends."""
        fresh = [rank for rank in self._ranks() if rank.pid not in self._asked]
        processes.tell(fresh, signal.SIGTERM)
        self._asked.update(rank.pid for rank in fresh)

    def _ranks(self) -> list[processes.Marked]:
        """Return the ranks themselves: what they start inherits their environment, not us."""
        found = processes.marked(WORKER_OF, str(self._run.path))
        return [one for one in found if one.rank is not None and one.parent == os.getpid()]


def _fit_network() -> None:
    """Keep the ranks of one machine on ways that work there."""
    # By the host's name gloo may find an address that leads nowhere.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    if torch.cuda.device_count() < 2:
        return
    from accelerate.utils import check_cuda_p2p_ib_support

    # RTX 40xx before driver 550.40.07: accelerate refuses to start without these.
    if not check_cuda_p2p_ib_support():
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
