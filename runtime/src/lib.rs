//! Zygote, keeper and creator: how Slipway makes containers.
