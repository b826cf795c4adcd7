"""A traffic simulator: people with a daily rhythm, honest machines, and attackers, with labels.

Stands in where no public data exist (credential stuffing, account takeover, object-level abuse).
"""
from sidecar.simulate.attacks import ATTACKS, Attack
from sidecar.simulate.run import Scenario, simulate

__all__ = ["ATTACKS", "Attack", "Scenario", "simulate"]
