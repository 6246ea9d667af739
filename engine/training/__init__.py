"""The trainer, what goes before its first step, and what guards, speeds up and records its steps."""
