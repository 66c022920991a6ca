"""What is written beside a finished checkpoint: the report and the model card."""

import logging
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from pvrt.api.arguments import as_command
from pvrt.api.compare import CONTEXT, WINDOWS, compared, write_report
from pvrt.api.lines import Tell
from pvrt.progress import RESULT, Event

if TYPE_CHECKING:
    from pvrt.tools.compare import Comparison
    from pvrt_tune.settings import TuneJob

_log = logging.getLogger("pvrt")


def describe(job: "TuneJob", command: str, tell: Tell) -> None:
    """Write report and model card beside a checkpoint, if they are not there already.

    command: the one that made it. The checkpoint is complete, so that nothing that fails here is
    more than a warning.
    """
    from pvrt_tune.model_card import CARD_FILE, REPORT_FILE

    if all((job.out / name).exists() for name in (CARD_FILE, REPORT_FILE)):
        return
    tell("comparing it with the original (--no-report leaves this out)")
    started = time.monotonic()
    try:
        _write(job, command, tell)
    except Exception as error:  # whatever it is, hours of work are safe on the disk
        again = as_command("compare", job.model, job.out, html="FILE")
        _log.warning("the checkpoint is complete, its report is not: %s. Again: %s", error, again)
        return
    tell(f"{REPORT_FILE} and {CARD_FILE} took {time.monotonic() - started:.0f} s")


def _write(job: "TuneJob", command: str, tell: Tell) -> None:
    """Model card, report, and the card once more with the report's figures."""
    from pvrt.api.opening import Opener
    from pvrt.format.atomic import replace
    from pvrt.format.grid import open_checkpoint
    from pvrt.tools.compare_text import as_text
    from pvrt.tools.held_out import HeldOut
    from pvrt_tune.data.provenance import Provenance
    from pvrt_tune.model_card import CARD_FILE, REPORT_FILE, model_card

    origin = Provenance.of(job.model)

    def write_card(found: "Comparison | None") -> None:
        card = model_card(open_checkpoint(job.out), origin, command, found)
        replace(job.out / CARD_FILE, card.encode())

    write_card(None)
    opener = Opener.of(job.device, "auto", tell)
    # No text of a run, and the same for all of them.
    text = HeldOut.read(None, None, CONTEXT, WINDOWS)
    found = compared(opener.original(job.model), [opener.folder(job.out)], text, tell)
    write_report(job.out / REPORT_FILE, found, f"Made by {command}, measured")
    tell(Event(as_text(found, questions=1), RESULT, **asdict(found)))
    write_card(found)
