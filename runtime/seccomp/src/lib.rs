//! Seccomp: the RuntimeDefault profile, and OCI profiles compiled to BPF.
