"""`lockstep init`: a task of the user's own, from a template."""
