"""Models straight from Hugging Face transformers, with our attention and experts in place of theirs."""

from graphmode.models.errors import VersionError
from graphmode.requirements import too_old

if reason := too_old():
    raise VersionError(reason)
