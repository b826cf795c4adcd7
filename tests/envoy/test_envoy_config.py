"""The shipped envoy.yaml: valid, and saying what it must."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar import plugins
from sidecar.demo.envoy import PLUGIN_TEMPLATE, TEMPLATE, EnvoyPlan, arguments, filters, render, write_config

SHIPPED = Path(__file__).resolve().parents[2] / "envoy" / "envoy.yaml"


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    return config


def validate(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments(config, validate=True), capture_output=True, text=True, timeout=60, check=False
    )


def test_envoy_accepts_the_shipped_file(envoy_binary: Path) -> None:
    done = validate(SHIPPED)
    assert done.returncode == 0, done.stderr
    assert "OK" in done.stdout
    assert "deprecated" not in done.stderr.lower()


def test_envoy_refuses_a_broken_one(envoy_binary: Path, shipped: dict[str, Any], tmp_path: Path) -> None:
    filters(shipped)["envoy.filters.http.ext_proc"]["failure_mode_alow"] = True
    done = validate(write_config(_plan(tmp_path), tmp_path / "broken.json", shipped))
    del filters(shipped)["envoy.filters.http.ext_proc"]["failure_mode_alow"]
    assert done.returncode != 0


def _plan(folder: Path) -> EnvoyPlan:
    return EnvoyPlan(10000, 9903, 8080, folder / "s.sock", folder / "access.log")


def test_envoy_accepts_what_the_demo_makes_of_it(envoy_binary: Path, tmp_path: Path) -> None:
    done = validate(write_config(_plan(tmp_path), tmp_path / "envoy.json"))
    assert done.returncode == 0, done.stderr


def test_the_demo_changes_addresses_and_little_else(shipped: dict[str, Any], tmp_path: Path) -> None:
    assert TEMPLATE.resolve() == SHIPPED
    mine = filters(render(_plan(tmp_path)))
    theirs = filters(shipped)
    assert mine["envoy.filters.http.header_mutation"] == theirs["envoy.filters.http.header_mutation"]
    changed = {"message_timeout", "max_message_timeout"}
    for name, value in theirs["envoy.filters.http.ext_proc"].items():
        if name not in changed:
            assert mine["envoy.filters.http.ext_proc"][name] == value


def test_what_protects_is_on(shipped: dict[str, Any]) -> None:
    found = filters(shipped)
    hcm, ext_proc = found["hcm"], found["envoy.filters.http.ext_proc"]
    names = [f["name"] for f in hcm["http_filters"]]
    assert names.index("envoy.filters.http.header_mutation") < names.index("envoy.filters.http.ext_proc")
    assert names[-1] == "envoy.filters.http.router"
    assert hcm["use_remote_address"] is True
    assert hcm["xff_num_trusted_hops"] == 0
    assert hcm["normalize_path"] is True
    assert ext_proc["processing_mode"]["request_body_mode"] == "NONE"
    assert ext_proc["processing_mode"]["response_header_mode"] == "SEND"
    assert ext_proc["allow_mode_override"] is True
    assert ext_proc["mutation_rules"]["disallow_all"] is True
    allowed = re.compile(ext_proc["mutation_rules"]["allow_expression"]["regex"])
    assert allowed.fullmatch("x-outrider-score")
    assert allowed.fullmatch("retry-after")
    for never in ("authorization", "host", ":path", "x-forwarded-for", "cookie"):
        assert not allowed.fullmatch(never)


def test_every_timeout_and_limit_is_stated(shipped: dict[str, Any]) -> None:
    hcm = filters(shipped)["hcm"]
    for name in ("request_headers_timeout", "stream_idle_timeout", "max_request_headers_kb"):
        assert name in hcm
    for cluster in shipped["static_resources"]["clusters"]:
        assert cluster["circuit_breakers"]["thresholds"]
        assert cluster["connect_timeout"]


def test_the_modules_configuration_differs_by_the_filter_only(tmp_path: Path) -> None:
    """envoy-plugin.yaml is envoy.yaml with the module in the place of ext_proc and what belongs to it."""
    asked = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    inside = yaml.safe_load(PLUGIN_TEMPLATE.read_text(encoding="utf-8"))
    for config in (asked, inside):
        hcm = filters(config)["hcm"]
        others = [f for f in hcm["http_filters"] if f["name"].endswith("router")]
        gone = [f["name"].rpartition(".")[2] for f in hcm["http_filters"] if f not in others]
        assert gone == (["header_mutation", "ext_proc"] if config is asked else ["outrider"])
        hcm["http_filters"] = others
        hcm["access_log"][0]["typed_config"]["log_format"]["json_format"].pop("ext_proc", None)
        resources = config["static_resources"]
        resources["clusters"] = [cluster for cluster in resources["clusters"] if cluster["name"] != "outrider"]
    assert asked == inside


def test_envoy_takes_the_modules_configuration_as_shipped(envoy_binary: Path) -> None:
    try:
        library = plugins.build("envoy")
    except plugins.PluginError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [str(envoy_binary), "--mode", "validate", "-c", str(PLUGIN_TEMPLATE)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "ENVOY_DYNAMIC_MODULES_SEARCH_PATH": str(library.parent)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
