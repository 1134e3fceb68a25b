"""Is the adapter applied, alone and beside others? Golden replies replayed through the endpoint."""
