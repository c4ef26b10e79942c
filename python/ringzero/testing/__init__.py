"""For tests that want a guest: `ringzero.testing.plugin` is what pytest loads by itself where ringzero is installed."""
