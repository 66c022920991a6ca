"""Which room of a package may use which: the graph of ARCHITECTURE.md, drawn from the imports."""

from functools import cache
from graphlib import TopologicalSorter
from itertools import pairwise

import pytest

from tests.fixtures.imports import PACKAGES, arrows, package, reached, room, rooms, uses

#: Lines of rooms, the used ones first: every room may use all that lie before its arrow, and what
#: these may use. Rooms between commas do not know each other.
ARROWS = {
    "pvrt_kernels": """
        reference <- dispatch <- packed <- cpu, gpu <- ops <- grouped <- __init__
    """,
    "pvrt": """
        errors, kv_cache, memory <- format <- modules <- hf, vllm_plugin
        lock, format <- tools
        errors <- versions <- tools, hf, vllm_plugin, __init__
        errors <- device <- tools
        errors <- instruction_set <- cli
        modules <- hf <- tools
        version, progress, tools <- api <- __init__
        vllm_plugin, __init__ <- cli <- __main__
    """,
    "pvrt_tune": """
        parallel <- randomness <- calibrate
        progress <- settings, data, machine, parallel
        time_limit <- plan
        shapes <- data <- model_blocks
        settings, lock, journal <- store <- run
        settings, data, model_blocks, machine, parallel <- run, fit
        settings, model_blocks <- original <- distil
        model_blocks <- model_calls <- calibrate
        parallel, randomness, fit <- pv
        run, fit, pv <- calibrate
        run, side_files <- write_checkpoint
        data <- model_card <- pipeline
        store, parallel <- shards <- distil
        calibrate, write_checkpoint <- distil, allocate <- plan <- pipeline <- __init__
    """,
    "pvrt_server": """
        errors, options, templates, notices <- opened <- capacity <- backend <- engine <- api
        templates, opened <- web <- api
        api <- vllm
        vllm, snippets, self_test <- launch <- __init__
    """,
}


@cache
def allowed(name: str) -> dict[str, set[str]]:
    """Per room all rooms that it may use. Raises CycleError for arrows that go round."""
    direct: dict[str, set[str]] = {}
    for line in filter(None, map(str.strip, ARROWS[name].splitlines())):
        tiers = [[part.strip() for part in tier.split(",")] for tier in line.split("<-")]
        for tier in tiers:
            for user in tier:
                direct.setdefault(user, set())
        for below, tier in pairwise(tiers):
            for user in tier:
                direct[user] |= set(below)
    found: dict[str, set[str]] = {}
    for user in TopologicalSorter(direct).static_order():
        found[user] = direct[user].union(*(found[below] for below in direct[user]))
    return found


@pytest.mark.parametrize("name", PACKAGES)
def test_every_room_has_its_place(name: str) -> None:
    assert rooms(name) == allowed(name).keys()


@pytest.mark.parametrize("name", PACKAGES)
def test_arrows_point_down(name: str) -> None:
    up = {
        (module, below)
        for (user, below), modules in arrows(name).items()
        for module in modules
        if below not in allowed(name)[user]
    }
    assert not up


def test_no_modules_import_in_a_circle() -> None:
    used: dict[str, set[str]] = {}
    for use in uses():
        used.setdefault(use.user.removesuffix(".__init__"), set()).add(use.used)
    circles = {module for module in used if module in reached(used, module)}
    assert not circles


def test_only_the_api_and_the_command_line_look_up_and_only_when_they_run() -> None:
    for use in uses():
        if package(use.user) == "pvrt" and package(use.used) in ("pvrt_tune", "pvrt_server"):
            assert room(use.user) in ("api", "cli"), use
            assert use.lazily, use
