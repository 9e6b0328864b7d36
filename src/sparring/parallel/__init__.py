"""Processes and devices: how ranks train, start, talk and end."""
