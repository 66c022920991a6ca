"""A small tuning run (calibration, PV-Tuning, both checkpoints) in processes that may die."""

import hashlib
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from pvrt.errors import PvrtError
from pvrt.format.folder import MANIFEST_FILE
from pvrt_tune.pipeline import tune
from pvrt_tune.plan.speed import measure
from pvrt_tune.settings import FinetuneSettings, FitSettings, Recipe, TrainSettings, TuneJob
from tests.fixtures.toy import small_llama, toy_tokenizer

_FORK = multiprocessing.get_context("fork")
RECIPE = Recipe(
    scheme="1x8g8",
    embeddings="keep",
    samples=2,
    length=32,
    fit=FitSettings(rounds=1, kmeans_iterations=2, cg_iterations=1, beam=1),
    finetune=FinetuneSettings(epochs=1),
    training=TrainSettings(windows=4, steps=4, batch=2, held_out=1, evaluate_every=1),
)
#: Exit codes of a run: it was told in a sentence that it cannot go on, or broke.
REFUSED, BROKE = 3, 4


def dense_model(folder: Path) -> None:
    """A model that takes less than a second to tune."""
    small_llama(tie_word_embeddings=True).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)


def digest(out: Path) -> str:
    """Of all files of a finished run beside its journal, without the seconds in its manifest."""
    found = hashlib.sha256()
    for file in sorted(file for file in out.iterdir() if file.is_file()):
        content = file.read_bytes()
        if file.name == MANIFEST_FILE:
            content = json.dumps(_untimed(json.loads(content))).encode()
        found.update(f"{file.name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return found.hexdigest()


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(each) for key, each in value.items() if "seconds" not in key}
    return [_untimed(each) for each in value] if isinstance(value, list) else value


class Process:
    """A run of a model into a folder, in a process of its own.

    inside surrounds it there. The error that ends it is written to a file.
    """

    def __init__(
        self,
        model: Path,
        out: Path,
        log: Path,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        measure("cpu")  # once for all of them
        self.log = log
        log.unlink(missing_ok=True)
        self._child = _FORK.Process(
            target=_run, args=(TuneJob(str(model), out, RECIPE), log, inside)
        )
        self._child.start()

    def wait(self) -> int:
        """Its exit code; negative is the signal that ended it."""
        self._child.join()
        assert self._child.exitcode is not None
        return self._child.exitcode

    def kill_after(self, cpu_seconds: float) -> bool:
        """SIGKILL once it has used so much of a CPU; whether it was still at work."""
        process = psutil.Process(self._child.pid)
        try:
            while self._child.is_alive() and sum(process.cpu_times()[:2]) < cpu_seconds:
                time.sleep(random.uniform(0, 0.003))
        except psutil.Error:
            pass
        self._child.kill()
        return self.wait() == -9

    @property
    def alive(self) -> bool:
        """Whether it is at work."""
        return self._child.is_alive()

    @property
    def said(self) -> str:
        """The error that ended it."""
        return self.log.read_text() if self.log.exists() else ""


def _run(job: TuneJob, log: Path, inside: Callable[[], AbstractContextManager[None]]) -> None:
    torch.set_num_threads(1)
    try:
        with inside():
            tune(job, _silent)
    except PvrtError as error:
        _tell(log, str(error))
        raise SystemExit(REFUSED) from None
    except Exception as error:
        _tell(log, f"{type(error).__name__}: {error}")
        raise SystemExit(BROKE) from None


def _tell(log: Path, said: str) -> None:
    log.write_text(said)


def _silent(line: str) -> None:
    pass
