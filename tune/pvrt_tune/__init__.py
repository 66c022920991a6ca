"""From a dense model to a PV-tuned AQLM checkpoint."""

from pvrt.versions import require_tested_versions

require_tested_versions()  # first: modules below import what older packages lack
