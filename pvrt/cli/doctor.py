"""`pvrt doctor`: what is missing or mismatched on this machine."""

import json
from dataclasses import asdict

import typer

from pvrt.cli.shared import EXIT_PROBLEM, AsJson


def doctor(as_json: AsJson = False) -> None:
    """Name what is missing or mismatched here, each with the command that fixes it."""
    from pvrt.tools.doctor import examine

    findings = list(examine())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.level:8} {finding.name:14} {finding.text}")
            if finding.remedy and finding.level != "ok":
                print(f"{'':23} -> {finding.remedy}")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(EXIT_PROBLEM)
