//! CRI pod and container configurations, checked and translated to the OCI runtime specification.
