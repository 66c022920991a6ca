"""The range of vLLM's versions that pvrt serves on."""

import pytest

from pvrt.errors import ServeError
from pvrt.vllm_plugin.versions import require_supported_vllm


@pytest.mark.parametrize("version", ["0.29.2", "0.26.0+cpu", "0.9.1"])
def test_a_vllm_that_is_too_old_is_refused(version: str) -> None:
    with pytest.raises(ServeError, match=rf"0\.30 to 0\.33, found {version[:4]}.*>=0.30,<0.34'"):
        require_supported_vllm(version)


@pytest.mark.parametrize("version", ["0.34.0", "1.0", "0.40.0.dev3+g0"])
def test_an_untested_newer_vllm_is_refused_unless_asked_for(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServeError, match=r"0\.30 to 0\.33, found .* or PVRT_ANY_VLLM=1"):
        require_supported_vllm(version)
    monkeypatch.setenv("PVRT_ANY_VLLM", "1")
    require_supported_vllm(version)


@pytest.mark.parametrize(
    "version", ["0.30.0", "0.32.0+cpu", "0.33.1rc1.dev3+g0", "dev", "0.1.dev7+g1"]
)
def test_tested_and_unnumbered_versions_pass(version: str) -> None:
    require_supported_vllm(version)
