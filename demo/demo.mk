# The demos; SGLANG_VERSION=0.5.12.post1 make demo takes another release of SGLang.

.PHONY: demo demo-quick demo-router
demo: ## real SGLang servers on the CPU: a blacklisted session heals, and does not without the feature
	@$(PYTHON) -m demo.full

demo-quick: ## the same on bare Mooncake engines, without SGLang or torch
	@$(PYTHON) -m demo.quick

demo-router: network-tools ## streaming clients behind SGLang's stock router, with the feature and without; QUICK=--quick: shorter
	@$(PYTHON) -m router.story $(QUICK)
