"""Deciding on recorded requests: one by one (score) or through time, per client (replay)."""
from sidecar.replay.decide import Decided, Decider, open_offline
from sidecar.replay.order import in_time
from sidecar.replay.summary import REFUSALS, Summary

__all__ = ["REFUSALS", "Decided", "Decider", "Summary", "in_time", "open_offline"]
