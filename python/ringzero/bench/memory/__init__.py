"""The measurements of memory virtualization, one a module: `ringzero bench memory` (docs/memory-benchmarks.md)."""
