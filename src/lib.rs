//! Slipway: the daemon and the command line.
