//! Pod networking: CNI, network namespaces, DNS files.
