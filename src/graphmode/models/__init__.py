"""Models straight from Hugging Face transformers, with our attention and experts in place of theirs."""

from graphmode.errors import VersionError
from graphmode.requirements import too_old, warn_of_untested_versions

if reason := too_old():
    raise VersionError(reason)
warn_of_untested_versions()
