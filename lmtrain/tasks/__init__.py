"""What networks are trained for: one module a task, each behind the interface of `base`."""
