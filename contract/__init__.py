"""What every room knows without importing another: the records of formats, dialects, targets, devices and bundles."""
