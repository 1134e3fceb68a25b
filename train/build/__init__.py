"""Documents into rows: read, split at structure, ask and answer, check, split without leaks."""
