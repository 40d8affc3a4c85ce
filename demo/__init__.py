"""What does the package do for an operator? Two demos that show it: `make demo` and `make demo-quick`."""
