"""Measurements, each with its own table: of the proxy under load (`outrider bench`), of the pipeline, the models, of
detection and behaviour on the measuring data."""
