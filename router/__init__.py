"""What do clients lose behind a router, with which of its flags? `make router`, `make demo-router`."""
