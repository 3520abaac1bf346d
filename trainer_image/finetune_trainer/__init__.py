"""Tune, evaluate and publish one language model: the stages of a FineTuneJob, on a laptop or in a pod."""
