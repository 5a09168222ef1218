"""The CVFM operation: crop, resize, fuse."""
