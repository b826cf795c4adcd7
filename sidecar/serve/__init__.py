"""`outrider serve`: the process that Envoy asks."""
