"""Fine-tuning of InternVL chat models."""

import logging

from internvl.versions import is_command, require_supported_versions

__version__ = "0.1.0"

# PEFT imports bitsandbytes where it is installed, and bitsandbytes 0.50 warns while it is imported that a package of
# kernels from the hub, which nothing here needs, is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if not is_command():
    require_supported_versions()
