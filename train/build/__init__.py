"""Documents into chat rows: read, split at structure, ask and answer, check, split by document."""
