"""What makes the models of the Pareto table: every tool from the same original and the same text.

A tool takes a `Case`, writes its files to the case's folder and returns its weights in float32 by
transformers' names, as its own runtime would multiply with them. A tool's imports are inside, for
each may have an environment of its own. How to install them stands in `pareto.py`.
"""

import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import data
import torch
from torch import Tensor

from pvrt.tools.perplexity import windows

WINDOWS, LENGTH = 64, 512  # of the calibration text, where a tool takes a number; as pvrt does
BITS = ("2", "2.5", "2.67", "3", "3.5", "4")  # of pvrt, over the whole file
THREADS = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
NO_FIT = ("-fit", "off")  # of llama.cpp: do not try how much fits a GPU
State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What a tool is handed.

    model: the original, bfloat16, as a folder; gguf: the same values; text: JSON lines to calibrate
    on; out: an empty folder; shared: one that all methods of the tool have; before: the folder of
    the method that this one goes on from.
    """

    model: Path
    gguf: Path
    text: Path
    out: Path
    shared: Path
    before: Path | None = None


class Tool(ABC):
    """A tool and the methods that the table has of it."""

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    files: ClassVar[str]  # pattern of the files whose bytes count

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of what does the work."""

    def before(self, method: str) -> str | None:
        """The method whose files this one goes on from, if any."""
        return None

    @abstractmethod
    def make(self, case: Case, method: str) -> None:
        """Write the files."""

    @abstractmethod
    def weights(self, case: Case) -> State:
        """The files' weights, float32; of tied ones the embedding alone."""

    def tokens_per_second(self, case: Case) -> float | None:
        """Greedy decoding of one sequence on this CPU by the tool's own runtime, if it has one."""
        return None

    def size(self, case: Case) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in case.out.glob(self.files))


def run(*command: str | Path) -> str:
    """A command's output; ends the script with the last of what it said if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}"
        )
    return done.stdout


def whole(text: Path) -> str:
    """The documents of a file of JSON lines, a blank line between two."""
    return "\n\n".join(data.documents(text))


def state(model: Any) -> State:
    """A model's dense parameters in float32; of tied ones the first name alone."""
    found = {name: tensor.detach().float() for name, tensor in model.named_parameters()}
    found = {name: tensor for name, tensor in found.items() if name.endswith(("weight", "bias"))}
    head = found.get("lm_head.weight")
    if head is not None and torch.equal(head, found["model.embed_tokens.weight"]):
        del found["lm_head.weight"]  # some tools write or load the two apart
    return found


def dense(folder: Path, dtype: torch.dtype, **given: Any) -> Any:
    """A model of a folder, by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given).eval()


class Original(Tool):
    """The original in 16 bits: what everything is compared with."""

    name, methods, files = "original", ("bfloat16",), "*.safetensors"

    def versions(self) -> dict[str, str]:
        return {}

    def make(self, case: Case, method: str) -> None:
        for file in case.model.glob(self.files):
            os.link(file, case.out / file.name)

    def weights(self, case: Case) -> State:
        return state(dense(case.model, torch.float32))


class LlamaCpp(Tool):
    """llama-quantize with an importance matrix of the calibration text."""

    name, files = "llama.cpp", "model.gguf"
    methods = ("IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M")

    def versions(self) -> dict[str, str]:
        said = subprocess.run(
            [self._program("llama-imatrix"), "--version"], capture_output=True, text=True
        )
        return {"llama.cpp": (said.stderr + said.stdout).partition("\n")[0].partition(": ")[2]}

    def make(self, case: Case, method: str) -> None:
        importance = case.shared / "imatrix.gguf"
        if not importance.is_file():
            partial, text = case.shared / "partial.gguf", case.shared / "text.txt"
            # It tokenises all that it is given.
            text.write_text(whole(case.text)[: 8 * WINDOWS * LENGTH], encoding="utf-8")
            size = ("-c", str(LENGTH), "--chunks", str(WINDOWS), "-t", THREADS, "--no-ppl", *NO_FIT)
            what = ("-m", case.gguf, "-f", text, "-o", partial)
            run(self._program("llama-imatrix"), *what, *size)
            partial.rename(importance)
        files = (importance, case.gguf, case.out / "model.gguf")
        run(self._program("llama-quantize"), "--imatrix", *files, method, THREADS)

    def weights(self, case: Case) -> State:
        from transformers import GgufConfig

        given = {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True)}
        return state(dense(case.out, torch.float32, **given))

    def tokens_per_second(self, case: Case) -> float | None:
        what = ("-m", case.out / "model.gguf", "-p", "0", "-n", "64", "-t", THREADS, "-o", "json")
        return float(json.loads(run(self._program("llama-bench"), *what))[0]["avg_ts"])

    @staticmethod
    def _program(name: str) -> str:
        found = shutil.which(name)
        if found is None:
            sys.exit(f"{name} is not on the PATH; pareto.py says how to build it")
        return found


class Hqq(Tool):
    """HQQ's defaults; it needs no text."""

    name, files = "HQQ", "qmodel.pt"
    methods = ("2 bits g16", "2 bits g64", "3 bits g64", "4 bits g64")

    def versions(self) -> dict[str, str]:
        return {"hqq": version("hqq")}

    def make(self, case: Case, method: str) -> None:
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        bits, _, group = method.split()
        settings = BaseQuantizeConfig(nbits=int(bits), group_size=int(group[1:]))
        model = dense(case.model, torch.float16)
        AutoHQQHFModel.quantize_model(model, settings, torch.float16, "cpu")
        AutoHQQHFModel.save_quantized(model, str(case.out))

    def weights(self, case: Case) -> State:
        from hqq.core.quantize import HQQLinear
        from hqq.models.hf.base import AutoHQQHFModel

        model = AutoHQQHFModel.from_quantized(
            str(case.out), compute_dtype=torch.float16, device="cpu"
        )
        found = state(model)
        for name, module in model.named_modules():
            if isinstance(module, HQQLinear):
                found[f"{name}.weight"] = module.dequantize().float()
        return found


class AutoRound(Tool):
    """AutoRound's light recipe, in windows of `LENGTH` tokens; saved in its own format."""

    name, files = "AutoRound", "*/*.safetensors"
    methods = ("W2A16 g64", "W3A16 g64", "W4A16 g64")

    def versions(self) -> dict[str, str]:
        return {"auto-round": version("auto-round")}

    def make(self, case: Case, method: str) -> None:
        from auto_round import AutoRound as Quantizer
        from transformers import AutoTokenizer

        scheme, group = method.split()
        tokenizer = AutoTokenizer.from_pretrained(case.model)
        rows = windows(whole(case.text), tokenizer, LENGTH, WINDOWS)
        tuner = Quantizer(
            dense(case.model, torch.float32),
            tokenizer,
            scheme=scheme,
            group_size=int(group[1:]),
            dataset=[row.unsqueeze(0) for row in rows],
            iters=50,
            lr=5e-3,
            nsamples=WINDOWS,
            seqlen=LENGTH,
            device_map="cpu",
        )
        tuner.quantize_and_save(str(case.out), format="auto_round")

    def weights(self, case: Case) -> State:
        (config,) = case.out.glob("*/config.json")  # it makes a folder of a name of its own
        model = dense(config.parent, torch.float32, device_map="cpu")
        found = state(model)
        for name, module in model.named_modules():
            if hasattr(module, "qweight"):
                product = module(torch.eye(module.infeatures, dtype=torch.float16))
                found[f"{name}.weight"] = product.detach().T.float().contiguous()
        return found


class Pvrt(Tool):
    """`pvrt tune` as a user types it, on the same text: calibrated, and PV-tuned from there on."""

    name, files = "pvrt", "out/*.safetensors"
    options: ClassVar[dict[str, tuple[str, ...]]] = {
        **{scheme: ("--scheme", scheme) for scheme in ("2x8g8", "3x8g8")},
        **{f"{bits} bits": ("--bits", bits) for bits in BITS},
    }
    methods = tuple(f"{name}, {stage}" for name in options for stage in ("calibrated", "tuned"))

    def versions(self) -> dict[str, str]:
        return {"pvrt": version("pvrt")}

    def before(self, method: str) -> str | None:
        asked, _, stage = method.partition(", ")
        return f"{asked}, calibrated" if stage == "tuned" else None

    def make(self, case: Case, method: str) -> None:
        text = ("-o", case.out / "out", "--data", case.text, "--no-report")
        if case.before is not None:
            run(*self._pvrt(), "tune", case.before / "out", "--from", case.model, *text)
            return
        effort = ("--effort", "quick", "--no-pv")
        asked = self.options[method.partition(", ")[0]]
        run(*self._pvrt(), "tune", case.model, *text, *effort, *asked)

    def weights(self, case: Case) -> State:
        import pvrt

        return state(pvrt.load(case.out / "out", dense=True, dtype=torch.float32))

    def tokens_per_second(self, case: Case) -> float | None:
        (row,) = json.loads(run(*self._pvrt(), "bench", case.out / "out", "-p", "0", "--json"))
        return float(row["tokens_per_second"])

    @staticmethod
    def _pvrt() -> tuple[str, ...]:
        return sys.executable, "-m", "pvrt"


TOOLS: dict[str, Tool] = {
    tool.name: tool for tool in (Original(), LlamaCpp(), Hqq(), AutoRound(), Pvrt())
}
