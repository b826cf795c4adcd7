"""The tour: a demo API, a real Envoy and the sidecar, started together on loopback."""
