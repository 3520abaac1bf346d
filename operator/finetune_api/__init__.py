"""The contract: what a FineTuneJob says, what its status says, what a run reports. Imports pydantic only."""

__version__ = "0.1.0"
"""Of the whole project: an image holds sources alone, no installed distribution that could tell."""
