"""What a memory plan says: whether a run fits, and the plan as data and as text."""

from dataclasses import asdict
from typing import Any

from pvrt.kv_cache import USABLE
from pvrt_tune.data.locate import locate
from pvrt_tune.machine import Machine
from pvrt_tune.plan.memory_plan import PV_TUNING, SAMPLING, Phase, Plan


def misfits(plan: Plan, machine: Machine) -> list[str]:
    """Why the run cannot fit: all problems, each a sentence with the numbers and what helps.

    Of several phases that the same change would help, the one that needs most is named.
    """
    worst: dict[tuple[str, str], tuple[int, str]] = {}
    for phase in plan.phases:
        for what, needed, free in (
            ("device memory", phase.device_bytes, machine.device),
            ("host memory", phase.host_bytes, machine.host),
            ("disk", phase.disk_bytes, machine.disk),
        ):
            if free is not None and needed > free:
                shown = f"{phase.name} needs {gigabytes(needed)} of {what}"
                shown += f", {gigabytes(free)} are free"
                kind = what, _advice(plan, phase, what)
                worst[kind] = max(worst.get(kind, (0, "")), (needed, shown))
    return [f"{shown}; {advice}" for (_, advice), (_, shown) in worst.items()]


def _advice(plan: Plan, phase: Phase, what: str) -> str:
    """What makes a phase need less, or the machine have more."""
    if what == "disk":
        return "free some, or give --out on another disk"
    if phase.name == SAMPLING:
        return "give calibration text with --data, so that the model need not write it"
    if phase.name == PV_TUNING and plan.hindrances:
        if plan.request.resumed:
            return "this run has begun with other memory; --restart finds what fits"
        return f"leave {', '.join(plan.hindrances)} to the plan, which finds what fits"
    if phase.name == PV_TUNING:
        return f"leave it out with --no-pv, or use a machine with more {what}"
    if plan.activations == "memory" and what == "host memory" and phase.name != "write":
        return "keep hidden states on disk with --activations disk, or lower --samples"
    if phase.name in ("block pass", "block fine-tune"):
        return "lower --length, or free some"
    return f"free some, or use a machine with more {what}"


#: Phases of calibration that go by turns, a block at a time, and are one stage to people.
_CALIBRATION = ("block pass", "layer fit", "block fine-tune")


def stages(plan: Plan) -> dict[str, float]:
    """Seconds of each stage by the name that its lines of progress have, in order."""
    found: dict[str, float] = {}
    for phase in plan.phases:
        name = "calibration" if phase.name in _CALIBRATION else phase.name
        found[name] = found.get(name, 0.0) + phase.seconds
    found.pop("write", None)  # it takes no time to speak of
    return found


def larger(plan: Plan) -> str | None:
    """A sentence where the result is larger than the GGUF file that it is made of."""
    if not plan.request.gguf:
        return None
    size = locate(plan.request.model, weights=False).stat().st_size
    if plan.result.file_bytes < size:
        return None
    return (
        f"the result takes {gigabytes(plan.result.file_bytes)}, and {plan.request.model} only "
        f"{gigabytes(size)}: give fewer --bits, or the model in 16 bits that the file was made of"
    )


def gigabytes(size: float) -> str:
    """A size for people, in powers of ten."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """A time for people."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


def describe(plan: Plan, memory: int) -> dict[str, Any]:
    """The plan as JSON data; serving is worked out for a device with `memory` bytes."""
    weights = plan.result.file_bytes
    return {
        "summary": summary(plan),
        "model": plan.request.model,
        "scheme": plan.request.recipe.asked,
        "device": plan.request.device,
        "parameters": plan.parameters,
        "blocks": plan.blocks,
        "activations": plan.activations,
        "stream": plan.stream,
        "choices": plan.request.recipe.choices,
        "chosen": plan.chosen,
        "larger": larger(plan),
        "phases": [asdict(phase) for phase in plan.phases],
        "peak": {
            what: max(getattr(phase, what) for phase in plan.phases)
            for what in ("device_bytes", "host_bytes", "disk_bytes")
        },
        "seconds": plan.seconds,
        "time_basis": plan.basis,
        "result": asdict(plan.result),
        "serving": {
            "weight_bytes": weights,
            "cache_bytes_first_token": plan.cache.bytes_for(1),
            "memory_bytes": memory,
            "longest_context": plan.cache.longest_context(USABLE * memory - weights),
        },
    }


def as_text(report: dict[str, Any]) -> str:
    """The plan for a terminal."""
    result, serving = report["result"], report["serving"]
    lines = [
        report["summary"],
        *filter(None, [report["chosen"], report["larger"]]),
        f"{report['model']}: {report['parameters'] / 1e9:.2f} billion weights in "
        f"{report['blocks']} blocks, scheme {report['scheme']} on {report['device']}",
        f"{'phase':16}{'device':>10}{'host':>10}{'disk':>10}{'time':>9}",
    ]
    for phase in report["phases"]:
        sizes = (gigabytes(phase[f"{what}_bytes"]) for what in ("device", "host", "disk"))
        cells = "".join(f"{size:>10}" for size in sizes)
        lines.append(f"{phase['name']:16}{cells}{duration(phase['seconds']):>9}")
    lines += [
        f"hidden states in {report['activations']}; about {duration(report['seconds'])} in all "
        f"(rates: {report['time_basis']})",
        f"result   {gigabytes(result['file_bytes'])} (dense: "
        f"{gigabytes(result['dense_model_bytes'])}), "
        f"{result['bits_per_weight_linears']:.3f} bits per weight in the linears, "
        f"{result['bits_per_weight_file']:.3f} over the file",
        f"serving  {gigabytes(serving['weight_bytes'])} of weights and "
        f"{serving['cache_bytes_first_token'] / 1e3:.1f} kB of cache per token: in "
        f"{gigabytes(serving['memory_bytes'])}, one sequence of up to "
        f"{serving['longest_context']} tokens",
    ]
    return "\n".join(lines)


def summary(plan: Plan) -> str:
    """One line, which `tune` and `pvrt plan` say first."""
    host, device = plan.peak("host_bytes").host_bytes, plan.peak("device_bytes").device_bytes
    memory = f"{gigabytes(host)} of host memory"
    if device:
        memory = f"{gigabytes(device)} of device memory, {memory}"
    return (
        f"plan: {memory}, {gigabytes(plan.peak('disk_bytes').disk_bytes)} of disk, about "
        f"{duration(plan.seconds)}; result {gigabytes(plan.result.file_bytes)}, "
        f"{plan.result.bits_per_weight_linears:.2f} bits per weight in the linears, "
        f"{plan.result.bits_per_weight_file:.2f} over the file"
    )
