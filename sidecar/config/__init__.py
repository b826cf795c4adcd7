"""Configuration: a YAML file into typed, frozen Settings, or every problem in it at once."""

from sidecar.config.load import load, loads
from sidecar.config.problems import ConfigError, Problem
from sidecar.config.settings import EffectiveRoute, Settings

__all__ = ["ConfigError", "EffectiveRoute", "Problem", "Settings", "load", "loads"]
