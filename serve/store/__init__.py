"""What the fine-tuning service remembers: files, jobs and all that belongs to them, in SQLite or PostgreSQL."""
