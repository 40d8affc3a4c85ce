# `make demo` shows what this does, `make test` shows that it works; each makes the environments that it needs.
PYTHON ?= python3
ENGINES = $$($(PYTHON) tools/environment.py engines)

.PHONY: test test-fast wheel network-tools

# Everything: without SGLang, on two managers of three stock releases, on real servers. About 15 minutes, the
# first time plus the downloads.
test: network-tools
	$(PYTHON) tools/environment.py sglang-0.5.10.post1
	$(PYTHON) tools/environment.py sglang-0.5.12.post1
	$(PYTHON) tools/environment.py sglang-0.5.23
	$(ENGINES) -m pytest test

# What needs no SGLang.
test-fast: network-tools
	$(ENGINES) -m pytest -n 6 test/unit test/faults/test_recovery.py

wheel:
	$(ENGINES) -m build --wheel --no-isolation .

# Tests that drop and reject packets do so in network namespaces of their own; without these they are skipped, aloud.
network-tools:
	@command -v iptables > /dev/null || { [ "$$(id -u)" != 0 ] || { apt-get update -q && apt-get install -y -q iptables iproute2; } > /dev/null; }

include demo/demo.mk
