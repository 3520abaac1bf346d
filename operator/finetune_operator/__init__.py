"""The operator: turns FineTuneJobs into checked, trained, evaluated and published models."""
