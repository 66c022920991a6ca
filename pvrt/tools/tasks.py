"""Tasks of the field's harness (lm-eval), by name or from local task files; works offline where the
data is local.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvrt.errors import DataError
from pvrt.versions import install

INSTALL = install("eval")
_SUFFIXES = (".yaml", ".yml")


def split_tasks(text: str) -> list[str]:
    """Names and paths between commas. Raises DataError where there is none."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise DataError(f"--tasks {text!r} has an empty name; write names or paths between commas")
    return names


class Harness:
    """The tasks of one call, found before a model is loaded.

    tasks: names of the harness, task files (.yaml) and folders of them. Raises DataError when
    lm-eval is not installed, or a task is unknown.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise DataError(
                f"--tasks needs EleutherAI's harness, lm-eval, which is not installed: {INSTALL}"
            ) from error
        folders = [str(Path(name).resolve()) for name in tasks if Path(name).is_dir()]
        named = [name for name in tasks if not _is_local(name)]
        # Its own index is thousands of files, for names alone.
        self.manager = TaskManager(include_path=folders or None, include_defaults=bool(named))
        self.specs = [_spec(name) for name in tasks if not Path(name).is_dir()]
        unknown = [name for name in named if not self.manager.match_tasks([name])]
        if unknown:
            raise DataError(
                f"lm-eval knows no task {unknown[0]!r}, and it is no task file (.yaml) or folder "
                "of them here; `lm-eval ls tasks` prints the names"
            )
        for folder in folders:
            found = TaskManager(include_path=folder, include_defaults=False).all_subtasks
            if not found:
                raise DataError(f"{folder} holds no task files of lm-eval (.yaml with a 'task')")
            self.specs += found
        try:
            self.manager.load(self.specs)  # data that is not here is told before a model is read
        except Exception as error:
            raise _failed(error) from error

    def run(
        self, model: Any, tokenizer: Any, limit: int | None, shots: int | None, batch: int
    ) -> dict[str, dict[str, Any]]:
        """Metrics and their standard errors by task, as the harness names them ("acc,none").

        limit: items per task; shots: examples before each; batch: sequences at once. Raises
        DataError when the harness cannot read a task's data.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            results = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
                tasks=self.specs,
                num_fewshot=shots,
                limit=limit,
                log_samples=False,
                task_manager=self.manager,
            )
        except Exception as error:
            raise _failed(error) from error
        counts = results["n-samples"]
        return {
            name: {
                "items": counts.get(name, {}).get("effective"),
                **{key: value for key, value in figures.items() if "," in key},
            }
            for name, figures in results["results"].items()
        }


def _failed(error: Exception) -> DataError:
    """What the harness, datasets or a task file raised: anything, with no common type."""
    reason = str(error).strip().split("\n")[0]
    return DataError(f"lm-eval cannot run these tasks: {type(error).__name__}: {reason}")


def _is_local(name: str) -> bool:
    return Path(name).is_dir() or Path(name).suffix in _SUFFIXES


def _spec(name: str) -> str:
    """A task as the harness takes it. Raises DataError for a task file that is not there."""
    if Path(name).suffix not in _SUFFIXES:
        return name
    if not Path(name).is_file():
        raise DataError(f"{name} does not exist; give a task file, a folder or a name of lm-eval")
    return str(Path(name).resolve())
