"""kvatlas inside vLLM's offloading connector."""
