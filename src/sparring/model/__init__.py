"""Models: loading, adapters, packing, attention, log-probs."""
