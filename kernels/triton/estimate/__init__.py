"""Estimation of sparse indexes: the passes over the probes' scores."""
