"""The KV cache of the engine: its pages, and the tiers below the device."""
