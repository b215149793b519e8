"""The contract between the two halves: what run.json, status.json and the other files of a run
hold, as types. Events have their own module (events), answers of a host's agent too (replies).

One half writes these with `codec.encode`, the other reads them with `codec.decode`, bounds
included. docs/run-schema.json is rendered from here. Times are seconds since 1970 (UTC), sizes
are bytes. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from tunesmith.basemodel.kinds import Kind
from tunesmith.core.errors import UsageError
from tunesmith.job.run.codec import (
    Between,
    Like,
    Most,
    Prose,
    named,
    omitted,
    omitted_mapping,
    optional,
    rest,
)
from tunesmith.job.run.process import Identity

T = TypeVar("T")

# The version of what the two halves say to each other (run.json, status.json, events, answers of
# the agent). Hosts and images are compared by a digest over this half's files, this one among
# them: raise it where a change of the other half alone asks for more than they know.
CONTRACT = 1

State = Literal["queued", "running", "succeeded", "failed", "stopped"]
STATES: tuple[State, ...] = get_args(State)
# States of a run in which somebody works on it, or will.
ACTIVE: tuple[State, ...] = ("queued", "running")
# Why work on a run began: by whom or what, and `retry` after a failure that may pass.
Cause = Literal["user", "resume", "autostart", "container", "queue", "retry"]
CAUSES: tuple[Cause, ...] = get_args(Cause)

# As a run's folder is named: no separator, no leading dot or dash.
RunName = Annotated[str, Like(r"[^\W_][\w.+@=,-]*", "a run id", 128)]
Word = Annotated[str, Like(r"[A-Za-z0-9_][\w.:+-]*", "a word", 200)]
Sha256 = Annotated[str, Like(r"[0-9a-f]{64}", "a sha256", 64)]
Line = Annotated[str, Prose(2000)]
FileName = Annotated[str, Prose(4096)]
Count = Annotated[int, Between(0)]
Seconds = Annotated[float, Between(0, 1e10)]
Figure = Annotated[float, Between()]
# A loss may be NaN or infinite; so may what is computed from one.
Loss = Annotated[float, Between(any_float=True)]
# The keys of a LLaMA-Factory config: its own schema says what they may be (plan/config.py).
Values = Mapping[str, Any]


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of a file."""

    size: Count
    sha256: Sha256


@dataclass(frozen=True)
class Price:
    """Money per hour."""

    per_hour: Figure
    currency: Line | None = None


@dataclass(frozen=True)
class ModelRef:
    """The base model: its name on a hub, where it lies, from where it came, and its files."""

    name: Line | None = None
    path: FileName | None = None
    source: Line | None = None
    revision: Line | None = None
    files: Annotated[Mapping[FileName, FileRecord], Most(100_000)] = field(default_factory=dict)


@dataclass(frozen=True)
class DataFile:
    """A data set as it was checked; `figures` are those of the check (dataset/report.py)."""

    file: FileName = ""
    key: Line | None = None
    rows: Count | None = None
    sha256: Sha256 | None = None
    figures: Values = rest()


@dataclass(frozen=True)
class ManagedKey:
    """A key of the config that the job runner decided; `was` is what the config said."""

    key: Line
    value: Any = None
    was: Any = None
    why: Line = ""


@dataclass(frozen=True)
class PromptItem:
    """A question asked before and after the training (dataset/prompts.py)."""

    prompt: Annotated[str, Prose(100_000)]
    expect: Annotated[str, Prose(100_000)] | None = None
    reference: Annotated[str, Prose(100_000)] | None = None
    system: Annotated[str, Prose(100_000)] | None = None


@dataclass(frozen=True)
class EvaluateOptions:
    """How the model is measured before and after."""

    max_new_tokens: Count = 64
    held_out_answers: Count = 8
    batch_size: Count = 32


@dataclass(frozen=True)
class Limits:
    """How patient the supervisor is. Seconds, unless the name says otherwise.

    A worker is stalled when no step was finished for `stall_seconds` and for
    `stall_steps` times the median step. `restarts` counts restarts in a row that reached
    no new checkpoint: a worker that gets further each time may fall as often as it likes.
    A failure that may pass by itself (a source out of reach) is tried again after
    `retry_seconds`, doubled each time. `max_seconds` is how long the run may work in all,
    restarts and resumes together; None sets no limit. `last_words_seconds`: how long the
    end of a run waits for a disk that takes nothing at all.
    """

    # A limit that is misspelt would not be kept.
    REFUSES_UNKNOWN: ClassVar[bool] = True

    restarts: Count = omitted(3)
    stall_seconds: Seconds = omitted(900.0)
    stall_steps: Seconds = omitted(10.0)
    dump_seconds: Seconds = omitted(5.0)
    stop_seconds: Seconds = omitted(600.0)
    disk_wait_seconds: Seconds = omitted(1800.0)
    retry_seconds: Seconds = omitted(15.0)
    last_words_seconds: Seconds = omitted(10.0)
    max_seconds: Seconds | None = optional()


@dataclass(frozen=True)
class PostRunCommand:
    """The command to run, `seconds` after the run has succeeded: time to say no."""

    command: tuple[FileName, ...]
    when: Literal["succeeded"]
    seconds: Seconds = omitted(10.0)


@dataclass(frozen=True)
class FetchSpec:
    """How the fetch phase brings the base model (job/training/fetch.py)."""

    name: Line
    store: FileName
    mirror: FileName = "default"
    revision: Line | None = None
    programs: FileName | None = None
    configs: FileName | None = optional()
    allow_pickle: bool = False


@dataclass(frozen=True)
class Download:
    """A further model or adapter that comes from a hub: the `place`-th name, from 0, of a key."""

    key: Word
    name: Line
    kind: Kind = "model"
    place: Count = omitted(0)


@dataclass(frozen=True)
class Origin:
    """From where a model or an adapter came: the `place`-th name, from 0, of a config's `key`.

    `written` is what the config said. `run` is the run whose result it is, and `result` the folder
    of it (output or merged); `host` is where that was trained if not here. `source` and `revision`
    are a hub's. `sha256` is over the names and sha256 of its files (basemodel/kinds.py).
    """

    key: Word
    written: FileName
    place: Count = omitted(0)
    run: RunName | None = optional()
    result: Word | None = optional()
    host: Line | None = optional()
    source: Line | None = optional()
    revision: Line | None = optional()
    sha256: Sha256 | None = optional()


@dataclass(frozen=True)
class InputRecord:
    """Size and sha256 of a file that a run reads; `adapter`: of one the training starts from."""

    size: Count
    sha256: Sha256
    adapter: bool = omitted(False)


@dataclass(frozen=True)
class RunInputs:
    """What one training or prediction reads: entries of the registry, folders, files by path."""

    registry: FileName
    entries: Values
    folders: tuple[FileName, ...]
    files: Annotated[Mapping[FileName, InputRecord], Most(1_000_000)]


@dataclass(frozen=True)
class GpuChoice:
    """The GPUs of a training: so many, the first there are, or those with these numbers."""

    count: Annotated[int, Between(1, 1000)]
    ids: tuple[Annotated[int, Between(0, 1000)], ...] = omitted(())


@dataclass(frozen=True)
class RunRequest:
    """run.json: what was asked. Written before the start; the fetch phase adds where the model
    lies.

    `evaluate`, `merge` (LLaMA-Factory's export keys, and accept_mismatch), `limits`, `after`:
    how the phases go, and what follows a success. `turn`: whether a host at work is waited for.
    `inputs`: what the training and a prediction read (job/run/inputs.py). `keep_batch`: several
    processes share the rows of a step that the config gives to one.
    `downloads`: further models that the fetch phase brings; `origins`: from where models and
    adapters came.
    """

    run_id: RunName = omitted("")
    created: Line = ""
    config_file: Line = ""
    stem: Line = ""
    title: Line = ""
    model: ModelRef | None = optional()
    overrides: Values = omitted_mapping()
    data: tuple[DataFile, ...] = omitted(())
    owned: tuple[ManagedKey, ...] = omitted(())
    phases: tuple[Word, ...] | None = None
    prompts: tuple[PromptItem, ...] = ()
    guard: tuple[PromptItem, ...] = ()
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    merge: Values | None = optional()
    limits: Limits | None = optional()
    env: Annotated[Mapping[Line, Annotated[str, Prose(100_000)] | Figure], Most(1000)] | None = (
        optional()
    )
    then: tuple[Word, ...] | None = optional()
    preset: Word | None = optional()
    fetch: FetchSpec | None = optional()
    price: Figure | Price | None = optional()
    turn: Literal["refuse", "wait"] | None = optional()
    gpus: GpuChoice | None = optional()
    keep_batch: bool = omitted(False)
    after: PostRunCommand | None = optional()
    predict: Values | None = optional()
    inputs: Mapping[Word, RunInputs] = omitted_mapping()
    downloads: Annotated[tuple[Download, ...], Most(100)] = omitted(())
    origins: Annotated[tuple[Origin, ...], Most(100)] = omitted(())
    version: Count = CONTRACT

    def needed_model(self) -> ModelRef:
        """Return the base model. Raises UsageError where run.json names none."""
        return self._needed(self.model, "model")

    def needed_phases(self) -> tuple[str, ...]:
        """Return the phases. Raises UsageError where run.json has none."""
        return self._needed(self.phases, "phases")

    def needed_merge(self) -> Values:
        """Return the keys of the merge. Raises UsageError where run.json has none."""
        return self._needed(self.merge, "merge")

    def _needed(self, value: T | None, key: str) -> T:
        if value is None:
            raise UsageError(
                f"run {self.run_id}: its run.json has no {key}",
                hint=f"`inv rm --run {self.run_id}` deletes the run",
            )
        return value


@dataclass(frozen=True)
class GpuFigures:
    """One GPU: memory in bytes, utilisation in percent, temperature in degrees Celsius.

    None is what this GPU does not tell.
    """

    name: Line = ""
    memory_used: Annotated[int, Between(0)] | None = None
    memory_total: Annotated[int, Between(0)] | None = None
    utilisation: Annotated[int, Between(0, 1000)] | None = None
    temperature: Annotated[int, Between(-1000, 1000)] | None = None


@dataclass(frozen=True)
class RunStatus:
    """status.json: where a run stands.

    `phases` are the states by phase: queued, running, succeeded, failed, stopped. `failure` is a
    class of job/run/failures.py; `retried` the one after which the phase was begun again.
    `supervisor` is who works on it. `paused`: true, or why. `ahead`: the runs it waits for.
    """

    state: State
    run_id: RunName = omitted("")
    phase: Word | None = None
    phases: Annotated[Mapping[Word, Word], Most(50)] = field(default_factory=dict)
    failure: Word | None = None
    message: Line | None = ""
    detail: Annotated[tuple[Line, ...], Most(1000)] = ()
    started: Seconds | None = None
    worked_seconds: Seconds | None = None
    step: Count | None = None
    total_steps: Count | None = None
    loss: Loss | None = None
    learning_rate: Loss | None = None
    tokens_per_second: Annotated[float, Between(0, 1e12)] | None = None
    eta_seconds: Seconds | None = None
    supervisor: Identity | None = optional()
    price: Figure | Price | None = None
    cause: Cause | None = optional()
    retried: Word | None = optional()
    paused: bool | Line | None = optional()
    gpu: Annotated[tuple[GpuFigures, ...], Most(1024)] | None = optional()
    ahead: tuple[RunName, ...] = omitted(())
    updated: Seconds | None = optional()
    version: Count = CONTRACT

    @property
    def active(self) -> bool:
        """Whether somebody works on the run, or will."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class ListedRun(RunStatus):
    """A run in a list of runs: its status, and what its request says it is.

    `on` is the target that has it; a target names itself. `origins`: the models and adapters it
    came from, as its config named them.
    """

    created: Line = ""
    title: Line = ""
    path: FileName = ""
    on: Line = omitted("")
    origins: Annotated[tuple[FileName, ...], Most(100)] = omitted(())


@dataclass(frozen=True)
class Heartbeat:
    """heartbeat.json: the newest step. `step_seconds` is the median of the last steps."""

    step: Annotated[int, Between()]
    total_steps: Annotated[int, Between()]
    time: Figure
    paused: bool | Line | None
    step_seconds: Figure | None = None
    pid: Count | None = None


@dataclass(frozen=True)
class Adjustments:
    """adjustments.json: what the supervisor changed in the config after a failure."""

    per_device_train_batch_size: Count | None = optional()
    gradient_accumulation_steps: Count | None = optional()
    disable_gradient_checkpointing: bool | None = optional()


@dataclass(frozen=True)
class CopyRecord:
    """pulled.json: the host that a run was pulled from, and the files that came."""

    host: Line = named("from")
    files: Annotated[Mapping[FileName, FileRecord], Most(100_000)] = field(default_factory=dict)
