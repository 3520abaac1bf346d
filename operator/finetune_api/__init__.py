"""The contract: what a FineTuneJob says, what its status says, what a run reports. Imports pydantic only."""
