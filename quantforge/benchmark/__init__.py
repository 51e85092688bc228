"""How fast models read prompts and write: samples taken in turn in one process, and a report of their medians."""
