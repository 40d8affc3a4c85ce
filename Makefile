# `make demo` shows what this does, `make test` shows that it works; each makes the environments that it needs.
PYTHON ?= python3
ENGINES = $$($(PYTHON) tools/environment.py engines)
# Where it is set, as in many images, hundreds of test processes compile anew what they import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: test test-fast faults soak rdma router mechanisms matrix matrix-mooncake newest bench wheel dist network-tools

# Everything: without SGLang, on two managers of five stock releases, on real servers. About 16 minutes, the first time
# plus the downloads. Much of it is waiting, so what comes last runs three at a time.
test: network-tools
	for release in 0.4.10.post2 0.5.2 0.5.8.post1 0.5.12.post1 0.5.23; do \
	  $(PYTHON) tools/environment.py sglang-$$release || exit 1; done
	$(ENGINES) -m pytest -n 2 test/unit
	$(ENGINES) -m pytest -n 8 test/faults
	$(ENGINES) -m pytest test/rdma
	$(ENGINES) -m pytest test/stock > .stock.log 2>&1 & stock=$$!; \
	$(ENGINES) -m pytest test/servers test/deploy test/docs > .servers.log 2>&1 & servers=$$!; \
	  $(ENGINES) -m pytest test/activation test/commands; others=$$?; \
	  wait $$stock; stock=$$?; wait $$servers; servers=$$?; \
	  cat .stock.log .servers.log; exit $$((stock + servers + others))

# Without SGLang and without what takes long (marked slow); one story on real engines. 35 seconds.
STORY = test/faults/test_recovery.py::test_a_stopped_decode_node_is_used_again_soon_after_it_goes_on
test-fast:
	$(ENGINES) -m pytest -n 4 -m "not slow" $(STORY) test/unit

# Every fault in full size, and the table of docs/faults.md: 200 exits, 50,000 probes, a minute of many threads.
# RUNS=5 injects each of them five times.
RUNS ?= 1
ALONE = test/faults/test_threads.py test/faults/test_leaks.py
faults: network-tools
	rm -f .faults.jsonl
	for run in $$(seq $(RUNS)); do FAULTS_EXITS=200 FAULT_REPORT=$(CURDIR)/.faults.jsonl \
	  $(ENGINES) -m pytest -n 6 $(ALONE:%=--ignore %) test/faults || exit 1; done
	FAULTS_PROBES=50000 FAULTS_STRESS_S=60 $(ENGINES) -m pytest -s --timeout 1200 $(ALONE)
	$(PYTHON) tools/fault_table.py .faults.jsonl

# Random faults of eight decode nodes over TCP, several at a time, with transfers under way; prints when each was used
# again. 20 minutes. SEED=2: other faults.
SEED ?= 1
soak: network-tools
	$(ENGINES) tools/soak.py 20 $(SEED)

# Faults over RDMA between emulated machines, and the table of docs/rdma.md. An hour and twenty minutes. RUNS=5 as
# above; RDMA_LOGS=FOLDER keeps what was logged in each.
rdma:
	rm -f .rdma.jsonl
	for run in $$(seq $(RUNS)); do RDMA_REPORT=$(CURDIR)/.rdma.jsonl $(ENGINES) -m pytest test/rdma || failed=1; done; \
	  $(PYTHON) tools/rdma_table.py docs/rdma.md .rdma.jsonl && exit $$failed

# What clients lose behind SGLang's stock router, with its defaults and with the flags of docs/operations.md, and the table
# of docs/router.md. Real servers on the CPU; about 45 minutes, the first time plus the downloads. CELLS=--quick: a few of
# them in 5 minutes; CELLS=--round=2: a part of them; either leaves the page as it is.
CELLS ?=
router: network-tools
	rm -f .router.jsonl
	$(PYTHON) -m router $(CELLS) .router.jsonl; failed=$$?; \
	  $(PYTHON) tools/router_table.py $(if $(CELLS),,docs/router.md) .router.jsonl && exit $$failed

# Two managers of each stock release, one release after another, and the table of docs/matrix.md. About 45 minutes and
# 8 GB, the first time plus the downloads. SGLANG=0.5.8.post1: that row alone.
SGLANG ?= 0.4.7.post1 0.4.8.post1 0.4.9.post6 0.4.10.post2 0.5.1.post3 0.5.2 0.5.3.post3 0.5.4.post3 0.5.5.post3 \
  0.5.6.post2 0.5.7 0.5.8.post1 0.5.9 0.5.10.post1 0.5.11 0.5.12.post1 0.5.13.post1 0.5.14 0.5.15.post1 0.5.16 0.5.17 \
  0.5.18 0.5.19 0.5.20 0.5.21 0.5.22 0.5.23
matrix:
	rm -rf .matrix && mkdir .matrix
	for release in $(SGLANG); do $(PYTHON) tools/environment.py sglang-$$release || exit 1; \
	  SGLANG_RELEASES=$$release $(ENGINES) -m pytest -m every_release --junitxml .matrix/$$release.xml test/activation test/stock \
	  || touch .matrix/failed; done
	$(PYTHON) tools/matrix_table.py docs/matrix.md .matrix/*.xml
	@test ! -e .matrix/failed

# The newest SGLang and Mooncake that the registry has, for a job that runs every day: reads the patch points, plays the
# story, and says which patch point is gone. It looks at all wheels of Mooncake, whatever GPU they are for. Two minutes,
# the first time plus the downloads.
newest:
	$(PYTHON) tools/newest.py

# Six versions of Mooncake on the prefill node against the same six on the decode node, and the table of
# docs/mooncake.md; then the faults on the newest of them. About 10 minutes and 500 MB, the first time plus the downloads.
matrix-mooncake: network-tools
	rm -f .mooncake.jsonl
	for version in 0.3.9 0.3.10.post2 0.3.11 0.3.12 0.3.14; do \
	  $(PYTHON) tools/environment.py sglang-0.5.23+$$version || exit 1; done
	MOONCAKE_REPORT=$(CURDIR)/.mooncake.jsonl $(ENGINES) -m pytest test/mooncake_versions; failed=$$?; \
	  $(PYTHON) tools/mooncake_table.py docs/mooncake.md .mooncake.jsonl && exit $$failed
	$$($(PYTHON) tools/environment.py engines+0.3.14) -m pytest -n 6 $(ALONE:%=--ignore %) test/faults

# Breaks each mechanism in a copy of the tree and says which test sees it. About an hour.
mechanisms:
	$(ENGINES) tools/break_mechanisms.py

# What it is worth, beside what it replaces: tables, bench/results/*.json and docs/plots/*.png. Under half an hour, the
# first time plus the downloads. CASE=lag, lost, hot-path, chunks, watching or fleet: that alone; CASE=--quick: a
# rehearsal.
CASE ?=
bench: network-tools
	$$($(PYTHON) tools/environment.py bench) -m bench $(CASE)

wheel:
	$(ENGINES) -m build --wheel --no-isolation .

# What is released: an sdist and a wheel made from it, each checked and installed into an empty environment.
DIST ?= dist
dist:
	rm -f $(DIST)/sglang_failed_session_probe-*
	$$($(PYTHON) tools/environment.py dist) -m build --no-isolation --outdir $(DIST) .
	$$($(PYTHON) tools/environment.py dist) -m twine check --strict $(DIST)/sglang_failed_session_probe-*
	$$($(PYTHON) tools/environment.py dist) tools/check_packages.py $(DIST)

# Tests that drop and reject packets do so in network namespaces of their own; without these they are skipped, aloud.
network-tools:
	@command -v iptables > /dev/null || { [ "$$(id -u)" != 0 ] || { apt-get update -q && apt-get install -y -q iptables iproute2; } > /dev/null; }

include demo/demo.mk
