"""All files of the merged model except its weights.

`python -m tunesmith.job.merge.skeleton RUN PART PIPE PARENT`: LLaMA-Factory's own export_model
writes configs, tokenizer and Modelfile for a model without memory (PyTorch's meta device); where
it would write the weights, only the assignment of tensors to files is recorded. Then the prompts
are compared and corrected (job/prompts/parity.py). It is a separate process because LLaMA-Factory
takes a gigabyte and some seconds, which the parallel merge (job/merge/streaming.py) need not wait
for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypedDict

from tunesmith.core import isolated
from tunesmith.core.documents import Arguments, Config
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.patching import installed
from tunesmith.job.inference import engine
from tunesmith.job.merge.streaming import Shard
from tunesmith.job.merge.tensors import Tensor
from tunesmith.job.patches.llamafactory import LOAD_NO_WEIGHTS
from tunesmith.job.patches.transformers import NOTE_SHARDS
from tunesmith.job.run.failures import JobError

if TYPE_CHECKING:
    from tunesmith.job.prompts.records import ParityRecord

# Bytes: LLaMA-Factory with PyTorch's CUDA libraries (1.1 GB were measured), plus a margin.
MEMORY = 1_500_000_000
# PyTorch's names of dtypes -> safetensors'.
_NAMES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bool": "BOOL",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
}


# {weights file: {tensor: [dtype, shape]}}, as JSON.
Layout = Mapping[str, Mapping[str, Sequence[Any]]]


class ErrorRecord(TypedDict, total=False):
    """An error, as it is sent through the pipe."""

    kind: str  # job, usage, code or crash
    failure: str  # class of a JobError
    message: str
    detail: list[str]


@dataclass
class ExportSkeleton:
    """The process that writes them. It reports the weights files first and the prompts last."""

    process: subprocess.Popen[bytes]
    pipe: IO[str]
    shards: list[Shard] | None = None

    def files(self) -> list[Shard]:
        """Wait for the weights files of the export and return them."""
        if self.shards is None:
            self.shards = shards_of(self._next("shards"))
        return self.shards

    def prompts(self) -> ParityRecord:
        """Wait for the end and return the content of parity.json."""
        self.files()
        record: ParityRecord = self._next("prompts")
        self.process.wait()
        return record

    def _next(self, what: str) -> Any:
        line = self.pipe.readline()
        if not line:
            code = self.process.wait()
            raise TunesmithError(
                f"LLaMA-Factory's export without weights ended with exit code {code} before it "
                "reported its files: see train.log"
            )
        message = json.loads(line)
        if "error" in message:
            raise _raised(message["error"])
        return message[what]


def shards_of(layout: Layout) -> list[Shard]:
    """Return the weights files of a layout."""
    return [
        Shard(file, {n: Tensor(dtype, tuple(shape)) for n, (dtype, shape) in tensors.items()})
        for file, tensors in layout.items()
    ]


def layout_of(shards: Sequence[Shard]) -> Layout:
    """Return the layout of weights files."""
    return {
        shard.file: {n: [t.dtype, list(t.shape)] for n, t in shard.tensors.items()}
        for shard in shards
    }


def possible() -> bool:
    """Return whether LLaMA-Factory is installed here."""
    return importlib.util.find_spec("llamafactory") is not None


@contextlib.contextmanager
def begin(
    run_dir: Path,
    part: Path,
    config: Config,
    keys: Config,
    log: IO[bytes] | None = None,
) -> Iterator[ExportSkeleton]:
    """Start the process; it has ended when the block ends. Its output goes to `log`, or to ours."""
    reading, writing = os.pipe()
    arguments = (str(run_dir.absolute()), str(part.absolute()), str(writing), str(os.getpid()))
    argv = isolated.argv(
        sys.executable, "tunesmith.job.merge.skeleton", *arguments, options=isolated.UNBUFFERED
    )
    with os.fdopen(reading, "r", encoding="utf-8") as pipe:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(writing,)
            )
        finally:
            os.close(writing)
        try:
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(json.dumps({"config": dict(config), "keys": dict(keys)}).encode())
            yield ExportSkeleton(process, pipe)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def main(argv: list[str]) -> int:
    """Write all files but the weights into PART; report the results through the pipe."""
    from tunesmith.job.run import streams
    from tunesmith.job.run.process import die_with_parent

    if not die_with_parent(argv[3]):
        return 1
    streams.outlive_disk()
    options = json.load(sys.stdin)
    with os.fdopen(int(argv[2]), "w", encoding="utf-8") as pipe:

        def send(what: str, value: Any) -> None:
            pipe.write(json.dumps({what: value}) + "\n")
            pipe.flush()

        try:
            record_versions(Path(argv[0]))
            prompts = make(
                Path(argv[1]),
                options["config"],
                options["keys"],
                lambda shards: send("shards", layout_of(shards)),
            )
            send("prompts", prompts)
        except BaseException as error:  # noqa: BLE001 - the merge reports it to the user
            traceback.print_exc()
            send("error", _described(error))
            return 1
    return 0


def make(
    part: Path, config: Config, keys: Config, on_shards: Callable[[Sequence[Shard]], None]
) -> ParityRecord:
    """Export without weights into `part`, then compare and correct the prompts.

    `on_shards` is called with the weights files as soon as they are known, seconds before the
    end. Returns the content of parity.json.
    """
    from tunesmith.job.patches import imports
    from tunesmith.job.prompts import parity

    imports.trim()
    with imports.only("sft", scores=False):
        from llamafactory.train import tuner

    export: Arguments = dict(engine.arguments(config)) | dict(keys)
    export |= {"export_dir": str(part), "export_legacy_format": False}
    for key in [k for k in export if k.startswith(("quantization_", "double_quantization"))]:
        del export[key]
    on_shards(without_weights(tuner, export))
    codec = engine.codec(engine.arguments(config))
    return parity.align(config, codec, part)


def without_weights(tuner: Any, export: Config) -> list[Shard]:
    """Run LLaMA-Factory's export_model on the meta device; return the files it would write."""
    import torch

    load = tuner.load_model
    shards: list[Shard] = []

    def load_nothing(tokenizer: Any, model_args: Any, finetuning_args: Any) -> Any:
        model_args.device_map = {"": torch.device("meta")}
        return load(tokenizer, model_args, finetuning_args)

    def note(shard: Mapping[str, Any], path: str, metadata: Any) -> None:
        tensors = {name: Tensor(_name(t.dtype), tuple(t.shape)) for name, t in shard.items()}
        shards.append(Shard(Path(path).name, tensors))

    with installed(LOAD_NO_WEIGHTS, load_nothing), installed(NOTE_SHARDS, note):
        tuner.export_model(dict(export))
    return shards


def _name(dtype: Any) -> str:
    plain = str(dtype).removeprefix("torch.")
    return _NAMES.get(plain, plain)


def record_versions(run_dir: Path) -> None:
    """Write RUN/versions.json. Imports torch."""
    from tunesmith.core.files import write_json
    from tunesmith.job.system.versions import versions

    write_json(run_dir / "versions.json", versions())


def _described(error: BaseException) -> ErrorRecord:
    if not isinstance(error, TunesmithError):
        return {"kind": "crash", "message": f"{type(error).__name__}: {error}", "detail": []}
    record = ErrorRecord(kind="code", message=error.line, detail=list(error.detail))
    if isinstance(error, JobError):
        record["kind"], record["failure"] = "job", error.failure
    elif isinstance(error, UsageError):
        record["kind"] = "usage"
    return record


def _raised(record: ErrorRecord) -> Exception:
    """Return an error of the other process as an exception of this one."""
    message, detail = record["message"], tuple(record["detail"])
    if record["kind"] == "job":
        return JobError(record["failure"], message, detail)
    if record["kind"] == "crash":
        return RuntimeError(message)  # classified by its text, like any failure of a worker
    return (UsageError if record["kind"] == "usage" else TunesmithError)(message, detail)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
