"""Number formats, one small file each: what a weight becomes, and the bits it is stored as."""
