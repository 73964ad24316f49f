"""The delta rule: its definition, and the backends that agree with it."""
