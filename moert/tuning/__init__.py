"""Which strategy and tiles each bucket runs: looked up in records, else measured, else the heuristic."""
