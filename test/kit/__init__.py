"""What tests, bench and tools share: nodes, processes, networks, peers and engines that misbehave, releases."""
