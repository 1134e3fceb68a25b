"""vLLM as a process: its flags by version, its guard, its start seen through its log, what it may leave behind."""
