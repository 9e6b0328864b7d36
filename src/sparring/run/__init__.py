"""The run directory: manifests, iterations, results, trackers, mirror."""
