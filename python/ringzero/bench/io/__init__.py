"""The measurements of I/O virtualization, one a module: `ringzero bench io`."""
