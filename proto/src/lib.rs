//! CRI v1 and the keeper protocol, with the code generated from them.
