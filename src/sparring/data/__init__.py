"""From data files to token ids: reading, row formats, rendering, and the tables that store the result."""
