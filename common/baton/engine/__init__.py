"""Continuous batching: scheduler, model runner, sampler and the step loop of a worker."""
