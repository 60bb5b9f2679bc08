//! Images: references, registries, layers.
