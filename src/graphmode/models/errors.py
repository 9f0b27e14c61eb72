"""What loading a model raises."""

from graphmode.graph.errors import GraphModeError


class ModelError(GraphModeError, ValueError):
    """A model that cannot be read, or that graphmode cannot run. The message names the file and what to do."""


class VersionError(GraphModeError, ImportError):
    """A package is older than graphmode needs. The message names it, and the command that installs another."""
